// Retrieval of past tokens (docs/contract.md, section 2), per KV head that reads the past; no gradient:
//   pool_append   k (before rotation) and v of the heads named, behind the pool's tokens, rounded to the pool's bits
//   pool_read     the pool's tokens from one on, as they are held: the opposite of pool_append
//   pool_unwanted of blocks, or tokens: the negative of the largest score around, for pool_select: what is dropped
//   pool_keep     the tokens that are not dropped, as they are held, to another pool
//   pool_gather   the selected tokens to the past rows, keys rotated to the positions before end_angle
// First rule, whole blocks:
//   pool_probes   probe = mean over a window of queries before rotation, in f32, as three bf16 that add up to it
//   pool_scores   score of a block = max over its tokens and all probes of probe . k
//   pool_select   the max_selected best of the eligible blocks, ties to the earlier, in order of position
// Second rule, windows around tokens; a probe is a query, and s = scale * log2(e) * probe . k:
//   pool_sums     for each tile of tokens and probe: max of s, and sum of exp2(s - max)
//   pool_lse      for each probe: log2 of the sum of exp2(s) over all tiles, in order of position
//   pool_shares   score of a token = max over all probes of s - lse, and the best token of each tile
//   pool_windows  windows around the best tokens; their max_selected tokens in order of position
// Scores: a mean is split into three bf16 whose sum it is, so tensor cores multiply f32 by bf16 without loss and add
// in f32; a query is bf16 already. A product depends only on its probe and key, not on their positions in a tile.
// Tiles of the second rule are counted from token 0. Bytes of a pool of 16 bits: scores read every key once, 2 head_dim
// a token and head; sums and shares each do, and shares write 4 a token; gather 8 head_dim a token.
#include <float.h>

#include "pipeline.cuh"
#include "pool.cuh"
#include "pool_length.cuh"
#include "reduce.cuh"
#include "rotation.cuh"
#include "select.cuh"
#include "softmax.cuh"

// ---------------------------------------------------------------------------------------------------- elementwise

// Splits an f32 (24 bits) into three bf16 of 8 bits each.
constexpr int kProbeParts = 3;

struct PoolConfig {
  static constexpr int kThreads = 256, kBlocks = 5;
};
// Rounding and rotation take more registers.
struct WideConfig {
  static constexpr int kThreads = 256, kBlocks = 3;
};

// Row of the ring that holds query t.
SEGATTN_FN int query_row(const SegattnRetrievalParams& p, int t) { return (p.first_query + t) % p.query_capacity; }

SEGATTN_FN void pool_append(const SegattnRetrievalParams& p, uint32_t block) {
  const uint32_t index = thread_of(block), head_units = p.head_dim / kVector, row_units = head_units * p.heads;
  const int64_t row = index / row_units;
  if (row >= p.rows) return;
  const int head = index % row_units / head_units, column = index % head_units * kVector;
  const int64_t src = (int64_t)p.head[head].kv_head * p.head_dim, unit = pool_unit(p, p.token + row, head);
  const SegattnPoolChunk& chunk = chunk_of(p, p.token + row);
  store_held(p, chunk.k, unit, column, row_of<const Bf16>(p.k, row) + src);
  store_held(p, chunk.v, unit, column, row_of<const Bf16>(p.v, row) + src);
}

// The pool's tokens from p.token on, to rows of the heads named.
SEGATTN_FN void pool_read(const SegattnRetrievalParams& p, uint32_t block) {
  const uint32_t index = thread_of(block), head_units = p.head_dim / kVector, row_units = head_units * p.heads;
  const int64_t row = index / row_units;
  if (row >= p.rows) return;
  const int head = index % row_units / head_units, column = index % head_units * kVector;
  const int64_t dst = (int64_t)p.head[head].kv_head * p.head_dim + column, unit = pool_unit(p, p.token + row, head);
  const SegattnPoolChunk& chunk = chunk_of(p, p.token + row);
  *(uint4*)(row_of<Bf16>(p.k, row) + dst) = load_held(p, chunk.k, unit, column);
  *(uint4*)(row_of<Bf16>(p.v, row) + dst) = load_held(p, chunk.v, unit, column);
}

