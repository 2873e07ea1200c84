// d_k and d_v of backward: key-stationary, over prior and current keys: d_k = scale dS^T Q, d_v = P^T d_out, summed
// over the query heads of the group.
#pragma once
#include "attention_gradients.cuh"
#include "pipeline.cuh"
#include "products.cuh"

// Keys are the rows of every product, so P^T and dS^T stay in registers as A of the next. Each of 4 warps has d_k and
// d_v of 32 keys at D <= 64 (64 + 64 registers), of 16 above (64 + 64 at D 128); at D 256 of half the columns of 16
// keys, so that two warps compute the same P^T. A warp with 16 keys also keeps k and v in registers: otherwise shared
// memory would bound the kernel. With 32 queries at a time the registers are full, and only ptxas for sm_90 manages
// without spills.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
constexpr int kRegisterSubQueries = 32;
#else
constexpr int kRegisterSubQueries = 16;
#endif

template <class T_, int kHeadDim_>
struct KeyGradConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kColumnParts = kHeadDim == 256 ? 2 : 1;
  static constexpr int kKeys = kWarps / kColumnParts * kRowTiles * 16;
  static constexpr int kQueries = kHeadDim == 256 ? 32 : 64;
  static constexpr bool kRegisterA = kRowTiles == 1 && kHeadDim <= 128;      // k and v in registers
  static constexpr int kSubQueries = kRegisterA ? kRegisterSubQueries : 32;  // queries of a product S^T
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlocks = 2;
  static constexpr int kColTiles = kSubQueries / 8, kOutTiles = kHeadDim / kColumnParts / 8;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  using QueryTile = Tile<T, kQueries, kHeadDim>;
};

template <class C>
struct KeyGradShared {
  typename C::KeyTile k, v;  // finally d_k and d_v, staged for the store
  typename C::QueryTile q[C::kStages], d_out[C::kStages];
  alignas(16) float lse[C::kStages][C::kQueries], delta[C::kStages][C::kQueries];
  KeyWorkTile work;
  QueryCursor query_tiles[4];  // tile t is query_tiles[t % 4]: the current one and the next two
};

template <class C>
SEGATTN_FN void load_query_stage(const SegattnBackwardParams& p, KeyGradShared<C>& shared, int iteration, int thread) {
  using T = typename C::T;
  thread = opaque(thread);
  const KeyWorkTile& work = shared.work;
  const QueryCursor at = shared.query_tiles[iteration & 3];
  const int stage = stage_of<C::kStages>(iteration);
  if (at.head < work.end_head) {
    copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.q[stage]),
                                                        Rows<const T>::of(p.problem.q, work.batch_index, at.head),
                                                        at.query, work.query_rows, thread);
    copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.d_out[stage]),
                                                        Rows<const T>::of(p.d_out, work.batch_index, at.head), at.query,
                                                        work.query_rows, thread);
    const int64_t row = prepared_row(p, work.batch_index, at.head, at.query);
    constexpr int kChunks = C::kQueries / 4;
    if (thread < kChunks) cp_async_16(shared_address(&shared.lse[stage][thread * 4]), p.row_lse + row + thread * 4, 16);
    else if (thread < 2 * kChunks)
      cp_async_16(shared_address(&shared.delta[stage][(thread - kChunks) * 4]),
                  p.row_delta + row + (thread - kChunks) * 4, 16);
  }
  cp_async_commit();
}

// Masks S^T where a query does not see a key, so that P is 0 for either sign of the scale.
template <class C>
SEGATTN_FN void mask_queries(float (&s)[C::kRowTiles][C::kColTiles][4], int first_key, int first_query, float scale,
                             int lane) {
  const float masked_score = scale < 0.f ? INFINITY : -INFINITY;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int before = first_key + m * 16 + half * 8 + lane / 4 - first_query - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (n * 8 + e < before) s[m][n][half * 2 + e] = masked_score;
    }
}

