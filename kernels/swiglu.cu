// SwiGLU (Shazeer 2020), rows [gate | up] of 2 * inner:
//   swiglu       y = silu(gate) up, where silu(x) = x sigmoid(x)
//   swiglu_grad  d_up = d_y silu(gate),  d_gate = d_y up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
//                and, where asked, y once more, which the gradient of the next weight needs
// A thread has eight elements; no sums. Bytes a row and element of inner: forward 6, gradient 10 (with y 12).
#include "softmax.cuh"
#include "vectors.cuh"

struct SwigluConfig {
  static constexpr int kThreads = 256, kBlocks = 5;
};

// For x below -126 ln 2 the exponential overflows to infinity and the result is 0, as it should be.
SEGATTN_FN float sigmoid(float x) { return 1.f / (1.f + exp2_approx(mul_rn(x, -kLog2E))); }

SEGATTN_FN void swiglu(const SegattnSwigluParams& p) {
  const uint32_t index = thread_index(), row_units = p.inner / kVector;
  const int column = (int)(index % row_units) * kVector;
  const int64_t row = index / row_units;
  if (row >= p.rows) return;
  float r_gate[kVector], r_up[kVector];
  load_vector(r_gate, row_of<const Bf16>(p.gate_up, row) + column);
  load_vector(r_up, row_of<const Bf16>(p.gate_up, row) + p.inner + column);
#pragma unroll
  for (int e = 0; e < kVector; e++) r_up[e] = mul_rn(mul_rn(r_gate[e], sigmoid(r_gate[e])), r_up[e]);
  store_vector(row_of<Bf16>(p.y, row) + column, r_up);
}

SEGATTN_FN void swiglu_grad(const SegattnSwigluParams& p) {
  const uint32_t index = thread_index(), row_units = p.inner / kVector;
  const int column = (int)(index % row_units) * kVector;
  const int64_t row = index / row_units;
  if (row >= p.rows) return;
  float r_gate[kVector], r_up[kVector], r_d_y[kVector];
  load_vector(r_gate, row_of<const Bf16>(p.gate_up, row) + column);
  load_vector(r_up, row_of<const Bf16>(p.gate_up, row) + p.inner + column);
  load_vector(r_d_y, row_of<const Bf16>(p.d_y, row) + column);
  float r_y[kVector], r_d_gate[kVector], r_d_up[kVector];
#pragma unroll
  for (int e = 0; e < kVector; e++) {
    const float s = sigmoid(r_gate[e]), silu = mul_rn(r_gate[e], s);
    r_y[e] = mul_rn(silu, r_up[e]);
    r_d_up[e] = mul_rn(r_d_y[e], silu);
    r_d_gate[e] = mul_rn(mul_rn(mul_rn(r_d_y[e], r_up[e]), s), fma_rn(r_gate[e], 1.f - s, 1.f));
  }
  store_vector(row_of<Bf16>(p.d_gate_up, row) + column, r_d_gate);
  store_vector(row_of<Bf16>(p.d_gate_up, row) + p.inner + column, r_d_up);
  if (p.y.data) store_vector(row_of<Bf16>(p.y, row) + column, r_y);
}

// ---------------------------------------------------------------------------------------------------- entry points

// A thread eight elements: rows * inner / 8 threads.
SEGATTN_INFO(swiglu_bf16, (SegattnKernelInfo{SwigluConfig::kThreads, 0, SwigluConfig::kBlocks, 0, 0, 0,
                                             sizeof(SegattnSwigluParams)}))
SEGATTN_KERNEL(swiglu_bf16, SwigluConfig, SegattnSwigluParams) { swiglu(params); }
SEGATTN_INFO(swiglu_grad_bf16, (SegattnKernelInfo{SwigluConfig::kThreads, 0, SwigluConfig::kBlocks, 0, 0, 0,
                                                  sizeof(SegattnSwigluParams)}))
SEGATTN_KERNEL(swiglu_grad_bf16, SwigluConfig, SegattnSwigluParams) { swiglu_grad(params); }