SEGATTN_FN void pool_probes(const SegattnRetrievalParams& p, uint32_t block) {
  const uint32_t index = thread_of(block), head_units = p.head_dim / kVector, probe = index / head_units;
  const int count = p.group * p.windows;
  if (probe >= (uint32_t)(p.heads * count)) return;
  const int head = probe / count, within = probe % count, column = index % head_units * kVector;
  const int64_t q_head = (int64_t)p.head[head].kv_head * p.group + within / p.windows;
  const int first = within % p.windows * p.stride;
  float r_sum[kVector] = {};
  for (int query = first; query < first + p.window; query++) {
    float r_q[kVector];
    load_vector(r_q, row_of<const Bf16>(p.q, query_row(p, query)) + q_head * p.head_dim + column);
#pragma unroll
    for (int e = 0; e < kVector; e++) r_sum[e] += r_q[e];
  }
#pragma unroll
  for (int e = 0; e < kVector; e++) r_sum[e] = r_sum[e] / (float)p.window;
#pragma unroll
  for (int part = 0; part < kProbeParts; part++) {
    const uint4 r_part = pack_vector(r_sum);
    *(uint4*)((Bf16*)p.probes + (((int64_t)part * p.heads * count) + probe) * p.head_dim + column) = r_part;
    float r_rounded[kVector];
    unpack_vector(r_rounded, r_part);
#pragma unroll
    for (int e = 0; e < kVector; e++) r_sum[e] -= r_rounded[e];
  }
}

// A thread has eight pairs of one row of one head, of keys and values.
SEGATTN_FN void pool_gather(const SegattnRetrievalParams& p, uint32_t block) {
  const int half = p.head_dim / 2;
  const uint32_t index = thread_of(block), head_units = half / kVector, slot_rows = p.max_selected * p.block_len;
  const uint32_t row = index / head_units % slot_rows, head = index / head_units / slot_rows;
  if (head >= (uint32_t)p.heads) return;
  const int rows = p.selected_count[head] * p.block_len, pair = index % head_units * kVector;
  const SegattnPoolHead info = p.head[head];
  if (row == 0 && pair == 0 && p.past_len) p.past_len[info.kv_head] = rows;
  if (row >= (uint32_t)rows) return;
  const int64_t token =
      (int64_t)p.selected[(int64_t)head * p.max_selected + row / p.block_len] * p.block_len + row % p.block_len;
  const int64_t unit = pool_unit(p, token, head), dst = (int64_t)info.kv_head * p.head_dim + pair;
  const SegattnPoolChunk& chunk = chunk_of(p, token);
  const Pairs k = held_pairs(p, chunk.k, unit, pair), v = held_pairs(p, chunk.v, unit, pair);
  const int64_t angle = (int64_t)info.end_angle - rows + row;
  store_pairs(row_of<Bf16>(p.k, row) + dst, 0, half, turned(k, p.cos, p.sin, angle * half + pair, 1.f));
  store_pairs(row_of<Bf16>(p.v, row) + dst, 0, half, v);
}

// ---------------------------------------------------------------------------------------------------- scores

// 4 warps x 32 keys against 16 probes at a time: 12 products a k-step for three tiles of probes and two of keys read
// from shared memory. The keys of a tile are read from global memory once, the probes from L2.
template <int kHeadDim_, int kParts_>
struct ScoreConfig {
  static constexpr int kHeadDim = kHeadDim_, kParts = kParts_;
  static constexpr int kThreads = 128, kBlocks = kHeadDim == 256 ? 1 : 4;
  static constexpr int kKeys = 128, kWarps = kThreads / 32, kWarpKeys = kKeys / kWarps, kColTiles = kWarpKeys / 8;
  static constexpr int kProbes = 16, kRowChunks = kHeadDim / 8;
  using KeyTile = Tile<Bf16, kKeys, kHeadDim>;
  using ProbeTile = Tile<Bf16, kProbes, kHeadDim>;
};

