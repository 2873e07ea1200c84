// Segment attention, backward, in three steps, each written once and in a fixed order:
//   prepare:  delta = d_out . out - d_lse, lse in base 2
//   d_q:      query-stationary, over past, prior and current keys: ds = p (d_out v^T - delta), d_q = scale ds k,
//             and d_past_gate = (sum over past keys of ds) / gate
//   d_kv:     key-stationary, over prior and current keys: d_k = scale ds^T q, d_v = p^T d_out, summed over the query
//             heads of the group
// All gradients are set (=), padding rows to 0. Past keys get none. No atomics on floats; the d_q of a tile
// with several items is the sum of their parts, in order (docs/kernels.md).
#include "attention_items.cuh"
#include "layout.cuh"
#include "pipeline.cuh"
#include "softmax.cuh"

// ---------------------------------------------------------------------------------------------------- prepare

struct PrepareConfig {
  static constexpr int kThreads = 128, kBlocks = 8;
};

// One warp a row, padding up to row_pitch included.
template <class T, int kHeadDim>
SEGATTN_FN void attention_prepare(const SegattnBackwardParams& p) {
  const int lane = threadIdx.x & 31;
  const int64_t index = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
  if (index >= (int64_t)p.problem.batch * p.problem.q_heads * p.row_pitch) return;
  const int query = (int)(index % p.row_pitch);
  const int head = (int)(index / p.row_pitch % p.problem.q_heads), entry = (int)(index / p.row_pitch / p.problem.q_heads);
  const bool valid = query < min(p.problem.segment_len[entry], (int)p.problem.q.rows);
  float delta = 0.f, lse = INFINITY;
  if (valid) {
    const uint16_t* out = (const uint16_t*)Rows<const T>::of(p.out, entry, head).row(query);
    const uint16_t* d_out = (const uint16_t*)Rows<const T>::of(p.d_out, entry, head).row(query);
#pragma unroll
    for (int i = lane; i < kHeadDim; i += 32) delta = fma_rn(widen(out[i], T{}), widen(d_out[i], T{}), delta);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
    const int64_t row = ((int64_t)entry * p.problem.q_heads + head) * p.problem.q.rows + query;
    if (p.d_lse) delta -= p.d_lse[row];
    lse = p.lse[row] * kLog2E;
  }
  if (lane == 0) {
    p.row_delta[index] = delta;
    p.row_lse[index] = lse;
  }
}

SEGATTN_FN int64_t prepared_row(const SegattnBackwardParams& p, int entry, int head, int query) {
  return ((int64_t)entry * p.problem.q_heads + head) * p.row_pitch + query;
}

// The factor of the exponent's argument with its sign; here nothing depends on the sign.
SEGATTN_FN float signed_scale_log2(float scale) { return mul_rn(scale, kLog2E); }

// ---------------------------------------------------------------------------------------------------- products

// x += a b^T for 16-row tiles of a [rows][head_dim] tile and kCols rows of another, over all of head_dim.
template <class T, class TileA, class TileB, int kRowTiles, int kColTiles>
SEGATTN_FN void multiply_rows(float (&x)[kRowTiles][kColTiles][4], SharedAddress a_tile_base, int a_row, SharedAddress b_tile_base, int b_row) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < kColTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[m][n][e] = 0.f;
#pragma unroll 4
  for (int k = 0; k < TileA::kCols; k += 16) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) load_a<TileA>(a[m], a_tile_base, a_row + m * 16, k);
#pragma unroll
    for (int n = 0; n < kColTiles; n += 2) {
      uint32_t b[4];
      load_b<TileB>(b, b_tile_base, b_row + n * 8, k);
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        mma_16x8x16(x[m][n], a[m], b[0], b[1], T{});
        mma_16x8x16(x[m][n + 1], a[m], b[2], b[3], T{});
      }
    }
  }
}

// out += w b: weights in registers against rows b_row... of a [k][n] tile, columns [column, column + 8 * kOutTiles).
template <class T, class TileB, int kRowTiles, int kColTiles, int kOutTiles>
SEGATTN_FN void accumulate(float (&out)[kRowTiles][kOutTiles][4], const uint32_t (&w)[kRowTiles][kColTiles / 2][4],
                           SharedAddress bt_tile_base, int b_row, int column) {
#pragma unroll
  for (int k = 0; k < kColTiles / 2; k++)
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      uint32_t b[4];
      load_bt<TileB>(b, bt_tile_base, b_row + k * 16, column + n * 8);
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        mma_16x8x16(out[m][n], w[m][k], b[0], b[1], T{});
        mma_16x8x16(out[m][n + 1], w[m][k], b[2], b[3], T{});
      }
    }
}

