// Segment attention, backward, for Hopper: d_q, and d_k with d_v, of attention_backward.cu on products of a warpgroup.
//
// The warps of a block's first warpgroup fetch, each a stage of a ring at a time, so that a warp waits for nothing but its
// own copies. The others multiply, 64 rows each: of keys against tiles of queries (d_k, d_v), of queries against tiles of
// keys (d_q). While one product runs, a warpgroup turns the one before into weights, and each warpgroup's weights also
// run beside the other's products. Registers move from the producer warps to those that multiply. Blocks take work tiles until
// there are none (docs/kernels.md).
#include "attention_gradients.cuh"
#include "layout.cuh"
#include "warpgroups.cuh"

// What both kernels have in common.
template <class T_, int kHeadDim_, int kWarpgroups, int kRing>
struct WarpgroupConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumerWarpgroups = kWarpgroups;  // warpgroups
  static constexpr int kProducerWarps = 4, kProducerThreads = kProducerWarps * 32, kStages = kRing;
  static constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
  static constexpr int kThreads = kProducerThreads + kConsumerWarps * 32, kBlocks = 1;
  static constexpr int kProducerRegisters = kConsumerWarpgroups == 3 ? 48 : 56, kConsumerRegisters = kConsumerWarpgroups == 3 ? 152 : 224;
  static constexpr int kKBlocks = kHeadDim / 16, kOutTiles = kHeadDim / 8;
  static_assert(registers_fit(kProducerThreads, kProducerRegisters, kConsumerWarps * 32, kConsumerRegisters), "or the launch waits for ever");
};

// The block's n-th work tile lies at n % kWorkBuffers: blocks fetch for one while they multiply one and store another.
constexpr int kWorkBuffers = 4;

// The number of the block's next work tile.
SEGATTN_FN uint32_t next_work_index(uint32_t* work_counter, bool first) { return first ? blockIdx.x : gridDim.x + atomic_add(work_counter, 1); }

// ---------------------------------------------------------------------------------------------------- d_q

template <class T, int kHeadDim>
struct QueryGradConfig : WarpgroupConfig<T, kHeadDim, kHeadDim == 64 ? 3 : 2, 4> {
  static constexpr int kRows = 64 * QueryGradConfig::kConsumerWarpgroups;
  static constexpr int kKeys = 64;
  static constexpr bool kRegisterA = QueryGradConfig::kConsumerWarpgroups == 2;  // d_out in registers
  static constexpr int kSplitKeys = kChunkKeys * kSectionChunks;
  static constexpr int kColTiles = kKeys / 8;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
};

struct QueryWork {
  WorkTile work;
  bool done;  // there is no work tile any more
};

template <class C>
struct QueryGradShared {
  typename C::QueryTile q, d_out;
  typename C::KeyTile k[C::kStages], v[C::kStages];
  alignas(16) float lse[C::kRows], delta[C::kRows];
  SourceRows<typename C::T> sources;
  QueryWork work[kWorkBuffers];
  KeyTile tiles[C::kStages];
  float gate_sums[2][C::kConsumerWarps];  // of work tile n at n % 2
  uint64_t rows_full, rows_empty;
  uint64_t full[C::kStages], empty[C::kStages];
};

template <class C>
SEGATTN_FN void start_barriers(QueryGradShared<C>& shared) {
  mbarrier_init(&shared.rows_full, C::kProducerThreads);
  mbarrier_init(&shared.rows_empty, C::kConsumerWarps);
  for (int stage = 0; stage < C::kStages; stage++) {
    mbarrier_init(&shared.full[stage], 32);
    mbarrier_init(&shared.empty[stage], C::kConsumerWarps);
  }
  fence_mbarrier_init();
}

// The block's next work tile that is there: tiles have fewer work tiles than the longest.
template <class C>
SEGATTN_FN void find_work(const SegattnBackwardParams& p, QueryWork& buffer, bool first) {
  const uint32_t work_tiles = (uint32_t)p.max_splits * p.tiles * p.problem.q_heads * p.problem.batch;
  do {
    const uint32_t index = next_work_index(p.work_counter, first);
    first = false;
    buffer.done = index >= work_tiles;
    if (buffer.done) return;
    buffer.work = work_tile_at<C::kRows, C::kKeys, C::kSplitKeys>(p.problem, index, p.tiles, 1, p.max_splits);
  } while (buffer.work.split >= buffer.work.splits);
}

