// Products of a warpgroup on wgmma, and the stores of their results. x[n] are the accumulators of columns n * 8... of
// the warpgroup's 64 rows (ptx.cuh). SS: both operands in shared memory. RS: A in registers. The functions only issue
// the products; wgmma_fence, wgmma_commit and wgmma_wait are the caller's.
#pragma once
#include "tile.cuh"

// Offset of column k in a K-major tile, in bytes.
template <class Tile>
SEGATTN_FN uint32_t k_major_offset(int k) {
  return k / 64 * Tile::kPanelBytes + k % 64 * 2;
}
// The descriptor of the operand `bytes` further on, within the same tile.
SEGATTN_FN uint64_t advance(uint64_t operand, uint32_t bytes) {
  return (operand & ~0xffffffffull) | (uint32_t)((uint32_t)operand + bytes / 16);
}

// SS, B K-major: x = a b^T over all of head_dim, for 64 rows of one [rows][head_dim] tile and kColTiles * 8 of another.
template <class T, class TileA, class TileB, int kColTiles>
SEGATTN_FN void wgmma_ss(float (&x)[kColTiles][4], SharedAddress a, int a_row, SharedAddress b) {
  const uint64_t first_a = k_major_operand<TileA>(a, a_row, 0), first_b = k_major_operand<TileB>(b, 0, 0);
  wgmma<false, false>(x, first_a, first_b, T{});
#pragma unroll
  for (int k = 16; k < TileA::kCols; k += 16)
    wgmma<true, false>(x, advance(first_a, k_major_offset<TileA>(k)), advance(first_b, k_major_offset<TileB>(k)), T{});
}

// RS, B K-major: the same with A in registers.
template <class T, class TileB, int kColTiles, int kKBlocks>
SEGATTN_FN void wgmma_rs(float (&x)[kColTiles][4], const uint32_t (&a)[kKBlocks][4], SharedAddress b) {
  const uint64_t first = k_major_operand<TileB>(b, 0, 0);
  wgmma<false, false>(x, a[0], first, T{});
#pragma unroll
  for (int k = 1; k < kKBlocks; k++) wgmma<true, false>(x, a[k], advance(first, k_major_offset<TileB>(k * 16)), T{});
}

// RS, B MN-major: out += a b for all rows and columns of a [k][n] tile.
template <class T, class TileB, int kKBlocks, int kOutTiles>
SEGATTN_FN void wgmma_rs_mn_major(float (&out)[kOutTiles][4], const uint32_t (&a)[kKBlocks][4], SharedAddress b) {
  const uint64_t first = mn_major_operand<TileB>(b, 0, 0);
#pragma unroll
  for (int k = 0; k < kKBlocks; k++) wgmma<true, true>(out, a[k], advance(first, k * 16 * TileB::kRowBytes), T{});
}

template <int kTiles>
SEGATTN_FN void clear(float (&x)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) x[n][e] = 0.f;
}

// A of a warp: its 16 rows of a [rows][head_dim] tile.
template <class TileA, int kKBlocks>
SEGATTN_FN void load_fragments(uint32_t (&a)[kKBlocks][4], SharedAddress tile, int row, int lane) {
  const SharedAddress base = a_base<TileA>(tile, lane);
#pragma unroll
  for (int k = 0; k < kKBlocks; k++) load_a<TileA>(a[k], base, row, k * 16);
}

// Accumulators as A of the next product: the two layouts agree.
template <class T, int kColTiles>
SEGATTN_FN void pack_operands(uint32_t (&a)[kColTiles / 2][4], const float (&x)[kColTiles][4]) {
#pragma unroll
  for (int n = 0; n < kColTiles; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) a[n / 2][n % 2 * 2 + half] = pack<T>(x[n][half * 2], x[n][half * 2 + 1]);
}

// A 4 x 4 transposition among the four lanes that share a row: each has 4 bytes of four 16-byte chunks, and gets the
// whole of chunk lane % 4.
SEGATTN_FN void gather_chunk(uint32_t (&w)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  const uint32_t first = shuffle_xor(odd ? w[0] : w[1], 1), second = shuffle_xor(odd ? w[2] : w[3], 1);
  const uint32_t a0 = odd ? first : w[0], a1 = odd ? w[1] : first, b0 = odd ? second : w[2], b1 = odd ? w[3] : second;
  const uint32_t c0 = shuffle_xor(upper ? a0 : b0, 2), c1 = shuffle_xor(upper ? a1 : b1, 2);
  w[0] = upper ? c0 : a0, w[1] = upper ? c1 : a1, w[2] = upper ? b0 : c0, w[3] = upper ? b1 : c1;
}

// Stores accumulators times `factor` to rows `row` (the warp's first row + lane / 4) and row + 8 of the target. Rows in
// [len, rows) are padding and become zero; rows from `rows` on do not exist.
template <class T, int kOutTiles>
SEGATTN_FN void store_rows(const float (&x)[kOutTiles][4], float factor, Rows<T> target, int row, int len, int rows,
                           int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int at = row + half * 8;
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 4) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = pack<T>(x[n + i][half * 2] * factor, x[n + i][half * 2 + 1] * factor);
      gather_chunk(w, lane);
      const bool valid = at < len;
      if (at < rows)
        *(uint4*)(target.row(at) + (n + lane % 4) * 8) =
            valid ? make_uint4(w[0], w[1], w[2], w[3]) : make_uint4(0, 0, 0, 0);
    }
  }
}

// The same for the warp's rows row... of a tile, staged in those rows of the tile so that global memory is written in
// whole rows. Row 0 of the tile is row `first` of the target.
template <class T, class Tile, int kOutTiles>
SEGATTN_FN void store_rows(const float (&x)[kOutTiles][4], float factor, Tile& tile, int row, Rows<T> target, int first,
                           int len, int rows, int lane) {
  const SharedAddress at = shared_address(&tile);
  unsigned char* bytes = (unsigned char*)&tile;
#pragma unroll
  for (int n = 0; n < kOutTiles; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const SharedAddress offset = Tile::chunk(at, row + half * 8 + lane / 4, n) - at;
      *(uint32_t*)(bytes + offset + lane % 4 * 4) = pack<T>(x[n][half * 2] * factor, x[n][half * 2 + 1] * factor);
    }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * kOutTiles; i += 32) {
    const int from = row + i / kOutTiles, chunk = i % kOutTiles, to = first + from;
    if (to >= rows) continue;
    const uint4 value = *(const uint4*)(bytes + (Tile::chunk(at, from, chunk) - at));
    *(uint4*)(target.row(to) + chunk * 8) = to < len ? value : make_uint4(0, 0, 0, 0);
  }
}
