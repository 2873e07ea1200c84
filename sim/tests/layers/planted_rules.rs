//! The bugs planted into the layers' kernels: barriers dropped, bounds and indices off by one, terms and factors mixed
//! up, roundings left out.

use segattn_sim::mutate::{Rule, drop_statement, replace};

use super::head_norms_rules::{HEAD_GRAD, HEAD_NORM, SPLIT_NORM};
use super::retrieval_rules::{LENGTH, POOL, RETRIEVAL, WINDOWS};
use super::rows_rules::{COPY, EMBEDDING, SWIGLU, VECTORS};
use super::sampling_rules::{SAMPLING, SELECT};
use super::sinks_rules::SINKS;

/// A file of `kernels/` and what is done to it.
pub struct Target {
    pub file: &'static str,
    /// The kernels that hold it.
    pub kernels: &'static [&'static str],
    /// The tests that must see its bugs.
    pub tests: &'static [&'static str],
    pub rules: &'static [Rule],
}

pub const TARGETS: [Target; 21] = [
    Target {
        file: "norm.cu",
        kernels: &["norm.cu"],
        tests: &["norm::", "head_norms::gradient"],
        rules: &NORM,
    },
    Target {
        file: "reduce.cuh",
        kernels: &["norm.cu", "loss.cu", "adamw.cu"],
        tests: &["norm::", "loss::", "adamw::"],
        rules: &REDUCE,
    },
    Target {
        file: "vectors.cuh",
        kernels: &["copy.cu", "rope.cu", "swiglu.cu", "embedding.cu"],
        tests: &["rotation::", "rows::"],
        rules: &VECTORS,
    },
    Target {
        file: "rope.cu",
        kernels: &["rope.cu"],
        tests: &["rotation::", "head_norms::split"],
        rules: &ROPE,
    },
    Target {
        file: "rope.cu",
        kernels: &["rope.cu"],
        tests: &["head_norms::split"],
        rules: &SPLIT_NORM,
    },
    Target {
        file: "norm.cu",
        kernels: &["norm.cu"],
        tests: &["head_norms::gradient"],
        rules: &HEAD_GRAD,
    },
    Target {
        file: "head_norm.cuh",
        kernels: &["rope.cu", "norm.cu"],
        tests: &["head_norms::"],
        rules: &HEAD_NORM,
    },
    Target {
        file: "rotation.cuh",
        kernels: &["rope.cu"],
        tests: &["rotation::"],
        rules: &ROTATION,
    },
    Target {
        file: "swiglu.cu",
        kernels: &["swiglu.cu"],
        tests: &["rows::"],
        rules: &SWIGLU,
    },
    Target {
        file: "embedding.cu",
        kernels: &["embedding.cu"],
        tests: &["rows::"],
        rules: &EMBEDDING,
    },
    Target {
        file: "copy.cu",
        kernels: &["copy.cu"],
        tests: &["rows::"],
        rules: &COPY,
    },
    Target {
        file: "row_softmax.cuh",
        kernels: &["loss.cu"],
        tests: &["loss::", "divergence::"],
        rules: &ROW_SOFTMAX,
    },
    Target {
        file: "loss.cu",
        kernels: &["loss.cu"],
        tests: &["loss::", "divergence::"],
        rules: &LOSS,
    },
    Target {
        file: "adamw.cu",
        kernels: &["adamw.cu"],
        tests: &["adamw::"],
        rules: &ADAMW,
    },
    Target {
        file: "pool.cuh",
        kernels: &["retrieval.cu"],
        tests: &["retrieval::"],
        rules: &POOL,
    },
    Target {
        file: "pool_length.cuh",
        kernels: &["retrieval.cu"],
        tests: &["length::"],
        rules: &LENGTH,
    },
    Target {
        file: "retrieval.cu",
        kernels: &["retrieval.cu"],
        tests: &["retrieval::"],
        rules: &RETRIEVAL,
    },
    Target {
        file: "retrieval.cu",
        kernels: &["retrieval.cu"],
        tests: &["windows::"],
        rules: &WINDOWS,
    },
    Target {
        file: "select.cuh",
        kernels: &["retrieval.cu", "sampling.cu"],
        tests: &["retrieval::", "sampling::", "windows::"],
        rules: &SELECT,
    },
    Target {
        file: "sampling.cu",
        kernels: &["sampling.cu"],
        tests: &["sampling::"],
        rules: &SAMPLING,
    },
    Target {
        file: "sink_logits.cu",
        kernels: &["sink_logits.cu"],
        tests: &["sinks::"],
        rules: &SINKS,
    },
];

