// d_k and d_v of Hopper's backward: key-stationary, over the queries of all heads that read the keys
// (attention_backward_hopper.cu).
//
//   producer warps:  the last one k and v of the next work tile (two buffers); the others q, d_out, lse, delta -> ring
//   consumer warps:  S^T = K Q^T (SS), dP^T = V d_out^T (SS), P^T and dS^T in registers, d_v += P^T d_out (RS),
//                    d_k += dS^T Q (RS); S^T of the next tile of queries is issued before these two are waited for
//
// With kStored, dS^T is stored for the d_q pass (stored_ds.cuh).
#pragma once
#include "query_grad_hopper.cuh"

template <class T_, int kHeadDim, bool kStored_ = false>
struct KeyGradConfig : WarpSpecialization<kHeadDim, 2, kHeadDim == 64 ? 4 : 3, 56, 224> {
  using T = T_;
  static constexpr int kThreads = KeyGradConfig::kProducerThreads + KeyGradConfig::kConsumerThreads, kBlocks = 1;
  static constexpr int kQueryProducerWarps = KeyGradConfig::kProducerWarps - 1;
  static constexpr int kKeys = 64 * KeyGradConfig::kConsumerWarpgroups;
  static constexpr int kQueries = kHeadDim == 64 ? 128 : 64;
  static constexpr int kColTiles = kQueries / 8;
  static constexpr bool kStored = kStored_;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  using QueryTile = Tile<T, kQueries, kHeadDim>;
  static_assert(kQueries == 64 || kQueries == 128, "wgmma is instantiated for 64 and 128 columns");
  static_assert(!kStored || kQueries == kBlockRows, "a tile of queries is a block of ds");
};

struct KeyWork {
  KeyWorkTile work;
  int iterations;  // tiles of queries, of all heads that read the keys
  bool none;       // no work tile is left
};

template <class C>
struct KeyGradShared {
  typename C::KeyTile k[2], v[2];  // of work tile n at n % 2; then d_k and d_v on their way to global memory
  typename C::QueryTile q[C::kStages], d_out[C::kStages];
  alignas(16) float lse[C::kStages][C::kQueries], delta[C::kStages][C::kQueries];
  KeyWork work[kWorkBuffers];
  int query[C::kStages];  // first query of the stage's tile
  int ds_block[C::kStored ? C::kStages : 1];
  Ring<2> kv_ring;
  Ring<C::kStages> query_ring;

  __device__ __forceinline__ void init_barriers() {
    kv_ring.init(32, C::kConsumerWarps);
    query_ring.init(32, C::kConsumerWarps);
  }
};

// ---------------------------------------------------------------------------------------------------- producer warps

template <class C>
SEGATTN_FN void find_work(const SegattnBackwardParams& p, KeyWork& buffer, bool first) {
  const int prior_tiles = p.d_prior_k.data ? ceil_div((int)p.d_prior_k.rows, C::kKeys) : 0;
  const int key_tiles = prior_tiles + ceil_div((int)p.d_k.rows, C::kKeys);
  const uint32_t work_tiles = (uint32_t)key_tiles * p.groups;
  const uint32_t index = next_work_index(p.work_counter + 1, first);
  buffer.none = index >= work_tiles;
  if (buffer.none) return;
  const KeyWorkTile work = key_work_tile<C>(p, index);
  buffer.work = work;
  int readers = 0;
  for (int head = work.kv_head * (p.problem.q_heads / p.problem.kv_heads); head < work.end_head; head++)
    readers += !work.prior || p.problem.prior_heads[head];
  buffer.iterations = readers * max(0, ceil_div(work.query_rows - work.first_query, C::kQueries));
}

