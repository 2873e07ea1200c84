// Products of tiles on mma.m16n8k16. SS: both operands come from shared memory. RS: A is in registers. x[m][n] are a
// warp's accumulators of rows m * 16... and columns n * 8... Each function reads the next operand while a product
// runs.
#pragma once
#include "tile.cuh"

template <int kRowTiles, int kColTiles>
SEGATTN_FN void clear(float (&x)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < kColTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[m][n][e] = 0.f;
}

// SS: x = a b^T over all of head_dim, for kRowTiles * 16 rows of one [rows][head_dim] tile and kColTiles * 8 of
// another.
template <class T, class TileA, class TileB, int kRowTiles, int kColTiles>
SEGATTN_FN void mma_ss(float (&x)[kRowTiles][kColTiles][4], SharedAddress a_tile_base, int a_row,
                       SharedAddress b_tile_base, int b_row) {
  constexpr int kPairs = kColTiles / 2, kKBlocks = TileA::kCols / 16;
  uint32_t a[kRowTiles][4], b[2][4];
  clear(x);
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) load_a<TileA>(a[m], a_tile_base, a_row + m * 16, 0);
  load_b<TileB>(b[0], b_tile_base, b_row, 0);
#pragma unroll
  for (int i = 0; i < kKBlocks * kPairs; i++) {
    const int k = i / kPairs, n = i % kPairs * 2, next = i + 1;
    if (next < kKBlocks * kPairs)
      load_b<TileB>(b[next & 1], b_tile_base, b_row + next % kPairs * 16, next / kPairs * 16);
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
      mma_16x8x16(x[m][n], a[m], b[i & 1][0], b[i & 1][1], T{});
      mma_16x8x16(x[m][n + 1], a[m], b[i & 1][2], b[i & 1][3], T{});
      if (n + 2 == kColTiles && k + 1 < kKBlocks) load_a<TileA>(a[m], a_tile_base, a_row + m * 16, (k + 1) * 16);
    }
  }
}

// RS: the same with A in registers.
template <class T, class TileB, int kRowTiles, int kColTiles, int kKBlocks>
SEGATTN_FN void mma_rs(float (&x)[kRowTiles][kColTiles][4], const uint32_t (&a)[kRowTiles][kKBlocks][4],
                       SharedAddress b_tile_base, int b_row) {
  constexpr int kPairs = kColTiles / 2;
  uint32_t b[2][4];
  clear(x);
  load_b<TileB>(b[0], b_tile_base, b_row, 0);
#pragma unroll
  for (int i = 0; i < kKBlocks * kPairs; i++) {
    const int k = i / kPairs, n = i % kPairs * 2, next = i + 1;
    if (next < kKBlocks * kPairs)
      load_b<TileB>(b[next & 1], b_tile_base, b_row + next % kPairs * 16, next / kPairs * 16);
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
      mma_16x8x16(x[m][n], a[m][k], b[i & 1][0], b[i & 1][1], T{});
      mma_16x8x16(x[m][n + 1], a[m][k], b[i & 1][2], b[i & 1][3], T{});
    }
  }
}

// A of kRowTiles * 16 rows of a [rows][head_dim] tile, over all of head_dim.
template <class TileA, int kRowTiles, int kKBlocks>
SEGATTN_FN void load_fragments(uint32_t (&a)[kRowTiles][kKBlocks][4], SharedAddress a_tile_base, int a_row) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int k = 0; k < kKBlocks; k++) load_a<TileA>(a[m][k], a_tile_base, a_row + m * 16, k * 16);
}

// RS, B MN-major: out += a b for rows b_row... of a [k][n] tile and columns [column, column + 8 * kOutTiles).
template <class T, class TileB, int kRowTiles, int kColTiles, int kOutTiles>
SEGATTN_FN void mma_rs_mn_major(float (&out)[kRowTiles][kOutTiles][4], const uint32_t (&a)[kRowTiles][kColTiles / 2][4],
                                SharedAddress bt_tile_base, int b_row, int column) {
  constexpr int kPairs = kOutTiles / 2, kKBlocks = kColTiles / 2;
  uint32_t b[2][4];
  load_bt<TileB>(b[0], bt_tile_base, b_row, column);
#pragma unroll
  for (int i = 0; i < kKBlocks * kPairs; i++) {
    const int k = i / kPairs, n = i % kPairs * 2, next = i + 1;
    if (next < kKBlocks * kPairs)
      load_bt<TileB>(b[next & 1], bt_tile_base, b_row + next / kPairs * 16, column + next % kPairs * 16);
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
      mma_16x8x16(out[m][n], a[m][k], b[i & 1][0], b[i & 1][1], T{});
      mma_16x8x16(out[m][n + 1], a[m][k], b[i & 1][2], b[i & 1][3], T{});
    }
  }
}

// Accumulators as A of the next product: the two layouts agree.
template <class T, int kRowTiles, int kColTiles>
SEGATTN_FN void pack_operands(uint32_t (&a)[kRowTiles][kColTiles / 2][4], const float (&x)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < kColTiles; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        a[m][n / 2][n % 2 * 2 + half] = pack<T>(x[m][n][half * 2], x[m][n][half * 2 + 1]);
}
