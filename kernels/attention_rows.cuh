// The rows of every forward kernel: accumulators, mask, softmax, merging of chunks, epilogue, and the combine kernel.
// They share this code because a row must have the same bits in all of them. C is a kernel's configuration: T,
// kHeadDim, kPackGqa, kRows of a block, kRowTiles (of 16 rows) of a warp, kConsumerThreads (that hold accumulators),
// kKeys, kSplitKeys, kColTiles, kOutTiles, QueryTile.
#pragma once
#include "work_tiles.cuh"
#include "softmax.cuh"

// Keys of a key tile. It decides the order of sums, so all forward kernels of a head_dim use the same.
__host__ __device__ constexpr int tile_keys(int head_dim) { return head_dim == 256 ? 32 : 64; }

// A warp's rows and the range of their positions, empty (-1) if all are padding.
struct WarpRows {
  int first_row, first_position, last_position;
};

// What a warp accumulates over a chunk.
template <class C>
struct Accumulator {
  float out[C::kRowTiles][C::kOutTiles][4];
  RowState rows[C::kRowTiles][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; m++) {
#pragma unroll
      for (int n = 0; n < C::kOutTiles; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[m][n][e] = 0.f;
      rows[m][0] = rows[m][1] = {SEGATTN_NEG_INF, 0.f};
    }
  }
};

template <class C>
SEGATTN_FN WarpRows warp_rows(const WorkTile& work, int packed_heads, int warp) {
  const int first_row = warp * C::kRowTiles * 16;
  const int first = query_row<C::kRows>(work, first_row, packed_heads).query;
  const int last =
      min(query_row<C::kRows>(work, first_row + C::kRowTiles * 16 - 1, packed_heads).query, work.query_rows - 1);
  return {first_row, work.keys.query_start + first, first <= last ? work.keys.query_start + last : -1};
}

// A negative scale is applied to the queries, whose sign is free. Each warp negates its own rows.
template <class C>
SEGATTN_FN void negate_queries(typename C::QueryTile& q, int warp, int lane) {
  constexpr int kWarpRows = C::kRowTiles * 16, kRowWords = C::QueryTile::kRowBytes / 4;
  for (int panel = 0; panel < C::kHeadDim / C::QueryTile::kPanelCols; panel++) {
    uint32_t* words = (uint32_t*)&q + (panel * C::QueryTile::kRows + warp * kWarpRows) * kRowWords;
    for (int i = lane; i < kWarpRows * kRowWords; i += 32) words[i] ^= 0x80008000u;
  }
  __syncwarp();
}

// Rescales O by the rows' factors, unless all of a warp's are 1.
template <int kOutTiles>
SEGATTN_FN void rescale(float (&out)[kOutTiles][4], const float (&factor)[2]) {
  if (!warp_any(factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
  for (int n = 0; n < kOutTiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) out[n][e] = mul_rn(out[n][e], factor[e / 2]);
}

// Softmax of 16 rows: scores become probabilities, packed as A of the next product, and O is rescaled.
template <class C>
SEGATTN_FN void softmax_rows(uint32_t (&probs)[C::kColTiles / 2][4], float (&s)[C::kColTiles][4],
                             float (&out)[C::kOutTiles][4], RowState (&rows)[2], const float (&bias)[2], float scale) {
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; half++) factor[half] = softmax_row(s, half, rows[half], scale, bias[half]);
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      probs[n / 2][n % 2 * 2 + half] = pack<typename C::T>(s[n][half * 2], s[n][half * 2 + 1]);
  rescale(out, factor);
}

// Masks the keys from `key` on of a key tile that the rows at the two positions do not see.
template <int kColTiles>
SEGATTN_FN void mask_keys(float (&s)[kColTiles][4], const WorkTile& work, const KeyTile& tile, int key,
                          const int (&position)[2], int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int limit = work.keys.limit(tile, position[half]) - tile.first - key - lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kColTiles; n++) {
      if (n * 8 >= limit) s[n][half * 2] = SEGATTN_NEG_INF;
      if (n * 8 + 1 >= limit) s[n][half * 2 + 1] = SEGATTN_NEG_INF;
    }
  }
}

template <class C>
SEGATTN_FN void mask_rows(float (&s)[C::kColTiles][4], const WorkTile& work, const KeyTile& tile, int first_row,
                          int packed_heads, int lane) {
  const int row = first_row + lane / 4;
  const int first = query_row<C::kRows>(work, row, packed_heads).position,
            second = query_row<C::kRows>(work, row + 8, packed_heads).position;
  mask_keys(s, work, tile, 0, {first, second}, lane);
}