// Starts copying a tile of queries into a stage.
template <class C>
SEGATTN_FN void copy_queries(const SegattnBackwardParams& p, KeyGradShared<C>& shared, const KeyWorkTile& work,
                             const QueryCursor& at, int stage, int lane) {
  using T = typename C::T;
  using QT = typename C::QueryTile;
  const Rows<const T> q = Rows<const T>::of(p.problem.q, work.batch_index, at.head);
  const Rows<const T> d_out = Rows<const T>::of(p.d_out, work.batch_index, at.head);
  copy_rows_async<QT, 32>(shared_address(&shared.q[stage]), q, at.query, work.query_rows, lane);
  copy_rows_async<QT, 32>(shared_address(&shared.d_out[stage]), d_out, at.query, work.query_rows, lane);
  const int64_t row = prepared_row(p, work.batch_index, at.head, at.query);
  for (int i = lane; i < C::kQueries / 4; i += 32) {
    cp_async_16(shared_address(&shared.lse[stage][i * 4]), p.row_lse + row + i * 4, 16);
    cp_async_16(shared_address(&shared.delta[stage][i * 4]), p.row_delta + row + i * 4, 16);
  }
  cp_async_commit();
  if (lane == 0) shared.query[stage] = at.query;
  if constexpr (C::kStored)
    if (lane == 0) shared.ds_block[stage] = ds_first_block(p, work.batch_index, at.head, at.query);
}

// The last producer warp: k and v of work tile n while those of n - 1 are in use; then it finds work tile n + 1.
template <class C>
SEGATTN_FN void produce_keys(const SegattnBackwardParams& p, KeyGradShared<C>& shared, uint32_t n, int lane) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  const KeyWork& buffer = shared.work[n % kWorkBuffers];
  const KeyWorkTile& work = buffer.work;
  const uint32_t stage = shared.kv_ring.stage(n);
  shared.kv_ring.wait_empty(n);
  if (buffer.none) return shared.kv_ring.arrive_without_copies(n);
  const SegattnTensor &k = work.prior ? p.problem.prior_k : p.problem.k,
                      &v = work.prior ? p.problem.prior_v : p.problem.v;
  const Rows<const T> k_rows = Rows<const T>::of(k, work.batch_index, work.kv_head);
  const Rows<const T> v_rows = Rows<const T>::of(v, work.batch_index, work.kv_head);
  copy_rows_async<KT, 32>(shared_address(&shared.k[stage]), k_rows, work.first, work.len, lane);
  copy_rows_async<KT, 32>(shared_address(&shared.v[stage]), v_rows, work.first, work.len, lane);
  cp_async_commit();
  shared.kv_ring.template arrive<0>(n);
  if (lane == 0) find_work<C>(p, shared.work[(n + 1) % kWorkBuffers], false);
}

// The other producer warps: the tiles of queries of a work tile, each warp every kQueryProducerWarps-th.
template <class C>
SEGATTN_FN void produce_queries(const SegattnBackwardParams& p, KeyGradShared<C>& shared, const KeyWork& buffer,
                                uint32_t first_iteration, int warp, int lane) {
  const KeyWorkTile& work = buffer.work;
  auto& ring = shared.query_ring;
  QueryCursor at = QueryCursor::first(p.problem, work);
  const int own = ring.template iterations_until_turn<C::kQueryProducerWarps>(first_iteration, warp);
  for (int i = 0; i < own; i++) at = at.template next<C::kQueries>(p.problem, work);
  for (int tile = own; tile < buffer.iterations; tile += C::kQueryProducerWarps) {
    const uint32_t iteration = first_iteration + tile;
    ring.wait_empty(iteration);
    copy_queries<C>(p, shared, work, at, ring.stage(iteration), lane);
    ring.template arrive<0>(iteration);
    for (int i = 0; i < C::kQueryProducerWarps; i++) at = at.template next<C::kQueries>(p.problem, work);
  }
}

template <class C>
SEGATTN_FN void produce_key_grad(const SegattnBackwardParams& p, KeyGradShared<C>& shared) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  uint32_t first_iteration = 0;  // of the work tile, on the ring of queries
  if (thread == C::kQueryProducerWarps * 32) find_work<C>(p, shared.work[0], true);
  for (uint32_t n = 0;; n++) {
    sync_producers<C>();
    const KeyWork& buffer = shared.work[n % kWorkBuffers];
    const bool none = buffer.none;
    if (warp == C::kQueryProducerWarps) produce_keys<C>(p, shared, n, lane);
    else if (!none) produce_queries<C>(p, shared, buffer, first_iteration, warp, lane);
    if (none) return;
    first_iteration += buffer.iterations;
  }
}

