//! The bugs planted into the attention kernels: barriers, waits and commits dropped or weakened, stages released early,
//! masks, bounds and indices off by one or swapped, sources and factors mixed up.

use segattn_sim::mutate::{Rule, drop_statement, replace};

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
pub const SURVIVORS: [[&str; 3]; 17] = [
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
        "an work beyond the last has no rows",
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
        "an work of no keys, whose results those of the tile's first work replace",
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
        "queries before the keys are masked_score: more work, the same sums",
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

const DECODE: [Rule; 43] = [
    drop_statement("__syncthreads()"),
    drop_statement("cp_async_commit()"),
    drop_statement("arrive_and_wait<"),
    replace("kInFlight = C::kStages - 2", "kInFlight = C::kStages - 1"),
    replace("2 * kv_tile + C::kStages - 1)", "2 * kv_tile + C::kStages)"),
    replace("iteration % 2 == 0 ?", "iteration % 2 == 1 ?"),
    replace("shared.tiles[iteration / 2]", "shared.tiles[iteration / 4]"),
    replace("(warp * C::kOwnColTiles + n) * 8", "n * 8"),
    replace("(warp * C::kOutTiles + n) * 8", "n * 8"),
    replace("n = warp * C::kOwnColTiles + i;", "n = i;"),
    replace("i % 2 * 2 + 1", "i % 2 * 2"),
    replace("k % 2 * 2 + 1", "k % 2 * 2"),
    replace(
        "own_max = quad_max(own_max)",
        "own_max = shuffle_xor(own_max, 1)",
    ),
    replace(
        "warp_max[half * 8 + lane / 4][warp]",
        "warp_max[lane / 4][warp]",
    ),
    replace("max_f32(maxima.z, maxima.w)", "maxima.z"),
    replace(
        "shared.warp_max[half * 8 + lane / 4];",
        "shared.warp_max[lane / 4];",
    ),
    replace("[lane][n % 2]", "[lane][0]"),
    replace("update[e / 2]", "update[0]"),
    replace("max[half] = update[half].max", "max[half] = max[half]"),
    drop_statement("odd += two"),
    replace(
        "tile.first + C::kKeys > work.keys.limit(tile, work.keys.query_start)",
        "false",
    ),
    replace(
        "tile, warp * C::kOwnColTiles * 8, position",
        "tile, 0, position",
    ),
    replace("== kPast ? 1.f : 0.f", "== kPrior ? 1.f : 0.f"),
    replace("== kPast ? 1.f : 0.f", ">= kPast ? 1.f : 0.f"),
    replace("== kPast ? 1.f : 0.f", "<= kPast ? 1.f : 0.f"),
    replace("mul_rn(gate_bias[1], past)", "mul_rn(gate_bias[0], past)"),
    replace("lane / 4 + 8, packed_heads", "lane / 4, packed_heads"),
    replace("? log2_approx(gate)", "? gate"),
    replace("warp * C::kOutTiles * 8 + lane % 4 * 2", "lane % 4 * 2"),
    replace("warp == 0 ? factor[0]", "warp == 1 ? factor[0]"),
    replace("if (warp < 2) sum_row", "if (warp < 1) sum_row"),
    replace("work.split, work.batch_index", "0, work.batch_index"),
    replace("q.query >= p.problem.q.rows", "q.query > p.problem.q.rows"),
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
    replace("ring.stage(2 * kv_tile + 1)", "ring.stage(2 * kv_tile)"),
    replace("index % heads * p.packed_heads", "index % heads"),
];

const ROWS: [Rule; 22] = [
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
    replace(
        "lane % 4 == 0 && q.query < p.problem.q.rows",
        "lane % 4 == 0",
    ),
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

const PREPARE: [Rule; 7] = [
    drop_statement("if (p.d_lse) delta"),
    replace("p.lse[row] * kLog2E", "p.lse[row]"),
    drop_statement("delta += shuffle_xor"),
    replace("query < rows)", "query <= rows)"),
    replace("if (chunk != 0) continue", ";"),
    replace("R::kLanes / 2; mask", "R::kLanes / 4; mask"),
    replace(
        "(x[i] >> 16), T{}), widen((uint16_t)(y[i] >> 16)",
        "(x[i] >> 16), T{}), widen((uint16_t)y[i]",
    ),
];

const QUERY_GRAD: [Rule; 22] = [
    drop_statement("__syncthreads()"),
    drop_statement("arrive_and_wait<"),
    drop_statement("cp_async_wait<"),
    drop_statement("cp_async_commit()"),
    replace("dp[m][n][half * 2 + e] - delta", "dp[m][n][half * 2 + e]"),
    replace("- tile.first - lane % 4 * 2", "- lane % 4 * 2"),
    replace("work.splits == 1", "true"),
    drop_statement("if (q.query >= p.problem.q.rows) continue"),
    replace("d_q[m][n][e] *= p.problem.scale", "d_q[m][n][e] *= 1.f"),
    replace(
        "tile.first >= work.keys.limit(tile, last_query)",
        "tile.first + 1 >= work.keys.limit(tile, last_query)",
    ),
    replace(
        "arrive_and_wait<0>();\n    load_key_stage(shared, kv_tile + 1, thread);",
        "load_key_stage(shared, kv_tile + 1, thread);\n    arrive_and_wait<0>();",
    ),
    replace("n * 8 + e >= limit", "n * 8 + e > limit"),
    replace("scale < 0.f ? INFINITY : -INFINITY", "-INFINITY"),
    replace("past ? work.keys.gate_log2 : 0.f", "work.keys.gate_log2"),
    replace("past = tile.source == kPast", "past = tile.source <= kPast"),
    replace("past ? kPastGrad : kOtherGrad", "kPastGrad"),
    replace(
        "row_sums(m), kPastWeight, s[m]",
        "row_sums(m), kPastWeight, dp[m]",
    ),
    replace(
        "shared.gate_sums + (first_row + m * 16)",
        "shared.gate_sums + first_row",
    ),
    drop_statement("clear_row_sums("),
    replace(
        "tile.first + C::kKeys > work.keys.limit(tile, shared.first_query[warp])",
        "false",
    ),
    replace(
        "shared.tiles[(kv_tile + 2) & 3]",
        "shared.tiles[(kv_tile + 1) & 3]",
    ),
    replace("bias - shared.lse[", "bias - shared.delta["),
];

const KEY_GRAD: [Rule; 20] = [
    drop_statement("__syncthreads()"),
    drop_statement("arrive_and_wait<"),
    drop_statement("cp_async_commit()"),
    replace("p.row_delta + row", "p.row_lse + row"),
    replace(
        "work.first + row >= tensor.rows",
        "work.first + row > tensor.rows",
    ),
    replace("work.first + row < work.len ? value", "true ? value"),
    replace("(d_k, p.problem.scale", "(d_k, 1.f"),
    replace("shared.lse[stage] + sub", "shared.lse[stage]"),
    replace("work.prior ? p.d_prior_v : p.d_v", "p.d_v"),
    replace(
        "work.prior ? p.problem.prior_k : p.problem.k",
        "p.problem.k",
    ),
    replace(
        "arrive_and_wait<0>();\n    load_query_stage<C>(p, shared, iteration + 1, thread);",
        "load_query_stage<C>(p, shared, iteration + 1, thread);\n    arrive_and_wait<0>();",
    ),
    replace("n * 8 + e < before", "n * 8 + e <= before"),
    replace("scale < 0.f ? INFINITY : -INFINITY", "-INFINITY"),
    replace(
        "shared.query_tiles[(iteration + 2) & 3]",
        "shared.query_tiles[(iteration + 1) & 3]",
    ),
    replace(
        "shared.work.prior && query < first_key + C::kRowTiles * 16",
        "shared.work.prior && query < first_key",
    ),
    replace("!shared.work.prior && query", "query"),
    replace("-(e % 2 ? lse.y : lse.x)", "(e % 2 ? lse.y : lse.x)"),
    replace("x * (d - (e % 2 ? delta.y : delta.x))", "x * d"),
    replace("(e % 2 ? delta.y : delta.x)", "delta.x"),
    replace(
        "bt_base<QT>(d_out, lane), sub, column",
        "bt_base<QT>(q, lane), sub, column",
    ),
];

const GRADIENTS: [Rule; 20] = [
    replace("(splits > 1)", "(splits > 2)"),
    replace("sum.x * scale", "sum.x"),
    replace("sum / gate", "sum"),
    replace(
        "row < query_rows; row += 32",
        "row < query_rows - 1; row += 32",
    ),
    replace("sums[i] += part[i]", "sums[i] = part[i]"),
    replace("sums[kPastWeight] * error", "error"),
    replace("sums[kOtherGrad]) - d_lse", "sums[kOtherGrad])"),
    replace("sum = quad_sum(sum)", "sum = sum"),
    drop_statement("sum += shuffle_xor"),
    replace("query < query_rows ? value", "true ? value"),
    replace("tile : tile - prior_tiles", "tile : tile"),
    replace(
        "C::kQueries * C::kQueries;",
        "C::kQueries * C::kQueries + C::kQueries;",
    ),
    replace(
        "work.prior ? p.problem.prior_len[work.batch_index] : segment_len",
        "segment_len",
    ),
    replace("work.prior && !p.prior_heads[head]", "false"),
    replace("longer + rest / heads", "longer - 1 + rest / heads"),
    replace("{head + 1, work.first_query}", "{head + 1, 0}"),
    replace(
        "query + kQueries < work.query_rows",
        "query + kQueries <= work.query_rows",
    ),
    replace("p.max_splits > 1 ? (int)p.problem.q.rows : 1", "1"),
    replace("split * pitch + i", "i"),
    replace("sum.w * scale", "sum.z * scale"),
];

const QUERY_GRAD_HOPPER: [Rule; 39] = [
    drop_statement("cp_async_commit()"),
    drop_statement("wgmma_fence()"),
    drop_statement("wgmma_commit()"),
    drop_statement("wgmma_wait<"),
    drop_statement("wait_empty("),
    replace("wgmma_wait<0>()", "wgmma_wait<1>()"),
    replace("wgmma_wait<1>()", "wgmma_wait<2>()"),
    replace("first_iteration += ", "first_iteration = "),
    replace("p.row_delta + row", "p.row_lse + row"),
    replace(">= (e < 2 ? limit : below)", "> (e < 2 ? limit : below)"),
    replace("e < 2 ? limit : below", "limit"),
    replace("current ? limit + 8 : limit", "limit"),
    replace("tile.first <= last_query", "tile.first < last_query"),
    replace("last_query >= first_query &&", ""),
    replace("tile.source != kCurrent ||", ""),
    replace(
        "at.first_query + 1 : tile.end) < tile.first + C::kKeys",
        "at.first_query + 64 : tile.end) < tile.first + C::kKeys",
    ),
    replace("row + 1 : tile.end", "row : tile.end"),
    replace("past ? keys.gate_log2 : 0.f", "keys.gate_log2"),
    replace("past = tile.source == kPast", "past = tile.source <= kPast"),
    replace("bias - fragments.lse[e / 2]", "bias - fragments.lse[0]"),
    replace("- fragments.delta[e / 2]", "- fragments.delta[0]"),
    replace("past ? kPastGrad : kOtherGrad", "kPastGrad"),
    replace("if (past) add_row_sums", "if (gated) add_row_sums"),
    replace("work.splits == 1", "true"),
    replace("if (query + half * 8 >= rows) continue", ";"),
    replace("scale < 0.f ? INFINITY : -INFINITY", "-INFINITY"),
    drop_statement("sync_producers<"),
    drop_statement("shared.row_ring.release("),
    drop_statement("shared.kv_ring.release("),
    replace("arrive<0>", "arrive<1>"),
    drop_statement("shared.row_ring.wait_empty("),
    drop_statement("shared.kv_ring.wait_empty("),
    drop_statement("shared.row_ring.wait_full("),
    drop_statement("shared.kv_ring.wait_full("),
    replace("i += C::kProducerWarps", "i += C::kProducerWarps + 1"),
    drop_statement("clear_row_sums("),
    replace("shared.gate_sums + warp_row", "shared.gate_sums"),
    replace(
        "min(first + group + 64, work.query_rows) - 1",
        "first + group + 63",
    ),
    replace("release(busy", "release(busy + 1"),
];

const KEY_GRAD_HOPPER: [Rule; 38] = [
    drop_statement("cp_async_commit()"),
    drop_statement("wgmma_fence()"),
    drop_statement("wgmma_commit()"),
    drop_statement("wgmma_wait<"),
    drop_statement("wait_empty("),
    replace("wgmma_wait<0>()", "wgmma_wait<1>()"),
    replace("wgmma_wait<1>()", "wgmma_wait<2>()"),
    replace("index >= work_tiles", "index > work_tiles"),
    replace("p.work_counter + 1", "p.work_counter"),
    replace("first_iteration += ", "first_iteration = "),
    replace("p.row_delta + row", "p.row_lse + row"),
    replace("scale < 0.f ? INFINITY : -INFINITY", "-INFINITY"),
    replace("readers += !work.prior || p", "readers += p"),
    replace(
        "work.prior ? p.problem.prior_k : p.problem.k",
        "p.problem.k",
    ),
    replace("work.prior ? p.d_prior_v : p.d_v", "p.d_v"),
    replace("< before + e / 2 * 8", "<= before + e / 2 * 8"),
    replace("before + e / 2 * 8", "before"),
    replace("before > -64", "before > 0"),
    replace("before() < C::kQueries", "before() < C::kQueries - 64"),
    replace("-(e % 2 ? lse.y : lse.x)", "-lse.x"),
    replace("(e % 2 ? delta.y : delta.x)", "delta.x"),
    replace(
        "grads.d_v, probs, d_out(stage)",
        "grads.d_v, probs, q(stage)",
    ),
    replace("uniform(first_row)", "0"),
    replace("(grads.d_k, p.problem.scale", "(grads.d_k, 1.f"),
    replace("work.prior ? -(1 << 30) : work", "work"),
    drop_statement("sync_producers<"),
    drop_statement("sync_consumer_warpgroup<"),
    drop_statement("shared.kv_ring.release("),
    drop_statement("shared.query_ring.release("),
    replace("arrive<0>", "arrive<1>"),
    drop_statement("shared.kv_ring.wait_empty("),
    drop_statement("ring.wait_empty(iteration"),
    drop_statement("shared.kv_ring.wait_full("),
    drop_statement("shared.query_ring.wait_full("),
    replace(
        "tile += C::kQueryProducerWarps",
        "tile += C::kQueryProducerWarps + 1",
    ),
    replace("shared.k[stage]), k_rows", "shared.k[0]), k_rows"),
    replace(
        "shared.k[kv_stage], warp_row",
        "shared.k[kv_stage], first_row",
    ),
    replace("release(busy", "release(busy + 1"),
];

pub const WARP_SPECIALIZATION: [Rule; 8] = [
    drop_statement("__syncthreads()"),
    drop_statement("setmaxnreg_decrease<"),
    replace(
        "setmaxnreg_increase<C::kConsumerRegisters>",
        "setmaxnreg_increase<C::kConsumerRegisters + 8>",
    ),
    replace(
        "first ? blockIdx.x : gridDim.x",
        "first ? blockIdx.x : gridDim.x - 1",
    ),
    replace("gridDim.x + atomic_add", "gridDim.x + 1 + atomic_add"),
    replace("index >= work_tiles", "index > work_tiles"),
    replace("work.split >= work.splits", "work.split > work.splits"),
    replace(
        "barrier_sync<C::kProducerThreads>(kProducerBarrier)",
        "barrier_sync<C::kProducerThreads - 32>(kProducerBarrier)",
    ),
];

pub const RING: [Rule; 11] = [
    drop_statement("cp_async_wait<"),
    drop_statement("fence_proxy_async_shared()"),
    drop_statement("mbarrier_arrive(&full"),
    drop_statement("mbarrier_arrive(&empty"),
    drop_statement("__syncwarp()"),
    replace("parity(iteration) ^ 1", "parity(iteration)"),
    replace("iteration / kStages & 1", "iteration & 1"),
    replace("full_arrivals);", "full_arrivals - 1);"),
    replace("empty_arrivals);", "empty_arrivals - 1);"),
    replace("empty_arrivals);", "empty_arrivals + 1);"),
    drop_statement("mbarrier_arrive_expect_bytes("),
];

const WARPGROUPS: [Rule; 11] = [
    drop_statement("__syncwarp()"),
    replace("wgmma<false, false>", "wgmma<true, false>"),
    replace("k % 64 * 2", "k % 64"),
    replace(
        "(first, k * 16 * TileB::kRowBytes)",
        "(first, k * 8 * TileB::kRowBytes)",
    ),
    replace("+ bytes / 16", "+ bytes / 8"),
    replace("n % 2 * 2 + half", "half * 2 + n % 2"),
    replace("odd ? w[0] : w[1]", "odd ? w[1] : w[0]"),
    replace("upper ? a0 : b0", "upper ? b0 : a0"),
    replace("at < len", "at <= len"),
    replace("if (at < rows)", "if (at <= rows)"),
    replace("(n + lane % 4) * 8", "n * 8"),
];

const WORK_TILES: [Rule; 13] = [
    drop_statement("__syncwarp()"),
    replace("query < work.query_rows ?", "query <= work.query_rows ?"),
    replace("index % packed_heads)", "index / packed_heads)"),
    replace(
        "work.first_kv_tile + kSplitTiles)",
        "work.first_kv_tile + kSplitTiles - 1)",
    ),
    replace("work.split * kSplitTiles;", "work.split * kSplitTiles + 1;"),
    replace("/ packed_heads + 1;", "/ packed_heads;"),
    replace(
        "(int64_t)split * p.batch + batch_index",
        "(int64_t)split * p.batch",
    ),
    replace(
        "k[kSinks] = Rows<const T>::of(p.past_k",
        "k[kSinks] = Rows<const T>::of(p.prior_k",
    ),
    replace(
        "v[kSinks] = Rows<const T>::of(p.past_v",
        "v[kSinks] = Rows<const T>::of(p.past_k",
    ),
    replace("(p.prior_k, batch_index", "(p.past_k, batch_index"),
    replace("(p.prior_v, batch_index", "(p.v, batch_index"),
    replace("q.query >= tensor.rows", "q.query > tensor.rows"),
    replace("q.position >= 0 ? value : make_uint4(0, 0, 0, 0)", "value"),
];

const VISIBILITY: [Rule; 16] = [
    replace(
        "min(position + 1, segment_len)",
        "min(position, segment_len)",
    ),
    replace("min(position + 1, segment_len)", "segment_len"),
    replace("gate > 0.f ? past_len", "true ? past_len"),
    replace("p.prior_heads[head] ?", "true ?"),
    replace(
        "kv_head * p.past_len_head_stride",
        "0 * p.past_len_head_stride",
    ),
    replace(
        "gate > 0.f ? past_len : list.sinks",
        "gate > 0.f ? past_len : 0",
    ),
    replace(
        "kv_head * p.sink_len_head_stride",
        "0 * p.sink_len_head_stride",
    ),
    replace(
        "batch_index * p.sink_len_batch_stride",
        "0 * p.sink_len_batch_stride",
    ),
    replace("index * kKeys, sinks}", "index * kKeys, past_len}"),
    replace("{kPast, sinks + index * kKeys", "{kPast, index * kKeys"),
    replace("index < past_tiles", "index <= past_tiles"),
    drop_statement("index -= past_tiles"),
    replace("position / kKeys + 1", "position / kKeys"),
    replace("? log2_approx(gate)", "? gate"),
    replace("segment_len - query_start", "segment_len"),
    // The order of the sources, in one of the places that must agree.
    replace(
        "return {kPast, sinks + index * kKeys, past_len}",
        "return {kPrior, sinks + index * kKeys, past_len}",
    ),
];

const SOFTMAX: [Rule; 11] = [
    replace("shuffle_xor(x, 2)", "shuffle_xor(x, 1)"),
    replace("row_max - reference", "max - reference"),
    replace("bias - reference", "-reference"),
    replace("even + odd", "even"),
    drop_statement("row.max = update.max"),
    replace(
        "exp2_approx(partial_max - reference)",
        "exp2_approx(total_max - reference)",
    ),
    replace("max == SEGATTN_NEG_INF ? 0.f : max", "max"),
    replace("scale < 0.f ? -scale : scale", "scale"),
    replace("max_f32(magnitude, 1e-37f)", "magnitude"),
    replace(
        "fma_rn(partial, f.partial, mul_rn(total, f.total))",
        "fma_rn(partial, f.total, mul_rn(total, f.partial))",
    ),
    drop_statement("odd += s"),
];

const PIPELINE: [Rule; 3] = [
    drop_statement("__syncthreads()"),
    drop_statement("cp_async_wait<"),
    replace("iteration & 1", "0"),
];

const TILE: [Rule; 16] = [
    replace("n + (lane & 7), k / 8", "n, k / 8"),
    replace("k / 8 + (lane >> 3)", "k / 8"),
    replace("k + lane, n / 8", "k, n / 8"),
    replace(
        "(base ^ (within << 4)) + panel * kPanelBytes",
        "(base ^ (within << 4)) + panel * kRowBytes",
    ),
    replace("(bit ^ swizzle(lane_row))", "bit"),
    replace(
        "Tile::lane_base(tile, lane & 15, lane >> 4)",
        "Tile::lane_base(tile, lane & 7, lane >> 4)",
    ),
    replace("(lane & 7) + (lane >> 4) * 8", "lane & 7"),
    replace("lane >> 3 & 1", "lane >> 4"),
    replace("ldmatrix_x4_trans(b", "ldmatrix_x4(b"),
    replace("+ head * tensor.head_stride", ""),
    replace("tensor.batch_offsets ?", "false ?"),
    replace("src + chunk * 8", "src"),
    replace("row < left ? 16 : 0", "row <= left ? 16 : 0"),
    replace("src += kRowsPerPass * rows.stride", "src += kRowsPerPass"),
    replace("left = end - first - row0", "left = end - first"),
    replace("row % 8 == 0 ? origin", "true ? origin"),
];

const PRODUCTS: [Rule; 8] = [
    drop_statement("clear(x)"),
    replace("b[next & 1]", "b[i & 1]"),
    replace("b_row + next % kPairs * 16", "b_row"),
    replace("next / kPairs * 16);", "0);"),
    replace("a[m][k], b", "a[m][0], b"),
    replace("a_row + m * 16", "a_row"),
    replace("(k + 1) * 16", "k * 16"),
    replace("n % 2 * 2 + half", "half * 2 + n % 2"),
];