// Probes of the first rule, and of the second.
template <int kHeadDim>
using MeanScores = ScoreConfig<kHeadDim, kProbeParts>;
template <int kHeadDim>
using QueryScores = ScoreConfig<kHeadDim, 1>;

template <class C>
struct ScoreShared {
  typename C::KeyTile keys;
  typename C::ProbeTile parts[C::kParts];
  float scores[C::kKeys];
  RowState sums[C::kWarps][C::kProbes];
  Highest highest[kMaxWarps];
};

// Retrieval blocks that a thread block scores: as many as fit into a tile of keys, at least one.
template <class C>
SEGATTN_FN int blocks_per_tile(int block_len) {
  return max(1, C::kKeys / block_len);
}

// Issues the copies of keys [first, end), a tile of them; elements of fewer bits are widened and stored. Some keys may
// lie in a later chunk of memory.
template <class C>
SEGATTN_FN void load_keys(const SegattnRetrievalParams& p, ScoreShared<C>& shared, int head, int64_t first,
                          int64_t end) {
  const SharedAddress tile = shared_address(&shared.keys);
  const int64_t first_chunk = (first - p.first_token) / p.chunk_tokens,
                first_row = (first - p.first_token) - first_chunk * p.chunk_tokens;
  void* g_first = p.chunks[first_chunk].k;
  for (int i = threadIdx.x; i < C::kKeys * C::kRowChunks; i += C::kThreads) {
    const int row = i / C::kRowChunks, column = i % C::kRowChunks;
    const bool valid = first + row < end;
    int64_t chunk = first_chunk, chunk_row = first_row + (valid ? row : 0);
    for (; chunk_row >= p.chunk_tokens; chunk_row -= p.chunk_tokens) chunk++;
    void* g_chunk = chunk == first_chunk ? g_first : p.chunks[chunk].k;
    const int64_t unit = chunk_row * p.heads + head;
    const SharedAddress place = C::KeyTile::chunk(tile, row, column);
    if (p.bits == 16) cp_async_16(place, (const Bf16*)g_chunk + unit * C::kHeadDim + column * 8, valid ? 16 : 0);
    else *(uint4*)((unsigned char*)&shared.keys + (place - tile)) = load_held(p, g_chunk, unit, column * 8);
  }
}

// Where a part of a probe is: what pool_probes wrote, or where a probe has one part, the query itself.
template <class C>
SEGATTN_FN const Bf16* probe_row(const SegattnRetrievalParams& p, int head, int probe, int part) {
  if (C::kParts > 1)
    return (const Bf16*)p.probes + (((int64_t)part * p.heads + head) * p.group * p.windows + probe) * C::kHeadDim;
  const int64_t q_head = (int64_t)p.head[head].kv_head * p.group + probe / p.windows;
  return row_of<const Bf16>(p.q, query_row(p, probe % p.windows)) + q_head * C::kHeadDim;
}

// Issues the copies of the parts of 16 probes from `first` on; beyond the end the last probe is repeated.
template <class C>
SEGATTN_FN void load_probes(const SegattnRetrievalParams& p, ScoreShared<C>& shared, int head, int first) {
  const int last = p.group * p.windows - 1;
  for (int i = threadIdx.x; i < C::kParts * C::kProbes * C::kRowChunks; i += C::kThreads) {
    const int part = i / (C::kProbes * C::kRowChunks), row = i / C::kRowChunks % C::kProbes, column = i % C::kRowChunks;
    const Bf16* g_probe = probe_row<C>(p, head, min(first + row, last), part);
    const SharedAddress tile = shared_address(&shared.parts[part]);
    cp_async_16(C::ProbeTile::chunk(tile, row, column), g_probe + column * 8, 16);
  }
}