// Each warp copies its share of q, d_out and what preparation left of the work tile's rows.
template <class C>
SEGATTN_FN void copy_rows(const SegattnBackwardParams& p, QueryGradShared<C>& shared, const WorkTile& work, int thread) {
  using T = typename C::T;
  const int first = work.query_tile * C::kRows;
  copy_rows_async<typename C::QueryTile, C::kProducerThreads>(shared_address(&shared.q), Rows<const T>::of(p.problem.q, work.batch_index, work.head), first,
                                                           work.query_rows, thread);
  copy_rows_async<typename C::QueryTile, C::kProducerThreads>(shared_address(&shared.d_out), Rows<const T>::of(p.d_out, work.batch_index, work.head), first,
                                                           work.query_rows, thread);
  const int64_t row = prepared_row(p, work.batch_index, work.head, first);
  for (int i = thread; i < C::kRows / 4; i += C::kProducerThreads) {
    const int bytes = first + i * 4 < p.row_pitch ? 16 : 0;
    cp_async_16(shared_address(&shared.lse[i * 4]), p.row_lse + row + i * 4, bytes);
    cp_async_16(shared_address(&shared.delta[i * 4]), p.row_delta + row + i * 4, bytes);
  }
  cp_async_commit();
}

template <class C>
SEGATTN_FN void produce_query_grad(const SegattnBackwardParams& p, QueryGradShared<C>& shared) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  uint32_t first_iteration = 0;  // of the work tile, counted over all work tiles of the block
  if (thread == 0) find_work<C>(p, shared.work[0], true);
  for (uint32_t n = 0;; n++) {
    barrier_sync<C::kProducerThreads>(1);
    const QueryWork& buffer = shared.work[n % kWorkBuffers];
    if (buffer.done) {
      wait_empty(&shared.rows_empty, n);
      mbarrier_arrive(&shared.rows_full);
      return;
    }
    const WorkTile& work = buffer.work;
    shared.sources.fill(p.problem, work.batch_index, work.head / (p.problem.q_heads / p.problem.kv_heads), thread);
    barrier_sync<C::kProducerThreads>(1);
    wait_empty(&shared.rows_empty, n);
    copy_rows<C>(p, shared, work, thread);
    signal_landed<0>(&shared.rows_full);
    const int iterations = max(0, work.end_kv_tile - work.first_kv_tile), own = (warp - first_iteration) % C::kStages;
    const auto produce = [&](int i) {
      const KeyTile tile = work.keys.template tile<C::kKeys>(work.first_kv_tile + i);
      wait_empty(&shared.empty[warp], (first_iteration + i) / C::kStages);
      copy_rows_async<typename C::KeyTile, 32>(shared_address(&shared.k[warp]), shared.sources.k[tile.source], tile.first, tile.end, lane);
      copy_rows_async<typename C::KeyTile, 32>(shared_address(&shared.v[warp]), shared.sources.v[tile.source], tile.first, tile.end, lane);
      cp_async_commit();
      if (lane == 0) shared.tiles[warp] = tile;
      signal_landed<0>(&shared.full[warp]);
    };
    if (own < iterations) produce(own);
    // What comes next is found while the keys fetched are in use.
    if (thread == 0) find_work<C>(p, shared.work[(n + 1) % kWorkBuffers], false);
    __syncwarp();
    for (int i = own + C::kStages; i < iterations; i += C::kStages) produce(i);
    first_iteration += iterations;
  }
}

