// The simulated GPU as kernels see it when g++ compiles them: the CUDA names they use, and the calls behind
// the second meaning of every function in kernels/ptx.cuh. The other side of these calls is sim/src/machine/calls.rs.
//
// Kernels are compiled with -DSEGATTN_SIM. Every call that can go wrong takes the place it was made from
// (`sim_site()`) as its last argument. An array given to a call is read or written once all lanes have met,
// so a wrapper should pass a copy (`uint32_t r[4]`) rather than the kernel's own registers: the kernel's
// arrays then stay in registers. The accumulators of wgmma are the exception, see sim_wgmma.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
static inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// What a running thread knows about itself. Mirrored by ThreadContext in sim/src/machine/thread.rs.
struct SimThread {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
  unsigned char* shared;  // the block's dynamic shared memory, aligned to 1024 bytes
};

// A tensor map as the simulator holds it: what cuTensorMapEncodeTiled was told. Mirrored by TensorMap in
// sim/src/instructions/tensor_map.rs. 128 bytes, like the real one.
struct alignas(64) CUtensorMap {
  uint64_t base;
  uint64_t dims[5];
  uint64_t strides[4];  // bytes, of dims[1..]; dims[0] is dense
  uint32_t box[5];
  uint16_t rank, element_bytes, swizzle_bytes, is_f32;
  uint32_t unused[5];
};
static_assert(sizeof(CUtensorMap) == 128, "mirrored in Rust");

// Operations of sim_atomic; 32-bit, on global or shared memory.
enum SimAtomic { SIM_LOAD, SIM_STORE, SIM_ADD, SIM_MIN, SIM_MAX, SIM_AND, SIM_OR, SIM_EXCHANGE, SIM_CAS };
// Memory order of sim_atomic.
enum SimOrder { SIM_RELAXED = 0, SIM_ACQUIRE = 1, SIM_RELEASE = 2, SIM_ACQ_REL = 3 };
// Whom an atomic or a fence synchronises with.
enum SimScope { SIM_BLOCK = 0, SIM_DEVICE = 1 };
// Memory covered by a proxy fence.
enum SimSpace { SIM_SHARED = 1, SIM_GLOBAL = 2, SIM_ALL = 3 };
// Flags of sim_wgmma.
enum SimWgmma { SIM_BF16 = 1, SIM_ACCUMULATE = 2, SIM_A_MN_MAJOR = 4, SIM_B_MN_MAJOR = 8 };

extern "C" {
// Constant for a thread's whole life, so the compiler may call it once.
const SimThread* sim_thread(void) __attribute__((const));

// ---- barriers: every lane of the warp must make the call
void sim_syncthreads(const void* site);
// bar.sync / bar.arrive id, count (in threads, a multiple of 32).
void sim_barrier_sync(uint32_t id, uint32_t count, const void* site);
void sim_barrier_arrive(uint32_t id, uint32_t count, const void* site);

// ---- warps: the lanes in `mask` meet
void sim_syncwarp(uint32_t mask, const void* site);
// The value of lane `source_lane` (0..31, in the mask).
uint32_t sim_shuffle(uint32_t mask, uint32_t value, uint32_t source_lane, const void* site);
uint32_t sim_ballot(uint32_t mask, int predicate, const void* site);
// ldmatrix.m8n8.x{count}[.trans].shared.b16: r[count]; `row` is this lane's row address.
void sim_ldmatrix(uint32_t* r, int count, int transpose, const void* row, const void* site);
void sim_stmatrix(const uint32_t* r, int count, int transpose, void* row, const void* site);
// mma.sync.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32: d[4] += a[4] b[2].
void sim_mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, int is_bf16, const void* site);

// ---- cp.async: `size` 4, 8 or 16 bytes, of which the first `valid` are copied and the rest zero-filled
void sim_cp_async(void* dst, const void* src, uint32_t size, uint32_t valid, const void* site);
void sim_cp_async_commit(void);
void sim_cp_async_wait(uint32_t newest_left, const void* site);

// ---- ordering between threads and blocks
// Returns the value before; SIM_STORE returns 0. `compare` is for SIM_CAS; MIN and MAX are signed.
uint32_t sim_atomic(int operation, void* address, uint32_t operand, uint32_t compare, int order, int scope,
                    const void* site);
// fence.acq_rel.{cta,gpu}: __threadfence_block(), __threadfence().
void sim_fence(int scope);
// Lets other threads run; the body of a spin loop that has no atomic in it, nanosleep.
void sim_yield(void);
// A kernel that gives up: reported.
void sim_trap(const void* site);

