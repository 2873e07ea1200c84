// d_q of backward: query-stationary, over past, prior and current keys: dS = P (d_out V^T - delta), d_q = scale dS K.
// What the gradient of a head's gate needs comes from the same P and dS (GateSum).
#pragma once
#include "attention_gradients.cuh"
#include "pipeline.cuh"
#include "products.cuh"

// 4 warps x 32 rows against 32 keys: S and dP (32 registers each) fit beside d_q (128 at D 128), and two stages of K
// and V beside q and d_out in 96 KB. D 256: 2 warps x 16 rows.
template <class T_, int kHeadDim_>
struct QueryGradConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kHeadDim == 256 ? 2 : 4;
  static constexpr int kRowTiles = kHeadDim == 256 ? 1 : 2;
  static constexpr int kRows = kWarps * kRowTiles * 16;
  static constexpr int kKeys = kHeadDim <= 64 ? 64 : 32;
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlocks = kHeadDim == 256 ? 3 : 2;
  static constexpr int kSplitKeys = kChunkKeys * kSectionChunks;
  static constexpr int kColTiles = kKeys / 8, kOutTiles = kHeadDim / 8;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
};

template <class C>
struct QueryGradShared {
  typename C::QueryTile q;  // finally d_q, staged for the store
  typename C::QueryTile d_out;
  typename C::KeyTile k[C::kStages], v[C::kStages];
  alignas(16) float lse[C::kRows], delta[C::kRows];
  SourceRows<typename C::T> sources;
  WorkTile work;
  KeyTile tiles[4];  // key tile t is tiles[t % 4]: the current one and the next two
  int first_query[C::kWarps], last_query[C::kWarps];
  float gate_sums[C::kRows][kGateSums];
};

template <class C>
SEGATTN_FN void load_key_stage(QueryGradShared<C>& shared, int kv_tile, int thread) {
  if (kv_tile < shared.work.end_kv_tile) {
    const KeyTile& tile = shared.tiles[kv_tile & 3];
    const int stage = stage_of<C::kStages>(kv_tile), source = tile.source;
    const uint32_t copier = opaque(thread);
    copy_rows_async<typename C::KeyTile, C::kThreads>(shared_address(&shared.k[stage]), shared.sources.k[source],
                                                      tile.first, tile.end, copier);
    copy_rows_async<typename C::KeyTile, C::kThreads>(shared_address(&shared.v[stage]), shared.sources.v[source],
                                                      tile.first, tile.end, copier);
  }
  cp_async_commit();
}

// Issues the copies of the tile's rows: q, d_out, and what the preparation kernel wrote.
template <class C>
SEGATTN_FN void load_query_rows(const SegattnBackwardParams& p, QueryGradShared<C>& shared, int thread) {
  using T = typename C::T;
  const WorkTile& work = shared.work;
  const int first = work.query_tile * C::kRows;
  copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.q),
                                                      Rows<const T>::of(p.problem.q, work.batch_index, work.head),
                                                      first, work.query_rows, thread);
  copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.d_out),
                                                      Rows<const T>::of(p.d_out, work.batch_index, work.head), first,
                                                      work.query_rows, thread);
  const int64_t prepared = prepared_row(p, work.batch_index, work.head, first);
  constexpr int kChunks = C::kRows / 4;
  if (thread < kChunks) {
    cp_async_16(shared_address(&shared.lse[thread * 4]), p.row_lse + prepared + thread * 4, 16);
    cp_async_16(shared_address(&shared.delta[thread * 4]), p.row_delta + prepared + thread * 4, 16);
  }
}

// Masks S, so that P is 0 for keys that a row does not see, for either sign of the scale.
template <class C>
SEGATTN_FN void mask_keys(float (&s)[C::kRowTiles][C::kColTiles][4], const WorkTile& work, const KeyTile& tile,
                          int first_row, float scale, int lane) {
  const float masked_score = scale < 0.f ? INFINITY : -INFINITY;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const QueryRow row = query_row<C::kRows>(work, first_row + m * 16 + half * 8 + lane / 4, 1);
      const int limit = work.keys.limit(tile, row.position) - tile.first - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (n * 8 + e >= limit) s[m][n][half * 2 + e] = masked_score;
    }
}

// S to P, in place.
template <class C>
SEGATTN_FN void softmax_probs(float (&s)[C::kRowTiles][C::kColTiles][4], const QueryGradShared<C>& shared, float scale,
                              float bias, int first_row, int lane) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float offset = bias - shared.lse[first_row + m * 16 + half * 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[m][n][half * 2 + e];
          x = exp2_approx(fma_rn(x, scale, offset));
        }
    }
}

// P to dS = P (dP - delta), in place.
template <class C>
SEGATTN_FN void softmax_grad(float (&s)[C::kRowTiles][C::kColTiles][4],
                             const float (&dp)[C::kRowTiles][C::kColTiles][4], const QueryGradShared<C>& shared,
                             int first_row, int lane) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float delta = shared.delta[first_row + m * 16 + half * 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) s[m][n][half * 2 + e] *= dp[m][n][half * 2 + e] - delta;
    }
}

