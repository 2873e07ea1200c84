// Segment attention, backward, in three steps, each written once and in a fixed order:
//   prepare:  delta = d_out . out - d_lse, lse in base 2
//   d_q:      query-stationary, over past, prior and current keys: ds = p (d_out v^T - delta), d_q = scale ds k,
//             and d_past_gate = (sum over past keys of ds) / gate
//   d_kv:     key-stationary, over prior and current keys: d_k = scale ds^T q, d_v = p^T d_out, summed over the query
//             heads of the group
// All gradients are set (=), padding rows to 0. Past keys get none. No atomics on floats; the d_q of a tile
// with several work tiles is the sum of their parts, in order (docs/kernels.md).
#include "attention_gradients.cuh"
#include "layout.cuh"
#include "pipeline.cuh"
#include "products.cuh"

// ---------------------------------------------------------------------------------------------------- prepare

// Rows of a block of 4 warps: kLanes lanes a row, 16 bytes each, kPasses rows one after the other.
template <class T_, int kHeadDim>
struct PrepareRows {
  using T = T_;
  static constexpr int kChunks = kHeadDim / 8, kLanes = kHeadDim == 96 ? 16 : kChunks;
  static constexpr int kPasses = 4, kPassRows = 32 / kLanes, kRows = 4 * kPasses * kPassRows;
};

// a . b of eight elements, added to sum.
template <class T>
SEGATTN_FN float add_products(float sum, const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum = fma_rn(widen((uint16_t)x[i], T{}), widen((uint16_t)y[i], T{}), sum);
    sum = fma_rn(widen((uint16_t)(x[i] >> 16), T{}), widen((uint16_t)(y[i] >> 16), T{}), sum);
  }
  return sum;
}

// A block's rows are of one head, padding up to row_pitch included.
template <class R>
SEGATTN_FN void attention_prepare(const SegattnBackwardParams& p) {
  using T = typename R::T;
  const int lane = threadIdx.x & 31, chunk = lane % R::kLanes, blocks = p.row_pitch / R::kRows, of_head = blockIdx.x / blocks;
  const int head = of_head % p.problem.q_heads, batch_index = of_head / p.problem.q_heads;
  const int first = blockIdx.x % blocks * R::kRows + (threadIdx.x >> 5) * (R::kPasses * R::kPassRows) + lane / R::kLanes;
  const int rows = min(p.problem.segment_len[batch_index], (int)p.problem.q.rows);
  const Rows<const T> out = Rows<const T>::of(p.out, batch_index, head), d_out = Rows<const T>::of(p.d_out, batch_index, head);
  uint4 x[R::kPasses], y[R::kPasses];
#pragma unroll
  for (int i = 0; i < R::kPasses; i++) {
    const int query = first + i * R::kPassRows;
    x[i] = y[i] = make_uint4(0, 0, 0, 0);
    if (query < rows && chunk < R::kChunks) x[i] = *(const uint4*)(out.row(query) + chunk * 8), y[i] = *(const uint4*)(d_out.row(query) + chunk * 8);
  }
#pragma unroll
  for (int i = 0; i < R::kPasses; i++) {
    const int query = first + i * R::kPassRows;
    float delta = add_products<T>(0.f, x[i], y[i]), lse = INFINITY;
#pragma unroll
    for (int mask = R::kLanes / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
    if (chunk != 0) continue;
    if (query < rows) {
      const int64_t row = ((int64_t)batch_index * p.problem.q_heads + head) * p.problem.q.rows + query;
      if (p.d_lse) delta -= p.d_lse[row];
      lse = p.lse[row] * kLog2E;
    }
    p.row_delta[prepared_row(p, batch_index, head, query)] = delta;
    p.row_lse[prepared_row(p, batch_index, head, query)] = lse;
  }
}

// ---------------------------------------------------------------------------------------------------- d_q

// 4 warps x 32 rows against 32 keys: scores and d_out v^T (32 registers each) beside d_q (128 at D 128). Keys 32 also
// keeps two stages of K and V beside q and d_out in 96 KB. D 256: 2 warps x 16 rows.
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
  typename C::QueryTile q;  // later d_q on its way to global memory
  typename C::QueryTile d_out;
  typename C::KeyTile k[C::kStages], v[C::kStages];
  alignas(16) float lse[C::kRows], delta[C::kRows];
  SourceRows<typename C::T> sources;
  WorkTile work;
  KeyTile tiles[4];  // number t at t % 4: the one worked on and the next two
  int first_query[C::kWarps], last_query[C::kWarps];
  float gate_sums[C::kThreads];  // each thread's sum of ds over past keys; then the warps'
};

