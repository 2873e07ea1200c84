// Sink logits (docs/contract.md, section 2): attention's output times what a learned logit of the head leaves of it.
//   sink_logits       y = share out
//   sink_logits_grad  d_out = share d_y,  d_lse = share rest (d_y . out)
//   sink_logits_sums  d_logits = -(sum of d_lse over the rows of a span)
// with e = exp(-|logit - lse|), share = (lse >= logit ? 1 : e) / (1 + e) and rest = 1 - share. The log-sum-exp lies
// [q_heads, rows] for each span, spans one after another, while rows lie [rows, q_heads * head_dim].
// The forward has a thread a vector, the gradient a lane a vector and a head a power of two of lanes. Sums are of one
// row and head, or of one head of one span: a lane every 32nd row, then a tree over the lanes. So bits depend on the
// span's own rows alone. Bytes a row and element: forward 4, gradient 6.
#include "head_norm.cuh"
#include "softmax.cuh"

struct SinkConfig {
  static constexpr int kThreads = 256, kBlocks = 6;
};

// The span of a row: the last that begins at it or before. A span has at least one row.
SEGATTN_FN int span_of_row(const SegattnSinkParams& p, int64_t row) {
  int low = 0, high = p.spans;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.span_start[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}

// Where the log-sum-exp of a row and head is.
SEGATTN_FN int64_t lse_at(const SegattnSinkParams& p, int64_t row, int head) {
  const int span = span_of_row(p, row);
  const int64_t first = p.span_start[span], rows = p.span_start[span + 1] - first;
  return first * p.q_heads + head * rows + (row - first);
}

// What the sink leaves, and what it takes. Of NaN both are NaN.
struct Shares {
  float share, rest;
};
SEGATTN_FN Shares shares(float logit, float lse) {
  const float e = exp2_approx(mul_rn(-fabsf(logit - lse), kLog2E)), all = 1.f + e;
  const bool is_less = lse >= logit;
  return {(is_less ? 1.f : e) / all, (is_less ? e : 1.f) / all};
}

SEGATTN_FN void sink_logits(const SegattnSinkParams& p) {
  const uint32_t index = thread_index(), head_units = p.head_dim / kVector, row_units = p.q_heads * head_units;
  const int64_t row = index / row_units;
  if (row >= p.rows) return;
  const int unit = (int)(index % row_units), head = unit / (int)head_units;
  const float share = shares(p.logits[head], p.lse[lse_at(p, row, head)]).share;
  float r_x[kVector];
  load_vector(r_x, row_of<const Bf16>(p.out, row) + unit * kVector);
#pragma unroll
  for (int e = 0; e < kVector; e++) r_x[e] = mul_rn(share, r_x[e]);
  store_vector(row_of<Bf16>(p.y, row) + unit * kVector, r_x);
}

SEGATTN_FN void sink_logits_grad(const SegattnSinkParams& p) {
  const HeadPlace at = head_place(thread_index(), p.q_heads, p.head_dim);
  const bool is_inside = at.row < p.rows && at.column < p.head_dim;
  const int64_t column = (int64_t)at.head * p.head_dim + at.column;
  float r_out[kVector] = {}, r_d_y[kVector] = {}, along = 0.f;
  if (is_inside) {
    load_vector(r_out, row_of<const Bf16>(p.out, at.row) + column);
    load_vector(r_d_y, row_of<const Bf16>(p.d_y, at.row) + column);
#pragma unroll
    for (int e = 0; e < kVector; e++) along = fma_rn(r_d_y[e], r_out[e], along);
  }
  along = sum_of_head(along, at.lanes);
  if (!is_inside) return;
  const int64_t lse_place = lse_at(p, at.row, at.head);
  const Shares part = shares(p.logits[at.head], p.lse[lse_place]);
  if (at.column == 0) p.d_lse[lse_place] = mul_rn(mul_rn(part.share, part.rest), along);
#pragma unroll
  for (int e = 0; e < kVector; e++) r_d_y[e] = mul_rn(part.share, r_d_y[e]);
  store_vector(row_of<Bf16>(p.d_out, at.row) + column, r_d_y);
}

// One warp a head of a span.
SEGATTN_FN void sink_logits_sums(const SegattnSinkParams& p) {
  const uint32_t index = thread_index(), unit = index / 32, lane = index % 32;
  if (unit >= (uint32_t)p.spans * p.q_heads) return;
  const int span = (int)(unit / p.q_heads), head = (int)(unit % p.q_heads);
  const int64_t first = p.span_start[span], rows = p.span_start[span + 1] - first;
  const float* g_d_lse = p.d_lse + first * p.q_heads + head * rows;
  float sum = 0.f;
  for (int64_t row = lane; row < rows; row += 32) sum += g_d_lse[row];
  sum = warp_reduce<SumOf>(sum);
  if (lane == 0) p.d_logits[unit] = -sum;
}

// ---------------------------------------------------------------------------------------------------- entry points

// rows * q_heads * head_dim / 8 threads.
SEGATTN_INFO(sink_logits_bf16,
             (SegattnKernelInfo{SinkConfig::kThreads, 0, SinkConfig::kBlocks, 0, 0, 0, sizeof(SegattnSinkParams)}))
SEGATTN_KERNEL(sink_logits_bf16, SinkConfig, SegattnSinkParams) { sink_logits(params); }
// rows * q_heads threads times head_dim / 8, rounded up to a power of two.
SEGATTN_INFO(sink_logits_grad_bf16,
             (SegattnKernelInfo{SinkConfig::kThreads, 0, SinkConfig::kBlocks, 0, 0, 0, sizeof(SegattnSinkParams)}))
SEGATTN_KERNEL(sink_logits_grad_bf16, SinkConfig, SegattnSinkParams) { sink_logits_grad(params); }
// 32 threads a span and head.
SEGATTN_INFO(sink_logits_sums_f32,
             (SegattnKernelInfo{SinkConfig::kThreads, 0, SinkConfig::kBlocks, 0, 0, 0, sizeof(SegattnSinkParams)}))
SEGATTN_KERNEL(sink_logits_sums_f32, SinkConfig, SegattnSinkParams) { sink_logits_sums(params); }