// x += probe . key for the thread's rows (probes) and columns (keys).
template <class C>
SEGATTN_FN void multiply(float (&x)[C::kColTiles][4], const ScoreShared<C>& shared) {
  using KT = typename C::KeyTile;
  using PT = typename C::ProbeTile;
  const int lane = threadIdx.x & 31, first_key = threadIdx.x / 32 * C::kWarpKeys;
  const SharedAddress keys = b_base<KT>(shared_address(&shared.keys), lane);
#pragma unroll 4
  for (int k = 0; k < C::kHeadDim; k += 16) {
    uint32_t a[C::kParts][4];
#pragma unroll
    for (int part = 0; part < C::kParts; part++)
      load_a<PT>(a[part], a_base<PT>(shared_address(&shared.parts[part]), lane), 0, k);
#pragma unroll
    for (int n = 0; n < C::kColTiles; n += 2) {
      uint32_t b[4];
      load_b<KT>(b, keys, first_key + n * 8, k);
#pragma unroll
      for (int part = C::kParts - 1; part >= 0; part--) {
        mma_16x8x16(x[n], a[part], b[0], b[1], Bf16{});
        mma_16x8x16(x[n + 1], a[part], b[2], b[3], Bf16{});
      }
    }
  }
}

// Calls f(first, x) with the products x of 16 probes from `first` on and the tile's keys, whose copies are in flight.
template <class C, class F>
SEGATTN_FN void for_each_product(const SegattnRetrievalParams& p, ScoreShared<C>& shared, int head, const F& f) {
  for (int first = 0; first < p.group * p.windows; first += C::kProbes) {
    if (first > 0) __syncthreads();
    load_probes<C>(p, shared, head, first);
    cp_async_commit();
    arrive_and_wait<0>();
    float x[C::kColTiles][4] = {};
    multiply<C>(x, shared);
    f(first, x);
  }
}

// For each key of the tile, whose copies are in flight, the maximum over all probes of score_of(probe).of(product); it
// goes to shared memory.
template <class C, class ScoreOf>
SEGATTN_FN void best_scores(const SegattnRetrievalParams& p, ScoreShared<C>& shared, int head,
                            const ScoreOf& score_of) {
  const int lane = threadIdx.x & 31;
  float best[C::kColTiles][2];
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++) best[n][0] = best[n][1] = -INFINITY;
  for_each_product<C>(p, shared, head, [&](int first, float (&x)[C::kColTiles][4]) {
    const auto low = score_of(first + lane / 4), high = score_of(first + lane / 4 + 8);
#pragma unroll
    for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) best[n][e] = max_f32(best[n][e], max_f32(low.of(x[n][e]), high.of(x[n][2 + e])));
  });
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) best[n][e] = max_f32(best[n][e], shuffle_xor(best[n][e], mask));
      if (lane < 4) shared.scores[threadIdx.x / 32 * C::kWarpKeys + n * 8 + lane * 2 + e] = best[n][e];
    }
}

// The first rule's score of a key for a probe.
struct Product {
  __device__ __forceinline__ float of(float product) const { return product; }
};

template <class C>
SEGATTN_FN void pool_scores(const SegattnRetrievalParams& p, uint32_t block) {
  ScoreShared<C>& shared = *(ScoreShared<C>*)shared_memory();
  const int tile_blocks = blocks_per_tile<C>(p.block_len), tiles = ceil_div(p.blocks, tile_blocks);
  if (block >= (uint32_t)(p.heads * tiles)) return;
  const int head = block / tiles, first_block = p.first_block + block % tiles * tile_blocks;
  const int eligible_end = eligible_blocks(p, head).end;
  const int end_block = min(min(first_block + tile_blocks, p.first_block + p.blocks), eligible_end);
  if (first_block >= end_block) return;
  const int64_t end = (int64_t)end_block * p.block_len;
  float block_best = -INFINITY;
  for (int64_t first = (int64_t)first_block * p.block_len; first < end; first += C::kKeys) {
    load_keys<C>(p, shared, head, first, end);
    best_scores<C>(p, shared, head, [](int) { return Product{}; });
    __syncthreads();
    // One thread has one retrieval block, of this tile or the one that is longer than a tile. The next scores are
    // written after the barrier that waits for the next tile's keys.
    const int from = p.block_len > C::kKeys ? 0 : threadIdx.x * p.block_len;
    const int to = p.block_len > C::kKeys ? C::kKeys : from + p.block_len;
    const bool mine = (int)threadIdx.x < end_block - first_block;
    for (int key = from; mine && key < to && first + key < end; key++)
      block_best = max_f32(block_best, shared.scores[key]);
  }
  if ((int)threadIdx.x < end_block - first_block)
    p.scores[head * p.score_pitch + first_block + threadIdx.x] = block_best;
}

