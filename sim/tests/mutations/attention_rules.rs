//! The bugs planted into the attention kernels: barriers, waits and commits dropped or weakened, stages released early,
//! masks, bounds and indices off by one or swapped, sources and factors mixed up.

use segattn_sim::mutate::{Rule, drop_statement, replace};

use super::gradient_rules::{
    GRADIENTS, KEY_GRAD, KEY_GRAD_HOPPER, PREPARE, QUERY_GRAD, QUERY_GRAD_HOPPER,
};
use super::shared_rules::{
    PIPELINE, PRODUCTS, RING, SOFTMAX, TILE, VISIBILITY, WARP_SPECIALIZATION, WARPGROUPS,
    WORK_TILES,
};

/// A file of `kernels/` and what is done to it.
pub struct Target {
    pub file: &'static str,
    /// The element type and head size of the instances that run: the smallest that the rules need.
    pub instance: &'static str,
    /// Whether Hopper's prefill runs, and it alone.
    pub hopper_prefill: bool,
    pub rules: &'static [Rule],
}

pub static TARGETS: [Target; 18] = [
    Target {
        file: "attention_forward.cu",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &FORWARD,
    },
    Target {
        file: "attention_decode.cu",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &DECODE,
    },
    Target {
        file: "attention_rows.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &ROWS,
    },
    Target {
        file: "attention_prepare.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &PREPARE,
    },
    Target {
        file: "query_grad.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &QUERY_GRAD,
    },
    Target {
        file: "key_grad.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &KEY_GRAD,
    },
    Target {
        file: "attention_gradients.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &GRADIENTS,
    },
    Target {
        file: "query_grad_hopper.cuh",
        instance: "bf16_d64",
        hopper_prefill: false,
        rules: &QUERY_GRAD_HOPPER,
    },
    Target {
        file: "key_grad_hopper.cuh",
        instance: "bf16_d64",
        hopper_prefill: false,
        rules: &KEY_GRAD_HOPPER,
    },
    Target {
        file: "warp_specialization.cuh",
        instance: "bf16_d64",
        hopper_prefill: false,
        rules: &WARP_SPECIALIZATION,
    },
    Target {
        file: "ring.cuh",
        instance: "bf16_d64",
        hopper_prefill: false,
        rules: &RING,
    },
    Target {
        file: "warpgroups.cuh",
        instance: "bf16_d64",
        hopper_prefill: false,
        rules: &WARPGROUPS,
    },
    Target {
        file: "work_tiles.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &WORK_TILES,
    },
    Target {
        file: "visibility.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &VISIBILITY,
    },
    Target {
        file: "softmax.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &SOFTMAX,
    },
    Target {
        file: "pipeline.cuh",
        instance: "bf16_d32",
        hopper_prefill: false,
        rules: &PIPELINE,
    },
    Target {
        file: "products.cuh",
        instance: "bf16_d96",
        hopper_prefill: false,
        rules: &PRODUCTS,
    },
    Target {
        file: "tile.cuh",
        instance: "bf16_d96",
        hopper_prefill: false,
        rules: &TILE,
    },
];