template <class C>
SEGATTN_FN void store_query_grad(const SegattnBackwardParams& p, float (&d_q)[C::kRowTiles][C::kOutTiles][4],
                                 QueryGradShared<C>& shared, int first_row, int warp, int lane) {
  const WorkTile& work = shared.work;
  if (work.splits == 1) {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
      for (int n = 0; n < C::kOutTiles; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) d_q[m][n][e] *= p.problem.scale;
    store_query_rows<typename C::T, typename C::QueryTile, C::kRowTiles>(
        d_q, shared_address(&shared.q), (unsigned char*)&shared, p.d_q, work, 1, warp, lane);
    return;
  }
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const QueryRow q = query_row<C::kRows>(work, first_row + m * 16 + half * 8 + lane / 4, 1);
      if (q.query >= work.rows) continue;
      float2* out = (float2*)(p.partial_d_q +
                              partial_row(p.problem, work.split, work.batch_index, q.head, q.query) * C::kHeadDim);
#pragma unroll
      for (int n = 0; n < C::kOutTiles; n++)
        out[n * 4 + lane % 4] = make_float2(d_q[m][n][half * 2], d_q[m][n][half * 2 + 1]);
    }
}

template <class C>
SEGATTN_FN void attention_query_grad(const SegattnBackwardParams& p) {
  using T = typename C::T;
  using QT = typename C::QueryTile;
  using KT = typename C::KeyTile;
  QueryGradShared<C>& shared = *(QueryGradShared<C>*)shared_memory();
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, first_row = warp * C::kRowTiles * 16;
  const WorkTile& work = shared.work;
  if (thread == 0) {
    shared.work = work_tile_at<C::kRows, C::kKeys, C::kSplitKeys>(p.problem, HeadRange::of(p), blockIdx.x, p.tiles,
                                                                  p.max_splits);
    for (int kv_tile = work.first_kv_tile; kv_tile < work.first_kv_tile + 2; kv_tile++)
      shared.tiles[kv_tile & 3] = work.keys.template tile<C::kKeys>(kv_tile);
  }
  __syncthreads();
  if (work.split >= work.splits) return;
  shared.sources.fill(p.problem, work.batch_index, work.head / (p.problem.q_heads / p.problem.kv_heads), thread);
  __syncthreads();
  const auto row_sums = [&](int m) { return shared.gate_sums + (first_row + m * 16); };
  const bool gated = work.keys.past_len > work.keys.sinks;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++) clear_row_sums(row_sums(m), lane);
  load_query_rows<C>(p, shared, thread);
  load_key_stage(shared, work.first_kv_tile, thread);

  const float scale = signed_scale_log2(p.problem.scale);
  float d_q[C::kRowTiles][C::kOutTiles][4];
  clear(d_q);
  if (lane == 0) {
    shared.first_query[warp] = work.query_tile * C::kRows + first_row;
    shared.last_query[warp] = min(work.query_tile * C::kRows + first_row + C::kRowTiles * 16, work.query_rows) - 1;
  }
  __syncwarp();
  for (int kv_tile = work.first_kv_tile; kv_tile < work.end_kv_tile; kv_tile++) {
    arrive_and_wait<0>();
    load_key_stage(shared, kv_tile + 1, thread);
    if (thread == 0) shared.tiles[(kv_tile + 2) & 3] = work.keys.template tile<C::kKeys>(kv_tile + 2);
    const KeyTile& tile = shared.tiles[kv_tile & 3];
    const int stage = stage_of<C::kStages>(kv_tile), at = opaque(lane);
    const int last_query = shared.last_query[warp];
    if (last_query < shared.first_query[warp] || tile.first >= work.keys.limit(tile, last_query)) continue;
    float s[C::kRowTiles][C::kColTiles][4], dp[C::kRowTiles][C::kColTiles][4];
    uint32_t ds[C::kRowTiles][C::kColTiles / 2][4];
    const SharedAddress k = shared_address(&shared.k[stage]), v = shared_address(&shared.v[stage]);
    mma_ss<T, QT, KT>(s, a_base<QT>(shared_address(&shared.q), at), first_row, b_base<KT>(k, at), 0);
    mma_ss<T, QT, KT>(dp, a_base<QT>(shared_address(&shared.d_out), at), first_row, b_base<KT>(v, at), 0);
    const bool past = tile.source == kPast;
    if (tile.first + C::kKeys > work.keys.limit(tile, shared.first_query[warp]))
      mask_keys<C>(s, work, tile, first_row, scale, at);
    softmax_probs<C>(s, shared, scale, past ? work.keys.gate_log2 : 0.f, first_row, at);
    if (past)
#pragma unroll
      for (int m = 0; m < C::kRowTiles; m++) add_row_sums(row_sums(m), kPastWeight, s[m], at);
    softmax_grad<C>(s, dp, shared, first_row, at);
    if (gated)
#pragma unroll
      for (int m = 0; m < C::kRowTiles; m++) add_row_sums(row_sums(m), past ? kPastGrad : kOtherGrad, s[m], at);
    pack_operands<T>(ds, s);
    mma_rs_mn_major<T, KT, C::kRowTiles, C::kColTiles>(d_q, ds, bt_base<KT>(k, at), 0, 0);
  }
  cp_async_wait<0>();
  __syncthreads();
  store_query_grad<C>(p, d_q, shared, first_row, warp, lane);
  if (!gated) return;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
    store_row_sums(p, work, row_sums(m), work.query_tile * C::kRows + first_row + m * 16, lane);
}

template <class C>
constexpr SegattnKernelInfo query_grad_info() {
  return {C::kThreads,   (int)sizeof(QueryGradShared<C>),   C::kBlocks, C::kRows, C::kKeys,
          C::kSplitKeys, (int)sizeof(SegattnBackwardParams)};
}
