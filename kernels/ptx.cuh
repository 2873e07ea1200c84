// All inline assembly, one small function per instruction. In the simulator the same names call its model of the
// instruction (sim/include/simulator.h).
#pragma once
#include <stdint.h>

#include "params.h"

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

#ifdef SEGATTN_SIM
#include "simulator.h"

#define SEGATTN_FN static __forceinline__
typedef uintptr_t SharedAddress;

SEGATTN_FN unsigned char* shared_memory() { return sim_thread()->shared; }
SEGATTN_FN SharedAddress shared_address(const void* p) { return (SharedAddress)p; }

SEGATTN_FN void cp_async_16(SharedAddress dst, const void* src, uint32_t valid_bytes) {
  sim_cp_async((void*)dst, src, 16, valid_bytes, sim_site());
}
SEGATTN_FN void cp_async_commit() { sim_cp_async_commit(); }
template <int kNewestLeft>
SEGATTN_FN void cp_async_wait() {
  sim_cp_async_wait(kNewestLeft, sim_site());
}

SEGATTN_FN void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  sim_ldmatrix(r, 4, 0, (const void*)row, sim_site());
}
SEGATTN_FN void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  sim_ldmatrix(r, 4, 1, (const void*)row, sim_site());
}
SEGATTN_FN void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  const uint32_t b[2] = {b0, b1};
  sim_mma_m16n8k16(d, a, b, 1, sim_site());
}
SEGATTN_FN void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16) {
  const uint32_t b[2] = {b0, b1};
  sim_mma_m16n8k16(d, a, b, 0, sim_site());
}

SEGATTN_FN void griddep_launch_dependents() {}
SEGATTN_FN void griddep_wait() {}

SEGATTN_FN int opaque(int x) { return x; }
SEGATTN_FN float exp2_approx(float x) { return sim_exp2(x); }
SEGATTN_FN float log2_approx(float x) { return sim_log2(x); }
SEGATTN_FN float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
SEGATTN_FN float mul_rn(float a, float b) { return a * b; }
SEGATTN_FN uint32_t pack_two(float low, float high, Bf16) {
  return sim_bf16_bits(low) | (uint32_t)sim_bf16_bits(high) << 16;
}
SEGATTN_FN uint32_t pack_two(float low, float high, F16) {
  return sim_f16_bits(low) | (uint32_t)sim_f16_bits(high) << 16;
}
SEGATTN_FN float widen(uint16_t bits, Bf16) { return sim_bf16_value(bits); }
SEGATTN_FN float widen(uint16_t bits, F16) { return sim_f16_value(bits); }

// ---- Hopper: mbarriers, setmaxnreg, wgmma
SEGATTN_FN void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  sim_mbarrier_init(barrier, arrivals, sim_site());
}
SEGATTN_FN void fence_mbarrier_init() { sim_fence_mbarrier_init(); }
SEGATTN_FN void mbarrier_arrive(uint64_t* barrier) { sim_mbarrier_arrive(barrier, 1, sim_site()); }
SEGATTN_FN void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes) {
  sim_mbarrier_arrive_expect_tx(barrier, bytes, sim_site());
}
SEGATTN_FN void mbarrier_wait(uint64_t* barrier, uint32_t parity) { sim_mbarrier_wait(barrier, parity, sim_site()); }
SEGATTN_FN void tensor_copy(SharedAddress dst, const SegattnTensorMap& map, const int32_t (&at)[5], uint64_t* barrier) {
  sim_tma_load((void*)dst, (const CUtensorMap*)&map, at, barrier, sim_site());
}
SEGATTN_FN void fence_proxy_async_shared() { sim_fence_proxy_async(SIM_SHARED); }
template <int kThreads>
SEGATTN_FN void barrier_sync(int id) {
  sim_barrier_sync(id, kThreads, sim_site());
}
template <int kRegisters>
SEGATTN_FN void setmaxnreg_increase() {
  sim_set_registers(kRegisters, 1, sim_site());
}
template <int kRegisters>
SEGATTN_FN void setmaxnreg_decrease() {
  sim_set_registers(kRegisters, 0, sim_site());
}
SEGATTN_FN uint64_t matrix_descriptor(SharedAddress at, uint32_t leading_bytes, uint32_t stride_bytes) {
  return sim_shared_address((const void*)at) >> 4 | (uint64_t)(leading_bytes >> 4) << 16 |
         (uint64_t)(stride_bytes >> 4) << 32 | 1ull << 62;
}
SEGATTN_FN void wgmma_fence() { sim_wgmma_fence(sim_site()); }
SEGATTN_FN void wgmma_commit() { sim_wgmma_commit(sim_site()); }
template <int kNewestLeft>
SEGATTN_FN void wgmma_wait() {
  sim_wgmma_wait(kNewestLeft, sim_site());
}
template <int kColTiles>
SEGATTN_FN void fence_operand(float (&)[kColTiles][4]) {}
SEGATTN_FN void complete_before(float, void*) {}
SEGATTN_FN int wgmma_type(Bf16) { return SIM_BF16; }
SEGATTN_FN int wgmma_type(F16) { return 0; }
template <bool kAccumulate, bool kMnMajorB, int kColTiles, class T>
SEGATTN_FN void wgmma(float (&d)[kColTiles][4], uint64_t a, uint64_t b, T t) {
  sim_wgmma(&d[0][0], kColTiles * 8, nullptr, a, b,
            wgmma_type(t) | (kAccumulate ? SIM_ACCUMULATE : 0) | (kMnMajorB ? SIM_B_MN_MAJOR : 0), sim_site());
}
template <bool kAccumulate, bool kMnMajorB, int kColTiles, class T>
SEGATTN_FN void wgmma(float (&d)[kColTiles][4], const uint32_t (&a)[4], uint64_t b, T t) {
  sim_wgmma(&d[0][0], kColTiles * 8, a, 0, b,
            wgmma_type(t) | (kAccumulate ? SIM_ACCUMULATE : 0) | (kMnMajorB ? SIM_B_MN_MAJOR : 0), sim_site());
}