// Scores of the keys that a row does not see become such that their weight is 0: `limit` keys are seen by the thread's
// upper row, `below` by the lower.
template <int kColTiles>
SEGATTN_FN void mask_keys(float (&s)[kColTiles][4], int limit, int below, float scale, int lane) {
  const float masked_score = scale < 0.f ? INFINITY : -INFINITY;
#pragma unroll
  for (int n = 0; n < kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (n * 8 + lane % 4 * 2 + e % 2 >= (e < 2 ? limit : below)) s[n][e] = masked_score;
}

// Where a warpgroup is in a work tile, and which queries it has: steps of the ring from `turn` to `end`.
template <class C>
struct KvIterator {
  QueryGradShared<C>& shared;
  uint32_t iteration, end;
  int first_query, last_query;  // of the warpgroup, valid ones
  int lane;

  __device__ __forceinline__ int stage() const { return uniform(iteration % C::kStages); }
  // Waits for keys of which some are seen by some row of the warpgroup; the others pass by. Whether there are any.
  __device__ __forceinline__ bool seek() {
    for (; iteration != end; iteration++) {
      mbarrier_wait(&shared.full[iteration % C::kStages], phase(iteration / C::kStages));
      const KeyTile& tile = shared.tiles[iteration % C::kStages];
      if (last_query >= first_query && (tile.source != kCurrent || tile.first <= last_query)) return true;
      release(&shared.empty[iteration % C::kStages], lane);
    }
    return false;
  }
};

// A thread's rows and what it needs to know of them.
template <class C>
struct QueryFragments {
  uint32_t q[C::kKBlocks][4], d_out[C::kRegisterA ? C::kKBlocks : 1][4];
  float lse[2], delta[2];
};

template <class C>
SEGATTN_FN void issue_qk(float (&s)[C::kColTiles][4], const QueryFragments<C>& fragments, QueryGradShared<C>& shared, int stage) {
  wgmma_fence();
  wgmma_rs<typename C::T, typename C::KeyTile>(s, fragments.q, shared_address(&shared.k[stage]));
  wgmma_commit();
}

// The work tile's keys: d_q of the warpgroup's rows, and the thread's sum of ds over past keys. Scores of the next keys are
// under way before the products of these are waited for.
template <class C>
SEGATTN_FN float query_grad_mainloop(float (&d_q)[C::kOutTiles][4], const QueryFragments<C>& fragments, QueryGradShared<C>& shared, const KeyList& keys,
                               KvIterator<C> at, float scale, int row, int group) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  const int lane = at.lane;
  float gate_sum = 0.f, s[C::kColTiles][4], dp[C::kColTiles][4];
  if (!at.seek()) return 0.f;
  issue_qk<C>(s, fragments, shared, at.stage());
  while (true) {
    const int stage = at.stage();
    const KeyTile& tile = shared.tiles[stage];
    const bool past = tile.source == kPast, current = tile.source == kCurrent;
    uint32_t ds[C::kColTiles / 2][4];
    wgmma_fence();
    if constexpr (C::kRegisterA) wgmma_rs<T, KT>(dp, fragments.d_out, shared_address(&shared.v[stage]));
    else wgmma_ss<T, typename C::QueryTile, KT>(dp, shared_address(&shared.d_out), uniform(group), shared_address(&shared.v[stage]));
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
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) dp[n][e] = s[n][e] * (dp[n][e] - fragments.delta[e / 2]);
    if (past)
#pragma unroll
      for (int n = 0; n < C::kColTiles; n++) gate_sum += (dp[n][0] + dp[n][1]) + (dp[n][2] + dp[n][3]);
    pack_operands<T>(ds, dp);
    wgmma_fence();
    wgmma_rs_mn_major<T, KT>(d_q, ds, shared_address(&shared.k[stage]));
    wgmma_commit();
    const uint32_t busy = at.iteration++;
    if (!at.seek()) {
      wgmma_wait<0>();
      release(&shared.empty[busy % C::kStages], lane);
      return gate_sum;
    }
    issue_qk<C>(s, fragments, shared, at.stage());
    wgmma_wait<1>();
    release(&shared.empty[busy % C::kStages], lane);
  }
}

