// Work of a query-stationary kernel. A *work tile* is a tile of query rows and a range of its key tiles, a KV split.
// Keys are split at multiples of kSplitKeys, so that many blocks share a long past. With PackGQA the rows of a tile
// are packed: row r of tile t is query (t * kRows + r) / packed_heads of the (t * kRows + r) % packed_heads-th of the
// tile's heads.
#pragma once
#include "tile.cuh"
#include "visibility.cuh"

struct WorkTile {
  int batch_index, head, query_tile, split;
  int first_kv_tile, end_kv_tile;  // of the head's list of key tiles
  int splits;                      // KV splits of the query tile; 1: the results are final
  int query_rows;                  // valid queries of the element of the batch
  int rows;                        // those that are written: valid ones and padding
  KeyList keys;
};

// The query of a tile's row. Position -1: the row is padding.
struct QueryRow {
  int query, head, position;
};

template <int kRows>
SEGATTN_FN QueryRow query_row(const WorkTile& work, int tile_row, int packed_heads) {
  const int index = work.query_tile * kRows + tile_row;
  const int query = packed_heads == 1 ? index : index / packed_heads;
  const int head = work.head + (packed_heads == 1 ? 0 : index % packed_heads);
  return {query, head, query < work.query_rows ? work.keys.query_start + query : -1};
}

// Query rows of an element of the batch that are written: the valid ones and padding, if there is any.
SEGATTN_FN int written_rows(const SegattnProblem& p, int query_rows) {
  return p.row_offsets ? query_rows : (int)p.q.rows;
}

// Number of key tiles that some row of the query tile sees.
template <int kRows, int kKeys>
SEGATTN_FN int visible_kv_tiles(const KeyList& keys, int tile, int packed_heads, int query_rows) {
  const int end_query = (tile * kRows + kRows - 1) / packed_heads + 1;
  const int last = min(end_query, query_rows) - 1;
  if (last * packed_heads + packed_heads - 1 < tile * kRows) return 0;
  return keys.tiles_of<kKeys>(keys.query_start + last);
}

// Fills in the range of key tiles of the work tile's KV split.
template <int kRows, int kKeys, int kSplitKeys>
SEGATTN_FN void locate_split(WorkTile& work, const SegattnProblem& p, int packed_heads) {
  work.keys = KeyList::of(p, work.batch_index, work.head);
  work.query_rows = work.keys.query_rows((int)p.q.rows);
  work.rows = written_rows(p, work.query_rows);
  const int kv_tiles = visible_kv_tiles<kRows, kKeys>(work.keys, work.query_tile, packed_heads, work.query_rows);
  constexpr int kSplitTiles = kSplitKeys / kKeys;
  // A tile of padding rows is a work tile, whose results are zeros. With row_offsets there is no such tile.
  work.splits = max(p.row_offsets ? 0 : 1, ceil_div(kv_tiles, kSplitTiles));
  work.first_kv_tile = work.split * kSplitTiles;
  work.end_kv_tile = min(kv_tiles, work.first_kv_tile + kSplitTiles);
}

// Query heads, of all in the order [batch, q_heads].
struct HeadRange {
  int first, count;

  SEGATTN_FN HeadRange of(const SegattnForwardParams& p) { return {0, opaque(p.problem.q_heads) * p.problem.batch}; }
  SEGATTN_FN HeadRange of(const SegattnBackwardParams& p) {
    const int group = p.problem.q_heads / p.problem.kv_heads;
    return {p.first_group * group, p.groups * group};
  }
};

