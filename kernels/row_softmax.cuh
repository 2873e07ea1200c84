// Softmax of a row of logits by one block. The row's length decides the order of maxima and sums. Loss and sampler
// share it, so that a sampled token has the log-probability that the loss computes for it, to the bit.
#pragma once
#include "reduce.cuh"
#include "softmax.cuh"
#include "vectors.cuh"

// Threads of a row. The number decides the order of the sum, and so the bits.
constexpr int kMaxRowThreads = 1024;
SEGATTN_FN int softmax_threads(int vocab) {
  return min(kMaxRowThreads, max(1, ceil_div(vocab, 2 * kVector * 32)) * 32);
}

// Loads eight elements from `column` on; from `vocab` on they are -inf. A row may begin at any element.
SEGATTN_FN void load_logits(float (&x)[kVector], const float* g_row, int column, int vocab) {
  if (column + kVector <= vocab && ((uintptr_t)g_row & 15) == 0) return load_vector(x, g_row + column);
#pragma unroll
  for (int e = 0; e < kVector; e++) x[e] = column + e < vocab ? g_row[column + e] : SEGATTN_NEG_INF;
}

struct RowSoftmax {
  float max, sum;  // sum of exp(x - max)
  __device__ __forceinline__ float log_probability(float x) const { return x - max - logf(sum); }
};

// What a row's elements are before the softmax: logits over a temperature.
struct Plain {
  SEGATTN_FN float of(float x) { return x; }
};
struct Tempered {
  float inverse;
  __device__ __forceinline__ float of(float x) const { return mul_rn(x, inverse); }
};

SEGATTN_FN float exp_of(float x) { return exp2_approx(mul_rn(x, kLog2E)); }

struct RowSoftmaxShared {
  float maxima[kMaxWarps], sums[kMaxWarps];
};

// One pass over the row: each thread keeps a running maximum and sum; the block then combines them.
template <class Scale = Plain>
SEGATTN_FN RowSoftmax row_softmax(const float* g_row, int vocab, RowSoftmaxShared& shared, Scale scale = {}) {
  float max = SEGATTN_NEG_INF, sum = 0.f;
  for (int column = threadIdx.x * kVector; column < vocab; column += blockDim.x * kVector) {
    float x[kVector], top = max, part = 0.f;
    load_logits(x, g_row, column, vocab);
#pragma unroll
    for (int e = 0; e < kVector; e++) top = max_f32(top, x[e] = scale.of(x[e]));
    const float reference = finite_max(top);
#pragma unroll
    for (int e = 0; e < kVector; e++) part += exp_of(x[e] - reference);
    sum = fma_rn(sum, exp_of(max - reference), part);
    max = top;
  }
  const float row_max = block_reduce<MaxOf>(max, shared.maxima);
  const float row_sum = block_reduce<SumOf>(mul_rn(sum, exp_of(max - finite_max(row_max))), shared.sums);
  return {row_max, row_sum};
}
