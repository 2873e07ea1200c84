// d_q of Hopper's backward: query-stationary, over past, prior and current keys (attention_backward_hopper.cu).
//
//   producer warps:  next work tile -> q, d_out, lse, delta (one buffer); K and V of each key tile -> ring
//   consumer warps:  S = Q K^T (RS), dP = d_out V^T (RS or SS), P and dS in registers, d_q += dS K (RS);
//                    S of the next key tile is issued before d_q of this one is waited for
//
// With kStored, the d_k pass has left dS of prior and current keys (stored_ds.cuh): these tiles need the last product
// alone. A head whose gate gets a gradient computes all three, for the sums of dS before rounding.
#pragma once
#include "stored_ds.cuh"
#include "warp_specialization.cuh"
#include "warpgroups.cuh"

// Work tiles in flight: one being copied, one being computed, one being stored.
constexpr int kWorkBuffers = 4;
static_assert(is_power_of_two(kWorkBuffers) && kWorkBuffers >= 3, "a counter that wraps indexes three live work tiles");

template <class T_, int kHeadDim, bool kStored_ = false>
struct QueryGradConfig
    : WarpSpecialization<kHeadDim, kHeadDim == 64 ? 3 : 2, 4, kHeadDim == 64 ? 48 : 56, kHeadDim == 64 ? 152 : 224> {
  using T = T_;
  static constexpr int kThreads = QueryGradConfig::kProducerThreads + QueryGradConfig::kConsumerThreads, kBlocks = 1;
  static constexpr int kRows = 64 * QueryGradConfig::kConsumerWarpgroups, kKeys = 64;
  static constexpr bool kRegisterA = QueryGradConfig::kConsumerWarpgroups == 2;  // d_out in registers: dP is RS
  static constexpr int kSplitKeys = kChunkKeys * kSectionChunks;
  static constexpr int kColTiles = kKeys / 8;
  static constexpr bool kStored = kStored_;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  static_assert(kSplitKeys % kKeys == 0, "a KV split is made of whole key tiles");
  static_assert(!kStored || (kKeys == kBlockRows && sizeof(KeyTile) >= kRows / kBlockRows * kBlockBytes),
                "ds of a key tile lies where v of another does");
};

struct QueryWork {
  WorkTile work;
  int stored_tiles;  // the last key tiles of the work tile, whose dS is stored
  bool none;         // no work tile is left

  __device__ __forceinline__ int kv_tiles() const { return max(0, work.end_kv_tile - work.first_kv_tile); }
};

template <class C>
struct QueryGradShared {
  typename C::QueryTile q, d_out;
  typename C::KeyTile k[C::kStages], v[C::kStages];  // v: or dS, a block for each warpgroup
  alignas(16) float lse[C::kRows], delta[C::kRows];
  SourceRows<typename C::T> sources;
  QueryWork work[kWorkBuffers];
  KeyTile tiles[C::kStages];
  float gate_sums[C::kRows][kGateSums];
  Ring<1> row_ring;  // q, d_out, lse and delta
  Ring<C::kStages> kv_ring;

  __device__ __forceinline__ void init_barriers() {
    row_ring.init(C::kProducerThreads, C::kConsumerWarps);
    kv_ring.init(32, C::kConsumerWarps);
  }
};

// ---------------------------------------------------------------------------------------------------- producer warps

template <class C>
SEGATTN_FN void find_work(const SegattnBackwardParams& p, QueryWork& buffer, bool first) {
  buffer.none = !next_query_work<C>(p, buffer.work, first);
  buffer.stored_tiles = 0;
  const KeyList& keys = buffer.work.keys;
  if (!C::kStored || buffer.none || keys.past_len > keys.sinks) return;
  const int prior_tiles = p.d_prior_k.data ? 0 : keys.template prior_tiles<C::kKeys>();
  const int others = keys.template sink_tiles<C::kKeys>() + prior_tiles;
  buffer.stored_tiles = min(max(0, buffer.work.end_kv_tile - others), buffer.kv_tiles());
}

// Whether queries see keys of a tile.
SEGATTN_FN bool sees(const KeyTile& tile, int first_query, int last_query) {
  return last_query >= first_query && (tile.source != kCurrent || tile.first <= last_query);
}