/// Rules with a mutant that is known to survive: file, text, and why.
pub const SURVIVORS: [[&str; 3]; 9] = [
    [
        "pool.cuh",
        "return finite ?",
        "groups that are not finite are in the tests of the device",
    ],
    [
        "pool.cuh",
        "step > 0.f ?",
        "groups of zeros are in the tests of the device",
    ],
    [
        "sampling.cu",
        "min(row.count, begin + own)",
        "keys beyond the row are 0, and such a key does not count",
    ],
    [
        "sampling.cu",
        "__syncthreads()",
        "some of them: the functions that follow begin with barriers of their own, or find_thread runs a second time",
    ],
    [
        "sampling.cu",
        "first + i < count ? rank_key(x[i]) : 0",
        "load_logits gives -inf beyond the end: the least key, behind every token of the row, and of weight 0",
    ],
    [
        "retrieval.cu",
        "p.first_block + p.blocks), eligible_end)",
        "a block too many is scored and not selected",
    ],
    [
        "pool.cuh",
        "(token - p.first_token) / p.chunk_tokens];",
        "a pool begins with token 0 of those that it holds",
    ],
    [
        "norm.cu",
        "first + row >= p.rows ||",
        "rows beyond the last are multiplied and then not added",
    ],
    [
        "row_softmax.cuh",
        "((uintptr_t)g_row & 15) == 0",
        "the simulator knows no alignment",
    ],
];

const NORM: [Rule; 41] = [
    drop_statement("__syncthreads()"),
    drop_statement("if (column >= p.width) break"),
    replace("r_x[e] += r_residual[e]", "r_x[e] = r_residual[e]"),
    drop_statement("*(uint4*)(group_of<Bf16>(p, p.x_sum"),
    // The sum must be taken of what was rounded.
    replace("      unpack_vector(r_x, r_held[i]);\n    }", "    }"),
    replace("+ p.eps", "- p.eps"),
    replace("p.rstd[row] = rstd", "p.rstd[row] = squares"),
    replace("squares / (float)p.width", "squares / (float)(p.width + 1)"),
    replace(
        "mul_rn(mul_rn(r_x[e], rstd), r_weight[e])",
        "mul_rn(r_x[e], rstd)",
    ),
    replace("* rstd * rstd * rstd", "* rstd * rstd"),
    replace("-mul_rn(r_x[e], pull)", "mul_rn(r_x[e], pull)"),
    replace("if (p.add) load_vector", "load_vector"),
    replace(
        "if (row >= p.rows || column >= p.width) continue;\n    r.d_y",
        "if (column >= p.width) continue;\n    r.d_y",
    ),
    replace("first + row >= p.rows ||", ""),
    replace("stage ^= 1", "stage ^= 0"),
    replace("p.rows - first);", "p.rows - first - 1);"),
    replace("sums ? p.d_weight[first_column + thread] : 0.f", "0.f"),
    replace(
        "thread < C::kColumns && first_column + thread < p.width",
        "thread < C::kColumns",
    ),
    replace(
        "first + C::kRows + tile_row, column",
        "first + C::kRows + tile_row + 1, column",
    ),
    replace("row % p.groups * p.width", "0"),
    replace("row_of<T>(rows, row / p.groups)", "row_of<T>(rows, row)"),
    drop_statement("if (!p.x.data) continue"),
    replace("    if (p.x.data) {", "    {"),
    drop_statement("if (p.groups != 1) __trap()"),
    replace(
        "column / L::kColumns * rows_of_sums(p)",
        "column / L::kColumns * p.rows",
    ),
    replace("+ row % L::kRows;", ";"),
    replace("first * p.width + column", "column"),
    replace("row * p.groups + first + i", "row * p.groups + i"),
    replace(
        "mul_rn(r_d_y[e], mul_rn(r_x[e], r_rstd[i]))",
        "mul_rn(r_d_y[e], r_x[e])",
    ),
    drop_statement("if (row >= rows_of_sums(p)) return"),
    replace("row < p.rows ? 0 : p.groups", "0"),
    replace("group += kLoads", "group += 1"),
    replace("group + kLoads <= p.groups", "group < p.groups"),
    replace(
        "g_sums[e * SumsLayout::kRows] = r_sum[e]",
        "g_sums[e] = r_sum[e]",
    ),
    replace("i * L::kRows < rows", "i * L::kRows <= rows"),
    replace("valid ? 16 : 0", "16"),
    drop_statement("cp_async_wait<0>()"),
    replace(
        "stage ^ 1, p, first + C::kRows",
        "stage, p, first + C::kRows",
    ),
    replace(
        "threadIdx.x < C::kAdding && column < p.width",
        "threadIdx.x < C::kAdding",
    ),
    replace("adds ? p.d_weight[column] : 0.f", "0.f"),
    replace("sum += rows.w", "sum += rows.z"),
];

