// Segment attention for at most a few query rows per head: the result of attention_forward.cu, to the bit.
//
// PackGQA: the query heads of a group share a tile of 16 rows. Every chunk of keys is a KV split and a block of its
// own, so that one token's keys are spread over the device; the combine kernel merges the splits. One warp alone
// would be bound by its own latency, so four warps share each key tile: a warp computes S and P of a quarter of the
// keys, and a quarter of O's columns. Maxima, P and the terms of the row sums are exchanged in shared memory. Every
// accumulator and every sum sees the same operands as in prefill, in the same order.
#include "attention_rows.cuh"
#include "layout.cuh"
#include "pipeline.cuh"
#include "products.cuh"

// kStages: tiles of K or V in flight or in use.
template <class T_, int kHeadDim_>
struct DecodeConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kPackGqa = true;
  static constexpr int kWarps = 4, kThreads = kWarps * 32, kConsumerThreads = kThreads;
  static constexpr int kRowTiles = 1, kRows = 16;
  static constexpr int kKeys = tile_keys(kHeadDim);
  static constexpr int kSplitKeys = kChunkKeys, kSplitTiles = kSplitKeys / kKeys;
  static constexpr int kStages = kHeadDim <= 32 ? 8 : kHeadDim <= 96 ? 5 : 4;
  static constexpr int kBlocks = kHeadDim <= 64 ? 4 : kHeadDim <= 128 ? 3 : 2;
  // Columns in tiles of 8: of S, of S that a warp computes, of O that a warp computes.
  static constexpr int kColTiles = kKeys / 8, kOwnColTiles = kColTiles / kWarps, kOutTiles = kHeadDim / 8 / kWarps;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
};

template <class C>
struct DecodeShared {
  typename C::QueryTile q;
  typename C::KeyTile kv[C::kStages];
  // Of the current key tile: each warp's highest score of a row; P as A of the next product, two words for each 8
  // columns; and P in f32, in the layout of accumulators, for the row sums.
  float warp_max[C::kRows][C::kWarps];
  uint2 probs[C::kColTiles / 2][32][2];
  float4 probs_f32[C::kColTiles][32];
  SourceRows<typename C::T> sources;
  KeyTile tiles[C::kSplitTiles];  // the key tiles of the work tile
};

// The ring of K and V tiles: iteration 2 t is K of key tile t, iteration 2 t + 1 is V. Each iteration commits a group
// of copies, empty or not.
template <class C>
struct KeyRing {
  DecodeShared<C>& shared;
  int tiles, thread;

  __device__ __forceinline__ void load(int iteration) {
    if (iteration / 2 < tiles) {
      const KeyTile& tile = shared.tiles[iteration / 2];
      const Rows<const typename C::T> rows =
          iteration % 2 == 0 ? shared.sources.k[tile.source] : shared.sources.v[tile.source];
      copy_rows_async<typename C::KeyTile, C::kThreads>(stage(iteration), rows, tile.first, tile.end, opaque(thread));
    }
    cp_async_commit();
  }
  __device__ __forceinline__ SharedAddress stage(int iteration) const {
    return shared_address(&shared.kv[iteration % C::kStages]);
  }
};

// Issues the copies of the tile's queries. Rows without a query become zero.
template <class C>
SEGATTN_FN void load_queries(DecodeShared<C>& shared, const SegattnTensor& q, const WorkTile& work, int packed_heads,
                             int thread) {
  constexpr int kRowChunks = C::kHeadDim / 8;
#pragma unroll 1
  for (int i = thread; i < C::kRows * kRowChunks; i += C::kThreads) {
    const int row = i / kRowChunks, column = i % kRowChunks;
    const QueryRow at = query_row<C::kRows>(work, row, packed_heads);
    const bool valid = at.position >= 0;
    const Rows<const typename C::T> rows =
        Rows<const typename C::T>::of(q, work.batch_index, valid ? at.head : work.head);
    cp_async_16(C::QueryTile::chunk(shared_address(&shared.q), row, column),
                rows.row(valid ? at.query : 0) + column * 8, valid ? 16 : 0);
  }
}