template <class C>
SEGATTN_FN void store_query_grad(const SegattnBackwardParams& p, const float (&d_q)[C::kOutTiles][4], const WorkTile& work, int query, int lane) {
  const int rows = (int)p.problem.q.rows;
  if (work.splits == 1) return store_rows(d_q, p.problem.scale, Rows<typename C::T>::of(p.d_q, work.batch_index, work.head), query, work.query_rows, rows, lane);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (query + half * 8 >= rows) continue;
    float2* out = (float2*)(p.partial_d_q + partial_row(p.problem, work.split, work.batch_index, work.head, query + half * 8) * C::kHeadDim);
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++) out[n * 4 + lane % 4] = make_float2(d_q[n][half * 2], d_q[n][half * 2 + 1]);
  }
}

// The work tile's part of d_past_gate times gate: lanes, then warps, in order.
template <class C>
SEGATTN_FN void store_gate_sum(const SegattnBackwardParams& p, float (&sums)[C::kConsumerWarps], const WorkTile& work, float sum, int thread) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  barrier_sync<C::kConsumerWarps * 32>(2);
  if (thread != 0) return;
  float total = 0.f;
  for (int i = 0; i < C::kConsumerWarps; i++) total += sums[i];
  p.partial_gate[partial_row(p.problem, work.split, work.batch_index, work.head, 0) / p.problem.q.rows * p.tiles + work.query_tile] = total;
}

template <class C>
SEGATTN_FN void consume_query_grad(const SegattnBackwardParams& p, QueryGradShared<C>& shared) {
  using QT = typename C::QueryTile;
  const int thread = threadIdx.x - C::kProducerThreads, lane = thread & 31, warp_row = thread / 32 * 16, row = warp_row + lane / 4;
  const float scale = signed_scale_log2(p.problem.scale);
  uint32_t first_iteration = 0;
  for (uint32_t n = 0;; n++) {
    mbarrier_wait(&shared.rows_full, phase(n));
    if (shared.work[n % kWorkBuffers].done) return;
    const WorkTile& work = shared.work[n % kWorkBuffers].work;
    QueryFragments<C> fragments;
    load_fragments<QT>(fragments.q, shared_address(&shared.q), warp_row, lane);
    if constexpr (C::kRegisterA) load_fragments<QT>(fragments.d_out, shared_address(&shared.d_out), warp_row, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) fragments.lse[half] = shared.lse[row + half * 8], fragments.delta[half] = shared.delta[row + half * 8];
    if constexpr (C::kRegisterA) release(&shared.rows_empty, lane);
    float d_q[C::kOutTiles][4];
    clear(d_q);
    const int first = work.query_tile * C::kRows, group = first + thread / 128 * 64;
    const KvIterator<C> iterator = {shared, first_iteration, first_iteration + max(0, work.end_kv_tile - work.first_kv_tile), group, min(group + 64, work.query_rows) - 1, lane};
    const float gate_sum = query_grad_mainloop<C>(d_q, fragments, shared, work.keys, iterator, scale, first + row, thread / 128 * 64);
    first_iteration = iterator.end;
    if constexpr (!C::kRegisterA) release(&shared.rows_empty, lane);
    store_query_grad<C>(p, d_q, work, first + row, lane);
    if (work.keys.past_len > 0) store_gate_sum<C>(p, shared.gate_sums[n & 1], work, gate_sum, thread);
  }
}

template <class C>
SEGATTN_FN void attention_query_grad(const SegattnBackwardParams& p) {
  QueryGradShared<C>& shared = *(QueryGradShared<C>*)shared_memory();
  if (threadIdx.x == 0) start_barriers(shared);
  __syncthreads();
  if (threadIdx.x < C::kProducerThreads) {
    setmaxnreg_decrease<C::kProducerRegisters>();
    produce_query_grad<C>(p, shared);
  } else {
    setmaxnreg_increase<C::kConsumerRegisters>();
    consume_query_grad<C>(p, shared);
  }
}

// ---------------------------------------------------------------------------------------------------- d_k, d_v

template <class T, int kHeadDim>
struct KeyGradConfig : WarpgroupConfig<T, kHeadDim, 2, kHeadDim == 64 ? 4 : 3> {
  static constexpr int kQueryProducerWarps = KeyGradConfig::kProducerWarps - 1;  // that fetch queries; the last one fetches keys
  static constexpr int kKeys = 64 * KeyGradConfig::kConsumerWarpgroups;
  static constexpr int kQueries = kHeadDim == 64 ? 128 : 64;
  static constexpr int kColTiles = kQueries / 8;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  using QueryTile = Tile<T, kQueries, kHeadDim>;
};

