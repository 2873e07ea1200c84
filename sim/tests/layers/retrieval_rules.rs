//! The bugs planted into retrieval: the pool's memory and its length, and the kernels of both rules.

use segattn_sim::mutate::{Rule, drop_statement, replace};

pub const POOL: [Rule; 18] = [
    replace(
        "ceil_div(info.eligible_begin, p.block_len)",
        "info.eligible_begin / p.block_len",
    ),
    replace(
        "(token - p.first_token) / p.chunk_tokens];",
        "token / p.chunk_tokens];",
    ),
    replace(
        "% p.chunk_tokens * p.heads + head",
        "% p.chunk_tokens * p.heads",
    ),
    replace("column) * p.bits / 8", "column) * p.bits / 16"),
    replace("column) / kStepGroup;", "column) / kStepGroup / 2;"),
    replace("p.chunk_tokens * p.heads, 0)", "p.heads, 0)"),
    replace("column - column % kStepGroup", "column"),
    replace("i < first + kStepGroup", "i < first + kVector"),
    replace("fmaxf(largest, fabsf(r_x[e]))", "fmaxf(largest, r_x[e])"),
    replace("return finite ?", "return true ?"),
    replace("(1 << (p.bits - 1)) - 1;", "1 << (p.bits - 1);"),
    replace("if (column % kStepGroup == 0) ", "if (column == 0) "),
    replace("rintf(r_x[e] / step)", "truncf(r_x[e] / step)"),
    replace("step > 0.f ?", "step >= 0.f ?"),
    replace("column)) / (float)pool_limit(p)", "column)) / 127.f"),
    replace("<< (e * p.bits)", "<< (e * 8)"),
    replace(">> (e * p.bits)", ">> (e * 8)"),
    replace("p.head_dim / 2 + pair", "p.head_dim / 2"),
];

pub const LENGTH: [Rule; 19] = [
    replace("if (head >= p.heads) return", "if (head > p.heads) return"),
    replace("block < eligible.begin ||", "block <= eligible.begin ||"),
    replace(
        "|| block >= eligible.end) return",
        "|| block > eligible.end) return",
    ),
    replace("max(eligible.begin, ", "max(0, "),
    replace("min(eligible.end, ", "min((int)p.score_pitch, "),
    replace("p.window_len - 1 - p.window_before", "p.window_before"),
    replace("+ p.window_before + 1", "+ p.window_before"),
    replace("p.scores + head * p.score_pitch", "p.scores"),
    replace("max_f32(best, g_scores[other])", "g_scores[other]"),
    replace("= -best;", "= best;"),
    replace("(int64_t)head * p.max_selected", "0"),
    replace("- middle <= kept", "<= kept"),
    replace("- middle <= kept", "- middle < kept"),
    replace("else high = middle", "else high = middle - 1"),
    replace("to / p.block_len) * p.block_len", "to) * p.block_len"),
    replace("if (row >= p.rows) return", "if (row > p.rows) return"),
    replace("p.token + row", "row"),
    replace("column % kStepGroup == 0", "column == 0"),
    replace(
        "copy_held(p, src.v, src_unit, dst.v",
        "copy_held(p, src.k, src_unit, dst.v",
    ),
];

pub const RETRIEVAL: [Rule; 31] = [
    replace("  if (block >= (uint32_t)(p.heads * tiles)) return;\n", ""),
    replace(
        "  if (block >= (uint32_t)p.heads) return;\n  const int head = block;\n  const Blocks",
        "  const int head = block;\n  const Blocks",
    ),
    replace("if (row >= p.rows) return", "if (row > p.rows) return"),
    replace(
        "p.head[head].kv_head * p.head_dim, unit",
        "head * p.head_dim, unit",
    ),
    replace(
        "store_held(p, chunk.v, unit, column, row_of<const Bf16>(p.v",
        "store_held(p, chunk.v, unit, column, row_of<const Bf16>(p.k",
    ),
    replace(
        "if (probe >= (uint32_t)(p.heads * count)) return",
        "if (probe > (uint32_t)(p.heads * count)) return",
    ),
    replace("within / p.windows;", "within % p.windows % p.group;"),
    replace(
        "within % p.windows * p.stride",
        "within % p.windows * p.window",
    ),
    replace("query < first + p.window", "query < first + p.window - 1"),
    replace("(p.first_query + t) % p.query_capacity", "t"),
    replace("eligible.begin + first + i", "first + i"),
    replace("r_sum[e] / (float)p.window", "r_sum[e]"),
    replace("r_sum[e] -= r_rounded[e]", "r_sum[e] -= 0.f"),
    replace("p.past_len[info.kv_head] = rows", "p.past_len[head] = rows"),
    replace(
        "if (row >= (uint32_t)rows) return",
        "if (row > (uint32_t)rows) return",
    ),
    replace("* p.block_len + row % p.block_len", "* p.block_len"),
    replace(
        "info.end_angle - rows + row",
        "info.end_angle - rows + row - 1",
    ),
    replace("turned(k, p.cos", "turned(v, p.cos"),
    replace(
        "const bool valid = first + row < end",
        "const bool valid = first + row <= end",
    ),
    replace(
        "chunk_row -= p.chunk_tokens) chunk++",
        "chunk_row -= p.chunk_tokens)",
    ),
    replace("min(first + row, last)", "first + row"),
    replace(
        "int part = C::kParts - 1; part >= 0",
        "int part = C::kParts - 1; part >= 1",
    ),
    replace(
        "max_f32(low.of(x[n][e]), high.of(x[n][2 + e]))",
        "low.of(x[n][e])",
    ),
    replace(
        "best[n][0] = best[n][1] = -INFINITY",
        "best[n][0] = best[n][1] = 0.f",
    ),
    replace("if (first > 0) __syncthreads()", ""),
    drop_statement("arrive_and_wait<0>()"),
    replace("int mask = 4; mask < 32", "int mask = 4; mask < 16"),
    replace(
        "    __syncthreads();\n    // One thread",
        "    // One thread",
    ),
    replace(
        "p.first_block + p.blocks), eligible_end)",
        "p.first_block + p.blocks), eligible_end + 1)",
    ),
    replace(
        "p.selected_count[head] = selected;\n  if (selected == 0)",
        "p.selected_count[head] = count;\n  if (selected == 0)",
    ),
    replace("eligible.begin + first + i", "eligible.begin + first"),
];