// Accumulators as operands of the next product: the layouts agree.
template <class T, int kRowTiles, int kColTiles>
SEGATTN_FN void pack_weights(uint32_t (&w)[kRowTiles][kColTiles / 2][4], const float (&x)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < kColTiles; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) w[m][n / 2][n % 2 * 2 + half] = pack<T>(x[m][n][half * 2], x[m][n][half * 2 + 1]);
}

template <int kRowTiles, int kColTiles>
SEGATTN_FN void clear(float (&x)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < kColTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[m][n][e] = 0.f;
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
  static constexpr int kKeys = 32;
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlocks = kHeadDim == 256 ? 3 : 2;
  static constexpr int kItemKeys = kChunkKeys * kSectionChunks;
  static constexpr int kColTiles = kKeys / 8, kOutTiles = kHeadDim / 8;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
};

template <class C>
struct QueryGradShared {
  typename C::QueryTile q;  // later d_q on its way to global memory
  typename C::QueryTile d_out;
  typename C::KeyTile k[C::kStages], v[C::kStages];
  SourceRows<typename C::T> sources;
  Item item;
  float gate_sums[C::kWarps];
};

template <class C>
SEGATTN_FN void load_key_stage(QueryGradShared<C>& shared, const Item& item, int step, int thread) {
  if (step < item.end_step) {
    const KeyTile tile = item.keys.tile<C::kKeys>(step);
    const int stage = Ring<C::kStages>::stage(step - item.first_step);
    copy_rows_async<typename C::KeyTile, C::kThreads>(shared_address(&shared.k[stage]), shared.sources.k[tile.source], tile.first, tile.end, thread);
    copy_rows_async<typename C::KeyTile, C::kThreads>(shared_address(&shared.v[stage]), shared.sources.v[tile.source], tile.first, tile.end, thread);
  }
  cp_async_commit();
}

// s becomes ds = p (dp - delta), in the place of dp; the sum of ds is added to `total`.
template <class C>
SEGATTN_FN void score_gradients(float (&s)[C::kRowTiles][C::kColTiles][4], const float (&dp)[C::kRowTiles][C::kColTiles][4],
                                const SegattnBackwardParams& p, const Item& item, const KeyTile& tile, int first_row, int lane,
                                float& total) {
  const float scale = signed_scale_log2(p.problem.scale), bias = tile.source == kPast ? item.keys.gate_log2 : 0.f;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const QueryRow row = query_row<C::kRows>(item, first_row + m * 16 + half * 8 + lane / 4, 1);
      const int64_t prepared = prepared_row(p, item.entry, item.head, row.query);
      const float offset = bias - p.row_lse[prepared], delta = p.row_delta[prepared];
      const int limit = item.keys.limit(tile, row.position) - tile.first - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[m][n][half * 2 + e];
          const float weight = n * 8 + e < limit ? exp2_approx(fma_rn(x, scale, offset)) : 0.f;
          x = weight * (dp[m][n][half * 2 + e] - delta);
          total += x;
        }
    }
}

template <class C>
SEGATTN_FN void store_query_grad(const SegattnBackwardParams& p, float (&d_q)[C::kRowTiles][C::kOutTiles][4],
                                 QueryGradShared<C>& shared, int first_row, int warp, int lane) {
  const Item& item = shared.item;
  if (item.splits == 1) {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
      for (int n = 0; n < C::kOutTiles; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) d_q[m][n][e] *= p.problem.scale;
    store_query_rows<typename C::T, typename C::QueryTile, C::kRowTiles>(d_q, shared_address(&shared.q), (unsigned char*)&shared, p.d_q, item, 1, warp, lane);
    return;
  }
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const QueryRow q = query_row<C::kRows>(item, first_row + m * 16 + half * 8 + lane / 4, 1);
      if (q.query >= p.problem.q.rows) continue;
      float2* out = (float2*)(p.partial_d_q + partial_row(p.problem, item.split, item.entry, q.head, q.query) * C::kHeadDim);
#pragma unroll
      for (int n = 0; n < C::kOutTiles; n++) out[n * 4 + lane % 4] = make_float2(d_q[m][n][half * 2], d_q[m][n][half * 2 + 1]);
    }
}