struct KeyWork {
  KeyWorkTile work;
  int iterations;  // query tiles of all its heads
  bool done;  // there is no work tile any more
};

template <class C>
struct KeyGradShared {
  typename C::KeyTile k[2], v[2];  // of work tile n at n % 2; then d_k and d_v on their way to global memory
  typename C::QueryTile q[C::kStages], d_out[C::kStages];
  alignas(16) float lse[C::kStages][C::kQueries], delta[C::kStages][C::kQueries];
  KeyWork work[kWorkBuffers];
  int query[C::kStages];  // first row of the stage's tile
  uint64_t keys_full[2], keys_empty[2];
  uint64_t full[C::kStages], empty[C::kStages];
};

template <class C>
SEGATTN_FN void start_barriers(KeyGradShared<C>& shared) {
  for (int i = 0; i < 2; i++) {
    mbarrier_init(&shared.keys_full[i], 32);
    mbarrier_init(&shared.keys_empty[i], C::kConsumerWarps);
  }
  for (int stage = 0; stage < C::kStages; stage++) {
    mbarrier_init(&shared.full[stage], 32);
    mbarrier_init(&shared.empty[stage], C::kConsumerWarps);
  }
  fence_mbarrier_init();
}

template <class C>
SEGATTN_FN void find_work(const SegattnBackwardParams& p, KeyWork& buffer, bool first) {
  const int prior_tiles = p.d_prior_k.data ? ceil_div((int)p.d_prior_k.rows, C::kKeys) : 0;
  const uint32_t work_tiles = (uint32_t)(prior_tiles + ceil_div((int)p.d_k.rows, C::kKeys)) * p.problem.kv_heads * p.problem.batch;
  const uint32_t index = next_work_index(p.work_counter + 1, first);
  buffer.done = index >= work_tiles;
  if (buffer.done) return;
  const KeyWorkTile work = key_work_tile<C>(p, index);
  buffer.work = work;
  int readers = 0;
  for (int head = work.kv_head * (p.problem.q_heads / p.problem.kv_heads); head < work.end_head; head++)
    readers += !work.prior || p.problem.prior_heads[head];
  buffer.iterations = readers * max(0, ceil_div(work.query_rows - work.first_query, C::kQueries));
}

// Fills a stage with a tile of queries.
template <class C>
SEGATTN_FN void copy_queries(const SegattnBackwardParams& p, KeyGradShared<C>& shared, const KeyWorkTile& work, const QueryCursor& at, int stage, int lane) {
  using T = typename C::T;
  copy_rows_async<typename C::QueryTile, 32>(shared_address(&shared.q[stage]), Rows<const T>::of(p.problem.q, work.batch_index, at.head), at.query,
                                             work.query_rows, lane);
  copy_rows_async<typename C::QueryTile, 32>(shared_address(&shared.d_out[stage]), Rows<const T>::of(p.d_out, work.batch_index, at.head), at.query,
                                             work.query_rows, lane);
  const int64_t row = prepared_row(p, work.batch_index, at.head, at.query);
  for (int i = lane; i < C::kQueries / 4; i += 32) {
    cp_async_16(shared_address(&shared.lse[stage][i * 4]), p.row_lse + row + i * 4, 16);
    cp_async_16(shared_address(&shared.delta[stage][i * 4]), p.row_delta + row + i * 4, 16);
  }
  cp_async_commit();
  if (lane == 0) shared.query[stage] = at.query;
}