pub const WINDOWS: [Rule; 46] = [
    replace("params.calls[blockIdx.x / blocks]", "params.calls[0]"),
    replace("body(call, blockIdx.x % blocks)", "body(call, blockIdx.x)"),
    replace(
        "  if (block >= (uint32_t)(p.heads * p.tiles)) return {};\n",
        "",
    ),
    replace(
        "block >= (uint32_t)(p.heads * count)) return;\n  const int head = block / count",
        "false) return;\n  const int head = block / count",
    ),
    replace(
        "  if (block >= (uint32_t)p.heads) return;\n  const int head = block;\n  const Tokens",
        "  const int head = block;\n  const Tokens",
    ),
    replace("p.lse[block] =", "p.lse[head] ="),
    replace(
        "token >= at.begin && token < at.end ? finite",
        "token < at.end ? finite",
    ),
    replace(
        "token >= at.begin && token < at.end ? finite",
        "token >= at.begin ? finite",
    ),
    replace("lane % 4 * 2;", "lane % 4;"),
    replace("[half * 8 + lane / 4]", "[lane / 4]"),
    replace(
        "merge_value(total.sum, partial.sum, factors)",
        "partial.sum",
    ),
    replace(
        "int other = 1; other < C::kWarps",
        "int other = 2; other < C::kWarps",
    ),
    replace("sum.sum = quad_sum(sum.sum);", ""),
    replace(
        "    __syncthreads();\n    if (threadIdx.x < C::kProbes",
        "    if (threadIdx.x < C::kProbes",
    ),
    replace("if (tile >= begin / kKeys) ", ""),
    replace("tile < ceil_div(end, kKeys)", "tile < end / kKeys"),
    replace("exp2_approx(tile.max - max)", "exp2_approx(tile.max)"),
    replace("max + log2_approx(sum)", "max"),
    replace("finite_score(p, product) - lse", "finite_score(p, product)"),
    replace(
        "g_lse[min(probe, count - 1)]",
        "g_lse[min(probe, count - 2)]",
    ),
    replace(
        "mul_rn(product, p.scale_log2), -FLT_MAX), FLT_MAX)",
        "mul_rn(product, p.scale_log2), -FLT_MAX), INFINITY)",
    ),
    replace(
        "max_f32(mul_rn(product, p.scale_log2), -FLT_MAX)",
        "mul_rn(product, p.scale_log2)",
    ),
    replace(
        "max_f32(shared.scores[threadIdx.x], -FLT_MAX)",
        "shared.scores[threadIdx.x]",
    ),
    replace("  __syncthreads();\n  Highest best", "  Highest best"),
    replace(
        "if (token >= at.begin && token < at.end) {",
        "if (token < at.end) {",
    ),
    replace(
        "if (token >= at.begin && token < at.end) {",
        "if (token >= at.begin) {",
    ),
    replace("max(a.begin, b.begin)", "a.begin"),
    replace("min(a.end, b.end)", "a.end"),
    replace(
        "p.group + probe / p.windows;\n  return",
        "p.group;\n  return",
    ),
    replace("query_row(p, probe % p.windows)", "query_row(p, 0)"),
    replace("min(best - eligible.begin, before)", "min(best, before)"),
    replace("eligible.begin, before)", "eligible.begin, before + 1)"),
    replace(", eligible.end - width);", ", eligible.end);"),
    replace("Tokens{token + 1, window.end}", "Tokens{token, window.end}"),
    replace(
        "Tokens{window.begin, token}",
        "Tokens{window.begin, token + 1}",
    ),
    replace(
        "token < begin + width; token +=",
        "token < begin + width - 1; token +=",
    ),
    replace("if (taken) g_scores[token] = kTaken;", ""),
    replace(
        "if (token < eligible.begin || token >= eligible.end) continue;",
        "",
    ),
    replace(
        "tile * C::kTile < window.end",
        "(tile + 1) * C::kTile < window.end",
    ),
    replace("if (lane == 0) g_best[tile] = {best.key, best.id};", ""),
    replace(
        "left -= window.end - window.begin;\n    __syncthreads();",
        "left -= window.end - window.begin;",
    ),
    replace(
        "min((uint32_t)p.window_len, left)",
        "(uint32_t)p.window_len",
    ),
    replace("g_selected[i] = eligible.begin + i", "g_selected[i] = i"),
    replace("first + i < eligible.end && g_scores", "g_scores"),
    replace(
        "{ g_selected[index] = first + i; }",
        "{ g_selected[index] = first; }",
    ),
    replace(
        "p.selected_count[head] = selected;\n  if (selected == count)",
        "p.selected_count[head] = count;\n  if (selected == count)",
    ),
];