const REDUCE: [Rule; 8] = [
    drop_statement("__syncthreads()"),
    replace("return max_f32(a, b)", "return a"),
    replace("int mask = 16; mask > 0", "int mask = 8; mask > 0"),
    replace(
        "s_warps[threadIdx.x >> 5] = x",
        "s_warps[threadIdx.x >> 6] = x",
    ),
    replace(
        "int warp = 1; warp < (int)blockDim.x / 32",
        "int warp = 1; warp < (int)blockDim.x / 32 - 1",
    ),
    replace("x = s_warps[0]", "x = s_warps[1]"),
    replace("__shfl_xor_sync(0xffffffffu, own.high, mask)", "own.high"),
    replace(
        "if ((threadIdx.x & 31) == 0)",
        "if ((threadIdx.x & 15) == 0)",
    ),
];

const ROPE: [Rule; 20] = [
    replace("first_block <= block", "first_block < block"),
    replace("high - low > 1", "high - low > 2"),
    replace("else high = middle", "else high = middle - 1"),
    replace("blockIdx.x - move.first_block", "blockIdx.x"),
    replace("at.row >= move.rows", "at.row > move.rows"),
    replace("if (move.first_angle >= 0)", "if (true)"),
    replace("move.first_angle + at.row", "move.first_angle"),
    replace("unit % head_units) * kVector", "unit % head_units)"),
    replace(
        "if (at.row >= p.rows) return",
        "if (at.row > p.rows) return",
    ),
    replace(
        "p.angles ? p.angles[at.row] : p.first_angle + at.row",
        "p.first_angle + at.row",
    ),
    replace("p.inverse ? -1.f : 1.f", "1.f"),
    replace("y.lo[e] += before.lo[e]", "y.lo[e] = before.lo[e]"),
    replace("y.hi[e] += before.hi[e]", "y.hi[e] -= before.hi[e]"),
    replace("|| p.probe_rows[at.row] < 0", ""),
    replace("is_key ? p.raw_k : p.v", "is_key ? p.v : p.raw_k"),
    replace("if (plain.data) ", ""),
    replace("- p.q_heads - (is_key ? 0 : p.kv_heads)", "- p.q_heads"),
    replace(
        "place) + head, at.pair, at.half, turned(x, p.cos, p.sin, angle * at.half + at.pair, 1.f)",
        "place) + head, at.pair, at.half, x",
    ),
    replace(
        "is_value = at.head >= p.q_heads + p.kv_heads",
        "is_value = at.head > p.q_heads + p.kv_heads",
    ),
    replace("at.half + at.pair, -1.f)", "at.half + at.pair, 1.f)"),
];

const ROTATION: [Rule; 4] = [
    replace("g_head + half + pair);", "g_head + half);"),
    replace("direction * r_sin[e]", "r_sin[e]"),
    replace("-mul_rn(x.hi[e], sin)", "mul_rn(x.hi[e], sin)"),
    replace(
        "load_vector(r_sin, g_sin + at)",
        "load_vector(r_sin, g_cos + at)",
    ),
];

const ROW_SOFTMAX: [Rule; 8] = [
    replace("return mul_rn(x, inverse)", "return x"),
    replace(
        "column + e < vocab ? g_row[column + e] : SEGATTN_NEG_INF",
        "column + e < vocab ? g_row[column + e] : 0.f",
    ),
    replace("column + e < vocab ? g_row", "column + e <= vocab ? g_row"),
    replace("((uintptr_t)g_row & 15) == 0", "true"),
    replace("return x - max - logf(sum)", "return x - logf(sum)"),
    replace(
        "sum = fma_rn(sum, exp_of(max - reference), part)",
        "sum = sum + part",
    ),
    replace("max = top;", ""),
    replace("mul_rn(sum, exp_of(max - finite_max(row_max)))", "sum"),
];