// S of the warp's keys.
template <class C>
SEGATTN_FN void score_keys(float (&s)[C::kOwnColTiles][4], const uint32_t (&q)[1][C::kHeadDim / 16][4], SharedAddress k,
                           int warp, int lane) {
  constexpr int kPairs = C::kHeadDim / 32;
  uint32_t b[C::kOwnColTiles][kPairs][4];
#pragma unroll
  for (int i = 0; i < kPairs; i++)
#pragma unroll
    for (int n = 0; n < C::kOwnColTiles; n++)
      load_b_pair<typename C::KeyTile>(b[n][i], k, (warp * C::kOwnColTiles + n) * 8, i * 32, lane);
#pragma unroll
  for (int n = 0; n < C::kOwnColTiles; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
  for (int i = 0; i < kPairs * 2; i++)
#pragma unroll
    for (int n = 0; n < C::kOwnColTiles; n++)
      mma_16x8x16(s[n], q[0][i], b[n][i / 2][i % 2 * 2], b[n][i / 2][i % 2 * 2 + 1], typename C::T{});
}

// Stores the warp's highest score of each row for the other warps.
template <class C>
SEGATTN_FN void share_warp_max(float (&warp_max)[C::kRows][C::kWarps], const float (&s)[C::kOwnColTiles][4], int warp,
                               int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float own_max = s[0][half * 2];
#pragma unroll
    for (int n = 0; n < C::kOwnColTiles; n++) own_max = max_f32(own_max, max_f32(s[n][half * 2], s[n][half * 2 + 1]));
    own_max = quad_max(own_max);
    if (lane % 4 == 0) warp_max[half * 8 + lane / 4][warp] = own_max;
  }
}

// Softmax of the warp's keys, from the maxima of all warps; stores P for the other warps.
template <class C>
SEGATTN_FN void softmax_keys(float (&factor)[2], float (&max)[2], DecodeShared<C>& shared,
                             const float (&s)[C::kOwnColTiles][4], const float (&bias)[2], float scale, int warp,
                             int lane) {
  RowUpdate update[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float4 maxima = *(const float4*)shared.warp_max[half * 8 + lane / 4];
    const float tile_max = max_f32(max_f32(maxima.x, maxima.y), max_f32(maxima.z, maxima.w));
    update[half] = update_row(max[half], tile_max, scale, bias[half]);
    max[half] = update[half].max;
    factor[half] = update[half].factor;
  }
#pragma unroll
  for (int i = 0; i < C::kOwnColTiles; i++) {
    const int n = warp * C::kOwnColTiles + i;
    float w[4];
#pragma unroll
    for (int e = 0; e < 4; e++) w[e] = probability(s[i][e], scale, update[e / 2]);
    shared.probs[n / 2][lane][n % 2] = make_uint2(pack<typename C::T>(w[0], w[1]), pack<typename C::T>(w[2], w[3]));
    shared.probs_f32[n][lane] = make_float4(w[0], w[1], w[2], w[3]);
  }
}

// Adds the tile's terms to the row sums of one half, by one warp, in the order of softmax_row.
template <class C>
SEGATTN_FN void sum_row(float& sum, const float4 (&probs_f32)[C::kColTiles][32], float factor, int half, int lane) {
  float even = 0.f, odd = 0.f;
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++) {
    const float2 two = ((const float2*)&probs_f32[n][lane])[half];
    even += two.x;
    odd += two.y;
  }
  sum = fma_rn(sum, factor, even + odd);
}

// O += P V for the warp's columns.
template <class C>
SEGATTN_FN void accumulate_pv(float (&out)[C::kOutTiles][4], const uint2 (&probs)[C::kColTiles / 2][32][2],
                              const float (&factor)[2], SharedAddress v, int warp, int lane) {
  constexpr int kPairs = C::kKeys / 32;
  uint32_t b[C::kOutTiles][kPairs][4], w[C::kColTiles / 2][4];
#pragma unroll
  for (int i = 0; i < kPairs; i++)
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++)
      load_bt_pair<typename C::KeyTile>(b[n][i], v, i * 32, (warp * C::kOutTiles + n) * 8, lane);
#pragma unroll
  for (int k = 0; k < C::kColTiles / 2; k++) {
    const uint4 four = *(const uint4*)probs[k][lane];
    w[k][0] = four.x, w[k][1] = four.y, w[k][2] = four.z, w[k][3] = four.w;
  }
  rescale(out, factor);