// ---- mbarriers
void sim_mbarrier_init(void* barrier, uint32_t count, const void* site);
void sim_mbarrier_invalidate(void* barrier, const void* site);
void sim_fence_mbarrier_init(void);
void sim_mbarrier_arrive(void* barrier, uint32_t count, const void* site);
void sim_mbarrier_arrive_expect_tx(void* barrier, uint32_t bytes, const void* site);
void sim_mbarrier_expect_tx(void* barrier, uint32_t bytes, const void* site);
// Blocks until the phase of that parity has completed.
void sim_mbarrier_wait(void* barrier, uint32_t parity, const void* site);
int sim_mbarrier_test_wait(void* barrier, uint32_t parity, const void* site);

// ---- the async proxy: bulk copies (one thread issues them) and its fences
void sim_fence_proxy_async(int space);
// cp.async.bulk.tensor.{rank}d.shared.global: coordinates innermost first, like box and dims.
void sim_tma_load(void* dst, const CUtensorMap* map, const int32_t* coordinates, void* barrier, const void* site);
void sim_tma_store(const CUtensorMap* map, const int32_t* coordinates, const void* src, const void* site);
void sim_tma_reduce_add(const CUtensorMap* map, const int32_t* coordinates, const void* src, const void* site);
// cp.async.bulk of plain bytes, a multiple of 16; reduce_add is of f32.
void sim_bulk_load(void* dst, const void* src, uint32_t bytes, void* barrier, const void* site);
void sim_bulk_store(void* dst, const void* src, uint32_t bytes, const void* site);
void sim_bulk_reduce_add(void* dst, const void* src, uint32_t bytes, const void* site);
void sim_bulk_commit(void);
// cp.async.bulk.wait_group[.read].
void sim_bulk_wait(uint32_t newest_left, int read, const void* site);

// ---- setmaxnreg.inc (take) or .dec: all 128 threads of a warpgroup have `each` registers from here on. What the block
// has to hand out is as under __launch_bounds__(threads, 1).
void sim_set_registers(uint32_t each, int take, const void* site);

// ---- wgmma: all 128 threads of a warpgroup make every call
void sim_wgmma_fence(const void* site);
// wgmma.m64n{n}k16.f32: d[n / 2] (+)= a b. `a` holds this thread's four registers, or is null for the
// operand at `a_descriptor`. Pass the kernel's own accumulators and operand registers, not copies: between
// the product and its wait they are watched.
void sim_wgmma(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, int flags,
               const void* site);
void sim_wgmma_commit(const void* site);
void sim_wgmma_wait(uint32_t newest_left, const void* site);
}

// Where in the code we are; the debug information turns it into a file and a line.
static __forceinline__ const void* sim_site() {
  const void* here;
#if defined(__x86_64__)
  asm volatile("lea 0(%%rip), %0" : "=r"(here));
#else
  asm volatile("adr %0, ." : "=r"(here));
#endif
  return here;
}

// The 32-bit address of shared memory, as descriptors and instructions hold it.
static __forceinline__ uint32_t sim_shared_address(const void* p) {
  return (uint32_t)((const unsigned char*)p - sim_thread()->shared);
}

#define threadIdx (sim_thread()->thread_idx)
#define blockIdx (sim_thread()->block_idx)
#define blockDim (sim_thread()->block_dim)
#define gridDim (sim_thread()->grid_dim)

// ---- CUDA's own functions
#define __syncthreads() sim_syncthreads(sim_site())
#define __threadfence() sim_fence(SIM_DEVICE)
#define __threadfence_block() sim_fence(SIM_BLOCK)
#define __trap() sim_trap(sim_site())
#define SIM_FUNCTION static __forceinline__
SIM_FUNCTION void __syncwarp(uint32_t mask = 0xffffffffu) { sim_syncwarp(mask, sim_site()); }
SIM_FUNCTION int __ballot_sync(uint32_t mask, int predicate) { return sim_ballot(mask, predicate, sim_site()); }
SIM_FUNCTION int __any_sync(uint32_t mask, int predicate) { return sim_ballot(mask, predicate, sim_site()) != 0; }
SIM_FUNCTION int __all_sync(uint32_t mask, int predicate) { return sim_ballot(mask, !predicate, sim_site()) == 0; }

template <class T>
SIM_FUNCTION T sim_shuffle_as(uint32_t mask, T value, uint32_t source_lane) {
  static_assert(sizeof(T) == 4, "shuffles are of 32 bits");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = sim_shuffle(mask, bits, source_lane, sim_site());
  memcpy(&value, &bits, 4);
  return value;
}
SIM_FUNCTION uint32_t sim_lane() {
  const SimThread* t = sim_thread();
  return (t->thread_idx.x + t->block_dim.x * (t->thread_idx.y + t->block_dim.y * t->thread_idx.z)) & 31;
}
template <class T>
SIM_FUNCTION T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
  return sim_shuffle_as(mask, value, (sim_lane() & ~(width - 1)) | (lane & (width - 1)));
}
template <class T>
SIM_FUNCTION T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32) {
  uint32_t lane = sim_lane(), source = lane ^ lane_mask;
  return sim_shuffle_as(mask, value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source);
}
template <class T>
SIM_FUNCTION T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  uint32_t lane = sim_lane();
  return sim_shuffle_as(mask, value, (lane & (width - 1)) + delta >= (unsigned)width ? lane : lane + delta);
}
template <class T>
SIM_FUNCTION T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  uint32_t lane = sim_lane();
  return sim_shuffle_as(mask, value, (lane & (width - 1)) < delta ? lane : lane - delta);
}

