// Tiles in shared memory; all of their address arithmetic stands here. A tile of kRows x kCols 16-bit elements
// consists of panels of kRows x 64 elements (32 if kCols is not a multiple of 64), side by side. Within a panel the
// 16-byte chunks of a row are swizzled, so that the eight rows of an ldmatrix lie in eight different bank groups. The
// layout is that of a TMA copy with 128-byte (64-byte) swizzle.
#pragma once
#include "ptx.cuh"

template <class T, int kTileRows, int kTileCols>
struct alignas(1024) Tile {
  static constexpr int kRows = kTileRows, kCols = kTileCols;
  static constexpr int kPanelCols = kCols % 64 == 0 ? 64 : 32;
  static constexpr int kPanelChunks = kPanelCols / 8;
  static constexpr int kRowBytes = kPanelCols * 2;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static_assert(kCols % 32 == 0 && kRows % 8 == 0, "whole panels of whole swizzle periods");
  T data[kRows * kCols];

  // Chunk c of row r is stored at chunk c ^ swizzle(r).
  SEGATTN_FN int swizzle(int row) { return kPanelCols == 64 ? row & 7 : (row >> 1) & 3; }

  SEGATTN_FN SharedAddress chunk(SharedAddress tile, int row, int chunk) {
    const int panel = chunk / kPanelChunks, within = chunk % kPanelChunks;
    return tile + panel * kPanelBytes + row * kRowBytes + ((within ^ swizzle(row)) << 4);
  }

  // lane_chunk(lane_base(tile, lane_row, bit), first_row, first_chunk) is the address of chunk first_chunk + bit of row
  // first_row + lane_row, if first_row is a multiple of 8 and first_chunk even. It costs one XOR and one addition.
  SEGATTN_FN SharedAddress lane_base(SharedAddress tile, int lane_row, int bit) {
    return tile + lane_row * kRowBytes + ((bit ^ swizzle(lane_row)) << 4);
  }
  SEGATTN_FN SharedAddress lane_chunk(SharedAddress base, int first_row, int first_chunk) {
    const int panel = first_chunk / kPanelChunks, within = first_chunk % kPanelChunks;
    return (base ^ (within << 4)) + panel * kPanelBytes + first_row * kRowBytes;
  }
};

// Operands of m16n8k16, read from a tile by ldmatrix. `base` is the result of the matching *_base, computed once a
// tile.

// A: 16 rows x 16 columns of a [m][k] tile.
template <class Tile>
SEGATTN_FN SharedAddress a_base(SharedAddress tile, int lane) {
  return Tile::lane_base(tile, lane & 15, lane >> 4);
}
template <class Tile>
SEGATTN_FN void load_a(uint32_t (&a)[4], SharedAddress base, int row, int col) {
  ldmatrix_x4(a, Tile::lane_chunk(base, row, col / 8));
}

// B of two neighbouring n8 tiles from a [n][k] tile: {b[0], b[1]} for rows n..n+7, {b[2], b[3]} for n+8..n+15.
template <class Tile>
SEGATTN_FN SharedAddress b_base(SharedAddress tile, int lane) {
  return Tile::lane_base(tile, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
}
template <class Tile>
SEGATTN_FN void load_b(uint32_t (&b)[4], SharedAddress base, int n, int k) {
  ldmatrix_x4(b, Tile::lane_chunk(base, n, k / 8));
}

// The same from a [k][n] tile, transposed by ldmatrix.
template <class Tile>
SEGATTN_FN SharedAddress bt_base(SharedAddress tile, int lane) {
  return Tile::lane_base(tile, lane & 15, lane >> 4);
}
template <class Tile>
SEGATTN_FN void load_bt(uint32_t (&b)[4], SharedAddress base, int k, int n) {
  ldmatrix_x4_trans(b, Tile::lane_chunk(base, k, n / 8));
}

// wgmma operands in a tile of 64-column panels. K-major: rows [row, ...) of a [rows][k] tile, from column k on.
template <class Tile>
SEGATTN_FN uint64_t k_major_operand(SharedAddress tile, int row, int k) {
  static_assert(Tile::kPanelCols == 64, "128-byte swizzle");
  return matrix_descriptor(tile + k / 64 * Tile::kPanelBytes + row * Tile::kRowBytes + k % 64 * 2, 0,
                           8 * Tile::kRowBytes);
}
// MN-major: columns [column, ...) of a [k][n] tile, from row k on. `column` is a multiple of 64, k of 16.
template <class Tile>
SEGATTN_FN uint64_t mn_major_operand(SharedAddress tile, int k, int column) {
  static_assert(Tile::kPanelCols == 64, "128-byte swizzle");
  return matrix_descriptor(tile + column / 64 * Tile::kPanelBytes + k * Tile::kRowBytes, Tile::kPanelBytes,
                           8 * Tile::kRowBytes);
}

// B of one n8 tile and two neighbouring k16 blocks, {b[0], b[1]} and {b[2], b[3]}, for warps whose columns are not a
// multiple of 16: from a [n][k] tile, and from a [k][n] tile.
template <class Tile>
SEGATTN_FN void load_b_pair(uint32_t (&b)[4], SharedAddress tile, int n, int k, int lane) {
  ldmatrix_x4(b, Tile::chunk(tile, n + (lane & 7), k / 8 + (lane >> 3)));
}
template <class Tile>
SEGATTN_FN void load_bt_pair(uint32_t (&b)[4], SharedAddress tile, int k, int n, int lane) {
  ldmatrix_x4_trans(b, Tile::chunk(tile, k + lane, n / 8));
}

// The rows of one head of one element of the batch.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  SEGATTN_FN Rows of(const SegattnTensor& tensor, int batch_index, int head) {
    const int64_t start = tensor.batch_offsets ? tensor.batch_offsets[batch_index] : batch_index * tensor.batch_stride;
    return {(T*)tensor.data + start + head * tensor.head_stride, tensor.row_stride};
  }
  __device__ __forceinline__ T* row(int64_t index) const { return data + index * stride; }
};