/// Rules with a mutant that is known to survive: file, text, and why.
pub const SURVIVORS: [[&str; 3]; 27] = [
    [
        "attention_forward_hopper.cu",
        "p.mapped >> kQueryMap & 1 &&",
        "no problem has queries without a tensor map: outputs lie as queries do, and theirs may not share heads",
    ],
    [
        "attention_forward_hopper.cu",
        "first + 64 <= work.query_rows",
        "rows of a copy beyond the last query are padding, whose results are not stored",
    ],
    [
        "ring.cuh",
        "cp_async_wait<",
        "of `arrive`: the forward's producers arrive once a warp; caught in the gradients",
    ],
    [
        "ring.cuh",
        "fence_proxy_async_shared()",
        "of `arrive`: the forward's producers arrive once a warp; caught in the gradients",
    ],
    [
        "ring.cuh",
        "mbarrier_arrive(&full",
        "of `arrive`: the forward's producers arrive once a warp; caught in the gradients",
    ],
    [
        "products.cuh",
        "a_row + m * 16",
        "of load_fragments: a warp has one row tile where it is called",
    ],
    [
        "tile.cuh",
        "row % 8 == 0 ? origin",
        "the threads of this instance copy a multiple of 8 rows at a time",
    ],
    [
        "tile.cuh",
        "row * Tile::kRowBytes + k % 64 * 2, 0, 8",
        "A begins at row 0 of its tile in the forward",
    ],
    [
        "query_grad_hopper.cuh",
        "last_query >= first_query &&",
        "a warpgroup without valid queries computes padding rows, which are not stored",
    ],
    [
        "query_grad_hopper.cuh",
        "min(first + group + 64, work.query_rows) - 1",
        "only a warpgroup without valid queries takes other key tiles: as above",
    ],
    [
        "query_grad_hopper.cuh",
        "shared.row_ring.release(",
        "at D 64 d_out is not in registers",
    ],
    [
        "key_grad_hopper.cuh",
        "shared.query_ring.release(",
        "no tile of queries is masked for a whole warpgroup",
    ],
    [
        "key_grad_hopper.cuh",
        "index >= work_tiles",
        "a work tile beyond the last has no rows",
    ],
    [
        "key_grad_hopper.cuh",
        "sync_consumer_warpgroup<",
        "before gradients take the place of keys: a simulated warp's product reads its own rows of them alone",
    ],
    [
        "attention_forward_hopper.cu",
        "sync_consumer_warpgroup<",
        "each warp turns the rows that its own partial of a product reads",
    ],
    [
        "query_grad_hopper.cuh",
        "wgmma_fence()",
        "some follow another since the registers were touched; ptxas wants them, and the build fails without",
    ],
    [
        "key_grad_hopper.cuh",
        "wgmma_fence()",
        "some follow another since the registers were touched; ptxas wants them, and the build fails without",
    ],
    [
        "attention_forward.cu",
        "work.split >= work.splits",
        "a KV split of no keys, whose results those of the work tile's first split replace",
    ],
    [
        "key_grad.cuh",
        "arrive_and_wait<",
        "at D 32, where k and v are not fragments in registers, the first wait of the loop is enough",
    ],
    [
        "key_grad.cuh",
        "cp_async_commit()",
        "the same: k and v join the first queries' group",
    ],
    [
        "attention_gradients.cuh",
        "longer + rest / heads",
        "no small problem has the four key tiles of which the last is put off",
    ],
    [
        "attention_gradients.cuh",
        "{head + 1, work.first_query}",
        "queries before the keys are masked: more work, the same sums",
    ],
    [
        "attention_gradients.cuh",
        "query + kQueries < work.query_rows",
        "one step more, of padding",
    ],
    [
        "attention_gradients.cuh",
        "query < query_rows ? value",
        "the partials of a padding row are zeros, and so is their sum",
    ],
    [
        "work_tiles.cuh",
        "__syncwarp()",
        "the first in store_query_rows: both callers come from a barrier of the block",
    ],
    [
        "work_tiles.cuh",
        "/ packed_heads + 1;",
        "one query less counts only where a tile's last query opens a key tile",
    ],
    [
        "softmax.cuh",
        "max == SEGATTN_NEG_INF ? 0.f : max",
        "only padding rows, which are not stored, have seen nothing by the end of a tile",
    ],
];