#else

#define SEGATTN_FN static __device__ __forceinline__
typedef uint32_t SharedAddress;

SEGATTN_FN unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}
SEGATTN_FN SharedAddress shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Copies 16 bytes: the first valid_bytes (0 or 16) from src, the others zero.
SEGATTN_FN void cp_async_16(SharedAddress dst, const void* src, uint32_t valid_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid_bytes)
               : "memory");
}
SEGATTN_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewestLeft>
SEGATTN_FN void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewestLeft) : "memory");
}

SEGATTN_FN void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
SEGATTN_FN void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
SEGATTN_FN void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SEGATTN_FN void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Programmatic dependent launch: the next kernel may start once all blocks of this one have called launch_dependents
// or ended. In each of its blocks griddep_wait blocks until this kernel has ended and its writes are visible. Where
// these instructions do not exist the host launches kernels one after the other.
SEGATTN_FN void griddep_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
SEGATTN_FN void griddep_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Returns x, but the compiler cannot hoist what depends on it out of a loop, where it would occupy registers.
SEGATTN_FN int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

SEGATTN_FN float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEGATTN_FN float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Explicit rounding, for code whose bits must agree in two kernels: the compiler does not contract these.
SEGATTN_FN float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SEGATTN_FN float mul_rn(float a, float b) { return __fmul_rn(a, b); }

SEGATTN_FN uint32_t pack_two(float low, float high, Bf16) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
SEGATTN_FN uint32_t pack_two(float low, float high, F16) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
SEGATTN_FN float widen(uint16_t bits, Bf16) { return __uint_as_float((uint32_t)bits << 16); }
SEGATTN_FN float widen(uint16_t bits, F16) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// ---- Hopper, for kernels compiled for sm_90a: mbarriers, setmaxnreg, and wgmma. A warpgroup is 128 threads, the
// first of them a multiple of 128.
SEGATTN_FN void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes mbarrier_init visible to the async proxy. Threads of the block see it after __syncthreads.
SEGATTN_FN void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SEGATTN_FN void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The same, and the phase does not complete before bulk copies have added so many bytes.
SEGATTN_FN void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Starts the bulk copy of a box of a tensor of rank 5, from the coordinates `at`, innermost first. The barrier counts
// its bytes. `map` is a kernel parameter.
SEGATTN_FN void tensor_copy(SharedAddress dst, const SegattnTensorMap& map, const int32_t (&at)[5], uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
      "%6}], [%7];" ::"r"(dst),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(shared_address(barrier))
      : "memory");
}
// Blocks until the phase of that parity has completed.
SEGATTN_FN void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Makes this thread's earlier writes to shared memory visible to wgmma and bulk copies of threads that it signals
// afterwards.
SEGATTN_FN void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Named barrier `id`, 1 <= id < 16, of kThreads threads.
template <int kThreads>
SEGATTN_FN void barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
// setmaxnreg: the registers of each thread of the warpgroup from here on, a multiple of 8. An increase blocks until
// they are free.
template <int kRegisters>
SEGATTN_FN void setmaxnreg_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SEGATTN_FN void setmaxnreg_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The descriptor of an operand in shared memory with 128-byte swizzle. K-major: groups of 8 rows are stride_bytes
// apart, leading_bytes is ignored. MN-major: panels of 64 columns are leading_bytes apart, groups of 8 k
// stride_bytes.
SEGATTN_FN uint64_t matrix_descriptor(SharedAddress at, uint32_t leading_bytes, uint32_t stride_bytes) {
  return (at & 0x3ffff) >> 4 | (uint64_t)(leading_bytes >> 4) << 16 | (uint64_t)(stride_bytes >> 4) << 32 | 1ull << 62;
}
// Required before the first wgmma, and whenever registers of its accumulators or of A were accessed since the last one.
SEGATTN_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SEGATTN_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kNewestLeft>
SEGATTN_FN void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewestLeft) : "memory");
}