SIM_FUNCTION int sim_rmw(int operation, void* address, uint32_t operand, uint32_t compare = 0) {
  return sim_atomic(operation, address, operand, compare, SIM_RELAXED, SIM_DEVICE, sim_site());
}
SIM_FUNCTION int atomicAdd(int* p, int v) { return sim_rmw(SIM_ADD, p, v); }
SIM_FUNCTION unsigned atomicAdd(unsigned* p, unsigned v) { return sim_rmw(SIM_ADD, p, v); }
SIM_FUNCTION int atomicMax(int* p, int v) { return sim_rmw(SIM_MAX, p, v); }
SIM_FUNCTION int atomicMin(int* p, int v) { return sim_rmw(SIM_MIN, p, v); }
SIM_FUNCTION int atomicExch(int* p, int v) { return sim_rmw(SIM_EXCHANGE, p, v); }
SIM_FUNCTION int atomicCAS(int* p, int compare, int v) { return sim_rmw(SIM_CAS, p, v, compare); }

template <class T>
static inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static inline T max(T a, T b) {
  return a < b ? b : a;
}
SIM_FUNCTION uint32_t __float_as_uint(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
SIM_FUNCTION float __uint_as_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
SIM_FUNCTION int __float_as_int(float x) { return (int)__float_as_uint(x); }
SIM_FUNCTION float __int_as_float(int i) { return __uint_as_float((uint32_t)i); }
SIM_FUNCTION int __popc(uint32_t x) { return __builtin_popcount(x); }
SIM_FUNCTION int __ffs(int x) { return __builtin_ffs(x); }
SIM_FUNCTION int __clz(int x) { return x ? __builtin_clz((uint32_t)x) : 32; }
// The number where one is NaN, of either kind, and +0 of two zeros: the library's own fmaxf promises neither.
SIM_FUNCTION float sim_fmax(float a, float b) {
  if (a != a || b != b) return a != a ? b : a;
  return a < b ? b : b < a ? a : __uint_as_float(__float_as_uint(a) & __float_as_uint(b));
}
SIM_FUNCTION float sim_fmin(float a, float b) {
  if (a != a || b != b) return a != a ? b : a;
  return a < b ? a : b < a ? b : __uint_as_float(__float_as_uint(a) | __float_as_uint(b));
}
#define fmaxf sim_fmax
#define fminf sim_fmin
SIM_FUNCTION float rsqrtf(float x) { return 1.0f / sqrtf(x); }
SIM_FUNCTION float __fdividef(float a, float b) { return a / b; }

// ---- the meaning of ex2.approx.ftz, lg2.approx.ftz and of the cvt.rn instructions
SIM_FUNCTION float sim_flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
SIM_FUNCTION float sim_exp2(float x) { return sim_flush(exp2f(sim_flush(x))); }
SIM_FUNCTION float sim_log2(float x) { return log2f(sim_flush(x)); }
SIM_FUNCTION float sim_bf16_value(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
SIM_FUNCTION uint16_t sim_bf16_bits(float x) {
  uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
// Binary16 by scaling: f32 arithmetic rounds subnormals and large values to the right number of bits.
SIM_FUNCTION float sim_f16_value(uint16_t bits) {
  uint32_t magnitude = (uint32_t)(bits & 0x7fff) << 13;
  float scaled = __uint_as_float(magnitude) * 0x1p112f;
  if ((bits & 0x7c00) == 0x7c00) scaled = __uint_as_float(0x7f800000u | magnitude);
  return copysignf(scaled, (bits & 0x8000) ? -1.0f : 1.0f);
}
SIM_FUNCTION uint16_t sim_f16_bits(float x) {
  uint16_t sign = (__float_as_uint(x) >> 16) & 0x8000;
  uint32_t u = __float_as_uint(x) & 0x7fffffffu;
  if (u > 0x7f800000u) return 0x7fff;
  if (u >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above round to infinity
  if (u < 0x38800000u)                         // below the smallest normal: the sum rounds at the last bit kept
    return sign | (uint16_t)(__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3f000000u);
  u += 0xfffu + ((u >> 13) & 1);
  return sign | (uint16_t)((u - 0x38000000u) >> 13);
}