// The last warp that fetches: the work tile's keys, while those before are in use, and then what comes next.
template <class C>
SEGATTN_FN void produce_keys(const SegattnBackwardParams& p, KeyGradShared<C>& shared, uint32_t n, int lane) {
  using T = typename C::T;
  const KeyWork& buffer = shared.work[n % kWorkBuffers];
  const KeyWorkTile& work = buffer.work;
  wait_empty(&shared.keys_empty[n & 1], n / 2);
  if (buffer.done) return mbarrier_arrive(&shared.keys_full[n & 1]);
  const SegattnTensor &k = work.prior ? p.problem.prior_k : p.problem.k, &v = work.prior ? p.problem.prior_v : p.problem.v;
  copy_rows_async<typename C::KeyTile, 32>(shared_address(&shared.k[n & 1]), Rows<const T>::of(k, work.batch_index, work.kv_head), work.first, work.len, lane);
  copy_rows_async<typename C::KeyTile, 32>(shared_address(&shared.v[n & 1]), Rows<const T>::of(v, work.batch_index, work.kv_head), work.first, work.len, lane);
  cp_async_commit();
  signal_landed<0>(&shared.keys_full[n & 1]);
  if (lane == 0) find_work<C>(p, shared.work[(n + 1) % kWorkBuffers], false);
}

// The others: the work tile's queries, a tile each in turn.
template <class C>
SEGATTN_FN void produce_queries(const SegattnBackwardParams& p, KeyGradShared<C>& shared, const KeyWork& buffer, uint32_t first_iteration, int warp, int lane) {
  const KeyWorkTile& work = buffer.work;
  QueryCursor at = QueryCursor::first(p.problem, work);
  const int own = (warp + C::kQueryProducerWarps - first_iteration % C::kQueryProducerWarps) % C::kQueryProducerWarps;
  for (int i = 0; i < own; i++) at = at.template next<C::kQueries>(p.problem, work);
  for (int tile = own; tile < buffer.iterations; tile += C::kQueryProducerWarps) {
    const uint32_t iteration = first_iteration + tile;
    const int stage = iteration % C::kStages;
    wait_empty(&shared.empty[stage], iteration / C::kStages);
    copy_queries<C>(p, shared, work, at, stage, lane);
    signal_landed<0>(&shared.full[stage]);
    for (int i = 0; i < C::kQueryProducerWarps; i++) at = at.template next<C::kQueries>(p.problem, work);
  }
}

template <class C>
SEGATTN_FN void produce_key_grad(const SegattnBackwardParams& p, KeyGradShared<C>& shared) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  uint32_t first_iteration = 0;  // of the work tile, counted over all work tiles of the block
  if (thread == C::kQueryProducerWarps * 32) find_work<C>(p, shared.work[0], true);
  for (uint32_t n = 0;; n++) {
    barrier_sync<C::kProducerThreads>(1);
    const KeyWork& buffer = shared.work[n % kWorkBuffers];
    const bool done = buffer.done;
    if (warp == C::kQueryProducerWarps) produce_keys<C>(p, shared, n, lane);
    else if (!done) produce_queries<C>(p, shared, buffer, first_iteration, warp, lane);
    if (done) return;
    first_iteration += buffer.iterations;
  }
}