// Merges 16 rows' O with the totals of the chunks before, whose values lie kConsumerThreads apart, and saves the
// result.
template <class C>
SEGATTN_FN void merge_row_tile(float (&out)[C::kOutTiles][4], const MergeFactors (&factors)[2], float4* saved,
                               bool first, bool last) {
  if (!first) {
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++) {
      const float4 total = saved[n * C::kConsumerThreads];
      out[n][0] = merge_value(total.x, out[n][0], factors[0]);
      out[n][1] = merge_value(total.y, out[n][1], factors[0]);
      out[n][2] = merge_value(total.z, out[n][2], factors[1]);
      out[n][3] = merge_value(total.w, out[n][3], factors[1]);
    }
  }
  if (last) return;
#pragma unroll
  for (int n = 0; n < C::kOutTiles; n++)
    saved[n * C::kConsumerThreads] = make_float4(out[n][0], out[n][1], out[n][2], out[n][3]);
}

// Ends a chunk: completes its row sums and merges it with the chunks before. Their totals wait in memory (registers for
// a second accumulator are not there), each value where only its own thread reads and writes it. After
// the last chunk acc.rows and acc.out are those of the work tile.
template <class C>
SEGATTN_FN void merge_chunk(Accumulator<C>& acc, RowState* total_rows, float4* total_out, bool first, bool last,
                            int thread) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++) {
    MergeFactors factors[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      RowState &row = acc.rows[m][half], &total = total_rows[m * 16 + half * 8 + thread % 32 / 4];
      row.sum = quad_sum(row.sum);
      if (!first) {
        factors[half] = merge_factors(total.max, row.max);
        row = {factors[half].max, merge_value(total.sum, row.sum, factors[half])};
      }
      if (!last) {
        __syncwarp();
        if (thread % 4 == 0) total = row;
      }
    }
    if (!(first && last))
      merge_row_tile<C>(acc.out[m], factors, total_out + m * C::kOutTiles * C::kConsumerThreads + thread, first, last);
  }
}

// Epilogue of a row. Adding 0 turns -0 into 0.
SEGATTN_FN float row_inverse(float sum) { return sum > 0.f || sum != sum ? 1.f / sum : 0.f; }
SEGATTN_FN float finish_value(float x, float inverse) { return fma_rn(x, inverse, 0.f); }
SEGATTN_FN float row_lse(const RowState& row) {
  return row.max == SEGATTN_NEG_INF ? row.max : (row.max + log2_approx(row.sum)) * kLn2;
}

// Epilogue of a warp's rows: normalises acc.out and stores lse.
template <class C>
SEGATTN_FN void finish_rows(const SegattnForwardParams& p, const WorkTile& work, Accumulator<C>& acc, int first_row,
                            int lane) {
  const int packed_heads = C::kPackGqa ? p.packed_heads : 1;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const RowState& row = acc.rows[m][half];
      const float inverse = row_inverse(row.sum);
#pragma unroll
      for (int n = 0; n < C::kOutTiles; n++) {
        acc.out[m][n][half * 2] = finish_value(acc.out[m][n][half * 2], inverse);
        acc.out[m][n][half * 2 + 1] = finish_value(acc.out[m][n][half * 2 + 1], inverse);
      }
      const QueryRow q = query_row<C::kRows>(work, first_row + m * 16 + half * 8 + lane / 4, packed_heads);
      if (lane % 4 == 0 && q.query < work.rows)
        p.lse[partial_row(p.problem, 0, work.batch_index, q.head, q.query)] =
            q.position >= 0 ? row_lse(row) : SEGATTN_NEG_INF;
    }
}

template <class C>
SEGATTN_FN void store_final(const SegattnForwardParams& p, const WorkTile& work, Accumulator<C>& acc,
                            typename C::QueryTile& staging, int first_row, int warp, int lane) {
  const int packed_heads = C::kPackGqa ? p.packed_heads : 1;
  finish_rows<C>(p, work, acc, first_row, lane);
  store_query_rows<typename C::T, typename C::QueryTile, C::kRowTiles>(
      acc.out, shared_address(&staging), (unsigned char*)&staging, p.out, work, packed_heads, warp, lane);
}

