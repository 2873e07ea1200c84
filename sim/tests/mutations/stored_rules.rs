//! The bugs planted into the passes of five products: blocks of ds that lie elsewhere, are stored, copied or read for
//! other keys and queries, and tiles for which the wrong number of products is computed.

use segattn_sim::mutate::{Rule, drop_statement, replace};

use super::attention_rules::Target;

const fn target(file: &'static str, rules: &'static [Rule]) -> Target {
    Target {
        file,
        instance: "bf16_d128",
        hopper_prefill: false,
        rules,
    }
}

pub static TARGETS: [Target; 3] = [
    target("stored_ds.cuh", &STORED),
    target("query_grad_hopper.cuh", &QUERY_GRAD),
    target("key_grad_hopper.cuh", &KEY_GRAD),
];

const STORED: [Rule; 26] = [
    replace(
        "p.d_prior_k.data ? ceil_div((int)p.d_prior_k.rows, kBlockRows) : 0",
        "0",
    ),
    replace(
        "query_tiles * (query_tiles + 1) / 2",
        "query_tiles * (query_tiles - 1) / 2",
    ),
    replace("query_tiles * ds_prior_blocks(p) +", ""),
    replace("- p.first_group * heads", ""),
    replace("batch_index * p.problem.q_heads + head", "head"),
    replace("of_launch * ds_blocks(", "0 * ds_blocks("),
    replace("+ ds_blocks(p, query / kBlockRows)", ""),
    replace("(prior ? 0 : ds_prior_blocks(p))", "0"),
    replace("+ first_key / kBlockRows", ""),
    replace("{row < keys, row + 8 < keys}", "{true, row + 8 < keys}"),
    replace("{row < keys, row + 8 < keys}", "{row < keys, row < keys}"),
    replace("there[i / 2]", "there[i % 2]"),
    replace("ds[j][i / 2 + i % 2 * 2]", "ds[j][i]"),
    replace("j * 512", "j * 256"),
    replace("+ thread / 32 * 128", ""),
    replace("+ thread % 32;", ";"),
    replace("to + (i + lane) * 16", "to + lane * 16"),
    replace("from + i + lane", "from + lane"),
    replace("i < kBlockBytes / 16", "i < kBlockBytes / 32"),
    replace("(warp * 4 + k)", "k"),
    replace("(warp * 4 + k)", "(k * 4 + warp)"),
    replace("group / 64 * kBlockBytes", "0"),
    drop_statement("wgmma_commit()"),
    drop_statement("wgmma_wait<"),
    drop_statement("shared.kv_ring.release("),
    replace("&shared.k[stage]", "&shared.k[0]"),
];

const QUERY_GRAD: [Rule; 14] = [
    replace("|| keys.past_len > keys.sinks) return", ") return"),
    replace(
        "p.d_prior_k.data ? 0 : keys.template prior_tiles<C::kKeys>()",
        "0",
    ),
    replace(
        "keys.template sink_tiles<C::kKeys>() + prior_tiles",
        "prior_tiles",
    ),
    replace(
        "max(0, buffer.work.end_kv_tile - others)",
        "buffer.work.end_kv_tile",
    ),
    replace(
        "min(max(0, buffer.work.end_kv_tile - others), buffer.kv_tiles())",
        "max(0, buffer.work.end_kv_tile - others)",
    ),
    replace("if (!sees(tile, first, last)) continue", ""),
    replace(
        "work.query_tile * C::kRows + group * 64, last",
        "work.query_tile * C::kRows, last",
    ),
    replace("tile.source == kPrior, tile.first", "false, tile.first"),
    replace("to + group * kBlockBytes", "to"),
    replace(
        "kv_tile >= work.end_kv_tile - buffer.stored_tiles",
        "kv_tile > work.end_kv_tile - buffer.stored_tiles",
    ),
    replace("!C::kStored || buffer.stored_tiles < kv_tiles", "false"),
    replace("!C::kStored || stored != first_iteration", "false"),
    replace("stored = end - buffer.stored_tiles", "stored = end"),
    replace("iterator.iteration = stored, ", ""),
];

const KEY_GRAD: [Rule; 6] = [
    replace("if (first_row < keys) store_ds", "store_ds"),
    replace("ds, first_row + row, keys", "ds, first_row + row + 8, keys"),
    replace(
        "shared.ds_block[stage] + key_block",
        "shared.ds_block[stage]",
    ),
    replace("keys = work.len - work.first", "keys = work.len"),
    replace(
        "work.prior, work.first + first_row",
        "work.prior, work.first",
    ),
    replace("at.head, at.query)", "at.head, 0)"),
];
