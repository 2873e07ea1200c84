// out = a b for one 16x16 by 16x8 product of bf16: ldmatrix, ldmatrix.trans and mma.sync.
#include "simulator.h"

struct Product {
  const uint16_t* a;  // [16, 16]
  const uint16_t* b;  // [16, 8]
  float* out;         // [16, 8]
};

extern "C" __global__ void product(const __grid_constant__ Product p) {
  uint16_t* s_a = (uint16_t*)sim_thread()->shared;
  uint16_t* s_b = s_a + 16 * 16;
  int lane = threadIdx.x;
  ((uint4*)s_a)[lane] = ((const uint4*)p.a)[lane];
  if (lane < 16) ((uint4*)s_b)[lane] = ((const uint4*)p.b)[lane];
  __syncwarp();
  uint32_t a[4], b[2];
  float d[4] = {0, 0, 0, 0};
  sim_ldmatrix(a, 4, 0, s_a + (lane % 16) * 16 + (lane / 16) * 8, sim_site());
  sim_ldmatrix(b, 2, 1, s_b + (lane % 16) * 8, sim_site());
  sim_mma_m16n8k16(d, a, b, 1, sim_site());
  for (int i = 0; i < 4; i++) p.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
