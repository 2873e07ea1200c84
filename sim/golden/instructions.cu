// One kernel for each function of kernels/ptx.cuh. record.cu runs them on a GPU and keeps inputs and results; the test
// `golden` runs the same file in the simulator on those inputs. Every kernel is one block: of one warp, or where
// products of a warpgroup are recorded, of 128 threads.
#include "tile.cuh"

struct GoldenParams {
  const void* in;    // [count] records of the kernel's own shape
  const void* more;  // a second input, or null
  void* out;         // as the kernel says
  int32_t count;
};

#define GOLDEN(name) extern "C" __global__ void __launch_bounds__(32) name(const __grid_constant__ GoldenParams p)
#define GOLDEN_WARPGROUP(name) \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ GoldenParams p)

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
    ((float*)p.out)[i * 32 + threadIdx.x] =
        shuffle_xor(((const float*)p.in)[i * 32 + threadIdx.x], ((const int*)p.more)[i]);
}
// The same of integers.
GOLDEN(golden_shuffle_xor_bits) {
  for (int i = 0; i < p.count; i++)
    ((uint32_t*)p.out)[i * 32 + threadIdx.x] =
        shuffle_xor(((const uint32_t*)p.in)[i * 32 + threadIdx.x], ((const int*)p.more)[i]);
}
// in: [count, 32], of which the first lane's value counts; out: [count, 32].
GOLDEN(golden_uniform) {
  for (int i = 0; i < p.count; i++)
    ((int32_t*)p.out)[i * 32 + threadIdx.x] = uniform(((const int32_t*)p.in)[i * 32 + threadIdx.x]);
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
      cp_async_16(shared_address(&s_stages[i % 2 * 32 + threadIdx.x]), (const uint4*)p.in + at,
                  ((const uint32_t*)p.more)[at]);
    cp_async_commit();
    if (i == 0) continue;
    cp_async_wait<1>();
    ((uint4*)p.out)[at - 32] = s_stages[(i - 1) % 2 * 32 + threadIdx.x];
  }
  cp_async_wait<0>();
}

// ---------------------------------------------------------------------------------------------------- products of a
// warpgroup

// d = a b^T and d = c + a b^T for 64 x 64 by 64 x 128, in four products. in: a [64, 64] and b [128, 64] of 16-bit
// elements; more: c; out: [2], of which the first began at zero. c and out: [16, 128, 4], columns / 8, the thread's
// accumulators.
constexpr int kWgmmaRows = 64, kWgmmaCols = 128, kWgmmaDepth = 64;

// The operands lie in tiles of 128 x 128, a in the lower half, and the four products' k at 0, 48, 64 and 112: rows,
// columns and panels other than the first are read too.
template <class T>
struct WgmmaShared {
  using Operand = Tile<T, 128, 128>;
  Operand a, b;
};
SEGATTN_FN int wgmma_k(int step) { return step * 48 - step / 2 * 32; }

template <class Tile>
SEGATTN_FN void store_element(Tile& tile, int row, int col, uint16_t bits) {
  *(uint16_t*)((unsigned char*)&tile + (uint32_t)Tile::chunk(0, row, col / 8) + col % 8 * 2) = bits;
}
template <class T, bool kMnMajorB>
SEGATTN_FN void store_operands(const GoldenParams& p, WgmmaShared<T>& shared) {
  const uint16_t *a = (const uint16_t*)p.in, *b = a + kWgmmaRows * kWgmmaDepth;
  for (int i = threadIdx.x; i < (kWgmmaRows + kWgmmaCols) * kWgmmaDepth; i += 128) {
    const int row = i / kWgmmaDepth, n = row - kWgmmaRows, k = wgmma_k(i % kWgmmaDepth / 16) + i % 16;
    if (n < 0) store_element(shared.a, 64 + row, k, a[i]);
    else store_element(shared.b, kMnMajorB ? k : n, kMnMajorB ? n : k, b[i - kWgmmaRows * kWgmmaDepth]);
  }
  fence_proxy_async_shared();
  __syncthreads();
}