// ---------------------------------------------------------------------------------------------------- consumer warps

// Masks S^T where a query does not see a key: the first `before` queries of the tile for the thread's upper key, 8
// more for the lower one. The sign makes P 0 for either sign of the scale.
template <int kColTiles>
SEGATTN_FN void mask_queries(float (&s)[kColTiles][4], int before, float scale, int lane) {
  const float masked_score = scale < 0.f ? INFINITY : -INFINITY;
#pragma unroll
  for (int n = 0; n < kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (n * 8 + lane % 4 * 2 + e % 2 < before + e / 2 * 8) s[n][e] = masked_score;
}

// S^T to P^T, in place.
template <int kColTiles>
SEGATTN_FN void transposed_probs(float (&s)[kColTiles][4], const float* s_lse, float scale, int lane) {
#pragma unroll
  for (int n = 0; n < kColTiles; n++) {
    const float2 lse = ((const float2*)s_lse)[n * 4 + lane % 4];
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = exp2_approx(fma_rn(s[n][e], scale, -(e % 2 ? lse.y : lse.x)));
  }
}

// dP^T to dS^T = P^T (dP^T - delta), in place.
template <int kColTiles>
SEGATTN_FN void transposed_softmax_grad(float (&dp)[kColTiles][4], const float (&probs)[kColTiles][4],
                                        const float* s_delta, int lane) {
#pragma unroll
  for (int n = 0; n < kColTiles; n++) {
    const float2 delta = ((const float2*)s_delta)[n * 4 + lane % 4];
#pragma unroll
    for (int e = 0; e < 4; e++) dp[n][e] = probs[n][e] * (dp[n][e] - (e % 2 ? delta.y : delta.x));
  }
}

// The gradients of a warpgroup's 64 keys.
template <class C>
struct KeyGrads {
  float d_k[C::kOutTiles][4], d_v[C::kOutTiles][4];
};

// A warpgroup's iterations of a work tile, from `iteration` to `end`, and the first of its keys.
template <class C>
struct QueryIterator {
  KeyGradShared<C>& shared;
  uint32_t iteration, end;
  int first_key, lane;

  __device__ __forceinline__ int stage() const { return uniform(shared.query_ring.stage(iteration)); }
  // Keys of the warpgroup that the stage's first query does not see; negative where it sees all.
  __device__ __forceinline__ int before() const { return first_key - shared.query[shared.query_ring.stage(iteration)]; }
  // Moves to the next iteration of which some query sees a key of the warpgroup and waits for it; releases those
  // before. False: there is none.
  __device__ __forceinline__ bool seek() {
    for (; iteration != end; iteration++) {
      shared.query_ring.wait_full(iteration);
      if (before() < C::kQueries) return true;
      shared.query_ring.release(iteration, lane);
    }
    return false;
  }
};

// The tiles of queries of a work tile: d_k and d_v of the warpgroup's keys, rows first_row... of the block's tile.
template <class C>
SEGATTN_FN void key_grad_mainloop(const SegattnBackwardParams& p, const KeyWorkTile& work, KeyGrads<C>& grads,
                                  KeyGradShared<C>& shared, QueryIterator<C> at, int kv_stage, float scale,
                                  int first_row, int lane) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  using QT = typename C::QueryTile;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const auto q = [&](int stage) { return shared_address(&shared.q[stage]); };
  const auto d_out = [&](int stage) { return shared_address(&shared.d_out[stage]); };
  const int keys = work.len - work.first, key_block = ds_key_block(p, work.prior, work.first + first_row);
  float s[C::kColTiles][4], dp[C::kColTiles][4];
  if (!at.seek()) return;
  wgmma_fence();
  wgmma_ss<T, KT, QT>(s, shared_address(&shared.k[kv_stage]), uniform(first_row), q(at.stage()));
  wgmma_commit();
  while (true) {
    const int stage = at.stage(), before = at.before();
    uint32_t probs[C::kColTiles / 2][4], ds[C::kColTiles / 2][4];
    wgmma_fence();
    wgmma_ss<T, KT, QT>(dp, shared_address(&shared.v[kv_stage]), uniform(first_row), d_out(stage));
    wgmma_commit();
    wgmma_wait<1>();
    if (before > -64) mask_queries(s, before + row, scale, lane);
    transposed_probs(s, shared.lse[stage], scale, lane);
    pack_operands<T>(probs, s);
    wgmma_wait<0>();
    transposed_softmax_grad(dp, s, shared.delta[stage], lane);
    pack_operands<T>(ds, dp);
    if constexpr (C::kStored)
      if (first_row < keys) store_ds(p, shared.ds_block[stage] + key_block, ds, first_row + row, keys);
    wgmma_fence();
    wgmma_rs_mn_major<T, QT>(grads.d_v, probs, d_out(stage));
    wgmma_rs_mn_major<T, QT>(grads.d_k, ds, q(stage));
    wgmma_commit();
    const uint32_t busy = at.iteration++;
    if (!at.seek()) {
      wgmma_wait<0>();
      return shared.query_ring.release(busy, lane);
    }
    wgmma_fence();
    wgmma_ss<T, KT, QT>(s, shared_address(&shared.k[kv_stage]), uniform(first_row), q(at.stage()));
    wgmma_commit();
    wgmma_wait<1>();
    shared.query_ring.release(busy, lane);
  }
}

