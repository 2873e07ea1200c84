// out = a b^T in bf16 with f32 sums: 32x32 tiles, two stages of cp.async, mma.sync; any sizes, k a multiple of 8.
// The kernel under the mutation test.
#include "simulator.h"

struct TiledProduct {
  const uint16_t* a;  // [m, k]
  const uint16_t* b;  // [n, k]
  float* out;         // [m, n]
  int m, n, k;
};

static const int kTile = 32;
static const int kThreads = 64;

// 16-byte chunk `chunk` of row `row` of a tile, swizzled so that eight rows of ldmatrix meet no bank twice.
SIM_FUNCTION uint16_t* chunk_at(uint16_t* s_tile, int row, int chunk) {
  return s_tile + row * kTile + ((chunk ^ (row >> 1)) & 3) * 8;
}

// Rows [first_row, first_row + 32) and columns [first_column, +32) of a [rows, k] matrix; zero outside.
SIM_FUNCTION void load_tile(uint16_t* s_tile, const uint16_t* g, int first_row, int rows, int first_column, int k) {
  for (int i = threadIdx.x; i < kTile * 4; i += kThreads) {
    int row = i / 4, chunk = i % 4;
    int g_row = first_row + row, column = first_column + chunk * 8;
    bool inside = g_row < rows && column < k;
    const uint16_t* source = inside ? g + (size_t)g_row * k + column : g;
    sim_cp_async(chunk_at(s_tile, row, chunk), source, 16, inside ? 16 : 0, sim_site());
  }
}

extern "C" __global__ void tiled_product(const __grid_constant__ TiledProduct p) {
  uint16_t* s_a = (uint16_t*)sim_thread()->shared;
  uint16_t* s_b = s_a + 2 * kTile * kTile;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  int num_tiles = (p.k + kTile - 1) / kTile;
  float sums[4][4] = {};
  load_tile(s_a, p.a, first_row, p.m, 0, p.k);
  load_tile(s_b, p.b, first_column, p.n, 0, p.k);
  sim_cp_async_commit();
  for (int tile = 0; tile < num_tiles; tile++) {
    uint16_t* s_a_now = s_a + (tile & 1) * kTile * kTile;
    uint16_t* s_b_now = s_b + (tile & 1) * kTile * kTile;
    sim_cp_async_wait(0, sim_site());
    __syncthreads();
    if (tile + 1 < num_tiles) {
      int next = (tile + 1) & 1;
      load_tile(s_a + next * kTile * kTile, p.a, first_row, p.m, (tile + 1) * kTile, p.k);
      load_tile(s_b + next * kTile * kTile, p.b, first_column, p.n, (tile + 1) * kTile, p.k);
      sim_cp_async_commit();
    }
    for (int step = 0; step < 2; step++) {
      uint32_t a[4], b[2];
      sim_ldmatrix(a, 4, 0, chunk_at(s_a_now, warp * 16 + lane % 16, step * 2 + lane / 16), sim_site());
      for (int column = 0; column < 4; column++) {
        sim_ldmatrix(b, 2, 0, chunk_at(s_b_now, column * 8 + lane % 8, step * 2 + lane / 8 % 2), sim_site());
        sim_mma_m16n8k16(sums[column], a, b, 1, sim_site());
      }
    }
  }
  for (int column = 0; column < 4; column++) {
    for (int i = 0; i < 4; i++) {
      int row = first_row + warp * 16 + lane / 4 + i / 2 * 8;
      int out_column = first_column + column * 8 + lane % 4 * 2 + i % 2;
      if (row < p.m && out_column < p.n) p.out[(size_t)row * p.n + out_column] = sums[column][i];
    }
  }
}