template <class C>
SEGATTN_FN void load_key_stage(QueryGradShared<C>& shared, int kv_tile, int thread) {
  if (kv_tile < shared.work.end_kv_tile) {
    const KeyTile& tile = shared.tiles[kv_tile & 3];
    const int stage = stage_of<C::kStages>(kv_tile), source = tile.source;
    const uint32_t copier = opaque(thread);
    copy_rows_async<typename C::KeyTile, C::kThreads>(shared_address(&shared.k[stage]), shared.sources.k[source], tile.first, tile.end, copier);
    copy_rows_async<typename C::KeyTile, C::kThreads>(shared_address(&shared.v[stage]), shared.sources.v[source], tile.first, tile.end, copier);
  }
  cp_async_commit();
}

// q, d_out and what preparation left of the tile's rows.
template <class C>
SEGATTN_FN void load_query_rows(const SegattnBackwardParams& p, QueryGradShared<C>& shared, int thread) {
  using T = typename C::T;
  const WorkTile& work = shared.work;
  const int first = work.query_tile * C::kRows;
  copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.q), Rows<const T>::of(p.problem.q, work.batch_index, work.head), first,
                                                      work.query_rows, thread);
  copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.d_out), Rows<const T>::of(p.d_out, work.batch_index, work.head), first,
                                                      work.query_rows, thread);
  const int64_t prepared = prepared_row(p, work.batch_index, work.head, first);
  constexpr int kChunks = C::kRows / 4;
  if (thread < kChunks) {
    cp_async_16(shared_address(&shared.lse[thread * 4]), p.row_lse + prepared + thread * 4, 16);
    cp_async_16(shared_address(&shared.delta[thread * 4]), p.row_delta + prepared + thread * 4, 16);
  }
}

// Scores of the keys that a row does not see become such that their weight is 0.
template <class C>
SEGATTN_FN void mask_keys(float (&s)[C::kRowTiles][C::kColTiles][4], const WorkTile& work, const KeyTile& tile, int first_row, float scale, int lane) {
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

// Scores to ds = p (dp - delta), in their place.
template <class C>
SEGATTN_FN void softmax_grad(float (&s)[C::kRowTiles][C::kColTiles][4], const float (&dp)[C::kRowTiles][C::kColTiles][4],
                                const QueryGradShared<C>& shared, float scale, float bias, int first_row, int lane) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first_row + m * 16 + half * 8 + lane / 4;
      const float offset = bias - shared.lse[row], delta = shared.delta[row];
#pragma unroll
      for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[m][n][half * 2 + e];
          x = exp2_approx(fma_rn(x, scale, offset)) * (dp[m][n][half * 2 + e] - delta);
        }
    }
}

template <int kRowTiles, int kColTiles>
SEGATTN_FN float sum_of(const float (&x)[kRowTiles][kColTiles][4]) {
  float sum = 0.f;
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < kColTiles; n++) sum += (x[m][n][0] + x[m][n][1]) + (x[m][n][2] + x[m][n][3]);
  return sum;
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
    store_query_rows<typename C::T, typename C::QueryTile, C::kRowTiles>(d_q, shared_address(&shared.q), (unsigned char*)&shared, p.d_q, work, 1, warp, lane);
    return;
  }
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const QueryRow q = query_row<C::kRows>(work, first_row + m * 16 + half * 8 + lane / 4, 1);
      if (q.query >= p.problem.q.rows) continue;
      float2* out = (float2*)(p.partial_d_q + partial_row(p.problem, work.split, work.batch_index, q.head, q.query) * C::kHeadDim);
#pragma unroll
      for (int n = 0; n < C::kOutTiles; n++) out[n * 4 + lane % 4] = make_float2(d_q[m][n][half * 2], d_q[m][n][half * 2 + 1]);
    }
}