template <class C>
SEGATTN_FN void consume_key_grad(const SegattnBackwardParams& p, KeyGradShared<C>& shared) {
  using T = typename C::T;
  const int thread = threadIdx.x - C::kProducerThreads, lane = thread & 31;
  const int first_row = thread / 128 * 64, warp_row = thread / 32 * 16;
  const float scale = signed_scale_log2(p.problem.scale);
  uint32_t first_iteration = 0;
  for (uint32_t n = 0;; n++) {
    const int kv_stage = uniform(shared.kv_ring.stage(n));
    shared.kv_ring.wait_full(n);
    const KeyWork& buffer = shared.work[n % kWorkBuffers];
    if (buffer.none) return;
    KeyGrads<C> grads;
    clear(grads.d_k);
    clear(grads.d_v);
    const KeyWorkTile& work = buffer.work;
    // Every query sees the prior keys.
    const int first_key = work.prior ? -(1 << 30) : work.first + first_row;
    const QueryIterator<C> iterator = {shared, first_iteration, first_iteration + buffer.iterations, first_key, lane};
    key_grad_mainloop<C>(p, work, grads, shared, iterator, kv_stage, scale, first_row, lane);
    first_iteration = iterator.end;
    const SegattnTensor &d_k = work.prior ? p.d_prior_k : p.d_k, &d_v = work.prior ? p.d_prior_v : p.d_v;
    const Rows<T> d_k_rows = Rows<T>::of(d_k, work.batch_index, work.kv_head);
    const Rows<T> d_v_rows = Rows<T>::of(d_v, work.batch_index, work.kv_head);
    // The gradients are staged where the warpgroup's products read k and v.
    sync_consumer_warpgroup<C>(thread / 128);
    store_rows(grads.d_k, p.problem.scale, shared.k[kv_stage], warp_row, d_k_rows, work.first, work.len, work.rows,
               lane);
    store_rows(grads.d_v, 1.f, shared.v[kv_stage], warp_row, d_v_rows, work.first, work.len, work.rows, lane);
    shared.kv_ring.release(n, lane);
  }
}

template <class C>
SEGATTN_FN void attention_key_grad(const SegattnBackwardParams& p) {
  KeyGradShared<C>& shared = *(KeyGradShared<C>*)shared_memory();
  run_warpgroups<C>(shared, [&] { produce_key_grad<C>(p, shared); }, [&] { consume_key_grad<C>(p, shared); });
}

template <class C>
constexpr SegattnKernelInfo key_grad_info() {
  return {C::kThreads, (int)sizeof(KeyGradShared<C>),     C::kBlocks, C::kKeys, C::kQueries,
          0,           (int)sizeof(SegattnBackwardParams)};
}