// Keys are masked for the queries before them: `before` queries of the tile for the thread's upper row of keys.
template <int kColTiles>
SEGATTN_FN void mask_queries(float (&s)[kColTiles][4], int before, float scale, int lane) {
  const float masked_score = scale < 0.f ? INFINITY : -INFINITY;
#pragma unroll
  for (int n = 0; n < kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (n * 8 + lane % 4 * 2 + e % 2 < before + e / 2 * 8) s[n][e] = masked_score;
}

// Scores of keys x queries to weights.
template <int kColTiles>
SEGATTN_FN void transposed_probs(float (&s)[kColTiles][4], const float* s_lse, float scale, int lane) {
#pragma unroll
  for (int n = 0; n < kColTiles; n++) {
    const float2 lse = ((const float2*)s_lse)[n * 4 + lane % 4];
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = exp2_approx(fma_rn(s[n][e], scale, -(e % 2 ? lse.y : lse.x)));
  }
}

// d_out v^T, transposed, to ds^T.
template <int kColTiles>
SEGATTN_FN void transposed_softmax_grad(float (&dp)[kColTiles][4], const float (&probs)[kColTiles][4], const float* s_delta, int lane) {
#pragma unroll
  for (int n = 0; n < kColTiles; n++) {
    const float2 delta = ((const float2*)s_delta)[n * 4 + lane % 4];
#pragma unroll
    for (int e = 0; e < 4; e++) dp[n][e] = probs[n][e] * (dp[n][e] - (e % 2 ? delta.y : delta.x));
  }
}

// The gradients of 64 keys.
template <class C>
struct KeyGrads {
  float d_k[C::kOutTiles][4], d_v[C::kOutTiles][4];
};

// Where a warpgroup is in a work tile: steps of the ring from `turn` to `end`.
template <class C>
struct QueryIterator {
  KeyGradShared<C>& shared;
  uint32_t iteration, end;
  int first_key, lane;  // of the warpgroup's keys

  __device__ __forceinline__ int stage() const { return uniform(iteration % C::kStages); }
  // Keys of the warpgroup that the stage's first query does not see, or a negative number.
  __device__ __forceinline__ int before() const { return first_key - shared.query[iteration % C::kStages]; }
  // Waits for queries that see some key of the warpgroup; the others pass by. Whether there are any.
  __device__ __forceinline__ bool seek() {
    for (; iteration != end; iteration++) {
      mbarrier_wait(&shared.full[iteration % C::kStages], phase(iteration / C::kStages));
      if (before() < C::kQueries) return true;
      release(&shared.empty[iteration % C::kStages], lane);
    }
    return false;
  }
};

// The work tile's queries: d_k and d_v of the warpgroup's keys, rows first_row... of the block's tile. Scores of the next
// queries are under way before the products of these are waited for.
template <class C>
SEGATTN_FN void key_grad_mainloop(KeyGrads<C>& grads, KeyGradShared<C>& shared, QueryIterator<C> at, int kv_buffer, float scale, int first_row, int lane) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  using QT = typename C::QueryTile;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const auto q = [&](int stage) { return shared_address(&shared.q[stage]); };
  const auto d_out = [&](int stage) { return shared_address(&shared.d_out[stage]); };
  if (!at.seek()) return;
  float s[C::kColTiles][4], dp[C::kColTiles][4];
  wgmma_fence();
  wgmma_ss<T, KT, QT>(s, shared_address(&shared.k[kv_buffer]), uniform(first_row), q(at.stage()));
  wgmma_commit();
  while (true) {
    const int stage = at.stage(), before = at.before();
    uint32_t probs[C::kColTiles / 2][4], ds[C::kColTiles / 2][4];
    wgmma_fence();
    wgmma_ss<T, KT, QT>(dp, shared_address(&shared.v[kv_buffer]), uniform(first_row), d_out(stage));
    wgmma_commit();
    wgmma_wait<1>();
    if (before > -64) mask_queries(s, before + row, scale, lane);
    transposed_probs(s, shared.lse[stage], scale, lane);
    pack_operands<T>(probs, s);
    wgmma_wait<0>();
    transposed_softmax_grad(dp, s, shared.delta[stage], lane);
    pack_operands<T>(ds, dp);
    wgmma_fence();
    wgmma_rs_mn_major<T, QT>(grads.d_v, probs, d_out(stage));
    wgmma_rs_mn_major<T, QT>(grads.d_k, ds, q(stage));
    wgmma_commit();
    const uint32_t busy = at.iteration++;
    if (!at.seek()) {
      wgmma_wait<0>();
      return release(&shared.empty[busy % C::kStages], lane);
    }
    wgmma_fence();
    wgmma_ss<T, KT, QT>(s, shared_address(&shared.k[kv_buffer]), uniform(first_row), q(at.stage()));
    wgmma_commit();
    wgmma_wait<1>();
    release(&shared.empty[busy % C::kStages], lane);
  }
}

