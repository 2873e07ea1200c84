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

// The same with a teacher's rows, both over a temperature T in p and q:
//   divergence[r] = sum of q (ln q - ln p),   p = softmax(logits[r] / T), q = softmax(teacher[r] / T)
//   d_logits[r]   = scales[r][0] (softmax(logits[r]) - onehot(target[r])) + scales[r][1] T (p - q)
// Log-probabilities have the bits of cross_entropy. Equal rows have divergence 0 and p - q = 0. Bytes a logit: 18, and
// 4 more where T is not 1.
SEGATTN_FN void divergence(const SegattnDivergenceParams& p) {
  if ((int)blockDim.x != softmax_threads(p.vocab)) __trap();
  RowSoftmaxShared& shared = *(RowSoftmaxShared*)shared_memory();
  const int64_t row = blockIdx.x;
  const float* g_logits = row_of<const float>(p.logits, row);
  const float* g_teacher = row_of<const float>(p.teacher, row);
  const int target = (int)p.targets[row];
  const Tempered over{p.inverse};
  // A softmax reads shared.sums last and writes shared.maxima first, and a barrier is between.
  const RowSoftmax plain = row_softmax(g_logits, p.vocab, shared);
  const RowSoftmax own = p.inverse == 1.f ? plain : row_softmax(g_logits, p.vocab, shared, over);
  const RowSoftmax teacher = row_softmax(g_teacher, p.vocab, shared, over);
  const float log_probability = plain.log_probability(g_logits[target]);
  const float scale = p.scales[2 * row], factor = scale / plain.sum, of_target = mul_rn(scale, expm1f(log_probability));
  const float slope = mul_rn(p.scales[2 * row + 1], p.temperature);
  const float over_own = 1.f / own.sum, over_teacher = 1.f / teacher.sum;
  const float offset = logf(own.sum) - logf(teacher.sum);
  Bf16* g_d_logits = row_of<Bf16>(p.d_logits, row);
  const int step = blockDim.x * kVector;
  float x[kVector], next[kVector], t[kVector], sum = 0.f;
  load_logits(next, g_logits, threadIdx.x * kVector, p.vocab);
  for (int first = 0; first < p.vocab; first += step) {
    const int column = first + threadIdx.x * kVector;
    load_logits(t, g_teacher, column, p.vocab);
#pragma unroll
    for (int e = 0; e < kVector; e++) {
      const float own_log = over.of(next[e]) - own.max, teacher_log = over.of(t[e]) - teacher.max;
      const float q = mul_rn(exp_of(teacher_log), over_teacher);
      // Where q is 0 nothing is added, whatever p is. NaN is not 0, so it is passed on.
      if (q != 0.f) sum = fma_rn(q, teacher_log - own_log + offset, sum);
      const float learned = mul_rn(slope, mul_rn(exp_of(own_log), over_own) - q);
      x[e] = (target == column + e ? of_target : mul_rn(exp_of(next[e] - plain.max), factor)) + learned;
    }
    load_logits(next, g_logits, column + step, p.vocab);
    __syncthreads();  // d_logits may overwrite the logits: all threads have read them
    store_gradient(g_d_logits, column, p.vocab, x);
  }
  const float all = block_reduce<SumOf>(sum, shared.maxima);
  if (threadIdx.x == 0) p.log_probability[row] = log_probability, p.divergence[row] = all;
}

// ---------------------------------------------------------------------------------------------------- entry points

// A block a row, softmax_threads(vocab) threads.
SEGATTN_INFO(cross_entropy_bf16, (SegattnKernelInfo{LossConfig::kThreads, sizeof(RowSoftmaxShared), LossConfig::kBlocks,
                                                    1, 0, 0, sizeof(SegattnLossParams)}))
SEGATTN_KERNEL(cross_entropy_bf16, LossConfig, SegattnLossParams) { cross_entropy(params); }

// A block a row, softmax_threads(vocab) threads.
SEGATTN_INFO(divergence_bf16, (SegattnKernelInfo{LossConfig::kThreads, sizeof(RowSoftmaxShared), LossConfig::kBlocks, 1,
                                                 0, 0, sizeof(SegattnDivergenceParams)}))
SEGATTN_KERNEL(divergence_bf16, LossConfig, SegattnDivergenceParams) { divergence(params); }