// The compiler must finish computing these values here: it must not move the computation past a wgmma that is in
// flight.
template <int kColTiles>
SEGATTN_FN void fence_operand(float (&d)[kColTiles][4]) {
#pragma unroll
  for (int n = 0; n < kColTiles; n++)
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

// What `x`, which is not negative, is computed from is computed before a later wgmma_wait: ptxas keeps a store to
// shared memory in front of it. Nothing is stored.
SEGATTN_FN void complete_before(float x, void* place) {
  asm volatile(
      "{\n.reg .pred negative;\nsetp.lt.f32 negative, %1, 0f00000000;\n@negative st.shared.f32 [%0], %1;\n}" ::"r"(
          shared_address(place)),
      "f"(x)
      : "memory");
}

// d = a b, or d += a b, of 64 x 16 by 16 x (64 or 128) elements. Warp w of the warpgroup has rows 16 w..., in the
// layouts that m16n8k16 has for d and a, and the result has the bits of a chain of m16n8k16. A is in registers or
// K-major in shared memory, B is K-major or MN-major in shared memory. d and the registers of A must not be accessed
// until wgmma_wait.
#define SEGATTN_D8                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SEGATTN_D16                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define SEGATTN_OUT(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SEGATTN_OUT8(d, i)                                                                                       \
  SEGATTN_OUT(d, i), SEGATTN_OUT(d, i + 1), SEGATTN_OUT(d, i + 2), SEGATTN_OUT(d, i + 3), SEGATTN_OUT(d, i + 4), \
      SEGATTN_OUT(d, i + 5), SEGATTN_OUT(d, i + 6), SEGATTN_OUT(d, i + 7)
#define SEGATTN_WGMMA(T, type, tiles, shape, registers, outputs, a0, a1, a2, a3, a4, a5, a6)                        \
  template <bool kAccumulate, bool kMnMajorB>                                                                       \
  SEGATTN_FN void wgmma(float (&d)[tiles][4], uint64_t a, uint64_t b, T) {                                          \
    asm volatile("wgmma.mma_async.sync.aligned." shape "k16.f32." type "." type " " registers ", %" #a0 ", %" #a1   \
                 ", %" #a2 ", 1, 1, 0, %" #a3 ";"                                                                   \
                 : outputs                                                                                          \
                 : "l"(a), "l"(b), "n"((int)kAccumulate), "n"((int)kMnMajorB));                                     \
  }                                                                                                                 \
  template <bool kAccumulate, bool kMnMajorB>                                                                       \
  SEGATTN_FN void wgmma(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b, T) {                              \
    asm volatile("wgmma.mma_async.sync.aligned." shape "k16.f32." type "." type " " registers ", {%" #a0 ", %" #a1  \
                 ", %" #a2 ", %" #a3 "}, %" #a4 ", %" #a5 ", 1, 1, %" #a6 ";"                                       \
                 : outputs                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"((int)kAccumulate), "n"((int)kMnMajorB)); \
  }
#define SEGATTN_ALL(...) __VA_ARGS__
SEGATTN_WGMMA(Bf16, "bf16", 8, "m64n64", SEGATTN_D8, SEGATTN_ALL(SEGATTN_OUT8(d, 0)), 32, 33, 34, 35, 36, 37, 38)
SEGATTN_WGMMA(F16, "f16", 8, "m64n64", SEGATTN_D8, SEGATTN_ALL(SEGATTN_OUT8(d, 0)), 32, 33, 34, 35, 36, 37, 38)
SEGATTN_WGMMA(Bf16, "bf16", 16, "m64n128", SEGATTN_D16, SEGATTN_ALL(SEGATTN_OUT8(d, 0), SEGATTN_OUT8(d, 8)), 64, 65, 66,
              67, 68, 69, 70)
SEGATTN_WGMMA(F16, "f16", 16, "m64n128", SEGATTN_D16, SEGATTN_ALL(SEGATTN_OUT8(d, 0), SEGATTN_OUT8(d, 8)), 64, 65, 66,
              67, 68, 69, 70)
#endif

// The same on a GPU and in the simulator.
SEGATTN_FN float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SEGATTN_FN uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// Returns x, which must be the same in all lanes, such that the compiler knows it: descriptors need uniform registers.
SEGATTN_FN int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
SEGATTN_FN bool warp_any(bool predicate) { return __any_sync(0xffffffffu, predicate); }
SEGATTN_FN uint32_t atomic_add(uint32_t* p, uint32_t n) { return atomicAdd(p, n); }
SEGATTN_FN float max_f32(float a, float b) { return fmaxf(a, b); }
template <class T>
SEGATTN_FN uint32_t pack(float low, float high) {
  return pack_two(low, high, T{});
}
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// An entry point. Its registers are limited so that Config::kBlocks blocks share a multiprocessor. SEGATTN_INFO is
// what the host needs to know for a launch.
#define SEGATTN_KERNEL(name, Config, Params)                                      \
  extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) \
      name(const __grid_constant__ Params params)
#define SEGATTN_INFO(name, info) extern "C" __device__ const SegattnKernelInfo name##_info = info;