template <class C>
SEGATTN_FN void consume_key_grad(const SegattnBackwardParams& p, KeyGradShared<C>& shared) {
  using T = typename C::T;
  const int thread = threadIdx.x - C::kProducerThreads, lane = thread & 31, first_row = thread / 128 * 64, warp_row = thread / 32 * 16;
  const float scale = signed_scale_log2(p.problem.scale);
  uint32_t first_iteration = 0;
  for (uint32_t n = 0;; n++) {
    const int kv_buffer = uniform(n & 1);
    mbarrier_wait(&shared.keys_full[kv_buffer], phase(n / 2));
    const KeyWork& buffer = shared.work[n % kWorkBuffers];
    if (buffer.done) return;
    KeyGrads<C> grads;
    clear(grads.d_k);
    clear(grads.d_v);
    const KeyWorkTile& work = buffer.work;
    const QueryIterator<C> iterator = {shared, first_iteration, first_iteration + buffer.iterations, work.prior ? -(1 << 30) : work.first + first_row, lane};
    key_grad_mainloop<C>(grads, shared, iterator, kv_buffer, scale, first_row, lane);
    first_iteration = iterator.end;
    const SegattnTensor &d_k = work.prior ? p.d_prior_k : p.d_k, &d_v = work.prior ? p.d_prior_v : p.d_v;
    barrier_sync<128>(2 + thread / 128);
    store_rows(grads.d_k, p.problem.scale, shared.k[kv_buffer], warp_row, Rows<T>::of(d_k, work.batch_index, work.kv_head), work.first, work.len, (int)d_k.rows, lane);
    store_rows(grads.d_v, 1.f, shared.v[kv_buffer], warp_row, Rows<T>::of(d_v, work.batch_index, work.kv_head), work.first, work.len, (int)d_v.rows, lane);
    release(&shared.keys_empty[kv_buffer], lane);
  }
}

template <class C>
SEGATTN_FN void attention_key_grad(const SegattnBackwardParams& p) {
  KeyGradShared<C>& shared = *(KeyGradShared<C>*)shared_memory();
  if (threadIdx.x == 0) start_barriers(shared);
  __syncthreads();
  if (threadIdx.x < C::kProducerThreads) {
    setmaxnreg_decrease<C::kProducerRegisters>();
    produce_key_grad<C>(p, shared);
  } else {
    setmaxnreg_increase<C::kConsumerRegisters>();
    consume_key_grad<C>(p, shared);
  }
}

// ---------------------------------------------------------------------------------------------------- entry points

template <class C>
constexpr SegattnKernelInfo query_grad_info() {
  return {C::kThreads, (int)sizeof(QueryGradShared<C>), C::kBlocks, C::kRows, C::kKeys, C::kSplitKeys, (int)sizeof(SegattnBackwardParams)};
}
template <class C>
constexpr SegattnKernelInfo key_grad_info() {
  return {C::kThreads, (int)sizeof(KeyGradShared<C>), C::kBlocks, C::kKeys, C::kQueries, 0, (int)sizeof(SegattnBackwardParams)};
}

// query_grad, key_grad: the blocks that run at once take work tiles: q_heads * batch * tiles * max_splits, and key tiles as in
// attention_backward.cu. query_grad_sum: as there.
#define BACKWARD(name, T, kHeadDim)                                                                            \
  using QueryGrad_##name = QueryGradConfig<T, kHeadDim>;                                                       \
  using KeyGrad_##name = KeyGradConfig<T, kHeadDim>;                                                           \
  SEGATTN_INFO(attention_query_grad_hopper_##name, query_grad_info<QueryGrad_##name>())                        \
  SEGATTN_INFO(attention_key_grad_hopper_##name, key_grad_info<KeyGrad_##name>())                              \
  SEGATTN_KERNEL(attention_query_grad_hopper_##name, QueryGrad_##name, SegattnBackwardParams) {                \
    attention_query_grad<QueryGrad_##name>(params);                                                            \
  }                                                                                                            \
  SEGATTN_KERNEL(attention_query_grad_sum_hopper_##name, PrepareConfig, SegattnBackwardParams) {               \
    attention_query_grad_sum<QueryGrad_##name>(params);                                                        \
  }                                                                                                            \
  SEGATTN_KERNEL(attention_key_grad_hopper_##name, KeyGrad_##name, SegattnBackwardParams) {                    \
    attention_key_grad<KeyGrad_##name>(params);                                                                \
  }

BACKWARD(bf16_d64, Bf16, 64)
BACKWARD(bf16_d128, Bf16, 128)
BACKWARD(f16_d64, F16, 64)
BACKWARD(f16_d128, F16, 128)

SEGATTN_LAYOUT(attention_backward_hopper)