// Starts copying dS of the warpgroups that see keys of a tile.
template <class C>
SEGATTN_FN void copy_stored(const SegattnBackwardParams& p, SharedAddress to, const WorkTile& work, const KeyTile& tile,
                            int lane) {
  for (int group = 0; group < C::kConsumerWarpgroups; group++) {
    const int first = work.query_tile * C::kRows + group * 64, last = min(first + 64, work.query_rows) - 1;
    if (!sees(tile, first, last)) continue;
    const int block = ds_first_block(p, work.batch_index, work.head, first) +
                      ds_key_block(p, tile.source == kPrior, tile.first);
    copy_ds_async(p, block, to + group * kBlockBytes, lane);
  }
}

// Starts copying the rows of a work tile: q, d_out, and what the preparation kernel left. The last tile may reach
// beyond row_pitch, which is a multiple of 128.
template <class C>
SEGATTN_FN void copy_rows(const SegattnBackwardParams& p, QueryGradShared<C>& shared, const WorkTile& work,
                          int thread) {
  using T = typename C::T;
  using QT = typename C::QueryTile;
  const int first = work.query_tile * C::kRows;
  const Rows<const T> q = Rows<const T>::of(p.problem.q, work.batch_index, work.head);
  const Rows<const T> d_out = Rows<const T>::of(p.d_out, work.batch_index, work.head);
  copy_rows_async<QT, C::kProducerThreads>(shared_address(&shared.q), q, first, work.query_rows, thread);
  copy_rows_async<QT, C::kProducerThreads>(shared_address(&shared.d_out), d_out, first, work.query_rows, thread);
  const int64_t row = prepared_row(p, work.batch_index, work.head, first);
  for (int i = thread; i < C::kRows / 4; i += C::kProducerThreads) {
    const int bytes = first + i * 4 < p.row_pitch ? 16 : 0;
    cp_async_16(shared_address(&shared.lse[i * 4]), p.row_lse + row + i * 4, bytes);
    cp_async_16(shared_address(&shared.delta[i * 4]), p.row_delta + row + i * 4, bytes);
  }
  cp_async_commit();
}

// Fills the ring's stage of `iteration` with key tile `kv_tile`.
template <class C>
SEGATTN_FN void produce_kv_tile(const SegattnBackwardParams& p, QueryGradShared<C>& shared, const QueryWork& buffer,
                                int kv_tile, uint32_t iteration, int lane) {
  using KT = typename C::KeyTile;
  const WorkTile& work = buffer.work;
  const KeyTile tile = work.keys.template tile<C::kKeys>(kv_tile);
  const uint32_t stage = shared.kv_ring.stage(iteration);
  const auto &k = shared.sources.k[tile.source], &v = shared.sources.v[tile.source];
  shared.kv_ring.wait_empty(iteration);
  copy_rows_async<KT, 32>(shared_address(&shared.k[stage]), k, tile.first, tile.end, lane);
  const SharedAddress v_stage = shared_address(&shared.v[stage]);
  if (C::kStored && kv_tile >= work.end_kv_tile - buffer.stored_tiles) copy_stored<C>(p, v_stage, work, tile, lane);
  else copy_rows_async<KT, 32>(v_stage, v, tile.first, tile.end, lane);
  cp_async_commit();
  if (lane == 0) shared.tiles[stage] = tile;
  shared.kv_ring.template arrive<0>(iteration);
}

template <class C>
SEGATTN_FN void produce_query_grad(const SegattnBackwardParams& p, QueryGradShared<C>& shared) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  uint32_t first_iteration = 0;  // of the work tile, on the K and V ring
  if (thread == 0) find_work<C>(p, shared.work[0], true);
  for (uint32_t n = 0;; n++) {
    sync_producers<C>();
    const QueryWork& buffer = shared.work[n % kWorkBuffers];
    if (buffer.none) {
      shared.row_ring.wait_empty(n);
      return shared.row_ring.arrive_without_copies(n);
    }
    const WorkTile& work = buffer.work;
    const int kv_tiles = buffer.kv_tiles();
    const int kv_head = work.head / (p.problem.q_heads / p.problem.kv_heads);
    shared.sources.fill(p.problem, work.batch_index, kv_head, thread);
    sync_producers<C>();
    shared.row_ring.wait_empty(n);
    if (!C::kStored || buffer.stored_tiles < kv_tiles) copy_rows<C>(p, shared, work, thread);
    shared.row_ring.template arrive<0>(n);
    const int own = shared.kv_ring.template iterations_until_turn<C::kProducerWarps>(first_iteration, warp);
    const auto produce = [&](int i) {
      produce_kv_tile<C>(p, shared, buffer, work.first_kv_tile + i, first_iteration + i, lane);
    };
    if (own < kv_tiles) produce(own);
    // One thread finds the next work tile while the key tiles copied so far are in use.
    if (thread == 0) find_work<C>(p, shared.work[(n + 1) % kWorkBuffers], false);
    __syncwarp();
    for (int i = own + C::kProducerWarps; i < kv_tiles; i += C::kProducerWarps) produce(i);
    first_iteration += kv_tiles;
  }
}