// S^T to P^T and dP^T to dS^T, in place.
template <class C>
SEGATTN_FN void transposed_softmax_grad(float (&s)[C::kRowTiles][C::kColTiles][4],
                                        float (&dp)[C::kRowTiles][C::kColTiles][4], const float* s_lse,
                                        const float* s_delta, float scale, int lane) {
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++) {
    const float2 lse = ((const float2*)s_lse)[n * 4 + lane % 4], delta = ((const float2*)s_delta)[n * 4 + lane % 4];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float &x = s[m][n][e], &d = dp[m][n][e];
        x = exp2_approx(fma_rn(x, scale, -(e % 2 ? lse.y : lse.x)));
        d = x * (d - (e % 2 ? delta.y : delta.x));
      }
  }
}

// Stores accumulators as rows of a tensor like k, staged in the block's tile. Keys from the length on become zero.
template <class C>
SEGATTN_FN void store_key_rows(const float (&x)[C::kRowTiles][C::kOutTiles][4], float factor, typename C::KeyTile& tile,
                               const SegattnTensor& tensor, const KeyWorkTile& work, int first_row, int column,
                               int thread) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  const SharedAddress base = shared_address(&tile);
  const int lane = thread & 31;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const SharedAddress offset = KT::chunk(base, first_row + m * 16 + half * 8 + lane / 4, column / 8 + n) - base;
        *(uint32_t*)((unsigned char*)&tile + offset + lane % 4 * 4) =
            pack<T>(x[m][n][half * 2] * factor, x[m][n][half * 2 + 1] * factor);
      }
  __syncthreads();
  constexpr int kRowChunks = C::kHeadDim / 8;
  const Rows<T> rows = Rows<T>::of(tensor, work.batch_index, work.kv_head);
  for (int i = thread; i < C::kKeys * kRowChunks; i += C::kThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    if (work.first + row >= work.rows) continue;
    const uint4 value = *(const uint4*)((unsigned char*)&tile + (KT::chunk(base, row, chunk) - base));
    *(uint4*)(rows.row(work.first + row) + chunk * 8) = work.first + row < work.len ? value : make_uint4(0, 0, 0, 0);
  }
}

// The first row and column of a warp's gradients in the block's tile.
template <class C>
struct KeyWarpTile {
  SEGATTN_FN int row(int thread) { return thread / 32 / C::kColumnParts * (C::kRowTiles * 16); }
  SEGATTN_FN int column(int thread) { return thread / 32 % C::kColumnParts * (C::kOutTiles * 8); }
};

// A of a warp, k and v; empty if they are read from shared memory.
template <class C>
struct KeyFragments {
  static constexpr int kKBlocks = C::kRegisterA ? C::kHeadDim / 16 : 1;
  uint32_t k[C::kRowTiles][kKBlocks][4], v[C::kRowTiles][kKBlocks][4];
};

// Adds the terms of kSubQueries queries, rows `sub`... of a stage, to d_k and d_v of the warp's keys.
template <class C>
SEGATTN_FN void add_queries(float (&d_k)[C::kRowTiles][C::kOutTiles][4], float (&d_v)[C::kRowTiles][C::kOutTiles][4],
                            const KeyFragments<C>& fragments, KeyGradShared<C>& shared, int iteration, int sub,
                            float scale, int thread) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  using QT = typename C::QueryTile;
  const int stage = stage_of<C::kStages>(iteration), lane = opaque(thread & 31),
            first_row = KeyWarpTile<C>::row(thread), column = KeyWarpTile<C>::column(thread);
  const SharedAddress q = shared_address(&shared.q[stage]), d_out = shared_address(&shared.d_out[stage]);
  const int first_key = shared.work.first + first_row, query = shared.query_tiles[iteration & 3].query + sub;
  float s[C::kRowTiles][C::kColTiles][4], dp[C::kRowTiles][C::kColTiles][4];
  uint32_t probs[C::kRowTiles][C::kColTiles / 2][4];
  if constexpr (C::kRegisterA) {
    mma_rs<T, QT>(s, fragments.k, b_base<QT>(q, lane), sub);
    mma_rs<T, QT>(dp, fragments.v, b_base<QT>(d_out, lane), sub);
  } else {
    mma_ss<T, KT, QT>(s, a_base<KT>(shared_address(&shared.k), lane), first_row, b_base<QT>(q, lane), sub);
    mma_ss<T, KT, QT>(dp, a_base<KT>(shared_address(&shared.v), lane), first_row, b_base<QT>(d_out, lane), sub);
  }
  if (!shared.work.prior && query < first_key + C::kRowTiles * 16) mask_queries<C>(s, first_key, query, scale, lane);
  transposed_softmax_grad<C>(s, dp, shared.lse[stage] + sub, shared.delta[stage] + sub, scale, lane);
  pack_operands<T>(probs, s);
  mma_rs_mn_major<T, QT, C::kRowTiles, C::kColTiles>(d_v, probs, bt_base<QT>(d_out, lane), sub, column);
  pack_operands<T>(probs, dp);
  mma_rs_mn_major<T, QT, C::kRowTiles, C::kColTiles>(d_k, probs, bt_base<QT>(q, lane), sub, column);
}