template <int kRows, int kKeys, int kSplitKeys>
SEGATTN_FN WorkTile work_tile_at(const SegattnProblem& p, const HeadRange& range, int index, int tiles,
                                 int max_splits) {
  const int q_heads = opaque(p.q_heads), heads = range.count, per_split = tiles * heads;
  WorkTile work;
  work.split = max_splits - 1 - index / per_split;
  index %= per_split;
  // Head by head, so that the keys of few heads are in L2 at a time, the longest tiles of a head first. The quarter
  // of the tiles with the fewest keys comes last, of all heads, so that the blocks end together.
  const int last_tiles = tiles / 4, longer = tiles - last_tiles;
  int head;
  if (index < longer * heads) {
    head = index / longer;
    work.query_tile = tiles - 1 - index % longer;
  } else {
    index -= longer * heads;
    head = index % heads;
    work.query_tile = last_tiles - 1 - index / heads;
  }
  head += range.first;
  work.head = head % q_heads;
  work.batch_index = head / q_heads;
  locate_split<kRows, kKeys, kSplitKeys>(work, p, 1);
  return work;
}

// Index of a row of a split's partial results, [split, batch, q_heads, rows].
SEGATTN_FN int64_t partial_row(const SegattnProblem& p, int split, int batch_index, int head, int query) {
  if (p.row_offsets) {
    const int first = p.row_offsets[batch_index], rows = p.row_offsets[batch_index + 1] - first;
    return ((int64_t)split * p.row_offsets[p.batch] + first) * p.q_heads + (int64_t)head * rows + query;
  }
  return (((int64_t)split * p.batch + batch_index) * p.q_heads + head) * p.q.rows + query;
}

// K and V of every source, of one KV head and element of the batch. Sinks are rows of the past tensors.
template <class T>
struct SourceRows {
  Rows<const T> k[4], v[4];

  // Called by all threads; the first eight write.
  __device__ __forceinline__ void fill(const SegattnProblem& p, int batch_index, int kv_head, int thread) {
    if (thread == 0) k[kPast] = Rows<const T>::of(p.past_k, batch_index, kv_head);
    if (thread == 1) v[kPast] = Rows<const T>::of(p.past_v, batch_index, kv_head);
    if (thread == 2) k[kPrior] = Rows<const T>::of(p.prior_k, batch_index, kv_head);
    if (thread == 3) v[kPrior] = Rows<const T>::of(p.prior_v, batch_index, kv_head);
    if (thread == 4) k[kCurrent] = Rows<const T>::of(p.k, batch_index, kv_head);
    if (thread == 5) v[kCurrent] = Rows<const T>::of(p.v, batch_index, kv_head);
    if (thread == 6) k[kSinks] = Rows<const T>::of(p.past_k, batch_index, kv_head);
    if (thread == 7) v[kSinks] = Rows<const T>::of(p.past_v, batch_index, kv_head);
  }
};

// Stores a warp's accumulators as 16-bit rows of a tensor like q, staged in the warp's own rows of a tile, so that
// global memory is written 16 bytes at a time. Padding rows become zero.
template <class T, class Tile, int kRowTiles>
SEGATTN_FN void store_query_rows(const float (&x)[kRowTiles][Tile::kCols / 8][4], SharedAddress tile,
                                 unsigned char* shared, const SegattnTensor& tensor, const WorkTile& work,
                                 int packed_heads, int warp, int lane) {
  const int row0 = warp * kRowTiles * 16;
  const SharedAddress origin = shared_address(shared);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < Tile::kCols / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = row0 + m * 16 + half * 8 + lane / 4;
        unsigned char* chunk = shared + (Tile::chunk(tile, row, n) - origin);
        *(uint32_t*)(chunk + lane % 4 * 4) = pack<T>(x[m][n][half * 2], x[m][n][half * 2 + 1]);
      }
  __syncwarp();
  constexpr int kRowChunks = Tile::kCols / 8;
  for (int i = lane; i < kRowTiles * 16 * kRowChunks; i += 32) {
    const int row = row0 + i / kRowChunks, column = i % kRowChunks;
    const QueryRow q = query_row<Tile::kRows>(work, row, packed_heads);
    if (q.query >= work.rows) continue;
    const uint4 value = *(const uint4*)(shared + (Tile::chunk(tile, row, column) - origin));
    T* target = Rows<T>::of(tensor, work.batch_index, q.head).row(q.query) + column * 8;
    *(uint4*)target = q.position >= 0 ? value : make_uint4(0, 0, 0, 0);
  }
}