// The work tile's part of d_past_gate times gate: lanes, then warps, in order.
template <class C>
SEGATTN_FN void store_gate_sum(const SegattnBackwardParams& p, QueryGradShared<C>& shared, int warp, int lane) {
  float sum = shared.gate_sums[threadIdx.x];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  __syncthreads();
  if (lane == 0) shared.gate_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
  for (int i = 0; i < C::kWarps; i++) total += shared.gate_sums[i];
  const WorkTile& work = shared.work;
  p.partial_gate[partial_row(p.problem, work.split, work.batch_index, work.head, 0) / p.problem.q.rows * p.tiles + work.query_tile] = total;
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
    shared.work = work_tile_at<C::kRows, C::kKeys, C::kSplitKeys>(p.problem, blockIdx.x, p.tiles, 1, p.max_splits);
    for (int kv_tile = work.first_kv_tile; kv_tile < work.first_kv_tile + 2; kv_tile++) shared.tiles[kv_tile & 3] = work.keys.template tile<C::kKeys>(kv_tile);
  }
  __syncthreads();
  if (work.split >= work.splits) return;
  shared.sources.fill(p.problem, work.batch_index, work.head / (p.problem.q_heads / p.problem.kv_heads), thread);
  __syncthreads();
  shared.gate_sums[thread] = 0.f;
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
    if (tile.first + C::kKeys > work.keys.limit(tile, shared.first_query[warp])) mask_keys<C>(s, work, tile, first_row, scale, at);
    softmax_grad<C>(s, dp, shared, scale, past ? work.keys.gate_log2 : 0.f, first_row, at);
    if (past) shared.gate_sums[opaque(thread)] += sum_of(s);
    pack_operands<T>(ds, s);
    mma_rs_mn_major<T, KT, C::kRowTiles, C::kColTiles>(d_q, ds, bt_base<KT>(k, at), 0, 0);
  }
  cp_async_wait<0>();
  __syncthreads();
  store_query_grad<C>(p, d_q, shared, first_row, warp, lane);
  store_gate_sum<C>(p, shared, warp, lane);
}

// ---------------------------------------------------------------------------------------------------- d_k, d_v

// Keys are the rows of every product, so p^T and ds^T stay in registers. 4 warps; a warp holds 32 keys' d_k and d_v at
// D <= 64 (64 + 64 registers), 16 above (64 + 64 at D 128), and at D 256 half of the columns of 16 keys: two warps then
// compute the same p^T. Where a warp has 16 keys, k and v stay in registers too: shared memory, which would bound the kernel,
// is read for queries alone. 32 queries at a time then fill the registers; only ptxas for sm_90 fits them.
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
  static constexpr bool kRegisterA = kRowTiles == 1 && kHeadDim <= 128;  // k and v in registers
  static constexpr int kSubQueries = kRegisterA ? kRegisterSubQueries : 32;  // scores and d_out v^T of so many queries at a time
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlocks = 2;
  static constexpr int kColTiles = kSubQueries / 8, kOutTiles = kHeadDim / kColumnParts / 8;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  using QueryTile = Tile<T, kQueries, kHeadDim>;
};

template <class C>
struct KeyGradShared {
  typename C::KeyTile k, v;  // later d_k and d_v on their way to global memory
  typename C::QueryTile q[C::kStages], d_out[C::kStages];
  alignas(16) float lse[C::kStages][C::kQueries], delta[C::kStages][C::kQueries];
  KeyWorkTile work;
  QueryCursor query_tiles[4];  // query tile number t at t % 4: the one worked on and the next two
};

template <class C>
SEGATTN_FN void load_query_stage(const SegattnBackwardParams& p, KeyGradShared<C>& shared, int iteration, int thread) {
  using T = typename C::T;
  thread = opaque(thread);
  const KeyWorkTile& work = shared.work;
  const QueryCursor at = shared.query_tiles[iteration & 3];
  const int stage = stage_of<C::kStages>(iteration);
  if (at.head < work.end_head) {
    copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.q[stage]), Rows<const T>::of(p.problem.q, work.batch_index, at.head),
                                                        at.query, work.query_rows, thread);
    copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.d_out[stage]), Rows<const T>::of(p.d_out, work.batch_index, at.head),
                                                        at.query, work.query_rows, thread);
    const int64_t row = prepared_row(p, work.batch_index, at.head, at.query);
    constexpr int kChunks = C::kQueries / 4;
    if (thread < kChunks) cp_async_16(shared_address(&shared.lse[stage][thread * 4]), p.row_lse + row + thread * 4, 16);
    else if (thread < 2 * kChunks)
      cp_async_16(shared_address(&shared.delta[stage][(thread - kChunks) * 4]), p.row_delta + row + (thread - kChunks) * 4, 16);
  }
  cp_async_commit();
}