// The item's part of d_past_gate times gate: lanes, then warps, in order.
template <class C>
SEGATTN_FN void store_gate_sum(const SegattnBackwardParams& p, float sum, QueryGradShared<C>& shared, int warp, int lane) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) shared.gate_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
  for (int i = 0; i < C::kWarps; i++) total += shared.gate_sums[i];
  const Item& item = shared.item;
  p.partial_gate[partial_row(p.problem, item.split, item.entry, item.head, 0) / p.problem.q.rows * p.tiles + item.tile] = total;
}

template <class C>
SEGATTN_FN void attention_query_grad(const SegattnBackwardParams& p) {
  using T = typename C::T;
  QueryGradShared<C>& shared = *(QueryGradShared<C>*)shared_memory();
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, first_row = warp * C::kRowTiles * 16;
  if (thread == 0) shared.item = item_at<C::kRows, C::kKeys, C::kItemKeys>(p.problem, blockIdx.x, p.tiles, 1, p.max_items);
  __syncthreads();
  const Item& item = shared.item;
  if (item.split >= item.splits) return;
  shared.sources.fill(p.problem, item.entry, item.head / (p.problem.q_heads / p.problem.kv_heads), thread);
  __syncthreads();
  copy_query_rows_async<typename C::QueryTile, C::kThreads, T>(shared_address(&shared.q), p.problem.q, item, 1, thread);
  copy_query_rows_async<typename C::QueryTile, C::kThreads, T>(shared_address(&shared.d_out), p.d_out, item, 1, thread);
  load_key_stage(shared, item, item.first_step, thread);

  float d_q[C::kRowTiles][C::kOutTiles][4], gate_sum = 0.f;
  clear(d_q);
  const int last_query = min(item.tile * C::kRows + first_row + C::kRowTiles * 16, item.query_rows) - 1;
  for (int step = item.first_step; step < item.end_step; step++) {
    const KeyTile tile = item.keys.tile<C::kKeys>(step);
    const int stage = Ring<C::kStages>::stage(step - item.first_step);
    arrive_and_wait<0>();
    load_key_stage(shared, item, step + 1, thread);
    if (last_query < item.tile * C::kRows + first_row || tile.first >= item.keys.limit(tile, last_query)) continue;
    float s[C::kRowTiles][C::kColTiles][4], dp[C::kRowTiles][C::kColTiles][4];
    uint32_t ds[C::kRowTiles][C::kColTiles / 2][4];
    const SharedAddress k = shared_address(&shared.k[stage]), v = shared_address(&shared.v[stage]);
    using QT = typename C::QueryTile;
    using KT = typename C::KeyTile;
    multiply_rows<T, QT, KT>(s, a_base<QT>(shared_address(&shared.q), lane), first_row, b_base<KT>(k, lane), 0);
    multiply_rows<T, QT, KT>(dp, a_base<QT>(shared_address(&shared.d_out), lane), first_row, b_base<KT>(v, lane), 0);
    float sum = 0.f;
    score_gradients<C>(s, dp, p, item, tile, first_row, lane, sum);
    if (tile.source == kPast) gate_sum += sum;
    pack_weights<T>(ds, s);
    accumulate<T, KT, C::kRowTiles, C::kColTiles>(d_q, ds, bt_base<KT>(k, lane), 0, 0);
  }
  cp_async_wait<0>();
  __syncthreads();
  store_query_grad<C>(p, d_q, shared, first_row, warp, lane);
  store_gate_sum<C>(p, gate_sum, shared, warp, lane);
}

// ---------------------------------------------------------------------------------------------------- d_q's parts