// The last kTiles * 8 columns, in one group. `a` in registers, or as it lies.
template <class T, bool kRegisterA, bool kMnMajorB, bool kAccumulate, int kTiles>
SEGATTN_FN void multiply(float (&d)[kTiles][4], WgmmaShared<T>& shared) {
  using Operand = typename WgmmaShared<T>::Operand;
  const int warp = uniform(threadIdx.x / 32), first = kWgmmaCols - kTiles * 8;
  const SharedAddress s_a = shared_address(&shared.a), s_b = shared_address(&shared.b);
  uint32_t a[4][4];
#pragma unroll
  for (int step = 0; step < 4; step++)
    load_a<Operand>(a[step], a_base<Operand>(s_a, threadIdx.x % 32), 64 + warp * 16, wgmma_k(step));
  fence_operand(d);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) {
    const int k = wgmma_k(step);
    const uint64_t b = kMnMajorB ? mn_major_operand<Operand>(s_b, k, first) : k_major_operand<Operand>(s_b, first, k);
    const uint64_t rows = k_major_operand<Operand>(s_a, 64, k);
    if constexpr (kRegisterA) {
      if (step == 0) wgmma<kAccumulate, kMnMajorB>(d, a[step], b, T{});
      else wgmma<true, kMnMajorB>(d, a[step], b, T{});
    } else {
      if (step == 0) wgmma<kAccumulate, kMnMajorB>(d, rows, b, T{});
      else wgmma<true, kMnMajorB>(d, rows, b, T{});
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
}

// The same sums one m16n8k16 after another.
template <class T>
SEGATTN_FN void multiply_in_chains(float (&d)[16][4], WgmmaShared<T>& shared) {
  using Operand = typename WgmmaShared<T>::Operand;
  const SharedAddress a_at = a_base<Operand>(shared_address(&shared.a), threadIdx.x % 32),
                      b_at = b_base<Operand>(shared_address(&shared.b), threadIdx.x % 32);
  for (int step = 0; step < 4; step++) {
    uint32_t a[4], b[4];
    load_a<Operand>(a, a_at, 64 + threadIdx.x / 32 * 16, wgmma_k(step));
#pragma unroll
    for (int n = 0; n < 16; n += 2) {
      load_b<Operand>(b, b_at, n * 8, wgmma_k(step));
      mma_16x8x16(d[n], a, b[0], b[1], T{});
      mma_16x8x16(d[n + 1], a, b[2], b[3], T{});
    }
  }
}

template <int kTiles>
SEGATTN_FN void load_sums(float (&d)[kTiles][4], const GoldenParams& p, bool zeros) {
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
    const float4 c = zeros ? make_float4(0, 0, 0, 0) : ((const float4*)p.more)[(16 - kTiles + n) * 128 + threadIdx.x];
    d[n][0] = c.x, d[n][1] = c.y, d[n][2] = c.z, d[n][3] = c.w;
  }
}
template <int kTiles>
SEGATTN_FN void store_sums(const float (&d)[kTiles][4], const GoldenParams& p, int part) {
#pragma unroll
  for (int n = 0; n < kTiles; n++)
    ((float4*)p.out)[(part * kTiles + n) * 128 + threadIdx.x] = make_float4(d[n][0], d[n][1], d[n][2], d[n][3]);
}

template <class T, bool kRegisterA, bool kMnMajorB, int kTiles>
SEGATTN_FN void golden_wgmma(const GoldenParams& p) {
  WgmmaShared<T>& shared = *(WgmmaShared<T>*)shared_memory();
  store_operands<T, kMnMajorB>(p, shared);
  float d[kTiles][4];
  load_sums(d, p, false);
  multiply<T, kRegisterA, kMnMajorB, false>(d, shared);  // what was there does not count
  store_sums(d, p, 0);
  load_sums(d, p, false);
  multiply<T, kRegisterA, kMnMajorB, true>(d, shared);
  store_sums(d, p, 1);
}
template <class T>
SEGATTN_FN void golden_mma_chain(const GoldenParams& p) {
  WgmmaShared<T>& shared = *(WgmmaShared<T>*)shared_memory();
  store_operands<T, false>(p, shared);
  float d[16][4];
  for (int part = 0; part < 2; part++) {
    load_sums(d, p, part == 0);
    multiply_in_chains(d, shared);
    store_sums(d, p, part);
  }
}

GOLDEN_WARPGROUP(golden_mma_chain_bf16) { golden_mma_chain<Bf16>(p); }
GOLDEN_WARPGROUP(golden_mma_chain_f16) { golden_mma_chain<F16>(p); }

// By where a is, how b lies, the columns and the type; in and more like those of mma_chain.
#define GOLDEN_WGMMA(type, T)                                                                    \
  GOLDEN_WARPGROUP(golden_wgmma_rs_k_major_64_##type) { golden_wgmma<T, true, false, 8>(p); }    \
  GOLDEN_WARPGROUP(golden_wgmma_rs_k_major_128_##type) { golden_wgmma<T, true, false, 16>(p); }  \
  GOLDEN_WARPGROUP(golden_wgmma_rs_mn_major_64_##type) { golden_wgmma<T, true, true, 8>(p); }    \
  GOLDEN_WARPGROUP(golden_wgmma_rs_mn_major_128_##type) { golden_wgmma<T, true, true, 16>(p); }  \
  GOLDEN_WARPGROUP(golden_wgmma_ss_k_major_64_##type) { golden_wgmma<T, false, false, 8>(p); }   \
  GOLDEN_WARPGROUP(golden_wgmma_ss_k_major_128_##type) { golden_wgmma<T, false, false, 16>(p); } \
  GOLDEN_WARPGROUP(golden_wgmma_ss_mn_major_64_##type) { golden_wgmma<T, false, true, 8>(p); }   \
  GOLDEN_WARPGROUP(golden_wgmma_ss_mn_major_128_##type) { golden_wgmma<T, false, true, 16>(p); }
GOLDEN_WGMMA(bf16, Bf16)
GOLDEN_WGMMA(f16, F16)
