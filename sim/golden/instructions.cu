// One kernel for each function of kernels/ptx.cuh. record.cu runs them on a GPU and keeps inputs and results; the test
// `golden` runs the same file in the simulator on those inputs. Every kernel is one block of one warp.
#include "ptx.cuh"

struct GoldenParams {
  const void* in;    // [count] records of the kernel's own shape
  const void* more;  // a second input, or null
  void* out;         // as the kernel says
  int32_t count;
};

#define GOLDEN(name) \
  extern "C" __global__ void __launch_bounds__(32) name(const __grid_constant__ GoldenParams p)

// The warp's lanes share out the records.
template <class In, class Out, class F>
SEGATTN_FN void for_each(const GoldenParams& p, F f) {
  for (int i = threadIdx.x; i < p.count; i += 32) ((Out*)p.out)[i] = f(((const In*)p.in)[i]);
}

// ---------------------------------------------------------------------------------------------------- arithmetic

GOLDEN(golden_exp2_approx) {
  for_each<float, float>(p, [](float x) { return exp2_approx(x); });
}
GOLDEN(golden_log2_approx) {
  for_each<float, float>(p, [](float x) { return log2_approx(x); });
}
GOLDEN(golden_fma_rn) {
  for_each<float4, float>(p, [](float4 x) { return fma_rn(x.x, x.y, x.z); });
}
GOLDEN(golden_mul_rn) {
  for_each<float2, float>(p, [](float2 x) { return mul_rn(x.x, x.y); });
}
GOLDEN(golden_max_f32) {
  for_each<float2, float>(p, [](float2 x) { return max_f32(x.x, x.y); });
}
GOLDEN(golden_pack_two_bf16) {
  for_each<float2, uint32_t>(p, [](float2 x) { return pack_two(x.x, x.y, Bf16{}); });
}
GOLDEN(golden_pack_two_f16) {
  for_each<float2, uint32_t>(p, [](float2 x) { return pack_two(x.x, x.y, F16{}); });
}
GOLDEN(golden_widen_bf16) {
  for_each<uint16_t, float>(p, [](uint16_t x) { return widen(x, Bf16{}); });
}
GOLDEN(golden_widen_f16) {
  for_each<uint16_t, float>(p, [](uint16_t x) { return widen(x, F16{}); });
}
GOLDEN(golden_opaque) {
  for_each<int32_t, int32_t>(p, [](int32_t x) { return opaque(x); });
}

// ---------------------------------------------------------------------------------------------------- the warp

// in: [count, 32] f32; more: [count] masks; out: [count, 32].
GOLDEN(golden_shuffle_xor) {
  for (int i = 0; i < p.count; i++)
    ((float*)p.out)[i * 32 + threadIdx.x] = shuffle_xor(((const float*)p.in)[i * 32 + threadIdx.x], ((const int*)p.more)[i]);
}
// in: [count] one bit a lane; out: [count, 32].
GOLDEN(golden_warp_any) {
  for (int i = 0; i < p.count; i++)
    ((uint32_t*)p.out)[i * 32 + threadIdx.x] = warp_any(((const uint32_t*)p.in)[i] >> threadIdx.x & 1);
}
// in: [count] summands; out: [1 + 32 + count]: a counter that begins at 0xfffffff0, for every value that 32 lanes were
// given how many got it, and what lane 0 was given when it added each summand.
GOLDEN(golden_atomic_add) {
  uint32_t* counter = (uint32_t*)p.out;
  if (threadIdx.x == 0) *counter = 0xfffffff0u;
  counter[1 + threadIdx.x] = 0;
  __syncwarp();
  atomic_add(&counter[1 + ((atomic_add(counter, 1) - 0xfffffff0u) & 31)], 1);
  __syncwarp();
  if (threadIdx.x != 0) return;
  for (int i = 0; i < p.count; i++) counter[33 + i] = atomic_add(counter, ((const uint32_t*)p.in)[i]);
}

// ---------------------------------------------------------------------------------------------------- matrices

// in: [count, 32] rows of 16 bytes; more: [count, 32]: the row each lane points at; out: [count, 32] four registers.
template <bool kTrans>
SEGATTN_FN void golden_ldmatrix(const GoldenParams& p) {
  uint4* s_rows = (uint4*)shared_memory();
  for (int i = 0; i < p.count; i++) {
    s_rows[threadIdx.x] = ((const uint4*)p.in)[i * 32 + threadIdx.x];
    __syncwarp();
    uint32_t r[4];
    const SharedAddress row = shared_address(s_rows + ((const int*)p.more)[i * 32 + threadIdx.x]);
    if (kTrans) ldmatrix_x4_trans(r, row);
    else ldmatrix_x4(r, row);
    ((uint4*)p.out)[i * 32 + threadIdx.x] = make_uint4(r[0], r[1], r[2], r[3]);
    __syncwarp();
  }
}
GOLDEN(golden_ldmatrix_x4) { golden_ldmatrix<false>(p); }
GOLDEN(golden_ldmatrix_x4_trans) { golden_ldmatrix<true>(p); }

// in: [count, 32] operands, a in x..w and b in the next two; more: [count, 32, 4] accumulators; out: like more.
struct MmaOperands {
  uint32_t a[4], b[2];
};
template <class T>
SEGATTN_FN void golden_mma(const GoldenParams& p) {
  for (int i = 0; i < p.count; i++) {
    const int at = i * 32 + threadIdx.x;
    const MmaOperands& in = ((const MmaOperands*)p.in)[at];
    const float4 c = ((const float4*)p.more)[at];
    const uint32_t a[4] = {in.a[0], in.a[1], in.a[2], in.a[3]};
    float d[4] = {c.x, c.y, c.z, c.w};
    mma_16x8x16(d, a, in.b[0], in.b[1], T{});
    ((float4*)p.out)[at] = make_float4(d[0], d[1], d[2], d[3]);
  }
}
GOLDEN(golden_mma_16x8x16_bf16) { golden_mma<Bf16>(p); }
GOLDEN(golden_mma_16x8x16_f16) { golden_mma<F16>(p); }

// ---------------------------------------------------------------------------------------------------- copies

// in: [count, 32] 16 bytes; more: [count, 32] bytes that are read, 0 or 16; out: like in. Two groups are in flight at a
// time, and a record is read when only the newer one may still be.
GOLDEN(golden_cp_async_16) {
  uint4* s_stages = (uint4*)shared_memory();
  for (int i = 0; i <= p.count; i++) {
    const int at = i * 32 + threadIdx.x;
    if (i < p.count)
      cp_async_16(shared_address(&s_stages[i % 2 * 32 + threadIdx.x]), (const uint4*)p.in + at, ((const uint32_t*)p.more)[at]);
    cp_async_commit();
    if (i == 0) continue;
    cp_async_wait<1>();
    ((uint4*)p.out)[at - 32] = s_stages[(i - 1) % 2 * 32 + threadIdx.x];
  }
  cp_async_wait<0>();
}