// Keys are masked for the queries before them, as in the query-stationary pass.
template <class C>
SEGATTN_FN void mask_queries(float (&s)[C::kRowTiles][C::kColTiles][4], int first_key, int first_query, float scale, int lane) {
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

// Scores of keys x queries to p^T (in s) and ds^T (in dp).
template <class C>
SEGATTN_FN void transposed_softmax_grad(float (&s)[C::kRowTiles][C::kColTiles][4], float (&dp)[C::kRowTiles][C::kColTiles][4],
                                     const float* s_lse, const float* s_delta, float scale, int lane) {
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

// Accumulators to rows of a tensor like k, through the block's tile; keys beyond the length become zero.
template <class C>
SEGATTN_FN void store_key_rows(const float (&x)[C::kRowTiles][C::kOutTiles][4], float factor, typename C::KeyTile& tile,
                               const SegattnTensor& tensor, const KeyWorkTile& work, int first_row, int column, int thread) {
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
        *(uint32_t*)((unsigned char*)&tile + offset + lane % 4 * 4) = pack<T>(x[m][n][half * 2] * factor, x[m][n][half * 2 + 1] * factor);
      }
  __syncthreads();
  constexpr int kRowChunks = C::kHeadDim / 8;
  const Rows<T> rows = Rows<T>::of(tensor, work.batch_index, work.kv_head);
  for (int i = thread; i < C::kKeys * kRowChunks; i += C::kThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    if (work.first + row >= tensor.rows) continue;
    const uint4 value = *(const uint4*)((unsigned char*)&tile + (KT::chunk(base, row, chunk) - base));
    *(uint4*)(rows.row(work.first + row) + chunk * 8) = work.first + row < work.len ? value : make_uint4(0, 0, 0, 0);
  }
}

// The part of a block's gradients that a thread's warp has: rows and columns from here on.
template <class C>
struct KeyWarpTile {
  SEGATTN_FN int row(int thread) { return thread / 32 / C::kColumnParts * (C::kRowTiles * 16); }
  SEGATTN_FN int column(int thread) { return thread / 32 % C::kColumnParts * (C::kOutTiles * 8); }
};

// The operands k and v of a warp, or nothing where registers do not hold them.
template <class C>
struct KeyFragments {
  static constexpr int kKBlocks = C::kRegisterA ? C::kHeadDim / 16 : 1;
  uint32_t k[C::kRowTiles][kKBlocks][4], v[C::kRowTiles][kKBlocks][4];
};

// d_k and d_v of a warp's keys += the part of kSubQueries queries, rows `sub`... of a stage.
template <class C>
SEGATTN_FN void add_queries(float (&d_k)[C::kRowTiles][C::kOutTiles][4], float (&d_v)[C::kRowTiles][C::kOutTiles][4], const KeyFragments<C>& fragments,
                            KeyGradShared<C>& shared, int iteration, int sub, float scale, int thread) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  using QT = typename C::QueryTile;
  const int stage = stage_of<C::kStages>(iteration), lane = opaque(thread & 31), first_row = KeyWarpTile<C>::row(thread), column = KeyWarpTile<C>::column(thread);
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
  const SegattnTensor &k = work.prior ? p.problem.prior_k : p.problem.k, &v = work.prior ? p.problem.prior_v : p.problem.v;
  copy_rows_async<KT, C::kThreads>(shared_address(&shared.k), Rows<const T>::of(k, work.batch_index, work.kv_head), work.first, work.len, thread);
  copy_rows_async<KT, C::kThreads>(shared_address(&shared.v), Rows<const T>::of(v, work.batch_index, work.kv_head), work.first, work.len, thread);
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
    if (thread == 0) shared.query_tiles[(iteration + 2) & 3] = shared.query_tiles[(iteration + 1) & 3].template next<C::kQueries>(p.problem, work);
#pragma unroll 1
    for (int sub = 0; sub < C::kQueries; sub += C::kSubQueries) {
      const int last_query = shared.query_tiles[iteration & 3].query + sub + C::kSubQueries - 1;
      if (!work.prior && last_query < work.first + first_row) continue;
      add_queries<C>(d_k, d_v, fragments, shared, iteration, sub, scale, thread);
    }
  }
  arrive_and_wait<0>();
  store_key_rows<C>(d_k, p.problem.scale, shared.k, work.prior ? p.d_prior_k : p.d_k, work, first_row, KeyWarpTile<C>::column(thread), thread);
  store_key_rows<C>(d_v, 1.f, shared.v, work.prior ? p.d_prior_v : p.d_v, work, first_row, KeyWarpTile<C>::column(thread), thread);
}