// ---------------------------------------------------------------------------------------------------- consumer warps

// Masks S of a key tile: the thread's upper row sees `limit` keys of the tile, the lower one `below`. The sign makes
// P 0 for either sign of the scale.
template <int kColTiles>
SEGATTN_FN void mask_keys(float (&s)[kColTiles][4], int limit, int below, float scale, int lane) {
  const float masked_score = scale < 0.f ? INFINITY : -INFINITY;
#pragma unroll
  for (int n = 0; n < kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (n * 8 + lane % 4 * 2 + e % 2 >= (e < 2 ? limit : below)) s[n][e] = masked_score;
}

// A warpgroup's iterations of a work tile, from `iteration` to `end`, and its valid queries.
template <class C>
struct KvIterator {
  QueryGradShared<C>& shared;
  uint32_t iteration, end;
  int first_query, last_query;
  int lane;

  __device__ __forceinline__ int stage() const { return uniform(shared.kv_ring.stage(iteration)); }
  // Moves to the next iteration whose keys some row of the warpgroup sees and waits for it; releases those before.
  // False: there is none.
  __device__ __forceinline__ bool seek() {
    for (; iteration != end; iteration++) {
      shared.kv_ring.wait_full(iteration);
      const KeyTile& tile = shared.tiles[shared.kv_ring.stage(iteration)];
      if (sees(tile, first_query, last_query)) return true;
      shared.kv_ring.release(iteration, lane);
    }
    return false;
  }
};

// A thread's A operands, and lse and delta of its two rows.
template <class C>
struct QueryFragments {
  uint32_t q[C::kKBlocks][4], d_out[C::kRegisterA ? C::kKBlocks : 1][4];
  float lse[2], delta[2];
};

template <class C>
SEGATTN_FN void load_query_fragments(QueryFragments<C>& fragments, QueryGradShared<C>& shared, int warp_row, int lane) {
  using QT = typename C::QueryTile;
  load_fragments<QT>(fragments.q, shared_address(&shared.q), warp_row, lane);
  if constexpr (C::kRegisterA) load_fragments<QT>(fragments.d_out, shared_address(&shared.d_out), warp_row, lane);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = warp_row + half * 8 + lane / 4;
    fragments.lse[half] = shared.lse[row], fragments.delta[half] = shared.delta[row];
  }
}

// Issues S = Q K^T.
template <class C>
SEGATTN_FN void issue_qk(float (&s)[C::kColTiles][4], const QueryFragments<C>& fragments, QueryGradShared<C>& shared,
                         int stage) {
  wgmma_fence();
  wgmma_rs<typename C::T, typename C::KeyTile>(s, fragments.q, shared_address(&shared.k[stage]));
  wgmma_commit();
}

// A work tile's keys: d_q of the warpgroup's rows, and the sums of the warp's 16 rows that its gate's gradient needs.
template <class C>
SEGATTN_FN void query_grad_mainloop(float (&d_q)[C::kOutTiles][4], const QueryFragments<C>& fragments,
                                    QueryGradShared<C>& shared, const KeyList& keys, KvIterator<C> at, float scale,
                                    int row, int group, float (*gate_sums)[kGateSums]) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  const int lane = at.lane;
  const bool gated = keys.past_len > keys.sinks;
  float s[C::kColTiles][4], dp[C::kColTiles][4];
  if (!at.seek()) return;
  issue_qk<C>(s, fragments, shared, at.stage());
  while (true) {
    const int stage = at.stage();
    const KeyTile& tile = shared.tiles[stage];
    const bool past = tile.source == kPast, current = tile.source == kCurrent;
    uint32_t ds[C::kColTiles / 2][4];
    wgmma_fence();
    if constexpr (C::kRegisterA) wgmma_rs<T, KT>(dp, fragments.d_out, shared_address(&shared.v[stage]));
    else
      wgmma_ss<T, typename C::QueryTile, KT>(dp, shared_address(&shared.d_out), uniform(group),
                                             shared_address(&shared.v[stage]));
    wgmma_commit();
    wgmma_wait<1>();
    if ((current ? at.first_query + 1 : tile.end) < tile.first + C::kKeys) {
      const int limit = (current ? row + 1 : tile.end) - tile.first;
      mask_keys(s, limit, current ? limit + 8 : limit, scale, lane);
    }
    const float bias = past ? keys.gate_log2 : 0.f;
#pragma unroll
    for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = exp2_approx(fma_rn(s[n][e], scale, bias - fragments.lse[e / 2]));
    if (past) add_row_sums(gate_sums, kPastWeight, s, lane);
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) dp[n][e] = s[n][e] * (dp[n][e] - fragments.delta[e / 2]);
    if (gated) add_row_sums(gate_sums, past ? kPastGrad : kOtherGrad, dp, lane);
    pack_operands<T>(ds, dp);
    wgmma_fence();
    wgmma_rs_mn_major<T, KT>(d_q, ds, shared_address(&shared.k[stage]));
    wgmma_commit();
    const uint32_t busy = at.iteration++;
    if (!at.seek()) {
      wgmma_wait<0>();
      return shared.kv_ring.release(busy, lane);
    }
    issue_qk<C>(s, fragments, shared, at.stage());
    wgmma_wait<1>();
    shared.kv_ring.release(busy, lane);
  }
}

