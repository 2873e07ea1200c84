// Cross entropy of rows of logits [rows, vocab]. The host calls it for a few rows of the LM head's product at a time:
//   log_probability[r] = ln softmax(logits[r])[target[r]]
//   d_logits[r]        = scale[r] (softmax(logits[r]) - onehot(target[r]))       set, where asked
// With scale[r] = weight[r] / sum of weights the latter is the gradient of the weighted mean of negative
// log-probabilities; a scale of 0 gives zeros. At the target, p - 1 is
// expm1(log_probability), which is as accurate as the sum. d_logits may overlap the first half of the logits. Bytes a
// logit: 4, with the gradient 10.
#include "row_softmax.cuh"

struct LossConfig {
  static constexpr int kThreads = kMaxRowThreads, kBlocks = 1;
};

SEGATTN_FN void store_gradient(Bf16* g_row, int column, int vocab, const float (&x)[kVector]) {
  if (column + kVector <= vocab && ((uintptr_t)g_row & 15) == 0) return store_vector(g_row + column, x);
#pragma unroll
  for (int e = 0; e < kVector; e++)
    if (column + e < vocab) ((uint16_t*)g_row)[column + e] = (uint16_t)pack<Bf16>(x[e], 0.f);
}

SEGATTN_FN void cross_entropy(const SegattnLossParams& p) {
  if ((int)blockDim.x != softmax_threads(p.vocab)) __trap();
  RowSoftmaxShared& shared = *(RowSoftmaxShared*)shared_memory();
  const int64_t row = blockIdx.x;
  const float* g_logits = row_of<const float>(p.logits, row);
  const int target = (int)p.targets[row];
  const RowSoftmax softmax = row_softmax(g_logits, p.vocab, shared);
  const float log_probability = softmax.log_probability(g_logits[target]);
  if (threadIdx.x == 0) p.log_probability[row] = log_probability;
  if (!p.d_logits.data) return;
  const float scale = p.scales[row];
  const float factor = scale / softmax.sum, of_target = scale * expm1f(log_probability);
  Bf16* g_d_logits = row_of<Bf16>(p.d_logits, row);
  const int step = blockDim.x * kVector;
  float x[kVector], next[kVector];
  load_logits(next, g_logits, threadIdx.x * kVector, p.vocab);
  for (int first = 0; first < p.vocab; first += step) {
    const int column = first + threadIdx.x * kVector;
#pragma unroll
    for (int e = 0; e < kVector; e++) x[e] = mul_rn(exp_of(next[e] - softmax.max), factor);
    if (target >= column && target < column + kVector)
#pragma unroll
      for (int e = 0; e < kVector; e++)
        if (target == column + e) x[e] = of_target;
    load_logits(next, g_logits, column + step, p.vocab);
    __syncthreads();  // d_logits may overwrite the logits: all threads have read them
    store_gradient(g_d_logits, column, p.vocab, x);
  }
}

// ---------------------------------------------------------------------------------------------------- entry points

// A block a row, softmax_threads(vocab) threads.
SEGATTN_INFO(cross_entropy_bf16, (SegattnKernelInfo{LossConfig::kThreads, sizeof(RowSoftmaxShared), LossConfig::kBlocks,
                                                    1, 0, 0, sizeof(SegattnLossParams)}))
SEGATTN_KERNEL(cross_entropy_bf16, LossConfig, SegattnLossParams) { cross_entropy(params); }
