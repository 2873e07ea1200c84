// Segment attention, forward: out = softmax(scale q k^T + log gate) v over past, prior and current keys, and lse = ln
// sum exp. Both are set, not added to; padding rows get out = 0 and lse = -inf.
//
// A block takes work tiles until none is left. It accumulates each chunk of kChunkKeys keys from zero and merges
// chunks left to right into a section, which is a KV split. If a tile has several splits, each stores a partial
// result, and the combine kernel merges these. So a row sees the same operations in the same order in every forward
// kernel (docs/kernels.md).
#include "attention_rows.cuh"
#include "layout.cuh"
#include "pipeline.cuh"
#include "products.cuh"

// 4 warps x 32 query rows (16 at D 256, where the accumulators of 32 do not fit). With 64 keys a tile S (64
// registers) fits beside O (128 at D 128). Two stages take 96 KB at D 128, so two blocks fit on Hopper, one on sm_86.
template <class T_, int kHeadDim_>
struct ForwardConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kPackGqa = false;
  static constexpr int kWarps = 4;
  static constexpr int kRowTiles = kHeadDim == 256 ? 1 : 2;
  static constexpr int kRows = kWarps * kRowTiles * 16;
  static constexpr int kKeys = tile_keys(kHeadDim);
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarps * 32, kConsumerThreads = kThreads;
  static constexpr int kBlocks = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kSplitKeys = kChunkKeys * kSectionChunks;
  static constexpr int kColTiles = kKeys / 8, kOutTiles = kHeadDim / 8;
  static constexpr int kChunkTiles = kChunkKeys / kKeys;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
};

template <class C>
struct ForwardShared {
  typename C::QueryTile q;  // finally the output, staged for the store
  typename C::KeyTile k[C::kStages], v[C::kStages];
  SourceRows<typename C::T> sources;
  WorkTile work;  // in shared memory because the registers are full
  bool done;
  KeyTile tiles[4];  // key tile t is tiles[t % 4]: the current one and the next two
  WarpRows warps[C::kWarps];
  float4* chunk_totals;       // the block's scratch, [row tile, out tile, thread, 4]
  RowState totals[C::kRows];  // of the chunks before the current one, then of the work tile
};

// Q K^T, mask and softmax of a key tile: P, packed as A of the next product.
template <class C>
SEGATTN_FN void score_and_softmax(uint32_t (&probs)[C::kRowTiles][C::kColTiles / 2][4], Accumulator<C>& acc,
                                  ForwardShared<C>& shared, const KeyTile& tile, int stage, const WarpRows& rows,
                                  float scale, int lane) {
  const WorkTile& work = shared.work;
  const bool masked = tile.first + C::kKeys > work.keys.limit(tile, rows.first_position);
  const float past = tile.source == kPast ? 1.f : 0.f;
  const SharedAddress q = a_base<typename C::QueryTile>(shared_address(&shared.q), lane);
  const SharedAddress k = b_base<typename C::KeyTile>(shared_address(&shared.k[stage]), lane);
  float s[C::kRowTiles][C::kColTiles][4];
  mma_ss<typename C::T, typename C::QueryTile, typename C::KeyTile>(s, q, rows.first_row, k, 0);
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++) {
    if (masked) mask_rows<C>(s[m], work, tile, rows.first_row + m * 16, 1, lane);
    const float gate = work.keys.gate_log2 * past;
    softmax_rows<C>(probs[m], s[m], acc.out[m], acc.rows[m], {gate, gate}, scale);
  }
}

// The pipeline of a work tile: K and V of the next key tile are copied while this one is computed, with one barrier a
// tile. One thread finds where a key tile's rows are, one tile before its copies start.
template <class C>
struct KeyPipeline {
  ForwardShared<C>& shared;
  int thread;

