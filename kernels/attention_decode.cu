// Segment attention for at most a few query rows per head: the result of attention_forward.cu, to the bit.
//
// PackGQA: the query heads of a group share a tile of 16 rows. Every chunk of keys is a KV split and a block of its
// own, so that one token's keys are spread over the device; the combine kernel merges the splits. A chunk is done in
// rounds of one key tile a warp:
//   1. Each warp computes S of its tile, alone. Its scores stay in registers.
//   2. The warps exchange the highest score of each row and tile. Each computes P of its tile.
//   3. Each warp adds the values of all tiles to its columns of O, in order.
// Every accumulator and every sum sees the same operands as in prefill, in the same order.
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
  // Few warps and little shared memory, so that many blocks are resident and share the memory's speed to the end.
  static constexpr int kWarps = 4, kThreads = kWarps * 32, kConsumerThreads = kThreads;
  static constexpr int kRowTiles = 1, kRows = 16;
  static constexpr int kKeys = tile_keys(kHeadDim);
  static constexpr int kSplitKeys = kChunkKeys, kSplitTiles = kSplitKeys / kKeys;
  static constexpr int kBlocks = kHeadDim <= 64 ? 4 : kHeadDim <= 128 ? 3 : 2;
  static constexpr int kStages = kHeadDim == 32 ? 8 : kHeadDim == 128 ? 4 : 5;
  // Rows of a stage that a warp copies: of its own tile's keys, in as many steps as there are warps, or of values.
  static constexpr int kWarpRows = kKeys / kWarps;
  // Columns in tiles of 8: of S, and of O that a warp computes.
  static constexpr int kColTiles = kKeys / 8, kOutTiles = kHeadDim / 8 / kWarps;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  static_assert(kWarpRows % 8 == 0 && kSplitTiles % kWarps == 0, "whole products, whole rounds");
};

template <class C>
struct DecodeShared {
  typename C::KeyTile stages[C::kStages];
  union {
    typename C::QueryTile q;  // until each warp holds the queries in registers
    // Of a round: P as A of the next product.
    uint4 probs[C::kWarps][C::kColTiles / 2][32];
  };
  // Of a round's tiles: each row's highest score in base 2, and each thread's part of the row sums of both halves. In
  // the end row_sums[0] has the row sums of the chunk.
  float maxima[C::kWarps][C::kRows];
  float row_sums[C::kWarps][2][32];
  SourceRows<typename C::T> sources;
  KeyTile tiles[C::kSplitTiles];  // the key tiles of the work tile
  // Of the rows, which belong to several heads: positions, and what gates add to the scores of past keys, in base 2.
  int position[C::kRows];
  float gate_bias[C::kRows];
};

// The ring of stages. The round of tiles t, t + 1, ... has iterations 2 t, 2 t + 1, ...: first kWarps of keys, in each
// of which a warp copies and reads rows of its own tile, then kWarps of values, a tile each, which all warps read. Each
// iteration commits a group of copies, empty or not.
template <class C>
struct DecodeRing {
  DecodeShared<C>& shared;
  int tiles, warp, lane;