// d_q of a thread's rows `query` and query + 8, or the KV split's partial result.
template <class C>
SEGATTN_FN void store_query_grad(const SegattnBackwardParams& p, const float (&d_q)[C::kOutTiles][4],
                                 const WorkTile& work, int query, int lane) {
  if (work.splits == 1) {
    const auto target = Rows<typename C::T>::of(p.d_q, work.batch_index, work.head);
    return store_rows(d_q, p.problem.scale, target, query, work.query_rows, work.rows, lane);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (query + half * 8 >= work.rows) continue;
    const int64_t row = partial_row(p.problem, work.split, work.batch_index, work.head, query + half * 8);
    float2* out = (float2*)(p.partial_d_q + row * C::kHeadDim);
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++) out[n * 4 + lane % 4] = make_float2(d_q[n][half * 2], d_q[n][half * 2 + 1]);
  }
}

template <class C>
SEGATTN_FN void consume_query_grad(const SegattnBackwardParams& p, QueryGradShared<C>& shared) {
  const int thread = threadIdx.x - C::kProducerThreads, lane = thread & 31;
  const int warp_row = thread / 32 * 16, row = warp_row + lane / 4;
  const float scale = signed_scale_log2(p.problem.scale);
  uint32_t first_iteration = 0;
  for (uint32_t n = 0;; n++) {
    shared.row_ring.wait_full(n);
    if (shared.work[n % kWorkBuffers].none) return;
    const QueryWork& buffer = shared.work[n % kWorkBuffers];
    const WorkTile& work = buffer.work;
    const uint32_t end = first_iteration + buffer.kv_tiles(), stored = end - buffer.stored_tiles;
    QueryFragments<C> fragments;
    if (!C::kStored || stored != first_iteration) load_query_fragments<C>(fragments, shared, warp_row, lane);
    if constexpr (C::kRegisterA) shared.row_ring.release(n, lane);
    float d_q[C::kOutTiles][4];
    clear(d_q);
    const int first = work.query_tile * C::kRows, group = thread / 128 * 64;
    KvIterator<C> iterator = {
        shared, first_iteration, stored, first + group, min(first + group + 64, work.query_rows) - 1, lane};
    float (*gate_sums)[kGateSums] = shared.gate_sums + warp_row;
    clear_row_sums(gate_sums, lane);
    query_grad_mainloop<C>(d_q, fragments, shared, work.keys, iterator, scale, first + row, group, gate_sums);
    if constexpr (C::kStored) {
      iterator.iteration = stored, iterator.end = end;
      stored_mainloop<C>(d_q, shared, iterator, group);
    }
    first_iteration = end;
    if constexpr (!C::kRegisterA) shared.row_ring.release(n, lane);
    store_query_grad<C>(p, d_q, work, first + row, lane);
    if (work.keys.past_len > work.keys.sinks) store_row_sums(p, work, gate_sums, first + warp_row, lane);
  }
}

template <class C>
SEGATTN_FN void attention_query_grad(const SegattnBackwardParams& p) {
  QueryGradShared<C>& shared = *(QueryGradShared<C>*)shared_memory();
  run_warpgroups<C>(shared, [&] { produce_query_grad<C>(p, shared); }, [&] { consume_query_grad<C>(p, shared); });
}

template <class C>
constexpr SegattnKernelInfo query_grad_info() {
  return {C::kThreads,   (int)sizeof(QueryGradShared<C>),   C::kBlocks, C::kRows, C::kKeys,
          C::kSplitKeys, (int)sizeof(SegattnBackwardParams)};
}