// ---------------------------------------------------------------------------------------------------- select

// One thread block has one head; each thread reads four neighbouring scores at a time.
struct PoolSelectConfig {
  static constexpr int kThreads = 1024, kBlocks = 1;
  static constexpr int kOwn = 4;
};

struct PoolSelectShared {
  SelectShared select;
  CompactionShared compaction;
};

// Rank keys of blocks first ... first + 3. Beyond the last block 0, which is below the key of every score.
SEGATTN_FN void load_score_keys(uint32_t (&keys)[PoolSelectConfig::kOwn], const float* g_scores, int first, int count) {
#pragma unroll
  for (int i = 0; i < PoolSelectConfig::kOwn; i++) keys[i] = first + i < count ? rank_key(g_scores[first + i]) : 0;
}

SEGATTN_FN void pool_select(const SegattnRetrievalParams& p, uint32_t block) {
  using C = PoolSelectConfig;
  PoolSelectShared& shared = *(PoolSelectShared*)shared_memory();
  if (block >= (uint32_t)p.heads) return;
  const int head = block;
  const Blocks eligible = eligible_blocks(p, head);
  const float* g_scores = p.scores + head * p.score_pitch + eligible.begin;
  int32_t* g_selected = p.selected + (int64_t)head * p.max_selected;
  const int count = max(0, eligible.end - eligible.begin), selected = min(count, p.max_selected);
  if (threadIdx.x == 0) p.selected_count[head] = selected;
  if (selected == 0) return;
  constexpr int kStep = C::kThreads * C::kOwn;
  const auto for_each = [&](const auto& f) {
    for (int first = threadIdx.x * C::kOwn; first < count; first += kStep) {
      uint32_t keys[C::kOwn];
      load_score_keys(keys, g_scores, first, count);
#pragma unroll
      for (int i = 0; i < C::kOwn; i++)
        if (first + i < count) f(keys[i]);
    }
  };
  const Threshold threshold = select_threshold(for_each, selected, shared.select);
  Compaction<C::kOwn> compaction;
  for (int step = 0; step < count; step += kStep) {
    const int first = step + threadIdx.x * C::kOwn;
    uint32_t keys[C::kOwn];
    load_score_keys(keys, g_scores, first, count);
    compaction.next(keys, threshold, shared.compaction,
                    [&](int i, uint32_t index) { g_selected[index] = eligible.begin + first + i; });
  }
}

// ---------------------------------------------------------------------------------------------------- shares

// Log2 of a token's weight before the division by the sum. A product that overflows becomes the largest finite number,
// and a sum of infinities of both signs the least one, so that nothing that follows is infinite.
SEGATTN_FN float finite_score(const SegattnRetrievalParams& p, float product) {
  return fminf(max_f32(mul_rn(product, p.scale_log2), -FLT_MAX), FLT_MAX);
}

// A tile of tokens, of those that a head may select; tiles are counted from token 0. A call without tiles scores none.
struct TokenTile {
  int head, tile, first, begin, end;
};
template <class C>
SEGATTN_FN TokenTile token_tile(const SegattnRetrievalParams& p, uint32_t block) {
  if (block >= (uint32_t)(p.heads * p.tiles)) return {};
  const int head = block / p.tiles, tile = block % p.tiles, first = tile * C::kKeys;
  const SegattnPoolHead info = p.head[head];
  return {head, tile, first, max(first, info.eligible_begin), min(first + C::kKeys, info.eligible_end)};
}

