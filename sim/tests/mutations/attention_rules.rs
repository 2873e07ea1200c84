//! The bugs planted into the attention kernels: barriers, waits and commits dropped or weakened, stages released early,
//! masks, bounds and indices off by one or swapped, sources and factors mixed up.

use segattn_sim::mutate::{Rule, drop_statement, replace};

/// A file of `kernels/` and what is done to it.
pub struct Target {
    pub file: &'static str,
    /// The element type and head size of the instances that run: the smallest that the rules need.
    pub instance: &'static str,
    pub rules: &'static [Rule],
}

pub const TARGETS: [Target; 7] = [
    Target {
        file: "attention_forward.cu",
        instance: "bf16_d32",
        rules: &FORWARD,
    },
    Target {
        file: "attention_backward.cu",
        instance: "bf16_d32",
        rules: &BACKWARD,
    },
    Target {
        file: "attention_items.cuh",
        instance: "bf16_d32",
        rules: &ITEMS,
    },
    Target {
        file: "visibility.cuh",
        instance: "bf16_d32",
        rules: &VISIBILITY,
    },
    Target {
        file: "softmax.cuh",
        instance: "bf16_d32",
        rules: &SOFTMAX,
    },
    Target {
        file: "pipeline.cuh",
        instance: "bf16_d32",
        rules: &PIPELINE,
    },
    Target {
        file: "tile.cuh",
        instance: "bf16_d96",
        rules: &TILE,
    },
];

/// Rules with a mutant that is known to survive: file, text, and why.
pub const SURVIVORS: [[&str; 3]; 4] = [
    [
        "attention_backward.cu",
        "query < query_rows ? sum",
        "the parts of a padding row are zeros, and so is their sum",
    ],
    [
        "attention_items.cuh",
        "__syncwarp()",
        "the first in store_query_rows: both callers come from a barrier of the block",
    ],
    [
        "attention_items.cuh",
        "/ heads_per_tile + 1;",
        "one query less counts only where a tile's last query opens a key tile",
    ],
    [
        "softmax.cuh",
        "max == SEGATTN_NEG_INF ? 0.f : max",
        "only padding rows, which are not stored, have seen nothing by the end of a tile",
    ],
];

const FORWARD: [Rule; 47] = [
    drop_statement("__syncthreads()"),
    drop_statement("__syncwarp()"),
    drop_statement("cp_async_commit()"),
    drop_statement("arrive_and_wait<"),
    replace("kInFlight>()", "kInFlight + 1>()"),
    // The next copy is issued before the barrier that frees its stage.
    replace(
        "arrive_and_wait<Ring<C::kStages>::kInFlight>();\n    load_keys(shared, item, step + C::kStages - 1, true, thread);",
        "load_keys(shared, item, step + C::kStages - 1, true, thread);\n    arrive_and_wait<Ring<C::kStages>::kInFlight>();",
    ),
    replace(
        "arrive_and_wait<Ring<C::kStages>::kInFlight>();\n    load_keys(shared, item, step + C::kStages, false, thread);",
        "load_keys(shared, item, step + C::kStages, false, thread);\n    arrive_and_wait<Ring<C::kStages>::kInFlight>();",
    ),
    replace("step + C::kStages - 1, true", "step + C::kStages, true"),
    replace("step + C::kStages, false", "step + C::kStages - 1, false"),
    replace(
        "values ? &shared.v[stage] : &shared.k[stage]",
        "values ? &shared.k[stage] : &shared.v[stage]",
    ),
    replace(
        "values ? shared.sources.v[tile.source]",
        "values ? shared.sources.k[tile.source]",
    ),
    replace(
        "if (tile.first + C::kKeys > item.keys.limit(tile, rows.first_position))",
        "if (false)",
    ),
    replace(
        "limit(tile, rows.first_position)",
        "limit(tile, rows.last_position)",
    ),
    replace("n * 8 >= limit", "n * 8 > limit"),
    replace("n * 8 + 1 >= limit", "n * 8 + 1 > limit"),
    replace("lane % 4 * 2;", "lane % 4;"),
    replace("past ? bias[m][half] : 0.f", "0.f"),
    replace("past ? bias[m][half] : 0.f", "bias[m][half]"),
    replace(
        "tile.source == kPast, scale",
        "tile.source == kPrior, scale",
    ),
    replace(
        "tile.first < item.keys.limit(tile, rows.last_position)",
        "tile.first + 1 < item.keys.limit(tile, rows.last_position)",
    ),
    replace(
        "step - item.first_step < C::kChunkSteps, last",
        "true, last",
    ),
    replace("last || (step + 1) % C::kChunkSteps == 0", "last"),
    drop_statement("if (!last) acc.clear()"),
    replace("factor[e / 2]", "factor[0]"),
    replace("factor[0] != 1.f || factor[1] != 1.f", "factor[0] != 1.f"),
    replace("n % 2 * 2 + half", "half * 2 + n % 2"),
    replace("p.a[m][k / 16], b[2], b[3]", "p.a[m][k / 16], b[3], b[2]"),
    replace("p.a[m][k / 16]", "p.a[m][0]"),
    replace("out[n][1], factors[0]", "out[n][1], factors[1]"),
    drop_statement("row.sum = quad_sum"),
    replace("if (thread % 4 == 0) total = row", "total = row"),
    replace("m * C::kOutTiles * C::kThreads + thread", "thread"),
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
    replace("? log2_approx(gate)", "? gate"),
    replace("item.split >= item.splits", "item.split > item.splits"),
    replace("index >= items", "index > items"),
    replace("(int64_t)blockIdx.x * (C::kRows", "(int64_t)0 * (C::kRows"),
    replace("scale < 0.f) negate", "scale < -9.f) negate"),
    replace("0x80008000u", "0x8000u"),
    replace("first == 0) total", "first >= 0) total"),
    replace("split = first + 1", "split = first + 2"),
    replace("min(splits, first + kSectionItems)", "splits"),
    replace("splits <= 1) return", "splits <= 3) return"),
    replace("part.state.max)", "state.max)"),
];