// One warp a row: adds up the parts of d_q where there are several. The warp of a head's first row
// also adds up the head's gate sums.
template <class C>
SEGATTN_FN void attention_query_grad_sum(const SegattnBackwardParams& p) {
  using T = typename C::T;
  const int lane = threadIdx.x & 31, rows = (int)p.problem.q.rows;
  const int64_t index = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
  if (index >= (int64_t)p.problem.batch * p.problem.q_heads * rows) return;
  const int query = (int)(index % rows), head = (int)(index / rows % p.problem.q_heads), entry = (int)(index / rows / p.problem.q_heads);
  const KeyList keys = KeyList::of(p.problem, entry, head);
  const int query_rows = keys.query_rows(rows);
  constexpr int kItemSteps = C::kItemKeys / C::kKeys;
  const int splits = ceil_div(tile_steps<C::kRows, C::kKeys>(keys, query / C::kRows, 1, query_rows), kItemSteps);
  if (splits > 1) {
    uint16_t* out = (uint16_t*)Rows<T>::of(p.d_q, entry, head).row(query);
#pragma unroll
    for (int i = lane; i < C::kHeadDim; i += 32) {
      float sum = 0.f;
      for (int split = 0; split < splits; split++) sum += p.partial_d_q[partial_row(p.problem, split, entry, head, query) * C::kHeadDim + i];
      out[i] = (uint16_t)pack<T>(query < query_rows ? sum * p.problem.scale : 0.f, 0.f);
    }
  }
  if (query != 0 || lane != 0) return;
  float sum = 0.f;
  const float gate = p.problem.past_gate[head];
  for (int tile = 0; gate > 0.f && tile < p.tiles; tile++) {
    const int parts = max(1, ceil_div(tile_steps<C::kRows, C::kKeys>(keys, tile, 1, query_rows), kItemSteps));
    for (int split = 0; split < parts; split++)
      sum += p.partial_gate[(((int64_t)split * p.problem.batch + entry) * p.problem.q_heads + head) * p.tiles + tile];
  }
  p.d_past_gate[(int64_t)entry * p.problem.q_heads + head] = gate > 0.f ? sum / gate : 0.f;
}

// ---------------------------------------------------------------------------------------------------- d_k, d_v

// Keys are the rows of every product, so p^T and ds^T stay in registers. 4 warps; a warp holds 32 keys' d_k and d_v at
// D <= 64 (64 + 64 registers), 16 above (64 + 64 at D 128), and at D 256 half of the columns of 16 keys: two warps then
// compute the same p^T.
template <class T_, int kHeadDim_>
struct KeyGradConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kColumnParts = kHeadDim == 256 ? 2 : 1;
  static constexpr int kKeys = kWarps / kColumnParts * kRowTiles * 16;
  static constexpr int kQueries = kHeadDim == 256 ? 32 : 64;
  static constexpr int kSubQueries = 32;  // scores and d_out v^T of 32 queries at a time
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlocks = 2;
  static constexpr int kColTiles = kSubQueries / 8, kOutTiles = kHeadDim / kColumnParts / 8;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  using QueryTile = Tile<T, kQueries, kHeadDim>;
};

// A block's keys and the queries that see them: heads of the group that read the source, each from first_query on.
struct KeyItem {
  int entry, kv_head, first;  // first key row
  int len;                    // valid keys of the source
  int query_rows, first_query;
  bool prior;
};

template <class C>
struct KeyGradShared {
  typename C::KeyTile k, v;  // later d_k and d_v on their way to global memory
  typename C::QueryTile q[C::kStages], d_out[C::kStages];
  float lse[C::kStages][C::kQueries], delta[C::kStages][C::kQueries];
  KeyItem item;
};

template <class C>
SEGATTN_FN KeyItem key_item(const SegattnBackwardParams& p) {
  const int prior_tiles = p.d_prior_k.data ? ceil_div((int)p.d_prior_k.rows, C::kKeys) : 0;
  const int tiles = prior_tiles + ceil_div((int)p.d_k.rows, C::kKeys);
  KeyItem item;
  const int tile = blockIdx.x % tiles, rest = blockIdx.x / tiles;
  item.kv_head = rest % p.problem.kv_heads;
  item.entry = rest / p.problem.kv_heads;
  item.prior = tile < prior_tiles;
  item.first = (item.prior ? tile : tile - prior_tiles) * C::kKeys;
  const int segment_len = p.problem.segment_len[item.entry];
  item.len = item.prior ? p.problem.prior_len[item.entry] : segment_len;
  item.query_rows = item.first < item.len ? min(segment_len, (int)p.problem.q.rows) : 0;
  item.first_query = item.prior ? 0 : item.first / C::kQueries * C::kQueries;
  return item;
}

// Where the loop over heads and query tiles stands.
struct QueryCursor {
  int head, query;