template <class C>
SEGATTN_FN void pool_sums(const SegattnRetrievalParams& p, uint32_t block) {
  ScoreShared<C>& shared = *(ScoreShared<C>*)shared_memory();
  const TokenTile at = token_tile<C>(p, block);
  if (at.begin >= at.end) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, count = p.group * p.windows;
  const int first_column = at.first + warp * C::kWarpKeys + lane % 4 * 2;
  RowState* g_sums = (RowState*)p.sums + ((int64_t)at.head * p.tiles + at.tile) * count;
  load_keys<C>(p, shared, at.head, at.first, at.end);
  for_each_product<C>(p, shared, at.head, [&](int first, float (&x)[C::kColTiles][4]) {
#pragma unroll
    for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = first_column + n * 8 + e % 2;
        x[n][e] = token >= at.begin && token < at.end ? finite_score(p, x[n][e]) : -INFINITY;
      }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      RowState sum = {-INFINITY, 0.f};
      softmax_row(x, half, sum, 1.f, 0.f);
      sum.sum = quad_sum(sum.sum);
      if (lane % 4 == 0) shared.sums[warp][half * 8 + lane / 4] = sum;
    }
    __syncthreads();
    if (threadIdx.x < C::kProbes && first + (int)threadIdx.x < count) {
      RowState total = shared.sums[0][threadIdx.x];
      for (int other = 1; other < C::kWarps; other++) {
        const RowState partial = shared.sums[other][threadIdx.x];
        const MergeFactors factors = merge_factors(total.max, partial.max);
        total = {factors.max, merge_value(total.sum, partial.sum, factors)};
      }
      g_sums[first + threadIdx.x] = total;
    }
  });
}

struct LseConfig {
  static constexpr int kThreads = 128, kBlocks = 8;
};

struct LseShared {
  float max[kMaxWarps], sum[kMaxWarps];
};

SEGATTN_FN void pool_lse(const SegattnRetrievalParams& p, uint32_t block) {
  constexpr int kKeys = QueryScores<32>::kKeys;
  LseShared& shared = *(LseShared*)shared_memory();
  const int count = p.group * p.windows;
  if (p.tiles == 0 || block >= (uint32_t)(p.heads * count)) return;
  const int head = block / count, probe = block % count;
  const int begin = p.head[head].eligible_begin, end = p.head[head].eligible_end;
  if (begin >= end) return;
  const RowState* g_sums = (const RowState*)p.sums + (int64_t)head * p.tiles * count + probe;
  // A thread has every 128th tile, counted from token 0: so the order of the sum depends on positions alone.
  const auto for_each_tile = [&](const auto& f) {
    for (int tile = threadIdx.x; tile < ceil_div(end, kKeys); tile += LseConfig::kThreads)
      if (tile >= begin / kKeys) f(g_sums[(int64_t)tile * count]);
  };
  float max = -INFINITY, sum = 0.f;
  for_each_tile([&](const RowState& tile) { max = max_f32(max, tile.max); });
  max = block_reduce<MaxOf>(max, shared.max);
  for_each_tile([&](const RowState& tile) { sum = fma_rn(tile.sum, exp2_approx(tile.max - max), sum); });
  sum = block_reduce<SumOf>(sum, shared.sum);
  if (threadIdx.x == 0) p.lse[block] = max + log2_approx(sum);
}

// The second rule's score of a token for a probe: log2 of its share.
struct Share {
  const SegattnRetrievalParams& p;
  float lse;
  __device__ __forceinline__ float of(float product) const { return finite_score(p, product) - lse; }
};

template <class C>
SEGATTN_FN void pool_shares(const SegattnRetrievalParams& p, uint32_t block) {
  static_assert(C::kThreads == C::kKeys, "a thread a token");
  ScoreShared<C>& shared = *(ScoreShared<C>*)shared_memory();
  const TokenTile at = token_tile<C>(p, block);
  if (at.begin >= at.end) return;
  const int count = p.group * p.windows, token = at.first + threadIdx.x;
  const float* g_lse = p.lse + (int64_t)at.head * count;
  load_keys<C>(p, shared, at.head, at.first, at.end);
  best_scores<C>(p, shared, at.head, [&](int probe) { return Share{p, g_lse[min(probe, count - 1)]}; });
  __syncthreads();
  Highest best = {0, 0};
  if (token >= at.begin && token < at.end) {
    // Finite, so that it is above that of a token in a window.
    const float score = max_f32(shared.scores[threadIdx.x], -FLT_MAX);
    p.scores[at.head * p.score_pitch + token] = score;
    best = {rank_key(score), (uint32_t)token};
  }
  best = block_reduce<HighestOf>(best, shared.highest);
  if (threadIdx.x == 0) p.best[(int64_t)at.head * p.tiles + at.tile] = {best.key, best.id};
}

