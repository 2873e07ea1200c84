// The preparation of backward: delta = d_out . out - d_lse and lse in base 2 of every row, padding rows included.
#pragma once
#include "attention_gradients.cuh"

// The rows of a block of 4 warps. kLanes lanes read a row, 16 bytes each; a warp reads kPasses such groups of rows.
template <class T_, int kHeadDim>
struct PrepareRows {
  using T = T_;
  static constexpr int kChunks = kHeadDim / 8, kLanes = kHeadDim == 96 ? 16 : kChunks;
  static constexpr int kPasses = 4, kPassRows = 32 / kLanes, kRows = 4 * kPasses * kPassRows;
};

// sum + a . b, of eight elements.
template <class T>
SEGATTN_FN float add_products(float sum, const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum = fma_rn(widen((uint16_t)x[i], T{}), widen((uint16_t)y[i], T{}), sum);
    sum = fma_rn(widen((uint16_t)(x[i] >> 16), T{}), widen((uint16_t)(y[i] >> 16), T{}), sum);
  }
  return sum;
}

// A block's rows belong to one head; padding rows up to row_pitch are written too.
template <class R>
SEGATTN_FN void attention_prepare(const SegattnBackwardParams& p) {
  using T = typename R::T;
  const int lane = threadIdx.x & 31, chunk = lane % R::kLanes, blocks = p.row_pitch / R::kRows,
            of_head = blockIdx.x / blocks;
  const int head = of_head % p.problem.q_heads, batch_index = of_head / p.problem.q_heads;
  const int first =
      blockIdx.x % blocks * R::kRows + (threadIdx.x >> 5) * (R::kPasses * R::kPassRows) + lane / R::kLanes;
  const int rows = min(p.problem.segment_len[batch_index], (int)p.problem.q.rows);
  const Rows<const T> out = Rows<const T>::of(p.out, batch_index, head),
                      d_out = Rows<const T>::of(p.d_out, batch_index, head);
  uint4 x[R::kPasses], y[R::kPasses];
#pragma unroll
  for (int i = 0; i < R::kPasses; i++) {
    const int query = first + i * R::kPassRows;
    x[i] = y[i] = make_uint4(0, 0, 0, 0);
    if (query < rows && chunk < R::kChunks)
      x[i] = *(const uint4*)(out.row(query) + chunk * 8), y[i] = *(const uint4*)(d_out.row(query) + chunk * 8);
  }
#pragma unroll
  for (int i = 0; i < R::kPasses; i++) {
    const int query = first + i * R::kPassRows;
    float delta = add_products<T>(0.f, x[i], y[i]), lse = INFINITY;
#pragma unroll
    for (int mask = R::kLanes / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
    if (chunk != 0) continue;
    if (query < rows) {
      const int64_t row = partial_row(p.problem, 0, batch_index, head, query);
      if (p.d_lse) delta -= p.d_lse[row];
      lse = p.lse[row] * kLog2E;
    }
    p.row_delta[prepared_row(p, batch_index, head, query)] = delta;
    p.row_lse[prepared_row(p, batch_index, head, query)] = lse;
  }
}

template <class R>
constexpr SegattnKernelInfo prepare_info() {
  return {PrepareConfig::kThreads, 0, PrepareConfig::kBlocks, R::kRows, 0, 0, (int)sizeof(SegattnBackwardParams)};
}