  // Moves to the first head at or after `head` that reads the source; one past the group where there is none.
  __device__ __forceinline__ void skip(const SegattnProblem& p, const KeyItem& item) {
    const int end = (item.kv_head + 1) * (p.q_heads / p.kv_heads);
    if (item.first_query >= item.query_rows) head = end;
    while (head < end && item.prior && !p.prior_heads[head]) head++;
  }
  __device__ __forceinline__ bool done(const SegattnProblem& p, const KeyItem& item) const {
    return head >= (item.kv_head + 1) * (p.q_heads / p.kv_heads);
  }
  template <int kQueries>
  __device__ __forceinline__ void advance(const SegattnProblem& p, const KeyItem& item) {
    query += kQueries;
    if (query < item.query_rows) return;
    query = item.first_query;
    head++;
    skip(p, item);
  }
};

template <class C>
SEGATTN_FN void load_query_stage(const SegattnBackwardParams& p, KeyGradShared<C>& shared, const KeyItem& item, const QueryCursor& at,
                                 int stage, int thread) {
  using T = typename C::T;
  if (!at.done(p.problem, item)) {
    copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.q[stage]), Rows<const T>::of(p.problem.q, item.entry, at.head),
                                                        at.query, item.query_rows, thread);
    copy_rows_async<typename C::QueryTile, C::kThreads>(shared_address(&shared.d_out[stage]), Rows<const T>::of(p.d_out, item.entry, at.head),
                                                        at.query, item.query_rows, thread);
    const int64_t row = prepared_row(p, item.entry, at.head, at.query);
    constexpr int kChunks = C::kQueries / 4;
    if (thread < kChunks) cp_async_16(shared_address(&shared.lse[stage][thread * 4]), p.row_lse + row + thread * 4, 16);
    else if (thread < 2 * kChunks)
      cp_async_16(shared_address(&shared.delta[stage][(thread - kChunks) * 4]), p.row_delta + row + (thread - kChunks) * 4, 16);
  }
  cp_async_commit();
}

// Scores of keys x queries to p^T (in s) and ds^T (in dp). A key is masked from the queries before it.
template <class C>
SEGATTN_FN void transposed_gradients(float (&s)[C::kRowTiles][C::kColTiles][4], float (&dp)[C::kRowTiles][C::kColTiles][4],
                                     const KeyItem& item, const float* s_lse, const float* s_delta, int first_key, int first_query,
                                     float scale, int lane) {
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = n * 8 + lane % 4 * 2 + e;
      const float lse = s_lse[column], delta = s_delta[column];
#pragma unroll
      for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int key = first_key + m * 16 + half * 8 + lane / 4;
          float &x = s[m][n][half * 2 + e], &d = dp[m][n][half * 2 + e];
          const bool sees = item.prior || key <= first_query + column;
          x = sees ? exp2_approx(fma_rn(x, scale, -lse)) : 0.f;
          d = x * (d - delta);
        }
    }
}

// Accumulators to rows of a tensor like k, through the block's tile; keys beyond the length become zero.
template <class C>
SEGATTN_FN void store_key_rows(const float (&x)[C::kRowTiles][C::kOutTiles][4], float factor, typename C::KeyTile& tile,
                               const SegattnTensor& tensor, const KeyItem& item, int first_row, int column, int thread) {
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
  const Rows<T> rows = Rows<T>::of(tensor, item.entry, item.kv_head);
  for (int i = thread; i < C::kKeys * kRowChunks; i += C::kThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    if (item.first + row >= tensor.rows) continue;
    const uint4 value = *(const uint4*)((unsigned char*)&tile + (KT::chunk(base, row, chunk) - base));
    *(uint4*)(rows.row(item.first + row) + chunk * 8) = item.first + row < item.len ? value : make_uint4(0, 0, 0, 0);
  }
}