  __device__ __forceinline__ const KeyTile& tile(int kv_tile) const { return shared.tiles[kv_tile % 4]; }
  __device__ __forceinline__ int stage(int kv_tile) const { return stage_of<C::kStages>(kv_tile); }
  __device__ __forceinline__ void load(int kv_tile) {
    if (kv_tile < shared.work.end_kv_tile) {
      const KeyTile& rows = tile(kv_tile);
      const int source = rows.source;
      load_tile(&shared.k[stage(kv_tile)], shared.sources.k[source], rows);
      load_tile(&shared.v[stage(kv_tile)], shared.sources.v[source], rows);
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void load_tile(const void* target, Rows<const typename C::T> rows, const KeyTile& at) {
    copy_rows_async<typename C::KeyTile, C::kThreads>(shared_address(target), rows, at.first, at.end, opaque(thread));
  }
  __device__ __forceinline__ void wait(int kv_tile) {
    arrive_and_wait<C::kStages - 2>();
    load(kv_tile + C::kStages - 1);
    if (thread == 0) shared.tiles[(kv_tile + 2) % 4] = shared.work.keys.template tile<C::kKeys>(kv_tile + 2);
  }
};

// Computes one work tile.
template <class C>
SEGATTN_FN void run_work_tile(const SegattnForwardParams& p, ForwardShared<C>& shared) {
  using T = typename C::T;
  const WorkTile& work = shared.work;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  WarpRows& rows = shared.warps[warp];
  if (lane == 0) rows = warp_rows<C>(work, 1, warp);
  const float scale = scale_log2(p.problem.scale);
  copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.q),
                                                      Rows<const T>::of(p.problem.q, work.batch_index, work.head),
                                                      work.query_tile * C::kRows, work.query_rows, opaque(thread));
  KeyPipeline<C> pipeline = {shared, thread};
  pipeline.load(work.first_kv_tile);
  Accumulator<C> acc;
  acc.clear();
  for (int kv_tile = work.first_kv_tile; kv_tile < work.end_kv_tile; kv_tile++) {
    pipeline.wait(kv_tile);
    if (kv_tile == work.first_kv_tile && p.problem.scale < 0.f) negate_queries<C>(shared.q, warp, lane);
    const KeyTile& tile = pipeline.tile(kv_tile);
    const int stage = pipeline.stage(kv_tile);
    const bool sees = rows.last_position >= 0 && tile.first < work.keys.limit(tile, rows.last_position);
    if (sees) {
      uint32_t probs[C::kRowTiles][C::kColTiles / 2][4];
      score_and_softmax<C>(probs, acc, shared, tile, stage, rows, scale, opaque(lane));
      mma_rs_mn_major<T, typename C::KeyTile, C::kRowTiles, C::kColTiles>(
          acc.out, probs, bt_base<typename C::KeyTile>(shared_address(&shared.v[stage]), opaque(lane)), 0, 0);
    }
    const bool last = kv_tile + 1 == work.end_kv_tile;
    if (last || (kv_tile + 1) % C::kChunkTiles == 0) {
      merge_chunk<C>(acc, shared.totals + rows.first_row, shared.chunk_totals,
                     kv_tile - work.first_kv_tile < C::kChunkTiles, last, thread);
      if (!last) acc.clear();
    }
  }
  arrive_and_wait<0>();  // the copies of queries may still be in flight if there were no keys
  if (work.splits > 1) store_partial<C>(p, work, acc, rows.first_row, lane);
  else store_final<C>(p, work, acc, shared.q, rows.first_row, warp, lane);
}

// Finds the block's next work tile that exists (tiles have fewer splits than the longest). False: none is left.
template <class C>
SEGATTN_FN bool next_work_tile(const SegattnForwardParams& p, ForwardShared<C>& shared, bool first) {
  const int tiles = opaque(p.tiles), max_splits = opaque(p.max_splits);
  const HeadRange heads = HeadRange::of(p);
  const uint32_t work_tiles = (uint32_t)max_splits * tiles * heads.count;
  WorkTile& work = shared.work;
  do {
    const uint32_t index = first ? blockIdx.x : gridDim.x + atomic_add(p.work_counter, 1);
    first = false;
    if (index >= work_tiles) return false;
    work = work_tile_at<C::kRows, C::kKeys, C::kSplitKeys>(p.problem, heads, index, tiles, max_splits);
  } while (work.split >= work.splits);
  for (int kv_tile = work.first_kv_tile; kv_tile <= work.first_kv_tile + 1; kv_tile++)
    shared.tiles[kv_tile % 4] = work.keys.template tile<C::kKeys>(kv_tile);
  return true;
}

template <class C>
SEGATTN_FN void attention_forward(const SegattnForwardParams& p) {
  ForwardShared<C>& shared = *(ForwardShared<C>*)shared_memory();
  if (threadIdx.x == 0)
    shared.chunk_totals = (float4*)(p.chunk_totals + (int64_t)blockIdx.x * (C::kRows * C::kHeadDim));
  for (bool first = true;; first = false) {
    __syncthreads();  // all warps have finished the previous work tile
    if (threadIdx.x == 0) shared.done = !next_work_tile<C>(p, shared, first);
    __syncthreads();
    if (shared.done) return;
    shared.sources.fill(p.problem, shared.work.batch_index,
                        shared.work.head / (opaque(p.problem.q_heads) / p.problem.kv_heads), threadIdx.x);
    __syncthreads();
    run_work_tile<C>(p, shared);
  }
}

template <class C>
constexpr SegattnKernelInfo forward_info() {
  return {C::kThreads,   (int)sizeof(ForwardShared<C>),    C::kBlocks, C::kRows, C::kKeys,
          C::kSplitKeys, (int)sizeof(SegattnForwardParams)};
}

#define FORWARD(name, T, kHeadDim)                              \
  using Config_##name = ForwardConfig<T, kHeadDim>;             \
  SEGATTN_INFO(attention_##name, forward_info<Config_##name>()) \
  SEGATTN_KERNEL(attention_##name, Config_##name, SegattnForwardParams) { attention_forward<Config_##name>(params); }

FORWARD(prefill_bf16_d32, Bf16, 32)
FORWARD(prefill_bf16_d64, Bf16, 64)
FORWARD(prefill_bf16_d96, Bf16, 96)
FORWARD(prefill_bf16_d128, Bf16, 128)
FORWARD(prefill_bf16_d256, Bf16, 256)
FORWARD(prefill_f16_d32, F16, 32)
FORWARD(prefill_f16_d64, F16, 64)
FORWARD(prefill_f16_d96, F16, 96)
FORWARD(prefill_f16_d128, F16, 128)
FORWARD(prefill_f16_d256, F16, 256)

COMBINE(prefill_bf16_d32)
COMBINE(prefill_bf16_d64)
COMBINE(prefill_bf16_d96)
COMBINE(prefill_bf16_d128)
COMBINE(prefill_bf16_d256)
COMBINE(prefill_f16_d32)
COMBINE(prefill_f16_d64)
COMBINE(prefill_f16_d96)
COMBINE(prefill_f16_d128)
COMBINE(prefill_f16_d256)

SEGATTN_LAYOUT(attention_forward)
