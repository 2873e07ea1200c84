// Tiles of a matrix go through a ring of two swizzled stages (TMA load, mbarriers), are doubled, and leave by a TMA
// store: what a warp-specialised kernel does with its data, without the arithmetic.
#include "simulator.h"

struct Doubled {
  CUtensorMap in, out;  // f32 [rows, 32], boxes of [8, 32], swizzle of 128 bytes
  int num_tiles;
};

static const int kTileBytes = 8 * 128;

extern "C" __global__ void doubled(const __grid_constant__ Doubled p) {
  unsigned char* s_in = sim_thread()->shared;
  unsigned char* s_out = s_in + 2 * kTileBytes;
  unsigned char* s_full = s_out + kTileBytes;
  unsigned char* s_empty = s_full + 16;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; stage++) {
      sim_mbarrier_init(s_full + stage * 8, 1, sim_site());
      sim_mbarrier_init(s_empty + stage * 8, 32, sim_site());
    }
    sim_fence_mbarrier_init();
  }
  __syncthreads();
  if (warp == 0) {
    for (int tile = 0; lane == 0 && tile < p.num_tiles; tile++) {
      int stage = tile % 2, phase = tile / 2 % 2;
      sim_mbarrier_wait(s_empty + stage * 8, phase ^ 1, sim_site());
      sim_mbarrier_arrive_expect_tx(s_full + stage * 8, kTileBytes, sim_site());
      int at[2] = {0, tile * 8};
      sim_tma_load(s_in + stage * kTileBytes, &p.in, at, s_full + stage * 8, sim_site());
    }
    return;
  }
  for (int tile = 0; tile < p.num_tiles; tile++) {
    int stage = tile % 2, phase = tile / 2 % 2;
    sim_mbarrier_wait(s_full + stage * 8, phase, sim_site());
    float values[8];
    for (int row = 0; row < 8; row++) {
      int offset = (row * 128 + lane * 4) ^ (row << 4);
      values[row] = 2 * *(float*)(s_in + stage * kTileBytes + offset) + row;
    }
    sim_mbarrier_arrive(s_empty + stage * 8, 1, sim_site());
    if (lane == 0) sim_bulk_wait(0, 1, sim_site());
    __syncwarp();
    for (int row = 0; row < 8; row++) *(float*)(s_out + ((row * 128 + lane * 4) ^ (row << 4))) = values[row];
    sim_fence_proxy_async(SIM_SHARED);
    __syncwarp();
    if (lane == 0) {
      int at[2] = {0, tile * 8};
      sim_tma_store(&p.out, at, s_out, sim_site());
      sim_bulk_commit();
    }
  }
  if (lane == 0) sim_bulk_wait(0, 0, sim_site());
}

struct Plain {
  const float* in;  // [64]
  float* out;       // [64]: += 2 in, by two bulk reductions
};

extern "C" __global__ void add_twice(const __grid_constant__ Plain p) {
  unsigned char* s_values = sim_thread()->shared;
  unsigned char* s_full = s_values + 256;
  if (threadIdx.x == 0) {
    sim_mbarrier_init(s_full, 1, sim_site());
    sim_fence_mbarrier_init();
    sim_mbarrier_arrive_expect_tx(s_full, 256, sim_site());
    sim_bulk_load(s_values, p.in, 256, s_full, sim_site());
  }
  __syncwarp();
  sim_mbarrier_wait(s_full, 0, sim_site());
  if (threadIdx.x == 0) {
    sim_bulk_reduce_add(p.out, s_values, 256, sim_site());
    sim_bulk_reduce_add(p.out, s_values, 256, sim_site());
    sim_bulk_commit();
    sim_bulk_wait(0, 0, sim_site());
  }
}
