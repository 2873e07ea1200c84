// The only inline assembly: one small function per instruction. Compiled for the simulator the same names
// mean calls into it (sim/include/simulator.h).
#pragma once
#include <stdint.h>

#include "params.h"

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

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
SEGATTN_FN void cp_async_wait() { sim_cp_async_wait(kNewestLeft, sim_site()); }

SEGATTN_FN void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) { sim_ldmatrix(r, 4, 0, (const void*)row, sim_site()); }
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

SEGATTN_FN int opaque(int x) { return x; }
SEGATTN_FN float exp2_approx(float x) { return sim_exp2(x); }
SEGATTN_FN float log2_approx(float x) { return sim_log2(x); }
SEGATTN_FN float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
SEGATTN_FN float mul_rn(float a, float b) { return a * b; }
SEGATTN_FN uint32_t pack_two(float low, float high, Bf16) { return sim_bf16_bits(low) | (uint32_t)sim_bf16_bits(high) << 16; }
SEGATTN_FN uint32_t pack_two(float low, float high, F16) { return sim_f16_bits(low) | (uint32_t)sim_f16_bits(high) << 16; }
SEGATTN_FN float widen(uint16_t bits, Bf16) { return sim_bf16_value(bits); }
SEGATTN_FN float widen(uint16_t bits, F16) { return sim_f16_value(bits); }

#else

#define SEGATTN_FN static __device__ __forceinline__
typedef uint32_t SharedAddress;

SEGATTN_FN unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}
SEGATTN_FN SharedAddress shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes, of which the first valid_bytes (0 or 16) are read and the others are zero.
SEGATTN_FN void cp_async_16(SharedAddress dst, const void* src, uint32_t valid_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid_bytes) : "memory");
}
SEGATTN_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewestLeft>
SEGATTN_FN void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kNewestLeft) : "memory"); }

SEGATTN_FN void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
SEGATTN_FN void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
SEGATTN_FN void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SEGATTN_FN void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same value, computed here: keeps what depends on it from being prepared ahead of a loop, in registers.
SEGATTN_FN int opaque(int x) { asm volatile("" : "+r"(x)); return x; }

SEGATTN_FN float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
SEGATTN_FN float log2_approx(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Rounding is spelled out where two kernels must agree on bits: the compiler fuses neither of these further.
SEGATTN_FN float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SEGATTN_FN float mul_rn(float a, float b) { return __fmul_rn(a, b); }

SEGATTN_FN uint32_t pack_two(float low, float high, Bf16) {
  uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
SEGATTN_FN uint32_t pack_two(float low, float high, F16) {
  uint32_t r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
SEGATTN_FN float widen(uint16_t bits, Bf16) { return __uint_as_float((uint32_t)bits << 16); }
SEGATTN_FN float widen(uint16_t bits, F16) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits)); return x; }
#endif

// What has one meaning for both.
SEGATTN_FN float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SEGATTN_FN bool warp_any(bool predicate) { return __any_sync(0xffffffffu, predicate); }
SEGATTN_FN uint32_t atomic_add(uint32_t* p, uint32_t n) { return atomicAdd(p, n); }
SEGATTN_FN float max_f32(float a, float b) { return fmaxf(a, b); }
template <class T>
SEGATTN_FN uint32_t pack(float low, float high) { return pack_two(low, high, T{}); }
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// An entry point: the template behind it, bounded in registers so that Config::kBlocks blocks share a
// multiprocessor, and beside it what the host needs for a launch.
#define SEGATTN_KERNEL(name, Config, Params)                                \
  extern "C" __global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) \
      name(const __grid_constant__ Params params)
#define SEGATTN_INFO(name, info) extern "C" __device__ const SegattnKernelInfo name##_info = info;