// ---------------------------------------------------------------------------------------------------- windows

// One thread block has one head.
struct WindowConfig {
  static constexpr int kThreads = 1024, kBlocks = 1;
  static constexpr int kOwn = 4;
  static constexpr int kTile = QueryScores<32>::kKeys;
};

// Tokens [begin, end).
struct Tokens {
  uint32_t begin, end;
};
struct OverlapOf {
  SEGATTN_FN Tokens join(Tokens a, Tokens b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }
};
SEGATTN_FN Tokens shuffle_xor(Tokens x, int mask) { return {shuffle_xor(x.begin, mask), shuffle_xor(x.end, mask)}; }

struct WindowShared {
  Highest highest[kMaxWarps];
  Tokens window[kMaxWarps];
  CompactionShared compaction;
};

// The score of a token that is in a window.
constexpr float kTaken = -INFINITY;

// The best token that is in no window.
SEGATTN_FN uint32_t best_token(const SegattnBestToken* g_best, Tokens eligible, WindowShared& shared) {
  using C = WindowConfig;
  Highest best = {0, 0};
  for (uint32_t tile = eligible.begin / C::kTile + threadIdx.x; tile * C::kTile < eligible.end; tile += C::kThreads)
    best = HighestOf::join(best, {g_best[tile].key, g_best[tile].token});
  return block_reduce<HighestOf>(best, shared.highest).id;
}

// The window of at most `left` tokens around the best one: within the eligible tokens, and between the windows before
// and behind it.
SEGATTN_FN Tokens window_around(uint32_t best, uint32_t left, const SegattnRetrievalParams& p, const float* g_scores,
                                Tokens eligible, WindowShared& shared) {
  const uint32_t width = min((uint32_t)p.window_len, left);
  const uint32_t before = (uint64_t)width * p.window_before / p.window_len;
  const uint32_t begin = min(best - min(best - eligible.begin, before), eligible.end - width);
  Tokens window = {begin, begin + width};
  for (uint32_t token = begin + threadIdx.x; token < begin + width; token += WindowConfig::kThreads)
    if (g_scores[token] == kTaken)
      window = OverlapOf::join(window, token < best ? Tokens{token + 1, window.end} : Tokens{window.begin, token});
  return block_reduce<OverlapOf>(window, shared.window);
}

// Marks the tokens of a window, and finds the best of the others in the tiles that it touches. A warp has a tile.
SEGATTN_FN void take(Tokens window, float* g_scores, SegattnBestToken* g_best, Tokens eligible) {
  using C = WindowConfig;
  const uint32_t lane = threadIdx.x & 31;
  for (uint32_t tile = window.begin / C::kTile + threadIdx.x / 32; tile * C::kTile < window.end;
       tile += C::kThreads / 32) {
    Highest best = {0, 0};
    for (uint32_t token = tile * C::kTile + lane; token < (tile + 1) * C::kTile; token += 32) {
      if (token < eligible.begin || token >= eligible.end) continue;
      const bool taken = token >= window.begin && token < window.end;
      if (taken) g_scores[token] = kTaken;
      best = HighestOf::join(best, {taken ? 0 : rank_key(g_scores[token]), token});
    }
    best = warp_reduce<HighestOf>(best);
    if (lane == 0) g_best[tile] = {best.key, best.id};
  }
}

