// Retrieval of past tokens (docs/contract.md, section 2), per KV head that reads the past; no gradient:
//   pool_append   a segment's k (before rotation) and v of the heads named, behind the pool's tokens
//   pool_probes   probe = mean over a window of queries before rotation, in f32, as three bf16 that add up to it
//   pool_scores   score of a block = max over its tokens and all probes of probe . k
//   pool_select     the max_selected best of the eligible blocks, ties to the earlier, in order of position
//   pool_gather   their tokens to the past rows, keys rotated to the positions before end_angle
// Scores: a probe is split into three bf16 whose sum it is, so tensor cores multiply f32 by bf16 without loss and add
// in f32. A score depends only on its probe and key, not on their positions in a tile. Bytes: scores read every key
// once, 2 head_dim a token and head; gather 8 head_dim a token.
#include "pipeline.cuh"
#include "rotation.cuh"
#include "select.cuh"

SEGATTN_FN const SegattnPoolChunk& chunk_of(const SegattnRetrievalParams& p, int64_t token) {
  return p.chunks[(token - p.first_token) / p.chunk_tokens];
}
// Offset of a token's head in its chunk of memory.
SEGATTN_FN int64_t pool_offset(const SegattnRetrievalParams& p, int64_t token, int head) {
  return ((token - p.first_token) % p.chunk_tokens * p.heads + head) * p.head_dim;
}

// ---------------------------------------------------------------------------------------------------- elementwise

// Splits an f32 (24 bits) into three bf16 of 8 bits each.
constexpr int kProbeParts = 3;

struct PoolConfig {
  static constexpr int kThreads = 256, kBlocks = 5;
};

// Row of the ring that holds query t.
SEGATTN_FN int query_row(const SegattnRetrievalParams& p, int t) { return (p.first_query + t) % p.query_capacity; }

// The blocks that lie wholly inside the eligible tokens of a head.
struct Blocks {
  int begin, end;
};
SEGATTN_FN Blocks eligible_blocks(const SegattnRetrievalParams& p, int head) {
  const SegattnPoolHead info = p.head[head];
  return {ceil_div(info.eligible_begin, p.block_len), info.eligible_end / p.block_len};
}

SEGATTN_FN void pool_append(const SegattnRetrievalParams& p) {
  const uint32_t index = thread_index(), head_units = p.head_dim / kVector, row_units = head_units * p.heads;
  const int64_t row = index / row_units;
  if (row >= p.rows) return;
  const int head = index % row_units / head_units, column = index % head_units * kVector;
  const int64_t src = (int64_t)p.head[head].kv_head * p.head_dim + column,
                dst = pool_offset(p, p.token + row, head) + column;
  const SegattnPoolChunk& chunk = chunk_of(p, p.token + row);
  *(uint4*)((Bf16*)chunk.k + dst) = *(const uint4*)(row_of<const Bf16>(p.k, row) + src);
  *(uint4*)((Bf16*)chunk.v + dst) = *(const uint4*)(row_of<const Bf16>(p.v, row) + src);
}

SEGATTN_FN void pool_probes(const SegattnRetrievalParams& p) {
  const uint32_t index = thread_index(), head_units = p.head_dim / kVector, probe = index / head_units;
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
SEGATTN_FN void pool_gather(const SegattnRetrievalParams& p) {
  const int half = p.head_dim / 2;
  const uint32_t index = thread_index(), head_units = half / kVector, slot_rows = p.max_selected * p.block_len;
  const uint32_t row = index / head_units % slot_rows, head = index / head_units / slot_rows;
  if (head >= (uint32_t)p.heads) return;
  const int rows = p.selected_count[head] * p.block_len, pair = index % head_units * kVector;
  const SegattnPoolHead info = p.head[head];
  if (row == 0 && pair == 0 && p.past_len) p.past_len[info.kv_head] = rows;
  if (row >= (uint32_t)rows) return;
  const int64_t token =
      (int64_t)p.selected[(int64_t)head * p.max_selected + row / p.block_len] * p.block_len + row % p.block_len;
  const int64_t src = pool_offset(p, token, head) + pair, dst = (int64_t)info.kv_head * p.head_dim + pair;
  const SegattnPoolChunk& chunk = chunk_of(p, token);
  const Pairs k = load_pairs((const Bf16*)chunk.k + src, 0, half), v = load_pairs((const Bf16*)chunk.v + src, 0, half);
  const int64_t angle = (int64_t)info.end_angle - rows + row;
  store_pairs(row_of<Bf16>(p.k, row) + dst, 0, half, turned(k, p.cos, p.sin, angle * half + pair, 1.f));
  store_pairs(row_of<Bf16>(p.v, row) + dst, 0, half, v);
}

// ---------------------------------------------------------------------------------------------------- scores

// 4 warps x 32 keys against 16 probes at a time: 12 products a k-step for three tiles of probes and two of keys read
// from shared memory. The keys of a tile are read from global memory once, the probes from L2.
template <int kHeadDim_>
struct ScoreConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = 128, kBlocks = kHeadDim == 256 ? 1 : 4;
  static constexpr int kKeys = 128, kWarpKeys = kKeys / 4, kColTiles = kWarpKeys / 8;
  static constexpr int kProbes = 16, kRowChunks = kHeadDim / 8;
  using KeyTile = Tile<Bf16, kKeys, kHeadDim>;
  using ProbeTile = Tile<Bf16, kProbes, kHeadDim>;
};

