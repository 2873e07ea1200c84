// out = a b for a 64x64 by 64xN product of bf16 by wgmma, with the operands laid out in each way it can read.
#include "simulator.h"

struct Operands {
  const uint16_t* a;  // [64, 64], or [k, m] for an MN-major operand
  const uint16_t* b;  // [N, 64] (K-major), or [64, N]
  float* out;         // [64, N]
};

// Row `row` of 128 bytes, in the swizzle of 128 bytes.
SIM_FUNCTION void store_row(unsigned char* s_tile, int row, int chunk, const uint16_t* g) {
  *(uint4*)(s_tile + row * 128 + ((chunk ^ row % 8) << 4)) = *(const uint4*)g;
}

SIM_FUNCTION uint64_t descriptor(const void* s_tile, uint64_t leading, uint64_t stride) {
  uint64_t start = sim_shared_address(s_tile);
  return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1ull << 62;
}

SIM_FUNCTION void write_out(float* out, const float* d, int n) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < n / 2; i++) {
    int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[row * n + column] = d[i];
  }
}

// a [64, 64] and b [64, 64] both K-major, from shared memory.
extern "C" __global__ void k_major(const __grid_constant__ Operands p) {
  unsigned char* s_a = sim_thread()->shared;
  unsigned char* s_b = s_a + 64 * 128;
  for (int i = threadIdx.x; i < 64 * 8; i += 128) {
    store_row(s_a, i / 8, i % 8, p.a + i * 8);
    store_row(s_b, i / 8, i % 8, p.b + i * 8);
  }
  sim_fence_proxy_async(SIM_SHARED);
  __syncthreads();
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0;
  sim_wgmma_fence(sim_site());
  for (int step = 0; step < 4; step++) {
    uint64_t a = descriptor(s_a + step * 32, 0, 1024), b = descriptor(s_b + step * 32, 0, 1024);
    sim_wgmma(d, 64, nullptr, a, b, SIM_BF16 | SIM_ACCUMULATE, sim_site());
  }
  sim_wgmma_commit(sim_site());
  sim_wgmma_wait(0, sim_site());
  write_out(p.out, d, 64);
}

// a [k, m] and b [64, 128], both MN-major: b in two panels of 64 columns.
extern "C" __global__ void mn_major(const __grid_constant__ Operands p) {
  unsigned char* s_a = sim_thread()->shared;
  unsigned char* s_b = s_a + 64 * 128;
  for (int i = threadIdx.x; i < 64 * 8; i += 128) {
    store_row(s_a, i / 8, i % 8, p.a + i * 8);
    for (int panel = 0; panel < 2; panel++)
      store_row(s_b + panel * 8192, i / 8, i % 8, p.b + i / 8 * 128 + panel * 64 + i % 8 * 8);
  }
  sim_fence_proxy_async(SIM_SHARED);
  __syncthreads();
  float d[64];
  sim_wgmma_fence(sim_site());
  for (int step = 0; step < 4; step++) {
    uint64_t a = descriptor(s_a + step * 2048, 8192, 1024), b = descriptor(s_b + step * 2048, 8192, 1024);
    int flags = SIM_BF16 | SIM_A_MN_MAJOR | SIM_B_MN_MAJOR | (step ? SIM_ACCUMULATE : 0);
    sim_wgmma(d, 128, nullptr, a, b, flags, sim_site());
  }
  sim_wgmma_commit(sim_site());
  sim_wgmma_wait(0, sim_site());
  write_out(p.out, d, 128);
}

// a from registers, b [64, 64] K-major; each step in a group of its own, two in flight.
extern "C" __global__ void a_in_registers(const __grid_constant__ Operands p) {
  unsigned char* s_b = sim_thread()->shared;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < 64 * 8; i += 128) store_row(s_b, i / 8, i % 8, p.b + i * 8);
  sim_fence_proxy_async(SIM_SHARED);
  __syncthreads();
  float d[32];
  uint32_t a[4][4];
  for (int step = 0; step < 4; step++)
    for (int i = 0; i < 4; i++) {
      int row = warp * 16 + lane / 4 + i % 2 * 8, k = step * 16 + lane % 4 * 2 + i / 2 * 8;
      a[step][i] = *(const uint32_t*)(p.a + row * 64 + k);
    }
  sim_wgmma_fence(sim_site());
  for (int step = 0; step < 4; step++) {
    int flags = SIM_BF16 | (step ? SIM_ACCUMULATE : 0);
    sim_wgmma(d, 64, a[step], 0, descriptor(s_b + step * 32, 0, 1024), flags, sim_site());
    sim_wgmma_commit(sim_site());
  }
  sim_wgmma_wait(0, sim_site());
  __syncthreads();
  if (threadIdx.x < 64) *(uint4*)(s_b + threadIdx.x * 16) = make_uint4(0, 0, 0, 0);
  write_out(p.out, d, 64);
}