  // Issues the copies of the `place`-th iteration from the beginning of the round that begins with `first_tile`.
  __device__ __forceinline__ void load(int first_tile, uint32_t place) const {
    constexpr uint32_t kSteps = C::kWarps;
    const uint32_t step = place % kSteps;
    const bool values = place / kSteps % 2 != 0;
    const int round = first_tile + place / (2 * kSteps) * kSteps, index = round + (values ? step : warp);
    // A warp without a tile computes with zeros, to no effect.
    if (values ? index < tiles : round < tiles) {
      const KeyTile& tile = shared.tiles[index];
      const Rows<const typename C::T> rows = values ? shared.sources.v[tile.source] : shared.sources.k[tile.source];
      const int first = tile.first + (values ? warp : step) * C::kWarpRows, left = index < tiles ? tile.end - first : 0;
      copy_rows_async_by_warp<typename C::KeyTile, C::kWarpRows>(own_rows(2 * first_tile + place), rows.row(first),
                                                                 rows.stride, left, opaque(lane));
    }
    cp_async_commit();
  }
  __device__ __forceinline__ SharedAddress stage(uint32_t iteration) const {
    return shared_address(&shared.stages[iteration % C::kStages]);
  }
  // The rows that the warp copies.
  __device__ __forceinline__ SharedAddress own_rows(uint32_t iteration) const {
    return stage(iteration) + warp * C::kWarpRows * C::KeyTile::kRowBytes;
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

// S of the warp's keys of a stage.
template <class C>
SEGATTN_FN void score_keys(float (&s)[C::kWarpRows / 8][4], const uint32_t (&q)[1][C::kHeadDim / 16][4],
                           SharedAddress keys, int lane) {
  constexpr int kTiles = C::kWarpRows / 8, kPairs = C::kHeadDim / 32;
  uint32_t b[2][kTiles][4];
  const auto load = [&](int i) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) load_b_pair<typename C::KeyTile>(b[i % 2][n], keys, n * 8, i * 32, lane);
  };
  load(0);
#pragma unroll
  for (int n = 0; n < kTiles; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    if (i + 1 < kPairs) load(i + 1);
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int n = 0; n < kTiles; n++)
        mma_16x8x16(s[n], q[0][i * 2 + k], b[i % 2][n][k * 2], b[i % 2][n][k * 2 + 1], typename C::T{});
  }
}

// Stores each row's highest score of the warp's tile for the other warps.
template <class C>
SEGATTN_FN void share_maxima(float (&maxima)[C::kRows], const float (&s)[C::kColTiles][4], const float (&bias)[2],
                             float scale, int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float tile_max = s[0][half * 2];
#pragma unroll
    for (int n = 0; n < C::kColTiles; n++) tile_max = max_f32(tile_max, max_f32(s[n][half * 2], s[n][half * 2 + 1]));
    tile_max = quad_max(tile_max);
    if (lane % 4 == 0) maxima[half * 8 + lane / 4] = fma_rn(tile_max, scale, bias[half]);
  }
}

// Softmax of the warp's tile. max is that of the tiles before the round. Stores P and its row sums for all warps.
template <class C>
SEGATTN_FN void softmax_tile(DecodeShared<C>& shared, const float (&s)[C::kColTiles][4], const float (&max)[2],
                             const float (&bias)[2], float scale, int warp, int lane) {
  RowUpdate update[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = half * 8 + lane / 4;
    float before = max[half];
#pragma unroll
    for (int tile = 0; tile < C::kWarps - 1; tile++)
      before = max_f32(before, tile < warp ? shared.maxima[tile][row] : SEGATTN_NEG_INF);
    update[half] = update_row(before, shared.maxima[warp][row], bias[half]);
  }
  float even[2] = {0.f, 0.f}, odd[2] = {0.f, 0.f};
#pragma unroll
  for (int pair = 0; pair < C::kColTiles / 2; pair++) {
    uint32_t p[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int half = i % 2, n = pair * 2 + i / 2;
      const float first = probability(s[n][half * 2], scale, update[half]),
                  second = probability(s[n][half * 2 + 1], scale, update[half]);
      even[half] += first;
      odd[half] += second;
      p[i] = pack<typename C::T>(first, second);
    }
    shared.probs[warp][pair][lane] = make_uint4(p[0], p[1], p[2], p[3]);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) shared.row_sums[warp][half][lane] = even[half] + odd[half];
}

// O += P V of a tile, for the warp's columns.
template <class C>
SEGATTN_FN void accumulate_pv(float (&out)[C::kOutTiles][4], const uint4 (&probs)[C::kColTiles / 2][32],
                              const float (&factor)[2], SharedAddress v, int warp, int lane) {
  constexpr int kPairs = C::kKeys / 32;
  uint32_t b[C::kOutTiles][kPairs][4];
#pragma unroll
  for (int i = 0; i < kPairs; i++)
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++)
      load_bt_pair<typename C::KeyTile>(b[n][i], v, i * 32, (warp * C::kOutTiles + n) * 8, lane);
#pragma unroll
  for (int n = 0; n < C::kOutTiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) out[n][e] = mul_rn(out[n][e], factor[e / 2]);