SEGATTN_FN void pool_windows(const SegattnRetrievalParams& p, uint32_t block) {
  using C = WindowConfig;
  WindowShared& shared = *(WindowShared*)shared_memory();
  if (block >= (uint32_t)p.heads) return;
  const int head = block;
  const Tokens eligible = {(uint32_t)p.head[head].eligible_begin, (uint32_t)p.head[head].eligible_end};
  const uint32_t count = eligible.end - eligible.begin, selected = min(count, (uint32_t)p.max_selected);
  int32_t* g_selected = p.selected + (int64_t)head * p.max_selected;
  if (threadIdx.x == 0) p.selected_count[head] = selected;
  if (selected == count) {
    for (uint32_t i = threadIdx.x; i < count; i += C::kThreads) g_selected[i] = eligible.begin + i;
    return;
  }
  float* g_scores = p.scores + head * p.score_pitch;
  SegattnBestToken* g_best = p.best + (int64_t)head * p.tiles;
  for (uint32_t left = selected; left > 0;) {
    const uint32_t best = best_token(g_best, eligible, shared);
    const Tokens window = window_around(best, left, p, g_scores, eligible, shared);
    take(window, g_scores, g_best, eligible);
    left -= window.end - window.begin;
    __syncthreads();
  }
  Compaction<C::kOwn> compaction;
  for (uint32_t step = eligible.begin; step < eligible.end; step += C::kThreads * C::kOwn) {
    const uint32_t first = step + threadIdx.x * C::kOwn;
    uint32_t taken[C::kOwn];
#pragma unroll
    for (int i = 0; i < C::kOwn; i++) taken[i] = first + i < eligible.end && g_scores[first + i] == kTaken;
    compaction.next(taken, {0, 0}, shared.compaction, [&](int i, uint32_t index) { g_selected[index] = first + i; });
  }
}

// ---------------------------------------------------------------------------------------------------- entry points

// Each call in the blocks that it has.
#define POOL(name, Config, shared_bytes, body)                                                           \
  SEGATTN_INFO(name, (SegattnKernelInfo{Config::kThreads, (int)(shared_bytes), Config::kBlocks, 0, 0, 0, \
                                        sizeof(SegattnRetrievalCalls)}))                                 \
  SEGATTN_KERNEL(name, Config, SegattnRetrievalCalls) {                                                  \
    const uint32_t blocks = (uint32_t)params.blocks;                                                     \
    const SegattnRetrievalParams call = params.calls[blockIdx.x / blocks];                               \
    body(call, blockIdx.x % blocks);                                                                     \
  }

// Of each call. A thread eight elements: rows * heads * head_dim / 8 threads; heads * group * windows * head_dim / 8.
POOL(pool_append_bf16, WideConfig, 0, pool_append)
POOL(pool_read_bf16, PoolConfig, 0, pool_read)
POOL(pool_keep_bf16, PoolConfig, 0, pool_keep)
POOL(pool_probes_bf16, PoolConfig, 0, pool_probes)
// A thread a block, or a token: heads * score_pitch.
POOL(pool_unwanted_f32, PoolConfig, 0, pool_unwanted)
// A thread eight pairs: heads * max_selected * block_len * head_dim / 16.
POOL(pool_gather_bf16, WideConfig, 0, pool_gather)
// A block a head.
POOL(pool_select_f32, PoolSelectConfig, sizeof(PoolSelectShared), pool_select)
// A block a head and probe.
POOL(pool_lse_f32, LseConfig, sizeof(LseShared), pool_lse)
// A block a head.
POOL(pool_windows_f32, WindowConfig, sizeof(WindowShared), pool_windows)

#define SCORES(name, Config, D) POOL(name##_bf16_d##D, Config<D>, sizeof(ScoreShared<Config<D>>), name<Config<D>>)
#define ALL_SCORES(D)                \
  SCORES(pool_scores, MeanScores, D) \
  SCORES(pool_sums, QueryScores, D)  \
  SCORES(pool_shares, QueryScores, D)
// pool_scores: heads * ceil(blocks / max(1, 128 / block_len)) blocks; pool_sums, pool_shares: heads * tiles.
ALL_SCORES(32)
ALL_SCORES(64)
ALL_SCORES(96)
ALL_SCORES(128)
ALL_SCORES(256)