const FORWARD: [Rule; 30] = [
    drop_statement("__syncthreads()"),
    drop_statement("cp_async_commit()"),
    drop_statement("arrive_and_wait<"),
    replace(
        "limit(tile, rows.first_position)",
        "limit(tile, rows.last_position)",
    ),
    replace(
        "tile.first < work.keys.limit(tile, rows.last_position)",
        "tile.first + 1 < work.keys.limit(tile, rows.last_position)",
    ),
    replace(
        "kv_tile - work.first_kv_tile < C::kChunkTiles, last",
        "true, last",
    ),
    replace("last || (kv_tile + 1) % C::kChunkTiles == 0", "last"),
    drop_statement("if (!last) acc.clear()"),
    replace("work.split >= work.splits", "work.split > work.splits"),
    replace("index >= work_tiles", "index > work_tiles"),
    replace("(int64_t)blockIdx.x * (C::kRows", "(int64_t)0 * (C::kRows"),
    replace("scale < 0.f) negate", "scale < -9.f) negate"),
    replace(
        "if (thread == 0) shared.tiles[(kv_tile",
        "shared.tiles[(kv_tile",
    ),
    replace(
        "(&shared.k[stage(kv_tile)], shared.sources.k[source]",
        "(&shared.k[stage(kv_tile)], shared.sources.v[source]",
    ),
    replace(
        "(&shared.v[stage(kv_tile)], shared.sources.v[source]",
        "(&shared.k[stage(kv_tile)], shared.sources.v[source]",
    ),
    replace("at.first, at.end, opaque", "at.first, at.end + 1, opaque"),
    replace("if (masked) mask_rows", "if (false) mask_rows"),
    replace(
        "tile.source == kPast ? 1.f : 0.f",
        "tile.source == kPrior ? 1.f : 0.f",
    ),
    replace("tile.source == kPast ? 1.f : 0.f", "1.f"),
    replace(
        "tile.source == kPast ? 1.f : 0.f",
        "tile.source <= kPast ? 1.f : 0.f",
    ),
    replace("gridDim.x + atomic_add", "gridDim.x + 1 + atomic_add"),
    replace(
        "first ? blockIdx.x : gridDim.x",
        "first ? blockIdx.x : gridDim.x - 1",
    ),
    replace(
        "arrive_and_wait<C::kStages - 2>",
        "cp_async_wait<C::kStages - 2>",
    ),
    replace("kStages - 2>()", "kStages - 1>()"),
    replace(
        "arrive_and_wait<C::kStages - 2>();\n    load(kv_tile + C::kStages - 1);",
        "load(kv_tile + C::kStages - 1);\n    arrive_and_wait<C::kStages - 2>();",
    ),
    replace(
        "load(kv_tile + C::kStages - 1)",
        "load(kv_tile + C::kStages)",
    ),
    replace(
        "shared.tiles[(kv_tile + 2) % 4] =",
        "shared.tiles[(kv_tile + 1) % 4] =",
    ),
    replace(
        "kv_tile <= work.first_kv_tile + 1",
        "kv_tile < work.first_kv_tile + 1",
    ),
    replace("work.keys.gate_log2 * past", "work.keys.gate_log2"),
    replace("rows.first_row + m * 16, 1", "rows.first_row, 1"),
];