template <class C>
SEGATTN_FN void attention_key_grad(const SegattnBackwardParams& p) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  using QT = typename C::QueryTile;
  KeyGradShared<C>& shared = *(KeyGradShared<C>*)shared_memory();
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int first_row = warp / C::kColumnParts * C::kRowTiles * 16, column = warp % C::kColumnParts * (C::kOutTiles * 8);
  if (thread == 0) shared.item = key_item<C>(p);
  __syncthreads();
  const KeyItem& item = shared.item;
  const SegattnTensor &k = item.prior ? p.problem.prior_k : p.problem.k, &v = item.prior ? p.problem.prior_v : p.problem.v;
  copy_rows_async<KT, C::kThreads>(shared_address(&shared.k), Rows<const T>::of(k, item.entry, item.kv_head), item.first, item.len, thread);
  copy_rows_async<KT, C::kThreads>(shared_address(&shared.v), Rows<const T>::of(v, item.entry, item.kv_head), item.first, item.len, thread);
  QueryCursor at = {item.kv_head * (p.problem.q_heads / p.problem.kv_heads), item.first_query};
  at.skip(p.problem, item);
  load_query_stage<C>(p, shared, item, at, 0, thread);

  float d_k[C::kRowTiles][C::kOutTiles][4], d_v[C::kRowTiles][C::kOutTiles][4];
  clear(d_k);
  clear(d_v);
  const float scale = signed_scale_log2(p.problem.scale);
  for (int step = 0; !at.done(p.problem, item); step++) {
    const int stage = Ring<C::kStages>::stage(step), query = at.query;
    arrive_and_wait<0>();
    at.template advance<C::kQueries>(p.problem, item);
    load_query_stage<C>(p, shared, item, at, Ring<C::kStages>::stage(step + 1), thread);
    const SharedAddress s_q = shared_address(&shared.q[stage]), s_d_out = shared_address(&shared.d_out[stage]);
#pragma unroll 1
    for (int sub = 0; sub < C::kQueries; sub += C::kSubQueries) {
      if (!item.prior && query + sub + C::kSubQueries <= item.first + first_row) continue;
      float s[C::kRowTiles][C::kColTiles][4], dp[C::kRowTiles][C::kColTiles][4];
      uint32_t weights[C::kRowTiles][C::kColTiles / 2][4];
      multiply_rows<T, KT, QT>(s, a_base<KT>(shared_address(&shared.k), lane), first_row, b_base<QT>(s_q, lane), sub);
      multiply_rows<T, KT, QT>(dp, a_base<KT>(shared_address(&shared.v), lane), first_row, b_base<QT>(s_d_out, lane), sub);
      transposed_gradients<C>(s, dp, item, shared.lse[stage] + sub, shared.delta[stage] + sub, item.first + first_row, query + sub, scale, lane);
      pack_weights<T>(weights, s);
      accumulate<T, QT, C::kRowTiles, C::kColTiles>(d_v, weights, bt_base<QT>(s_d_out, lane), sub, column);
      pack_weights<T>(weights, dp);
      accumulate<T, QT, C::kRowTiles, C::kColTiles>(d_k, weights, bt_base<QT>(s_q, lane), sub, column);
    }
  }
  arrive_and_wait<0>();
  store_key_rows<C>(d_k, p.problem.scale, shared.k, item.prior ? p.d_prior_k : p.d_k, item, first_row, column, thread);
  store_key_rows<C>(d_v, 1.f, shared.v, item.prior ? p.d_prior_v : p.d_v, item, first_row, column, thread);
}

// ---------------------------------------------------------------------------------------------------- entry points

template <class C>
constexpr SegattnKernelInfo query_grad_info() {
  return {C::kThreads, (int)sizeof(QueryGradShared<C>), C::kBlocks, C::kRows, C::kKeys, C::kItemKeys, (int)sizeof(SegattnBackwardParams)};
}
template <class C>
constexpr SegattnKernelInfo key_grad_info() {
  return {C::kThreads, (int)sizeof(KeyGradShared<C>), C::kBlocks, C::kKeys, C::kQueries, 0, (int)sizeof(SegattnBackwardParams)};
}

// prepare and query_grad_sum: 4 rows a block, over batch * q_heads * row_pitch and * rows. query_grad: a block an item.
// key_grad: a block a key tile, batch * kv_heads * (prior tiles, unless read_only_prior, + current tiles).
#define BACKWARD(name, T, kHeadDim)                                                                            \
  using QueryGrad_##name = QueryGradConfig<T, kHeadDim>;                                                       \
  using KeyGrad_##name = KeyGradConfig<T, kHeadDim>;                                                           \
  SEGATTN_INFO(attention_query_grad_##name, query_grad_info<QueryGrad_##name>())                               \
  SEGATTN_INFO(attention_key_grad_##name, key_grad_info<KeyGrad_##name>())                                     \
  SEGATTN_KERNEL(attention_prepare_##name, PrepareConfig, SegattnBackwardParams) {                             \
    attention_prepare<T, kHeadDim>(params);                                                                    \
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