const BACKWARD: [Rule; 47] = [
    drop_statement("__syncthreads()"),
    drop_statement("arrive_and_wait<"),
    drop_statement("cp_async_wait<"),
    drop_statement("cp_async_commit()"),
    replace(
        "arrive_and_wait<0>();\n    load_key_stage(shared, item, step + 1, thread);",
        "load_key_stage(shared, item, step + 1, thread);\n    arrive_and_wait<0>();",
    ),
    replace(
        "Ring<C::kStages>::stage(step + 1)",
        "Ring<C::kStages>::stage(step)",
    ),
    drop_statement("if (p.d_lse) delta"),
    replace("p.lse[row] * kLog2E", "p.lse[row]"),
    drop_statement("delta += shuffle_xor"),
    replace(
        "query < min(p.problem.segment_len[entry]",
        "query <= min(p.problem.segment_len[entry]",
    ),
    replace("n * 8 + e < limit", "n * 8 + e <= limit"),
    replace("(dp[m][n][half * 2 + e] - delta)", "dp[m][n][half * 2 + e]"),
    replace(
        "tile.source == kPast ? item.keys.gate_log2 : 0.f",
        "item.keys.gate_log2",
    ),
    replace("- tile.first - lane % 4 * 2", "- lane % 4 * 2"),
    replace("if (tile.source == kPast) gate_sum", "gate_sum"),
    replace("item.splits == 1", "true"),
    drop_statement("if (q.query >= p.problem.q.rows) continue"),
    replace("i < C::kWarps; i++) total", "i < C::kWarps - 1; i++) total"),
    replace("if (lane == 0) shared.gate_sums", "shared.gate_sums"),
    drop_statement("sum += shuffle_xor"),
    replace("* p.tiles + item.tile", "* p.tiles"),
    replace("splits > 1", "splits > 2"),
    replace("sum * p.problem.scale", "sum"),
    replace("sum / gate", "sum"),
    replace("tile < p.tiles; tile++", "tile < p.tiles - 1; tile++"),
    replace("query < query_rows ? sum", "true ? sum"),
    replace("tile : tile - prior_tiles", "tile : tile"),
    replace(
        "C::kQueries * C::kQueries;",
        "C::kQueries * C::kQueries + C::kQueries;",
    ),
    replace(
        "item.prior ? p.problem.prior_len[item.entry] : segment_len",
        "segment_len",
    ),
    replace("item.prior && !p.prior_heads[head]", "false"),
    replace("p.row_delta + row", "p.row_lse + row"),
    replace(
        "item.prior || key <= first_query + column",
        "item.prior || key < first_query + column",
    ),
    replace("item.prior || key <= first_query + column", "true"),
    replace("fma_rn(x, scale, -lse)", "fma_rn(x, scale, lse)"),
    replace("x * (d - delta)", "x * d"),
    replace(
        "item.first + row >= tensor.rows",
        "item.first + row > tensor.rows",
    ),
    replace("item.first + row < item.len ? value", "true ? value"),
    replace("(d_k, p.problem.scale", "(d_k, 1.f"),
    replace("shared.lse[stage] + sub", "shared.lse[stage]"),
    replace(
        "item.first + first_row, query + sub",
        "item.first, query + sub",
    ),
    replace("b_row + k * 16", "b_row"),
    replace("d_out[i], T{}), delta)", "out[i], T{}), delta)"),
    replace(
        "accumulate<T, QT, C::kRowTiles, C::kColTiles>(d_v, weights, bt_base<QT>(s_d_out",
        "accumulate<T, QT, C::kRowTiles, C::kColTiles>(d_v, weights, bt_base<QT>(s_q",
    ),
    replace("item.prior ? p.d_prior_v : p.d_v", "p.d_v"),
    replace(
        "item.prior ? p.problem.prior_k : p.problem.k",
        "p.problem.k",
    ),
    replace("d_q[m][n][e] *= p.problem.scale", "d_q[m][n][e] *= 1.f"),
    replace(
        "tile.first >= item.keys.limit(tile, last_query)",
        "tile.first + 1 >= item.keys.limit(tile, last_query)",
    ),
];