const DECODE: [Rule; 57] = [
    drop_statement("__syncthreads()"),
    drop_statement("__syncwarp()"),
    drop_statement("cp_async_commit()"),
    drop_statement("arrive_and_wait<"),
    drop_statement("cp_async_wait<"),
    replace("kInFlight = C::kStages - 2", "kInFlight = C::kStages - 1"),
    replace("cp_async_wait<kInFlight>", "cp_async_wait<kInFlight + 1>"),
    replace("place / kSteps % 2 != 0", "place / kSteps % 2 == 0"),
    replace("place / (2 * kSteps) * kSteps", "place / (2 * kSteps)"),
    replace("place % kSteps", "place % kSteps / 2"),
    replace("(values ? step : warp)", "(values ? warp : step)"),
    replace("(values ? warp : step)", "(values ? step : warp)"),
    replace("values ? index < tiles : round < tiles", "index < tiles"),
    replace(
        "index < tiles : round < tiles",
        "index < tiles : round < tiles - 1",
    ),
    replace("? tile.end - first", "? tile.end - first + 1"),
    replace("sources.v[tile.source] :", "sources.k[tile.source] :"),
    replace(
        "warp * C::kWarpRows * C::KeyTile",
        "C::kWarpRows * C::KeyTile",
    ),
    replace("keys, n * 8, i * 32", "keys, 0, i * 32"),
    replace("b[i % 2][n][k * 2 + 1]", "b[i % 2][n][k * 2]"),
    replace("q[0][i * 2 + k]", "q[0][i * 2]"),
    replace(
        "tile_max = quad_max(tile_max)",
        "tile_max = shuffle_xor(tile_max, 1)",
    ),
    replace("maxima[half * 8 + lane / 4] =", "maxima[lane / 4] ="),
    replace(
        "fma_rn(tile_max, scale, bias[half])",
        "mul_rn(tile_max, scale)",
    ),
    replace("tile < warp ?", "tile + 1 < warp ?"),
    replace("float before = max[half]", "float before = max[0]"),
    replace("row = half * 8 + lane / 4;", "row = lane / 4;"),
    replace("n = pair * 2 + i / 2", "n = pair * 2"),
    drop_statement("odd[half] +="),
    replace(
        "row_sums[warp][half][lane] = even",
        "row_sums[warp][0][lane] = even",
    ),
    replace("v, i * 32, (warp", "v, 0, (warp"),
    replace("(warp * C::kOutTiles + n) * 8", "n * 8"),
    replace("factor[e / 2]", "factor[0]"),
    replace("k % 2 * 2 + 1", "k % 2 * 2"),
    replace("max[half] = update.max", "max[half] = max[half]"),
    replace("update_row(max[half], shared", "update_row(max[0], shared"),
    replace(
        "tile.first + C::kKeys > work.keys.limit(tile, work.keys.query_start)",
        "false",
    ),
    replace("== kPast ? 1.f : 0.f", "== kPrior ? 1.f : 0.f"),
    replace("== kPast ? 1.f : 0.f", ">= kPast ? 1.f : 0.f"),
    replace("== kPast ? 1.f : 0.f", "<= kPast ? 1.f : 0.f"),
    replace(
        "shared.gate_bias[half * 8 + lane / 4]",
        "shared.gate_bias[lane / 4]",
    ),
    replace("shared.position[lane / 4 + 8]", "shared.position[lane / 4]"),
    replace("? log2_approx(gate)", "? gate"),
    replace("warp * C::kOutTiles * 8 + lane % 4 * 2", "lane % 4 * 2"),
    replace("warp == 0 ? factor[0]", "warp == 1 ? factor[0]"),
    replace("if (warp < 2) sum", "if (warp < 1) sum"),
    replace("tile < tiles; tile++", "tile + 1 < tiles; tile++"),
    replace("work.split, work.batch_index", "0, work.batch_index"),
    replace("q.query >= work.rows", "q.query > work.rows"),
    replace("q.position >= 0 ? two : 0", "two"),
    replace(
        "q.position >= 0 ? row_lse(row) : SEGATTN_NEG_INF",
        "row_lse(row)",
    ),
    drop_statement("sum = quad_sum"),
    replace("|| lane % 4 != 0", ""),
    replace("work.split >= work.splits", "work.split > work.splits"),
    replace("work.first_kv_tile + thread);", "thread);"),
    replace("at.position >= 0", "at.position >= -1"),
    replace("scale < 0.f ? 0x80008000u", "scale < 0.f ? 0x8000u"),
    replace("index % heads * p.packed_heads", "index % heads"),
];

const ROWS: [Rule; 23] = [
    drop_statement("if (query >= written_rows(p.problem, query_rows)) return"),
    drop_statement("__syncwarp()"),
    replace("n * 8 >= limit", "n * 8 > limit"),
    replace("n * 8 + 1 >= limit", "n * 8 + 1 > limit"),
    replace("lane % 4 * 2;", "lane % 4;"),
    replace("factor[e / 2]", "factor[0]"),
    replace("factor[0] != 1.f || factor[1] != 1.f", "factor[0] != 1.f"),
    replace("out[n][1], factors[0]", "out[n][1], factors[1]"),
    drop_statement("row.sum = quad_sum"),
    replace("if (thread % 4 == 0) total = row", "total = row"),
    replace("m * C::kOutTiles * C::kConsumerThreads + thread", "thread"),
    replace("* kLn2", "* 1.f"),
    replace("lane % 4 == 0 && q.query < work.rows", "lane % 4 == 0"),
    replace(
        "q.position >= 0 ? row_lse(row) : SEGATTN_NEG_INF",
        "row_lse(row)",
    ),
    replace("out[n * 4 + lane % 4]", "out[n * 4 + lane / 8]"),
    replace("0x80008000u", "0x8000u"),
    replace("first == 0) total", "first >= 0) total"),
    replace(
        "int i = 1; i < kSectionSplits",
        "int i = 2; i < kSectionSplits",
    ),
    replace("count = splits - first", "count = splits"),
    replace("splits <= 1) return", "splits <= 3) return"),
    replace("partial.state.max)", "state.max)"),
    replace(
        "probs[n / 2][n % 2 * 2 + half]",
        "probs[n / 2][half * 2 + n % 2]",
    ),
    replace("row + 8, packed_heads", "row, packed_heads"),
];
