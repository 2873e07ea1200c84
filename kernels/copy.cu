// Copies of rows [rows, width] between buffers of either precision: dst = factor src, or dst += factor src, in f32 and
// rounded to dst once. No sums over elements, so an element's bits are its own. Bytes an element: those of both sides
// (and dst once more for +=).
#include "vectors.cuh"

struct CopyConfig {
  static constexpr int kThreads = 256, kBlocks = 8;
};

template <class Src, class Dst>
SEGATTN_FN void copy(const SegattnCopyParams& p) {
  const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t row_threads = p.vectors ? p.width / kVector : p.width;
  const int64_t row = index / row_threads;
  if (row >= p.rows) return;
  const int column = (int)(index % row_threads) * (p.vectors ? kVector : 1);
  const Src* g_src = row_of<const Src>(p.src, row) + column;
  Dst* g_dst = row_of<Dst>(p.dst, row) + column;
  if (!p.vectors) {
    const float x = mul_rn(p.factor, load_one(g_src));
    store_one(g_dst, p.add ? load_one(g_dst) + x : x);
    return;
  }
  float r_x[kVector], r_sum[kVector];
  load_vector(r_x, g_src);
#pragma unroll
  for (int i = 0; i < kVector; i++) r_x[i] = mul_rn(p.factor, r_x[i]);
  if (p.add) {
    load_vector(r_sum, g_dst);
#pragma unroll
    for (int i = 0; i < kVector; i++) r_x[i] = r_sum[i] + r_x[i];
  }
  store_vector(g_dst, r_x);
}

// ---------------------------------------------------------------------------------------------------- entry points

// A thread eight elements where p.vectors, else one: rows * width / 8 threads, or rows * width.
#define COPY(name, Src, Dst)                                                                                          \
  SEGATTN_INFO(name,                                                                                                  \
               (SegattnKernelInfo{CopyConfig::kThreads, 0, CopyConfig::kBlocks, 0, 0, 0, sizeof(SegattnCopyParams)})) \
  SEGATTN_KERNEL(name, CopyConfig, SegattnCopyParams) { copy<Src, Dst>(params); }

COPY(copy_bf16_bf16, Bf16, Bf16)
COPY(copy_bf16_f32, Bf16, float)
COPY(copy_f32_bf16, float, Bf16)
COPY(copy_f32_f32, float, float)
