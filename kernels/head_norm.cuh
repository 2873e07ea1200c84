// Norms of heads of at most 256 elements, a lane a vector of the head. A warp has several heads where they are short: a
// block a row (norm.cu) would leave half of its lanes idle at 128 elements, and 200,000 blocks would bound the time.
// Bits are those of a block a row: lanes without elements add zeros there, so a tree over fewer lanes has equal sums.
#pragma once
#include "reduce.cuh"
#include "vectors.cuh"

// A head is loaded once and kept in registers; its warp waits for two sums, so only other warps have loads in flight.
struct HeadConfig {
  static constexpr int kThreads = 256, kBlocks = 6;
};

// The vector of a lane: its row, head and column, and how many lanes the head has, a power of two. A column beyond the
// head is a lane without elements.
struct HeadPlace {
  int64_t row;
  int head, column, lanes;
};
SEGATTN_FN HeadPlace head_place(uint32_t index, int heads, int head_dim) {
  int bits = 5;
  while (bits > 0 && kVector << (bits - 1) >= head_dim) bits--;
  const uint32_t lanes = 1u << bits, unit = index >> bits;
  return {unit / heads, (int)(unit % heads), (int)(index & (lanes - 1)) * kVector, (int)lanes};
}

// The sum over the lanes of a head. All lanes of the warp call it.
SEGATTN_FN float sum_of_head(float x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) x = SumOf::join(x, shuffle_xor(x, mask));
  return x;
}

SEGATTN_FN float rstd_of_head(const float (&r_x)[kVector], const HeadPlace& at, int head_dim, float eps) {
  float squares = 0.f;
#pragma unroll
  for (int e = 0; e < kVector; e++) squares = fma_rn(r_x[e], r_x[e], squares);
  return 1.f / sqrtf(sum_of_head(squares, at.lanes) / (float)head_dim + eps);
}

// Where the rstd of a head of q or k is.
SEGATTN_FN float* rstd_at(const SegattnHeadNorms& norms, const HeadPlace& at, int q_heads, int kv_heads) {
  if (at.head < q_heads) return norms.q_rstd + at.row * q_heads + at.head;
  return norms.k_rstd + at.row * kv_heads + (at.head - q_heads);
}

// The vector of a lane of this warp.
SEGATTN_FN uint4 vector_of_lane(uint4 v, int lane) {
  return make_uint4(__shfl_sync(0xffffffffu, v.x, lane), __shfl_sync(0xffffffffu, v.y, lane),
                    __shfl_sync(0xffffffffu, v.z, lane), __shfl_sync(0xffffffffu, v.w, lane));
}
