//! The bugs planted into the kernels of heads' norms: lanes, halves and parts mixed up, terms and roundings left out.

use segattn_sim::mutate::{Rule, drop_statement, replace};

/// `split_qkv_norm` of `rope.cu`.
pub const SPLIT_NORM: [Rule; 15] = [
    replace("at, p.head_dim, p.norms.eps", "at, p.head_dim, 0.f"),
    drop_statement("if (!is_normed) return"),
    replace(
        "at.head < p.q_heads ? p.norms.q_weight : p.norms.k_weight",
        "p.norms.q_weight",
    ),
    replace(
        "mul_rn(mul_rn(r_x[e], rstd), r_weight[e])",
        "mul_rn(r_x[e], mul_rn(rstd, r_weight[e]))",
    ),
    replace("(is_low ? at.column : at.column - half)", "at.column"),
    replace("is_low ? -r_sin[e] : r_sin[e]", "r_sin[e]"),
    replace(
        "at.row < p.rows && at.column < p.head_dim",
        "at.column < p.head_dim",
    ),
    replace(
        "at.row < p.rows && at.column < p.head_dim",
        "at.row < p.rows",
    ),
    replace("is_inside && !is_value, r_x", "is_inside, r_x"),
    replace("(at.column < half ? half : -half)", "half"),
    replace("(threadIdx.x + across) & 31", "threadIdx.x & 31"),
    drop_statement("if (!is_inside) return"),
    drop_statement("if (!p.k.data) return"),
    replace("is_value ? normed_heads : p.q_heads", "p.q_heads"),
    replace("is_value ? p.v : p.raw_k", "is_value ? p.raw_k : p.v"),
];

/// `head_norms_grad` of `norm.cu`.
pub const HEAD_GRAD: [Rule; 12] = [
    replace("r_d_y[e] = mul_rn(r_d_y[e], r_weight[e])", ""),
    replace(
        "along = fma_rn(r_d_y[e], r_x[e], along)",
        "along = mul_rn(r_d_y[e], r_x[e])",
    ),
    replace(
        "at.head < p.q_heads ? p.norms.q_weight : p.norms.k_weight",
        "p.norms.k_weight",
    ),
    replace(
        "is_inside && at.head < p.q_heads + p.kv_heads",
        "is_inside && at.head < p.q_heads",
    ),
    replace("sum_of_head(along, at.lanes)", "along"),
    replace(
        "along / (float)p.head_dim",
        "along / (float)(p.head_dim + 1)",
    ),
    replace("rstd * rstd * rstd;\n    // A", "rstd * rstd;\n    // A"),
    drop_statement("if (!is_inside) return"),
    replace("(int)blockIdx.x < p.blocks ? 0 : 1", "0"),
    replace("blockIdx.x - p.blocks", "blockIdx.x"),
    replace("p.blocks ? 0 : 1", "p.blocks - 1 ? 0 : 1"),
    // Zeros have a sign.
    replace("0.f + fma_rn", "fma_rn"),
];

/// `head_norm.cuh`.
pub const HEAD_NORM: [Rule; 11] = [
    replace("int bits = 5", "int bits = 4"),
    replace("(bits - 1) >= head_dim", "(bits - 1) > head_dim"),
    replace("(int)(unit % heads)", "(int)unit"),
    replace("(index & (lanes - 1)) * kVector", "(index & (lanes - 1))"),
    replace("int mask = lanes / 2", "int mask = lanes / 4"),
    replace("+ eps", "- eps"),
    replace("/ (float)head_dim", "/ (float)(head_dim + 1)"),
    replace("norms.q_rstd + at.row * q_heads", "norms.q_rstd + at.row"),
    replace("(at.head - q_heads)", "at.head"),
    replace("at.row * kv_heads", "at.row"),
    replace("__shfl_sync(0xffffffffu, v.y, lane)", "v.y"),
];
