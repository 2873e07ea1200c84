// ds of prior and current keys in 16 bits, which Hopper's d_k pass leaves for its d_q pass (docs/kernels.md).
//
// A head's blocks are pairs of 64 queries and 64 keys: for each tile of queries the prior keys' blocks, unless they get
// no gradient, then those of the current keys up to the diagonal. A block is written by one warpgroup of the d_k pass
// and read by one of the d_q pass. It consists of 8 x 8 matrices of rows of keys, 128 bytes each, in the order
// [16 queries of four, 16 keys of four, 8 keys of two, 8 queries of two].
#pragma once
#include "attention_gradients.cuh"
#include "warpgroups.cuh"

constexpr int kBlockRows = 64;
constexpr int kBlockBytes = kBlockRows * kBlockRows * 2;

SEGATTN_FN int ds_prior_blocks(const SegattnBackwardParams& p) {
  return p.d_prior_k.data ? ceil_div((int)p.d_prior_k.rows, kBlockRows) : 0;
}

// Blocks of a head's first so many tiles of queries.
SEGATTN_FN int ds_blocks(const SegattnBackwardParams& p, int query_tiles) {
  return query_tiles * ds_prior_blocks(p) + query_tiles * (query_tiles + 1) / 2;
}

// The first block of a query's tile.
SEGATTN_FN int ds_first_block(const SegattnBackwardParams& p, int batch_index, int head, int query) {
  const int heads = p.problem.q_heads / p.problem.kv_heads;
  const int of_launch = batch_index * p.problem.q_heads + head - p.first_group * heads;
  return of_launch * ds_blocks(p, ceil_div((int)p.problem.q.rows, kBlockRows)) + ds_blocks(p, query / kBlockRows);
}

// The block of a tile's keys, after that of its first prior keys.
SEGATTN_FN int ds_key_block(const SegattnBackwardParams& p, bool prior, int first_key) {
  return (prior ? 0 : ds_prior_blocks(p)) + first_key / kBlockRows;
}

// Stores the packed dS^T of a warp's 16 keys and 64 queries. Thread rows `row` and row + 8 from `keys` on become zero:
// there are no such keys.
SEGATTN_FN void store_ds(const SegattnBackwardParams& p, int block, const uint32_t (&ds)[4][4], int row, int keys) {
  const int thread = threadIdx.x % 128;
  uint32_t* to = p.ds + (int64_t)block * (kBlockBytes / 4) + thread / 32 * 128 + thread % 32;
  const bool there[2] = {row < keys, row + 8 < keys};
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) to[j * 512 + i * 32] = there[i / 2] ? ds[j][i / 2 + i % 2 * 2] : 0;
}

// Starts copying a block to shared memory, by all lanes of a warp.
SEGATTN_FN void copy_ds_async(const SegattnBackwardParams& p, int block, SharedAddress to, int lane) {
  const uint4* from = (const uint4*)p.ds + (int64_t)block * (kBlockBytes / 16);
#pragma unroll
  for (int i = 0; i < kBlockBytes / 16; i += 32) cp_async_16(to + (i + lane) * 16, from + i + lane, 16);
}

// dS of a warp's 16 queries and the 64 keys of a block, as A operands.
SEGATTN_FN void load_ds(uint32_t (&ds)[4][4], SharedAddress block, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < 4; k++) ldmatrix_x4_trans(ds[k], block + (warp * 4 + k) * 512 + lane * 16);
}

// A work tile's keys whose dS is stored: d_q of the warpgroup's rows, whose first is row `group` of the work tile.
template <class C, class Shared, class Iterator>
SEGATTN_FN void stored_mainloop(float (&d_q)[C::kOutTiles][4], Shared& shared, Iterator at, int group) {
  for (; at.seek(); at.iteration++) {
    const int stage = at.stage();
    uint32_t ds[C::kColTiles / 2][4];
    load_ds(ds, shared_address(&shared.v[stage]) + group / 64 * kBlockBytes, threadIdx.x % 128 / 32, at.lane);
    wgmma_fence();
    wgmma_rs_mn_major<typename C::T, typename C::KeyTile>(d_q, ds, shared_address(&shared.k[stage]));
    wgmma_commit();
    wgmma_wait<0>();
    shared.kv_ring.release(at.iteration, at.lane);
  }
}