// Issues cp.async for rows [first, first + kRows) to a tile, from its first row or a multiple of 8 on. Rows from
// `end` on are not read and become zero.
template <class Tile, int kThreads, int kRows = Tile::kRows, class T>
SEGATTN_FN void copy_rows_async(SharedAddress tile, Rows<T> rows, int first, int end, uint32_t thread) {
  constexpr int kRowChunks = Tile::kCols / 8;
  constexpr int kUnit = (kRowChunks & (kRowChunks - 1)) == 0 ? kRowChunks : Tile::kPanelChunks;
  constexpr int kRowsPerPass = kThreads / kUnit;
  static_assert(kThreads % kUnit == 0 && kRows % kRowsPerPass == 0, "a thread keeps its column");
  const int row0 = thread / kUnit, column = thread % kUnit, left = end - first - row0;
  const T* src = rows.row(first + row0) + column * 8;
  const SharedAddress origin = Tile::chunk(tile, row0, column);
#pragma unroll
  for (int pass = 0; pass < kRows / kRowsPerPass; pass++) {
    const int row = pass * kRowsPerPass;
    const SharedAddress target = row % 8 == 0 ? origin + row * Tile::kRowBytes : Tile::chunk(tile, row0 + row, column);
#pragma unroll
    for (int chunk = 0; chunk < kRowChunks; chunk += kUnit)
      cp_async_16(target + chunk / Tile::kPanelChunks * Tile::kPanelBytes, src + chunk * 8, row < left ? 16 : 0);
    src += kRowsPerPass * rows.stride;
  }
}

// The same by one warp, for kRows rows from a multiple of 8 of the tile on, of which `left` are there. A lane keeps its
// column of every panel: few addresses, and whole lines of 128 bytes where panels have them.
template <class Tile, int kRows, class T>
SEGATTN_FN void copy_rows_async_by_warp(SharedAddress rows_of_tile, const T* src, int64_t stride, int left,
                                        uint32_t lane) {
  constexpr int kRowsPerPass = 32 / Tile::kPanelChunks;
  static_assert(kRows % 8 == 0 && 8 % kRowsPerPass == 0, "whole passes, whole swizzle periods");
  const int row0 = lane / Tile::kPanelChunks, column = lane % Tile::kPanelChunks;
  const SharedAddress origin = Tile::chunk(rows_of_tile, row0, column);
  src += row0 * stride + column * 8;
#pragma unroll
  for (int row = 0; row < kRows; row += kRowsPerPass) {
    // Rows 4 apart differ in one bit of the swizzle, rows 8 apart in none.
    const SharedAddress target = (row % 8 == 0 ? origin : origin ^ (4 << 4)) + row * Tile::kRowBytes;
#pragma unroll
    for (int panel = 0; panel < Tile::kCols / Tile::kPanelCols; panel++)
      cp_async_16(target + panel * Tile::kPanelBytes, src + panel * Tile::kPanelCols, row0 + row < left ? 16 : 0);
    src += kRowsPerPass * stride;
  }
}