template <class C>
SEGATTN_FN void attention_key_grad(const SegattnBackwardParams& p) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  KeyGradShared<C>& shared = *(KeyGradShared<C>*)shared_memory();
  const int thread = threadIdx.x, lane = thread & 31, first_row = KeyWarpTile<C>::row(thread);
  const KeyWorkTile& work = shared.work;
  if (thread == 0) {
    shared.work = key_work_tile<C>(p, blockIdx.x);
    shared.query_tiles[0] = QueryCursor::first(p.problem, work);
    shared.query_tiles[1] = shared.query_tiles[0].template next<C::kQueries>(p.problem, work);
  }
  __syncthreads();
  const SegattnTensor &k = work.prior ? p.problem.prior_k : p.problem.k,
                      &v = work.prior ? p.problem.prior_v : p.problem.v;
  copy_rows_async<KT, C::kThreads>(shared_address(&shared.k), Rows<const T>::of(k, work.batch_index, work.kv_head),
                                   work.first, work.len, thread);
  copy_rows_async<KT, C::kThreads>(shared_address(&shared.v), Rows<const T>::of(v, work.batch_index, work.kv_head),
                                   work.first, work.len, thread);
  cp_async_commit();
  load_query_stage<C>(p, shared, 0, thread);
  arrive_and_wait<1>();
  KeyFragments<C> fragments;
  if constexpr (C::kRegisterA) {
    load_fragments<KT>(fragments.k, a_base<KT>(shared_address(&shared.k), lane), first_row);
    load_fragments<KT>(fragments.v, a_base<KT>(shared_address(&shared.v), lane), first_row);
  }

  float d_k[C::kRowTiles][C::kOutTiles][4], d_v[C::kRowTiles][C::kOutTiles][4];
  clear(d_k);
  clear(d_v);
  const float scale = signed_scale_log2(p.problem.scale);
  for (int iteration = 0; shared.query_tiles[iteration & 3].head < work.end_head; iteration++) {
    arrive_and_wait<0>();
    load_query_stage<C>(p, shared, iteration + 1, thread);
    if (thread == 0)
      shared.query_tiles[(iteration + 2) & 3] =
          shared.query_tiles[(iteration + 1) & 3].template next<C::kQueries>(p.problem, work);
#pragma unroll 1
    for (int sub = 0; sub < C::kQueries; sub += C::kSubQueries) {
      const int last_query = shared.query_tiles[iteration & 3].query + sub + C::kSubQueries - 1;
      if (!work.prior && last_query < work.first + first_row) continue;
      add_queries<C>(d_k, d_v, fragments, shared, iteration, sub, scale, thread);
    }
  }
  arrive_and_wait<0>();
  store_key_rows<C>(d_k, p.problem.scale, shared.k, work.prior ? p.d_prior_k : p.d_k, work, first_row,
                    KeyWarpTile<C>::column(thread), thread);
  store_key_rows<C>(d_v, 1.f, shared.v, work.prior ? p.d_prior_v : p.d_v, work, first_row,
                    KeyWarpTile<C>::column(thread), thread);
}

template <class C>
constexpr SegattnKernelInfo key_grad_info() {
  return {C::kThreads, (int)sizeof(KeyGradShared<C>),     C::kBlocks, C::kKeys, C::kQueries,
          0,           (int)sizeof(SegattnBackwardParams)};
}