// ---------------------------------------------------------------------------------------------------- entry points

template <class R>
constexpr SegattnKernelInfo prepare_info() {
  return {PrepareConfig::kThreads, 0, PrepareConfig::kBlocks, R::kRows, 0, 0, (int)sizeof(SegattnBackwardParams)};
}
template <class C>
constexpr SegattnKernelInfo query_grad_info() {
  return {C::kThreads, (int)sizeof(QueryGradShared<C>), C::kBlocks, C::kRows, C::kKeys, C::kSplitKeys, (int)sizeof(SegattnBackwardParams)};
}
template <class C>
constexpr SegattnKernelInfo key_grad_info() {
  return {C::kThreads, (int)sizeof(KeyGradShared<C>), C::kBlocks, C::kKeys, C::kQueries, 0, (int)sizeof(SegattnBackwardParams)};
}

// prepare: over batch * q_heads * row_pitch rows. query_grad: a block a work tile. query_grad_sum: 4 rows a block, over batch *
// q_heads * rows, or one row a head where no tile has several work tiles.
// key_grad: a block a key tile, batch * kv_heads * (prior tiles, unless read_only_prior, + current tiles).
#define BACKWARD(name, T, kHeadDim)                                                                            \
  using QueryGrad_##name = QueryGradConfig<T, kHeadDim>;                                                       \
  using KeyGrad_##name = KeyGradConfig<T, kHeadDim>;                                                           \
  using Prepare_##name = PrepareRows<T, kHeadDim>;                                                             \
  SEGATTN_INFO(attention_prepare_##name, prepare_info<Prepare_##name>())                                       \
  SEGATTN_INFO(attention_query_grad_##name, query_grad_info<QueryGrad_##name>())                               \
  SEGATTN_INFO(attention_key_grad_##name, key_grad_info<KeyGrad_##name>())                                     \
  SEGATTN_KERNEL(attention_prepare_##name, PrepareConfig, SegattnBackwardParams) {                             \
    attention_prepare<Prepare_##name>(params);                                                                 \
  }                                                                                                            \
  SEGATTN_KERNEL(attention_query_grad_##name, QueryGrad_##name, SegattnBackwardParams) {                       \
    attention_query_grad<QueryGrad_##name>(params);                                                            \
  }                                                                                                            \
  SEGATTN_KERNEL(attention_query_grad_sum_##name, PrepareConfig, SegattnBackwardParams) {                      \
    attention_query_grad_sum<QueryGrad_##name>(params);                                                        \
  }                                                                                                            \
  SEGATTN_KERNEL(attention_key_grad_##name, KeyGrad_##name, SegattnBackwardParams) {                           \
    attention_key_grad<KeyGrad_##name>(params);                                                                \
  }

BACKWARD(bf16_d32, Bf16, 32)
BACKWARD(bf16_d64, Bf16, 64)
BACKWARD(bf16_d96, Bf16, 96)
BACKWARD(bf16_d128, Bf16, 128)
BACKWARD(bf16_d256, Bf16, 256)
BACKWARD(f16_d32, F16, 32)
BACKWARD(f16_d64, F16, 64)
BACKWARD(f16_d96, F16, 96)
BACKWARD(f16_d128, F16, 128)
BACKWARD(f16_d256, F16, 256)

SEGATTN_LAYOUT(attention_backward)