const ITEMS: [Rule; 11] = [
    drop_statement("__syncwarp()"),
    replace("query < item.query_rows ?", "query <= item.query_rows ?"),
    replace("index % heads_per_tile)", "index / heads_per_tile)"),
    replace(
        "item.first_step + kItemSteps)",
        "item.first_step + kItemSteps - 1)",
    ),
    replace("item.split * kItemSteps;", "item.split * kItemSteps + 1;"),
    replace("/ heads_per_tile + 1;", "/ heads_per_tile;"),
    replace(
        "(int64_t)split * p.batch + entry",
        "(int64_t)split * p.batch",
    ),
    replace("(p.prior_k, entry", "(p.past_k, entry"),
    replace("(p.prior_v, entry", "(p.v, entry"),
    replace("q.query >= tensor.rows", "q.query > tensor.rows"),
    replace("q.position >= 0 ? value : make_uint4(0, 0, 0, 0)", "value"),
];

const VISIBILITY: [Rule; 11] = [
    replace(
        "min(position + 1, segment_len)",
        "min(position, segment_len)",
    ),
    replace("min(position + 1, segment_len)", "segment_len"),
    replace("gate > 0.f ? p.past_len", "true ? p.past_len"),
    replace("p.prior_heads[head] ?", "true ?"),
    replace(
        "kv_head * p.past_len_head_stride",
        "0 * p.past_len_head_stride",
    ),
    replace("index < past_tiles", "index <= past_tiles"),
    drop_statement("index -= past_tiles"),
    replace("position / kKeys + 1", "position / kKeys"),
    replace("? log2_approx(gate)", "? gate"),
    replace("segment_len - query_start", "segment_len"),
    // The order of the sources, in one of the places that must agree.
    replace(
        "return {kPast, index * kKeys, past_len}",
        "return {kPrior, index * kKeys, past_len}",
    ),
];

const SOFTMAX: [Rule; 11] = [
    replace("shuffle_xor(x, 2)", "shuffle_xor(x, 1)"),
    replace("row.max - reference", "max - reference"),
    replace("bias - reference", "-reference"),
    replace("even + odd", "even"),
    drop_statement("row.max = max"),
    replace(
        "exp2_approx(part_max - reference)",
        "exp2_approx(total_max - reference)",
    ),
    replace("max == SEGATTN_NEG_INF ? 0.f : max", "max"),
    replace("scale < 0.f ? -scale : scale", "scale"),
    replace("max_f32(magnitude, 1e-37f)", "magnitude"),
    replace(
        "fma_rn(part, f.part, mul_rn(total, f.total))",
        "fma_rn(part, f.total, mul_rn(total, f.part))",
    ),
    drop_statement("odd += s"),
];

const PIPELINE: [Rule; 4] = [
    drop_statement("__syncthreads()"),
    drop_statement("cp_async_wait<"),
    replace("2 * (kStages - 1)", "2 * kStages - 1"),
    replace("step & 1", "0"),
];

const TILE: [Rule; 11] = [
    replace(
        "(base ^ (within << 4)) + panel * kPanelBytes",
        "(base ^ (within << 4)) + panel * kRowBytes",
    ),
    replace("(bit ^ twist(lane_row))", "bit"),
    replace(
        "Tile::lane_base(tile, lane & 15, lane >> 4)",
        "Tile::lane_base(tile, lane & 7, lane >> 4)",
    ),
    replace("(lane & 7) + (lane >> 4) * 8", "lane & 7"),
    replace("lane >> 3 & 1", "lane >> 4"),
    replace("ldmatrix_x4_trans(b", "ldmatrix_x4(b"),
    replace("first + row < end", "first + row <= end"),
    replace("+ head * tensor.head_stride", ""),
    replace("tensor.batch_offsets ?", "false ?"),
    replace("src + chunk * 8", "src"),
    replace("row0 + pass * kRowsPerPass;", "row0;"),
];