template <class C>
SEGATTN_FN void store_partial(const SegattnForwardParams& p, const WorkTile& work, const Accumulator<C>& acc,
                              int first_row, int lane) {
  const int packed_heads = C::kPackGqa ? p.packed_heads : 1;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const QueryRow q = query_row<C::kRows>(work, first_row + m * 16 + half * 8 + lane / 4, packed_heads);
      if (q.position < 0) continue;
      const int64_t row = partial_row(p.problem, work.split, work.batch_index, q.head, q.query);
      float2* out = (float2*)(p.partial_out + row * C::kHeadDim);
#pragma unroll
      for (int n = 0; n < C::kOutTiles; n++)
        out[n * 4 + lane % 4] = make_float2(acc.out[m][n][half * 2], acc.out[m][n][half * 2 + 1]);
      if (lane % 4 == 0) ((float2*)p.partial_state)[row] = make_float2(acc.rows[m][half].max, acc.rows[m][half].sum);
    }
}

// The combine kernel, one warp a row: merges a row's KV splits in order, chunks into sections and sections into the
// row. Lane l has columns l, l + 32, ...
template <class C>
struct CombinedRow {
  static constexpr int kValues = C::kHeadDim / 32;
  float out[kValues];
  RowState state;

  __device__ __forceinline__ void load(const SegattnForwardParams& p, int64_t row, int lane) {
    const float2 s = ((const float2*)p.partial_state)[row];
    state = {s.x, s.y};
#pragma unroll
    for (int i = 0; i < kValues; i++) out[i] = p.partial_out[row * C::kHeadDim + i * 32 + lane];
  }
  __device__ __forceinline__ void merge(const CombinedRow& partial) {
    const MergeFactors f = merge_factors(state.max, partial.state.max);
    state = {f.max, merge_value(state.sum, partial.state.sum, f)};
#pragma unroll
    for (int i = 0; i < kValues; i++) out[i] = merge_value(out[i], partial.out[i], f);
  }
};

template <class C>
SEGATTN_FN void attention_combine(const SegattnForwardParams& p) {
  using T = typename C::T;
  const int lane = threadIdx.x & 31;
  const uint32_t rows = (uint32_t)p.problem.q.rows, heads = p.problem.q_heads,
                 index = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (index >= p.problem.batch * heads * rows) return griddep_wait();
  const int query = index % rows, head = index / rows % heads, batch_index = index / rows / heads;
  const int packed_heads = C::kPackGqa ? p.packed_heads : 1;
  const KeyList keys = KeyList::of(p.problem, batch_index, head);
  const int query_rows = keys.query_rows((int)rows);
  const int tile = (query * packed_heads + head % packed_heads) / C::kRows;
  const int kv_tiles = visible_kv_tiles<C::kRows, C::kKeys>(keys, tile, packed_heads, query_rows);
  const int splits = ceil_div(kv_tiles, C::kSplitKeys / C::kKeys);
  griddep_wait();           // what is read above was written before the attention kernel
  if (splits <= 1) return;  // the attention kernel stored the final result
  if (query >= written_rows(p.problem, query_rows)) return;

  constexpr int kSectionSplits = kSectionChunks * kChunkKeys / C::kSplitKeys;
  CombinedRow<C> total, partials[kSectionSplits];
  for (int first = 0; first < splits && query < query_rows; first += kSectionSplits) {
    const int count = splits - first;
    // Issues all loads of a section before the first is used: their latencies overlap.
#pragma unroll
    for (int i = 0; i < kSectionSplits; i++)
      if (i < count) partials[i].load(p, partial_row(p.problem, first + i, batch_index, head, query), lane);
#pragma unroll
    for (int i = 1; i < kSectionSplits; i++)
      if (i < count) partials[0].merge(partials[i]);
    if (first == 0) total = partials[0];
    else total.merge(partials[0]);
  }
  uint16_t* out = (uint16_t*)Rows<T>::of(p.out, batch_index, head).row(query);
  const float inverse = query < query_rows ? row_inverse(total.state.sum) : 0.f;
#pragma unroll
  for (int i = 0; i < CombinedRow<C>::kValues; i++)
    out[i * 32 + lane] = query < query_rows ? (uint16_t)pack<T>(finish_value(total.out[i], inverse), 0.f) : (uint16_t)0;
  if (lane == 0)
    p.lse[partial_row(p.problem, 0, batch_index, head, query)] =
        query < query_rows ? row_lse(total.state) : SEGATTN_NEG_INF;
}

struct CombineConfig {
  static constexpr int kThreads = 128, kBlocks = 4;
};
constexpr SegattnKernelInfo kCombineInfo = {128, 0, 4, 4, 0, 0, (int)sizeof(SegattnForwardParams)};

// The combine kernel of a forward kernel.
#define COMBINE(name)                        \
  SEGATTN_INFO(combine_##name, kCombineInfo) \
  SEGATTN_KERNEL(combine_##name, CombineConfig, SegattnForwardParams) { attention_combine<Config_##name>(params); }
