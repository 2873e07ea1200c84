// Work of a query-stationary kernel: a tile of query rows and a run of its key tiles, the *work tile*. Rows of a
// tile are packed: row r of tile t is query (t * kRows + r) / packed_heads of head (...) % packed_heads.
// The keys of a tile are split into work tiles at multiples of kSplitKeys, so that a long past is worked on by many
// blocks; work tiles with the most keys come first.
#pragma once
#include "tile.cuh"
#include "visibility.cuh"

struct WorkTile {
  int batch_index, head, query_tile, split;
  int first_kv_tile, end_kv_tile;  // key tiles of the head's list
  int splits;                // work tiles of this tile; 1: the results are final
  int query_rows;            // valid queries of the entry
  KeyList keys;
};

// The valid rows of a thread's query: position -1 is padding.
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

// Key tiles that some row of the tile sees.
template <int kRows, int kKeys>
SEGATTN_FN int visible_kv_tiles(const KeyList& keys, int tile, int packed_heads, int query_rows) {
  const int end_query = (tile * kRows + kRows - 1) / packed_heads + 1;
  const int last = min(end_query, query_rows) - 1;
  if (last * packed_heads + packed_heads - 1 < tile * kRows) return 0;
  return keys.tiles_of<kKeys>(keys.query_start + last);
}

// The work tile of a head's tile that begins with the split-th run of its keys.
template <int kRows, int kKeys, int kSplitKeys>
SEGATTN_FN void locate_split(WorkTile& work, const SegattnProblem& p, int packed_heads) {
  work.keys = KeyList::of(p, work.batch_index, work.head);
  work.query_rows = work.keys.query_rows((int)p.q.rows);
  const int kv_tiles = visible_kv_tiles<kRows, kKeys>(work.keys, work.query_tile, packed_heads, work.query_rows);
  constexpr int kSplitTiles = kSplitKeys / kKeys;
  work.splits = max(1, ceil_div(kv_tiles, kSplitTiles));
  work.first_kv_tile = work.split * kSplitTiles;
  work.end_kv_tile = min(kv_tiles, work.first_kv_tile + kSplitTiles);
}

template <int kRows, int kKeys, int kSplitKeys>
SEGATTN_FN WorkTile work_tile_at(const SegattnProblem& p, int index, int tiles, int packed_heads, int max_splits) {
  const int head_tiles = opaque(p.q_heads) / packed_heads, per_split = tiles * head_tiles * p.batch;
  WorkTile work;
  work.split = max_splits - 1 - index / per_split;
  index %= per_split;
  // Head by head, so that the keys of few heads are in use at a time; but the tiles of the fewest keys of all heads come
  // last, so that the blocks end together.
  const int heads = head_tiles * p.batch, last_tiles = tiles / 4, longer = tiles - last_tiles;
  int head;
  if (index < longer * heads) {
    head = index / longer;
    work.query_tile = tiles - 1 - index % longer;
  } else {
    index -= longer * heads;
    head = index % heads;
    work.query_tile = last_tiles - 1 - index / heads;
  }
  work.head = head % head_tiles * packed_heads;
  work.batch_index = head / head_tiles;
  locate_split<kRows, kKeys, kSplitKeys>(work, p, packed_heads);
  return work;
}

// Where a row's partial result lies: [split, batch, q_heads, rows].
SEGATTN_FN int64_t partial_row(const SegattnProblem& p, int split, int batch_index, int head, int query) {
  return (((int64_t)split * p.batch + batch_index) * p.q_heads + head) * p.q.rows + query;
}

// Keys and values of the three sources, as one KV head of one batch entry sees them.
template <class T>
struct SourceRows {
  Rows<const T> k[3], v[3];

  // Written by the first six threads.
  __device__ __forceinline__ void fill(const SegattnProblem& p, int batch_index, int kv_head, int thread) {
    if (thread == 0) k[kPast] = Rows<const T>::of(p.past_k, batch_index, kv_head);
    if (thread == 1) v[kPast] = Rows<const T>::of(p.past_v, batch_index, kv_head);
    if (thread == 2) k[kPrior] = Rows<const T>::of(p.prior_k, batch_index, kv_head);
    if (thread == 3) v[kPrior] = Rows<const T>::of(p.prior_v, batch_index, kv_head);
    if (thread == 4) k[kCurrent] = Rows<const T>::of(p.k, batch_index, kv_head);
    if (thread == 5) v[kCurrent] = Rows<const T>::of(p.v, batch_index, kv_head);
  }
};

// Writes a warp's accumulators as 16-bit rows of a tensor like q: through the warp's own rows of a tile, so that
// global memory is written 16 bytes at a time. Rows that are padding become zero.
template <class T, class Tile, int kRowTiles>
SEGATTN_FN void store_query_rows(const float (&x)[kRowTiles][Tile::kCols / 8][4], SharedAddress tile, unsigned char* shared,
                                 const SegattnTensor& tensor, const WorkTile& work, int packed_heads, int warp, int lane) {
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
    if (q.query >= tensor.rows) continue;
    const uint4 value = *(const uint4*)(shared + (Tile::chunk(tile, row, column) - origin));
    T* target = Rows<T>::of(tensor, work.batch_index, q.head).row(q.query) + column * 8;
    *(uint4*)target = q.position >= 0 ? value : make_uint4(0, 0, 0, 0);
  }
}
