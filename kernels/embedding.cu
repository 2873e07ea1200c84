// The embedding: rows of a table by token.
//   embed       y[r] = table[tokens[r]]
//   embed_grad  d_table[t] += sum over rows r with tokens[r] = t of d_y[r], one chain over rows in ascending order
// The host hands in the rows sorted by token (order, run_start), so that every row of the table has one writer.
// Bytes a row and element: forward 4, gradient 2 and 8 for every distinct token.
#include "vectors.cuh"

struct EmbedConfig {
  static constexpr int kThreads = 256, kBlocks = 6;
};
// One warp has 256 columns of one token: the rows of a frequent token are read sixteen at a time, added one by one.
struct EmbedGradConfig {
  static constexpr int kThreads = 128, kBlocks = 3;
  static constexpr int kRowsInFlight = 16;
};

SEGATTN_FN void embed(const SegattnEmbedParams& p) {
  const uint32_t index = thread_index(), row_units = p.width / kVector;
  const int column = (int)(index % row_units) * kVector;
  const int64_t row = index / row_units;
  if (row >= p.rows) return;
  *(uint4*)(row_of<Bf16>(p.y, row) + column) = *(const uint4*)(row_of<const Bf16>(p.table, p.tokens[row]) + column);
}

SEGATTN_FN void embed_grad(const SegattnEmbedParams& p) {
  using C = EmbedGradConfig;
  const uint32_t index = thread_index() / 32, column_parts = ceil_div(p.width, 32 * kVector),
                 run = index / column_parts;
  const int lane = threadIdx.x % 32, column = ((int)(index % column_parts) * 32 + lane) * kVector;
  if (run >= (uint32_t)p.runs) return;
  const int first = p.run_start[run], end = p.run_start[run + 1];
  const bool inside = column < p.width;
  float* g_sum = row_of<float>(p.d_table, p.tokens[p.order[first]]) + column;
  float r_sum[kVector];
  if (inside) load_vector(r_sum, g_sum);
  for (int at = first; at < end; at += C::kRowsInFlight) {
    // Each lane fetches a row's number, so that rows do not wait for theirs one after the other.
    const int own = at + lane < end ? p.order[at + lane] : 0;
    uint4 r_rows[C::kRowsInFlight];
#pragma unroll
    for (int i = 0; i < C::kRowsInFlight; i++) {
      const int row = __shfl_sync(0xffffffffu, own, i);
      if (inside && at + i < end) r_rows[i] = *(const uint4*)(row_of<const Bf16>(p.y, row) + column);
    }
#pragma unroll
    for (int i = 0; i < C::kRowsInFlight; i++) {
      if (!inside || at + i >= end) continue;
      float r_row[kVector];
      unpack_vector(r_row, r_rows[i]);
#pragma unroll
      for (int e = 0; e < kVector; e++) r_sum[e] += r_row[e];
    }
  }
  if (inside) store_vector(g_sum, r_sum);
}

// ---------------------------------------------------------------------------------------------------- entry points

// embed: a thread eight elements, rows * width / 8 threads. embed_grad: a warp a token and 256 columns,
// runs * ceil(width / 256) warps.
SEGATTN_INFO(embed_bf16,
             (SegattnKernelInfo{EmbedConfig::kThreads, 0, EmbedConfig::kBlocks, 0, 0, 0, sizeof(SegattnEmbedParams)}))
SEGATTN_KERNEL(embed_bf16, EmbedConfig, SegattnEmbedParams) { embed(params); }
SEGATTN_INFO(embed_grad_bf16, (SegattnKernelInfo{EmbedGradConfig::kThreads, 0, EmbedGradConfig::kBlocks, 0, 0, 0,
                                                 sizeof(SegattnEmbedParams)}))
SEGATTN_KERNEL(embed_grad_bf16, EmbedGradConfig, SegattnEmbedParams) { embed_grad(params); }