#pragma unroll
  for (int k = 0; k < C::kColTiles / 2; k++)
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++)
      mma_16x8x16(out[n], w[k], b[n][k / 2][k % 2 * 2], b[n][k / 2][k % 2 * 2 + 1], typename C::T{});
}

// Stores the warp's columns of the rows of one half: of the final or of a partial result.
template <class C>
SEGATTN_FN void store_columns(const SegattnForwardParams& p, const WorkTile& work, const QueryRow& q,
                              const float (&out)[C::kOutTiles][4], float sum, int half, int warp, int lane) {
  if (q.query >= p.problem.q.rows) return;
  const int column = warp * C::kOutTiles * 8 + lane % 4 * 2;
  if (work.splits > 1) {
    float* g_out =
        p.partial_out + partial_row(p.problem, work.split, work.batch_index, q.head, q.query) * C::kHeadDim + column;
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++)
      *(float2*)(g_out + n * 8) = make_float2(out[n][half * 2], out[n][half * 2 + 1]);
    return;
  }
  typename C::T* g_out = Rows<typename C::T>::of(p.out, work.batch_index, q.head).row(q.query) + column;
  const float inverse = row_inverse(sum);
#pragma unroll
  for (int n = 0; n < C::kOutTiles; n++) {
    const uint32_t two =
        pack<typename C::T>(finish_value(out[n][half * 2], inverse), finish_value(out[n][half * 2 + 1], inverse));
    *(uint32_t*)(g_out + n * 8) = q.position >= 0 ? two : 0;
  }
}

// Stores lse of the rows of one half, or the state of a partial result.
SEGATTN_FN void store_state(const SegattnForwardParams& p, const WorkTile& work, const QueryRow& q, const RowState& row,
                            int lane) {
  if (q.query >= p.problem.q.rows || lane % 4 != 0) return;
  if (work.splits > 1)
    ((float2*)p.partial_state)[partial_row(p.problem, work.split, work.batch_index, q.head, q.query)] =
        make_float2(row.max, row.sum);
  else
    p.lse[partial_row(p.problem, 0, work.batch_index, q.head, q.query)] =
        q.position >= 0 ? row_lse(row) : SEGATTN_NEG_INF;
}

// The block's work tile. All first splits come first: they are full.
template <class C>
SEGATTN_FN WorkTile block_work_tile(const SegattnForwardParams& p) {
  const uint32_t heads = (uint32_t)p.problem.q_heads / p.packed_heads, batch = p.problem.batch, tiles = p.tiles;
  WorkTile work;
  uint32_t index = blockIdx.x;
  work.query_tile = index % tiles, index /= tiles;
  work.head = index % heads * p.packed_heads, index /= heads;
  work.batch_index = index % batch, work.split = index / batch;
  locate_split<C::kRows, C::kKeys, C::kSplitKeys>(work, p.problem, p.packed_heads);
  return work;
}

