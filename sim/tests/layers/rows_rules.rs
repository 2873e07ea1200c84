//! The bugs planted into the kernels of rows: copies, embeddings, SwiGLU, and what they share.

use segattn_sim::mutate::{Rule, replace};

pub const VECTORS: [Rule; 5] = [
    replace("(uint16_t)(pairs[i] >> 16)", "(uint16_t)pairs[i]"),
    replace("pack<Bf16>(x[2], x[3])", "pack<Bf16>(x[3], x[2])"),
    replace("b = ((const float4*)p)[1]", "b = ((const float4*)p)[0]"),
    replace("row * rows.stride", "row * (rows.stride + 8)"),
    replace(
        "blockIdx.x * blockDim.x + threadIdx.x",
        "blockIdx.x * blockDim.x + threadIdx.x + 1",
    ),
];

pub const SWIGLU: [Rule; 8] = [
    replace("mul_rn(x, -kLog2E)", "mul_rn(x, kLog2E)"),
    replace("if (row >= p.rows) return", "if (row > p.rows) return"),
    replace("+ p.inner + column);\n#pragma", "+ column);\n#pragma"),
    replace(
        "fma_rn(r_gate[e], 1.f - s, 1.f)",
        "fma_rn(r_gate[e], s, 1.f)",
    ),
    replace("mul_rn(r_d_y[e], silu)", "mul_rn(r_d_y[e], s)"),
    replace("mul_rn(r_d_y[e], r_up[e])", "r_d_y[e]"),
    replace(
        "p.d_gate_up, row) + p.inner + column, r_d_up",
        "p.d_gate_up, row) + p.inner + column, r_d_gate",
    ),
    replace("if (p.y.data) ", ""),
];

pub const EMBEDDING: [Rule; 9] = [
    replace("p.table, p.tokens[row]", "p.table, row"),
    replace("if (row >= p.rows) return", "if (row > p.rows) return"),
    replace(
        "if (run >= (uint32_t)p.runs) return",
        "if (run > (uint32_t)p.runs) return",
    ),
    replace("p.run_start[run + 1]", "p.run_start[run + 1] - 1"),
    replace("p.tokens[p.order[first]]", "p.tokens[first]"),
    replace(
        "if (inside) load_vector(r_sum, g_sum)",
        "if (inside) load_vector(r_sum, (const float*)(g_sum + 8))",
    ),
    replace("p.order[at + lane] : 0", "at + lane : 0"),
    replace(
        "if (!inside || at + i >= end) continue",
        "if (!inside) continue",
    ),
    replace("r_sum[e] += r_row[e]", "r_sum[e] = r_row[e]"),
];

pub const COPY: [Rule; 13] = [
    replace(
        "p.vectors ? p.width / kVector : p.width",
        "p.width / kVector",
    ),
    replace("if (row >= p.rows) return", "if (row > p.rows) return"),
    replace("index % row_threads", "index"),
    replace("* (p.vectors ? kVector : 1)", ""),
    replace(
        "row_of<const Src>(p.src, row) + column",
        "row_of<const Src>(p.src, row)",
    ),
    replace(
        "row_of<Dst>(p.dst, row) + column",
        "row_of<Dst>(p.dst, row)",
    ),
    replace("mul_rn(p.factor, load_one(g_src))", "load_one(g_src)"),
    replace("load_one(g_dst) + x : x", "x : load_one(g_dst) + x"),
    replace("load_one(g_dst) + x", "x"),
    replace("r_x[i] = mul_rn(p.factor, r_x[i])", ""),
    replace("load_vector(r_sum, g_dst)", "load_vector(r_sum, g_src)"),
    replace("r_x[i] = r_sum[i] + r_x[i]", "r_x[i] += 0.f"),
    replace("store_vector(g_dst, r_x)", "store_vector(g_dst, r_sum)"),
];