const LOSS: [Rule; 22] = [
    replace(
        "column + kVector <= vocab && ((uintptr_t)g_row & 15) == 0",
        "((uintptr_t)g_row & 15) == 0",
    ),
    replace(
        "if (column + e < vocab) ((uint16_t*)",
        "if (column + e <= vocab) ((uint16_t*)",
    ),
    replace(
        "softmax.log_probability(g_logits[target])",
        "softmax.log_probability(g_logits[0])",
    ),
    replace("if (!p.d_logits.data) return", ""),
    replace("p.scales[row]", "p.scales[0]"),
    replace("= scale / softmax.sum", "= 1.f / softmax.sum"),
    replace("scale * expm1f(log_probability)", "expm1f(log_probability)"),
    replace("next[e] - softmax.max", "next[e]"),
    drop_statement("__syncthreads()"),
    replace("p.inverse == 1.f ? plain :", "true ? plain :"),
    replace("row_softmax(g_teacher", "row_softmax(g_logits"),
    replace(
        "plain.log_probability(g_logits[target])",
        "own.log_probability(g_logits[target])",
    ),
    replace("p.scales[2 * row]", "p.scales[2 * row + 1]"),
    replace(
        "mul_rn(p.scales[2 * row + 1], p.temperature)",
        "p.scales[2 * row + 1]",
    ),
    replace("logf(own.sum) - logf(teacher.sum)", "logf(own.sum)"),
    replace("over.of(next[e]) - own.max", "over.of(next[e])"),
    replace("over.of(t[e]) - teacher.max", "over.of(t[e]) - own.max"),
    replace("if (q != 0.f) sum", "sum"),
    replace("teacher_log - own_log + offset", "teacher_log - own_log"),
    replace(
        "mul_rn(exp_of(own_log), over_own) - q",
        "mul_rn(exp_of(own_log), over_own)",
    ),
    replace(
        "? of_target : mul_rn(exp_of(next[e] - plain.max), factor)) + learned",
        "? of_target : learned)",
    ),
    replace("block_reduce<SumOf>(sum, shared.maxima)", "sum"),
];

const ADAMW: [Rule; 23] = [
    replace(
        "p.tensors[middle].first_chunk <= chunk",
        "p.tensors[middle].first_chunk < chunk",
    ),
    replace(
        "at + 4 <= len) return *(const float4*)",
        "at + 3 <= len) return *(const float4*)",
    ),
    replace("at + 2 < len ? g[at + 2] : 0.f", "0.f"),
    replace("if (at + 2 < len) g[at + 2] = x.z", ""),
    replace("if (at + 1 < len) g[at + 1] = x.y", "g[at + 1] = x.y"),
    replace("if (at + 2 < len) g[at + 2] = (uint16_t)pairs.y", ""),
    replace("(uint16_t)(pairs.x >> 16)", "(uint16_t)pairs.x"),
    replace(
        "(blockIdx.x - tensor.first_chunk) * C::kChunk",
        "blockIdx.x * C::kChunk",
    ),
    replace(
        "(x * x + y * y) + (z * z + w * w)",
        "(x * x + y * y) + z * z",
    ),
    replace("const double x = g[i].x", "const float x = g[i].x"),
    replace("chunk < p.chunks", "chunk < p.chunks - 1"),
    replace(
        "p.clip_norm >= 0. && norm > p.clip_norm",
        "norm > p.clip_norm",
    ),
    replace("isfinite(norm) && ", ""),
    replace(" && !p.only_measure", ""),
    drop_statement("g = mul_rn(g, clip)"),
    replace("mul_rn(p.rest1, g)", "g"),
    replace("mul_rn(p.rest2, mul_rn(g, g))", "mul_rn(p.rest2, g)"),
    replace(
        "mul_rn(sqrtf(v), p.root) + p.eps",
        "mul_rn(sqrtf(v), p.root)",
    ),
    replace("mul_rn(tensor.keep, w)", "w"),
    replace(
        "w > 0.f ? max_f32(next, tensor.floor) : w",
        "max_f32(next, tensor.floor)",
    ),
    replace("if (!tensor.changes) return", ""),
    replace(
        "store_four(tensor.m, at, tensor.len, m[i])",
        "store_four(tensor.m, at, tensor.len, v[i])",
    ),
    replace("if (tensor.weights) ", ""),
];