template <class C>
struct ScoreShared {
  typename C::KeyTile keys;
  typename C::ProbeTile parts[kProbeParts];
  float scores[C::kKeys];
};

// Retrieval blocks that a thread block scores: as many as fit into a tile of keys, at least one.
template <class C>
SEGATTN_FN int blocks_per_tile(int block_len) {
  return max(1, C::kKeys / block_len);
}

// Issues the copies of keys [first, end), a tile of them. Some may lie in a later chunk of memory.
template <class C>
SEGATTN_FN void load_keys(const SegattnRetrievalParams& p, ScoreShared<C>& shared, int head, int64_t first,
                          int64_t end) {
  const SharedAddress tile = shared_address(&shared.keys);
  const int64_t first_chunk = (first - p.first_token) / p.chunk_tokens,
                first_row = (first - p.first_token) - first_chunk * p.chunk_tokens;
  const int64_t pitch = (int64_t)p.heads * C::kHeadDim, head_offset = (int64_t)head * C::kHeadDim;
  const void* g_first = p.chunks[first_chunk].k;
  for (int i = threadIdx.x; i < C::kKeys * C::kRowChunks; i += C::kThreads) {
    const int row = i / C::kRowChunks, column = i % C::kRowChunks;
    const bool valid = first + row < end;
    int64_t chunk = first_chunk, chunk_row = first_row + (valid ? row : 0);
    for (; chunk_row >= p.chunk_tokens; chunk_row -= p.chunk_tokens) chunk++;
    const Bf16* g_key =
        (const Bf16*)(chunk == first_chunk ? g_first : p.chunks[chunk].k) + chunk_row * pitch + head_offset;
    cp_async_16(C::KeyTile::chunk(tile, row, column), g_key + column * 8, valid ? 16 : 0);
  }
}

// Issues the copies of the three parts of 16 probes from `first` on; beyond the end the last probe is repeated.
template <class C>
SEGATTN_FN void load_probes(const SegattnRetrievalParams& p, ScoreShared<C>& shared, int head, int first) {
  const int count = p.group * p.windows;
  for (int i = threadIdx.x; i < kProbeParts * C::kProbes * C::kRowChunks; i += C::kThreads) {
    const int part = i / (C::kProbes * C::kRowChunks), row = i / C::kRowChunks % C::kProbes, column = i % C::kRowChunks;
    const int64_t probe = ((int64_t)part * p.heads + head) * count + min(first + row, count - 1);
    const SharedAddress tile = shared_address(&shared.parts[part]);
    cp_async_16(C::ProbeTile::chunk(tile, row, column), (const Bf16*)p.probes + probe * C::kHeadDim + column * 8, 16);
  }
}

