// Small kernels, one for each feature of the simulator; the tests plant bugs into them by changing their text.
#include "simulator.h"

struct Arrays {
  const int* in;  // [grid * block]
  int* out;       // [grid * block]
  int* counter;   // [1]
  long offset;    // elements
};

// out[i] = in[neighbour of i in the block], through shared memory.
extern "C" __global__ void rotate_block(const __grid_constant__ Arrays p) {
  int* s_values = (int*)sim_thread()->shared;
  int i = threadIdx.x, n = blockDim.x;
  s_values[i] = p.in[blockIdx.x * n + i];
  __syncthreads();
  p.out[blockIdx.x * n + i] = s_values[(i + 1) % n];
}

// The same within warps.
extern "C" __global__ void rotate_warp(const __grid_constant__ Arrays p) {
  int* s_values = (int*)sim_thread()->shared;
  int i = threadIdx.x, lane = i & 31;
  s_values[i] = p.in[i];
  __syncwarp();
  p.out[i] = s_values[i - lane + (lane + 1) % 32];
}

// Sums of half-warps by shuffles with partial masks.
extern "C" __global__ void half_warp_sums(const __grid_constant__ Arrays p) {
  int lane = threadIdx.x, value = p.in[lane];
  uint32_t mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  for (int step = 8; step; step /= 2) value += __shfl_xor_sync(mask, value, step);
  p.out[lane] = value;
}

// The last block to finish sums what all blocks wrote.
extern "C" __global__ void last_block_sums(const __grid_constant__ Arrays p) {
  int* s_last = (int*)sim_thread()->shared;
  int i = threadIdx.x;
  p.out[blockIdx.x * blockDim.x + i] = p.in[blockIdx.x * blockDim.x + i];
  __syncthreads();
  if (i == 0) {
    __threadfence();
    *s_last = atomicAdd(p.counter, 1) == (int)gridDim.x - 1;
  }
  __syncthreads();
  if (*s_last && i == 0) {
    __threadfence();
    int sum = 0;
    for (int j = 0; j < (int)(gridDim.x * blockDim.x); j++) sum += p.out[j];
    p.counter[0] = sum;
  }
}

// Copies through shared memory with cp.async; the tail of the tile is zero-filled.
extern "C" __global__ void copy_async(const __grid_constant__ Arrays p) {
  int4* s_tile = (int4*)sim_thread()->shared;
  int i = threadIdx.x;
  int valid = p.offset - i * 4 >= 4 ? 16 : 0;
  sim_cp_async(&s_tile[i], valid ? p.in + i * 4 : p.in, 16, valid, sim_site());
  sim_cp_async_commit();
  sim_cp_async_wait(0, sim_site());
  __syncthreads();
  int neighbour = (i + 1) % blockDim.x;
  ((int4*)p.out)[neighbour] = s_tile[neighbour];
}

// One value at a far offset.
extern "C" __global__ void far_store(const __grid_constant__ Arrays p) {
  if (threadIdx.x == 0) p.out[p.offset] = p.in[0];
}

// Two warps, a producer and a consumer, that meet at named barriers.
extern "C" __global__ void producer_consumer(const __grid_constant__ Arrays p) {
  int* s_value = (int*)sim_thread()->shared;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int step = 0; step < 4; step++) {
    if (warp == 0) {
      if (step > 0) sim_barrier_sync(2, 64, sim_site());
      s_value[lane] = p.in[step * 32 + lane];
      sim_barrier_arrive(1, 64, sim_site());
    } else {
      sim_barrier_sync(1, 64, sim_site());
      p.out[step * 32 + lane] = s_value[31 - lane];
      if (step < 3) sim_barrier_arrive(2, 64, sim_site());
    }
  }
}

// Block 1 spins until block 0 has published a value.
extern "C" __global__ void wait_for_block(const __grid_constant__ Arrays p) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    p.out[0] = p.in[0];
    sim_atomic(SIM_STORE, p.counter, 1, 0, SIM_RELEASE, SIM_DEVICE, sim_site());
  } else {
    while (sim_atomic(SIM_LOAD, p.counter, 0, 0, SIM_ACQUIRE, SIM_DEVICE, sim_site()) != 1) {}
    p.out[1] = p.out[0] + 1;
  }
}
