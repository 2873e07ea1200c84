//! The bugs planted into the kernels of sink logits.

use segattn_sim::mutate::{Rule, drop_statement, replace};

pub const SINKS: [Rule; 24] = [
    replace("p.span_start[middle] <= row", "p.span_start[middle] < row"),
    replace("int low = 0, high = p.spans", "int low = 0, high = 1"),
    replace(
        "first * p.q_heads + head * rows + (row - first)",
        "row * p.q_heads + head",
    ),
    replace("head * rows + (row - first)", "head * rows + row"),
    replace("-fabsf(logit - lse)", "fabsf(logit - lse)"),
    replace("-fabsf(logit - lse)", "(logit - lse)"),
    replace(", kLog2E)), all", ", 1.f)), all"),
    replace("all = 1.f + e", "all = 1.f"),
    replace("lse >= logit", "lse <= logit"),
    replace("(is_less ? e : 1.f) / all", "(is_less ? 1.f : e) / all"),
    replace("if (row >= p.rows) return", "if (row > p.rows) return"),
    replace("unit / (int)head_units", "unit % p.q_heads"),
    replace("mul_rn(share, r_x[e])", "r_x[e]"),
    replace(
        "at.row < p.rows && at.column < p.head_dim",
        "at.column < p.head_dim",
    ),
    replace(
        "at.row < p.rows && at.column < p.head_dim",
        "at.row < p.rows",
    ),
    replace("(int64_t)at.head * p.head_dim + at.column", "at.column"),
    replace(
        "fma_rn(r_d_y[e], r_out[e], along)",
        "mul_rn(r_d_y[e], r_out[e])",
    ),
    replace("sum_of_head(along, at.lanes)", "along"),
    drop_statement("if (!is_inside) return"),
    replace("mul_rn(part.share, part.rest)", "part.share"),
    replace(
        "mul_rn(part.share, r_d_y[e])",
        "mul_rn(part.rest, r_d_y[e])",
    ),
    replace(
        "(uint32_t)p.spans * p.q_heads",
        "(uint32_t)p.spans * p.q_heads + 1",
    ),
    replace("row < rows; row += 32", "row < rows; row += 33"),
    replace("p.d_logits[unit] = -sum", "p.d_logits[unit] = sum"),
];