template <class C>
SEGATTN_FN void attention_decode(const SegattnForwardParams& p) {
  DecodeShared<C>& shared = *(DecodeShared<C>*)shared_memory();
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, packed_heads = p.packed_heads;
  griddep_launch_dependents();
  const WorkTile work = block_work_tile<C>(p);
  if (work.split >= work.splits) return;
  if (thread < C::kSplitTiles) shared.tiles[thread] = work.keys.template tile<C::kKeys>(work.first_kv_tile + thread);
  shared.sources.fill(p.problem, work.batch_index, work.head / (p.problem.q_heads / p.problem.kv_heads), thread - 32);
  load_queries<C>(shared, p.problem.q, work, packed_heads, thread);
  // The rows of a tile belong to several heads, whose gates differ.
  const QueryRow rows[2] = {query_row<C::kRows>(work, lane / 4, packed_heads),
                            query_row<C::kRows>(work, lane / 4 + 8, packed_heads)};
  const int position[2] = {rows[0].position, rows[1].position};
  float gate_bias[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float gate = p.problem.past_gate[rows[half].head];
    gate_bias[half] = gate > 0.f ? log2_approx(gate) : 0.f;
  }
  const float scale = scale_log2(p.problem.scale);
  __syncthreads();
  KeyRing<C> ring = {shared, work.end_kv_tile - work.first_kv_tile, thread};
  // All iterations but the one needed next may be in flight.
  constexpr int kInFlight = C::kStages - 2;
#pragma unroll 1
  for (int iteration = 0; iteration < C::kStages - 1; iteration++) ring.load(iteration);
  arrive_and_wait<kInFlight>();
  uint32_t q[1][C::kHeadDim / 16][4];
  load_fragments<typename C::QueryTile>(q, a_base<typename C::QueryTile>(shared_address(&shared.q), lane), 0);
  // A negative scale is applied to the queries, whose sign is free.
  const uint32_t sign = p.problem.scale < 0.f ? 0x80008000u : 0;
#pragma unroll
  for (int k = 0; k < C::kHeadDim / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) q[0][k][i] ^= sign;

  float out[1][C::kOutTiles][4];
  clear(out);
  float max[2] = {SEGATTN_NEG_INF, SEGATTN_NEG_INF}, sum = 0.f;  // sum: warps 0 and 1, each of one half
  for (int kv_tile = 0; kv_tile < ring.tiles; kv_tile++) {
    const KeyTile& tile = shared.tiles[kv_tile];
    ring.load(2 * kv_tile + C::kStages - 1);  // into the stage of the previous tile's V
    float s[C::kOwnColTiles][4], factor[2];
    score_keys<C>(s, q, ring.stage(2 * kv_tile), warp, lane);
    if (tile.first + C::kKeys > work.keys.limit(tile, work.keys.query_start))
      mask_keys(s, work, tile, warp * C::kOwnColTiles * 8, position, lane);
    share_warp_max<C>(shared.warp_max, s, warp, lane);
    __syncthreads();
    ring.load(2 * kv_tile + C::kStages);  // into the stage of this tile's K
    const float past = tile.source == kPast ? 1.f : 0.f;
    softmax_keys<C>(factor, max, shared, s, {mul_rn(gate_bias[0], past), mul_rn(gate_bias[1], past)}, scale, warp,
                    lane);
    arrive_and_wait<kInFlight>();
    accumulate_pv<C>(out[0], shared.probs, factor, ring.stage(2 * kv_tile + 1), warp, lane);
    if (warp < 2) sum_row<C>(sum, shared.probs_f32, warp == 0 ? factor[0] : factor[1], warp, lane);
    arrive_and_wait<kInFlight>();
  }
  sum = quad_sum(sum);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (warp != half) continue;
    store_state(p, work, rows[half], {max[half], sum}, lane);
    if (lane % 4 == 0) shared.warp_max[half * 8 + lane / 4][0] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++)
    store_columns<C>(p, work, rows[half], out[0], shared.warp_max[half * 8 + lane / 4][0], half, warp, lane);
}

template <class C>
constexpr SegattnKernelInfo decode_info() {
  return {C::kThreads,   (int)sizeof(DecodeShared<C>),     C::kBlocks, C::kRows, C::kKeys,
          C::kSplitKeys, (int)sizeof(SegattnForwardParams)};
}

#define DECODE(name, T, kHeadDim)                              \
  using Config_##name = DecodeConfig<T, kHeadDim>;             \
  SEGATTN_INFO(attention_##name, decode_info<Config_##name>()) \
  SEGATTN_KERNEL(attention_##name, Config_##name, SegattnForwardParams) { attention_decode<Config_##name>(params); }

DECODE(decode_bf16_d32, Bf16, 32)
DECODE(decode_bf16_d64, Bf16, 64)
DECODE(decode_bf16_d96, Bf16, 96)
DECODE(decode_bf16_d128, Bf16, 128)
DECODE(decode_bf16_d256, Bf16, 256)
DECODE(decode_f16_d32, F16, 32)
DECODE(decode_f16_d64, F16, 64)
DECODE(decode_f16_d96, F16, 96)
DECODE(decode_f16_d128, F16, 128)
DECODE(decode_f16_d256, F16, 256)

COMBINE(decode_bf16_d32)
COMBINE(decode_bf16_d64)
COMBINE(decode_bf16_d96)
COMBINE(decode_bf16_d128)
COMBINE(decode_bf16_d256)
COMBINE(decode_f16_d32)
COMBINE(decode_f16_d64)
COMBINE(decode_f16_d96)
COMBINE(decode_f16_d128)
COMBINE(decode_f16_d256)

SEGATTN_LAYOUT(attention_decode)