// best = max(best, probe . key) over the thread's rows (probes), for its columns (keys).
template <class C>
SEGATTN_FN void score_tile(float (&best)[C::kColTiles][2], const ScoreShared<C>& shared) {
  using KT = typename C::KeyTile;
  using PT = typename C::ProbeTile;
  const int lane = threadIdx.x & 31, first_key = threadIdx.x / 32 * C::kWarpKeys;
  const SharedAddress keys = b_base<KT>(shared_address(&shared.keys), lane);
  float x[C::kColTiles][4] = {};
#pragma unroll 4
  for (int k = 0; k < C::kHeadDim; k += 16) {
    uint32_t a[kProbeParts][4];
#pragma unroll
    for (int part = 0; part < kProbeParts; part++)
      load_a<PT>(a[part], a_base<PT>(shared_address(&shared.parts[part]), lane), 0, k);
#pragma unroll
    for (int n = 0; n < C::kColTiles; n += 2) {
      uint32_t b[4];
      load_b<KT>(b, keys, first_key + n * 8, k);
#pragma unroll
      for (int part = kProbeParts - 1; part >= 0; part--) {
        mma_16x8x16(x[n], a[part], b[0], b[1], Bf16{});
        mma_16x8x16(x[n + 1], a[part], b[2], b[3], Bf16{});
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) best[n][e] = max_f32(best[n][e], max_f32(x[n][e], x[n][2 + e]));
}

// Scores of the tile's keys, whose copies are in flight, against all probes; the result goes to shared memory.
template <class C>
SEGATTN_FN void score_keys(const SegattnRetrievalParams& p, ScoreShared<C>& shared, int head) {
  float best[C::kColTiles][2];
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++) best[n][0] = best[n][1] = -INFINITY;
  for (int probe = 0; probe < p.group * p.windows; probe += C::kProbes) {
    if (probe > 0) __syncthreads();
    load_probes<C>(p, shared, head, probe);
    cp_async_commit();
    arrive_and_wait<0>();
    score_tile<C>(best, shared);
  }
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < C::kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) best[n][e] = max_f32(best[n][e], shuffle_xor(best[n][e], mask));
      if (lane < 4) shared.scores[threadIdx.x / 32 * C::kWarpKeys + n * 8 + lane * 2 + e] = best[n][e];
    }
}

template <class C>
SEGATTN_FN void pool_scores(const SegattnRetrievalParams& p) {
  ScoreShared<C>& shared = *(ScoreShared<C>*)shared_memory();
  const int tile_blocks = blocks_per_tile<C>(p.block_len), tiles = ceil_div(p.blocks, tile_blocks);
  const int head = blockIdx.x / tiles, first_block = p.first_block + blockIdx.x % tiles * tile_blocks;
  const int eligible_end = eligible_blocks(p, head).end;
  const int end_block = min(min(first_block + tile_blocks, p.first_block + p.blocks), eligible_end);
  if (first_block >= end_block) return;
  const int64_t end = (int64_t)end_block * p.block_len;
  float block_best = -INFINITY;
  for (int64_t first = (int64_t)first_block * p.block_len; first < end; first += C::kKeys) {
    load_keys<C>(p, shared, head, first, end);
    score_keys<C>(p, shared, head);
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

SEGATTN_FN void pool_select(const SegattnRetrievalParams& p) {
  using C = PoolSelectConfig;
  PoolSelectShared& shared = *(PoolSelectShared*)shared_memory();
  const int head = blockIdx.x;
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

// ---------------------------------------------------------------------------------------------------- entry points

#define POOL(name, Config, shared_bytes, body)                                                           \
  SEGATTN_INFO(name, (SegattnKernelInfo{Config::kThreads, (int)(shared_bytes), Config::kBlocks, 0, 0, 0, \
                                        sizeof(SegattnRetrievalParams)}))                                \
  SEGATTN_KERNEL(name, Config, SegattnRetrievalParams) { body(params); }

// A thread eight elements: rows * heads * head_dim / 8 threads; heads * group * windows * head_dim / 8.
POOL(pool_append_bf16, PoolConfig, 0, pool_append)
POOL(pool_probes_bf16, PoolConfig, 0, pool_probes)
// A thread eight pairs: heads * max_selected * block_len * head_dim / 16.
POOL(pool_gather_bf16, PoolConfig, 0, pool_gather)
// A block a head.
POOL(pool_select_f32, PoolSelectConfig, sizeof(PoolSelectShared), pool_select)
// heads * ceil(blocks / max(1, 128 / block_len)) blocks.
POOL(pool_scores_bf16_d32, ScoreConfig<32>, sizeof(ScoreShared<ScoreConfig<32>>), pool_scores<ScoreConfig<32>>)
POOL(pool_scores_bf16_d64, ScoreConfig<64>, sizeof(ScoreShared<ScoreConfig<64>>), pool_scores<ScoreConfig<64>>)
POOL(pool_scores_bf16_d96, ScoreConfig<96>, sizeof(ScoreShared<ScoreConfig<96>>), pool_scores<ScoreConfig<96>>)
POOL(pool_scores_bf16_d128, ScoreConfig<128>, sizeof(ScoreShared<ScoreConfig<128>>), pool_scores<ScoreConfig<128>>)
POOL(pool_scores_bf16_d256, ScoreConfig<256>, sizeof(ScoreShared<ScoreConfig<256>>), pool_scores<ScoreConfig<256>>)