#pragma unroll
  for (int k = 0; k < C::kColTiles / 2; k++) {
    const uint4 four = probs[k][lane];
    const uint32_t p[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++)
      mma_16x8x16(out[n], p, b[n][k / 2][k % 2 * 2], b[n][k / 2][k % 2 * 2 + 1], typename C::T{});
  }
}

// Stores the warp's columns of the rows of one half: of the final or of a partial result.
template <class C>
SEGATTN_FN void store_columns(const SegattnForwardParams& p, const WorkTile& work, const QueryRow& q,
                              const float (&out)[C::kOutTiles][4], float sum, int half, int warp, int lane) {
  if (q.query >= work.rows) return;
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
  if (q.query >= work.rows || lane % 4 != 0) return;
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
  if (thread >= 64 && thread < 64 + C::kRows) {
    const QueryRow row = query_row<C::kRows>(work, thread - 64, packed_heads);
    const float gate = p.problem.past_gate[row.head];
    shared.position[thread - 64] = row.position;
    shared.gate_bias[thread - 64] = gate > 0.f ? log2_approx(gate) : 0.f;
  }
  const float scale = scale_log2(p.problem.scale);
  __syncthreads();
  const DecodeRing<C> ring = {shared, work.end_kv_tile - work.first_kv_tile, warp, lane};
  // Before an iteration is used, all up to the (kStages - 2)-th after it are in flight.
  constexpr int kInFlight = C::kStages - 2;
#pragma unroll 1
  for (int iteration = 0; iteration < C::kStages - 1; iteration++) ring.load(0, iteration);
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
#pragma unroll 1
  for (int first_tile = 0; first_tile < ring.tiles; first_tile += C::kWarps) {
    const int tiles = min(ring.tiles - first_tile, C::kWarps);
    __syncthreads();  // all warps have read the values, P and maxima of the round before
    float s[C::kColTiles][4], bias[2];
#pragma unroll
    for (int step = 0; step < C::kWarps; step++) {
      cp_async_wait<kInFlight>();
      __syncwarp();
      ring.load(first_tile, step + C::kStages - 1);
      float own[C::kWarpRows / 8][4];
      score_keys<C>(own, q, ring.own_rows(2 * first_tile + step), lane);
#pragma unroll
      for (int n = 0; n < C::kWarpRows / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[step * C::kWarpRows / 8 + n][e] = own[n][e];
    }
    if (warp < tiles) {
      const KeyTile& tile = shared.tiles[first_tile + warp];
      if (tile.first + C::kKeys > work.keys.limit(tile, work.keys.query_start))
        mask_keys(s, work, tile, 0, {shared.position[lane / 4], shared.position[lane / 4 + 8]}, lane);
      const float past = tile.source == kPast ? 1.f : 0.f;
#pragma unroll
      for (int half = 0; half < 2; half++) bias[half] = mul_rn(shared.gate_bias[half * 8 + lane / 4], past);
      share_maxima<C>(shared.maxima[warp], s, bias, scale, lane);
    }
    __syncthreads();
    if (warp < tiles) softmax_tile<C>(shared, s, max, bias, scale, warp, lane);
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
      const int place = C::kWarps + tile;
      arrive_and_wait<kInFlight>();
      ring.load(first_tile, place + C::kStages - 1);
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const RowUpdate update = update_row(max[half], shared.maxima[tile][half * 8 + lane / 4], 0.f);
        max[half] = update.max, factor[half] = update.factor;
      }
      accumulate_pv<C>(out[0], shared.probs[tile], factor, ring.stage(2 * first_tile + place), warp, lane);
      if (warp < 2) sum = fma_rn(sum, warp == 0 ? factor[0] : factor[1], shared.row_sums[tile][warp][lane]);
    }
  }
  sum = quad_sum(sum);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (warp != half) continue;
    const QueryRow row = query_row<C::kRows>(work, half * 8 + opaque(lane) / 4, packed_heads);
    store_state(p, work, row, {max[half], sum}, lane);
    shared.row_sums[0][half][lane] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const QueryRow row = query_row<C::kRows>(work, half * 8 + opaque(lane) / 4, packed_heads);
    store_columns<C>(p, work, row, out[0], shared.row_sums[0][half][lane], half, warp, lane);
  }
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
