// d_q of Hopper's backward: query-stationary, over past, prior and current keys (attention_backward_hopper.cu).
//
//   producer warps:  next work tile -> q, d_out, lse, delta (one buffer); K and V of each key tile -> ring
//   consumer warps:  S = Q K^T (RS), dP = d_out V^T (RS or SS), P and dS in registers, d_q += dS K (RS);
//                    S of the next key tile is issued before d_q of this one is waited for
#pragma once
#include "attention_gradients.cuh"
#include "warp_specialization.cuh"
#include "warpgroups.cuh"

// Work tiles in flight: one being copied, one being computed, one being stored.
constexpr int kWorkBuffers = 4;
static_assert(is_power_of_two(kWorkBuffers) && kWorkBuffers >= 3, "a counter that wraps indexes three live work tiles");

template <class T_, int kHeadDim>
struct QueryGradConfig
    : WarpSpecialization<kHeadDim, 3, kHeadDim == 64 ? 16 : 12, 40, 152> {
  using T = T_;
  static constexpr int kThreads = QueryGradConfig::kProducerThreads + QueryGradConfig::kConsumerThreads, kBlocks = 1;
  static constexpr int kRows = 64 * QueryGradConfig::kConsumerWarpgroups, kKeys = 64;
  static constexpr bool kRegisterA = QueryGradConfig::kConsumerWarpgroups == 2;  // d_out in registers: dP is RS
  static constexpr int kSplitKeys = kChunkKeys * kSectionChunks;
  static constexpr int kColTiles = kKeys / 8;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  static_assert(kSplitKeys % kKeys == 0, "a KV split is made of whole key tiles");
};

struct QueryWork {
  WorkTile work;
  bool none;  // no work tile is left
};

template <class C>
struct QueryGradShared {
  typename C::KeyTile k[C::kStages];
  SourceRows<typename C::T> sources;
  QueryWork work[kWorkBuffers];
  KeyTile tiles[C::kStages];
  float gate_sums[C::kRows][kGateSums];
  Ring<1> row_ring;  // q, d_out, lse and delta
  Ring<C::kStages> kv_ring;

  __device__ __forceinline__ void init_barriers() {
    row_ring.init(C::kProducerThreads, C::kConsumerWarps);
    kv_ring.init(32, C::kConsumerWarps);
  }
};

// ---------------------------------------------------------------------------------------------------- producer warps

template <class C>
SEGATTN_FN void find_work(const SegattnBackwardParams& p, QueryWork& buffer, bool first) {
  buffer.none = !next_query_work<C>(p, buffer.work, first);
}

// Fills the ring's stage of `iteration` with key tile `kv_tile`.
template <class C>
SEGATTN_FN void produce_kv_tile(QueryGradShared<C>& shared, const WorkTile& work, int kv_tile, uint32_t iteration,
                                int lane) {
  using KT = typename C::KeyTile;
  const KeyTile tile = work.keys.template tile<C::kKeys>(kv_tile);
  const uint32_t stage = shared.kv_ring.stage(iteration);
  const auto &k = shared.sources.k[tile.source];
  shared.kv_ring.wait_empty(iteration);
  copy_rows_async<KT, 32>(shared_address(&shared.k[stage]), k, tile.first, tile.end, lane);
  cp_async_commit();
  if (lane == 0) shared.tiles[stage] = tile;
  shared.kv_ring.template arrive<0>(iteration);
}

template <class C>
SEGATTN_FN void produce_query_grad(const SegattnBackwardParams& p, QueryGradShared<C>& shared) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  uint32_t first_iteration = 0;  // of the work tile, on the K and V ring
  if (thread == 0) find_work<C>(p, shared.work[0], true);
  for (uint32_t n = 0;; n++) {
    sync_producers<C>();
    const QueryWork& buffer = shared.work[n % kWorkBuffers];
    if (buffer.none) {
      shared.row_ring.wait_empty(n);
      return shared.row_ring.arrive_without_copies(n);
    }
    const WorkTile& work = buffer.work;
    const int kv_head = work.head / (p.problem.q_heads / p.problem.kv_heads);
    shared.sources.fill(p.problem, work.batch_index, kv_head, thread);
    sync_producers<C>();
    shared.row_ring.wait_empty(n);
    shared.row_ring.arrive_without_copies(n);
    const int kv_tiles = max(0, work.end_kv_tile - work.first_kv_tile);
    const int own = shared.kv_ring.template iterations_until_turn<C::kProducerWarps>(first_iteration, warp);
    const auto produce = [&](int i) {
      produce_kv_tile<C>(shared, work, work.first_kv_tile + i, first_iteration + i, lane);
    };
    if (own < kv_tiles) produce(own);
    // One thread finds the next work tile while the key tiles copied so far are in use.
    if (thread == 0) find_work<C>(p, shared.work[(n + 1) % kWorkBuffers], false);
    __syncwarp();
    for (int i = own + C::kProducerWarps; i < kv_tiles; i += C::kProducerWarps) produce(i);
    first_iteration += kv_tiles;
  }
}

// ---------------------------------------------------------------------------------------------------- consumer warps

// Masks S of a key tile: the thread's upper row sees `limit` keys of the tile, the lower one `below`. The sign makes
// P 0 for either sign of the scale.
template <int kColTiles>
SEGATTN_FN void mask_keys(float (&s)[kColTiles][4], int limit, int below, float scale, int lane) {
  const float masked_score = scale < 0.f ? INFINITY : -INFINITY;
#pragma unroll
  for (int n = 0; n < kColTiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (n * 8 + lane % 4 * 2 + e % 2 >= (e < 2 ? limit : below)) s[n][e] = masked_score;
}

// A warpgroup's iterations of a work tile, from `iteration` to `end`, and its valid queries.
template <class C>
struct KvIterator {
  QueryGradShared<C>& shared;
  uint32_t iteration, end;
  int first_query, last_query;
  int lane;

  __device__ __forceinline__ int stage() const { return uniform(shared.kv_ring.stage(iteration)); }
  // Moves to the next iteration whose keys some row of the warpgroup sees and waits for it; releases those before.
  // False: there is none.
  __device__ __forceinline__ bool seek() {
    for (; iteration != end; iteration++) {
      shared.kv_ring.wait_full(iteration);
      const KeyTile& tile = shared.tiles[shared.kv_ring.stage(iteration)];
      if (last_query >= first_query && (tile.source != kCurrent || tile.first <= last_query)) return true;
      shared.kv_ring.release(iteration, lane);
    }
    return false;
  }
};


__device__ __forceinline__ uint32_t transpose8(uint32_t x) { uint32_t y; asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x)); return y; }
__device__ __forceinline__ uint4 load_once(const uint4* p) { uint4 v; asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }

template <class C>
SEGATTN_FN void load_ds(uint4 (&w)[4], const uint4* tile, bool there) {
#pragma unroll
  for (int s = 0; s < 4; s++) w[s] = there ? load_once(tile + s * 32) : make_uint4(0, 0, 0, 0);
}
SEGATTN_FN void transpose_ds(uint32_t (&a)[4][4], const uint4 (&w)[4]) {
#pragma unroll
  for (int s = 0; s < 4; s++) a[s][0] = transpose8(w[s].x), a[s][1] = transpose8(w[s].z), a[s][2] = transpose8(w[s].y), a[s][3] = transpose8(w[s].w);
}

template <class C>
SEGATTN_FN void query_grad_mainloop(float (&d_q)[C::kOutTiles][4], QueryGradShared<C>& shared, const uint4* tiles,
                                    uint32_t iteration, int count, int total, int lane) {
  using T = typename C::T;
  using KT = typename C::KeyTile;
  constexpr int kAhead = 3;
  uint4 w[kAhead][4];
#pragma unroll
  for (int j = 0; j < kAhead; j++) load_ds<C>(w[j], tiles + 512 * j, count > j);
  uint32_t operand[4][4];
#pragma unroll 1
  for (int i = 0; i < count; i += kAhead) {
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      if (i + j >= count) break;
      shared.kv_ring.wait_full(iteration + i + j);
      wgmma_wait<0>();
      if (i + j > 0) shared.kv_ring.release(iteration + i + j - 1, lane);
      transpose_ds(operand, w[j]);
      load_ds<C>(w[j], tiles + (i + j + kAhead) * 512, i + j + kAhead < count);
      wgmma_fence();
      wgmma_rs_mn_major<T, KT>(d_q, operand, shared_address(&shared.k[uniform(shared.kv_ring.stage(iteration + i + j))]));
      wgmma_commit();
    }
  }
  int i;
  wgmma_wait<0>();
  if (count > 0) shared.kv_ring.release(iteration + count - 1, lane);
  for (i = count; i < total; i++) {
    shared.kv_ring.wait_full(iteration + i);
    shared.kv_ring.release(iteration + i, lane);
  }
}

// d_q of a thread's rows `query` and query + 8, or the KV split's partial result.
template <class C>
SEGATTN_FN void store_query_grad(const SegattnBackwardParams& p, const float (&d_q)[C::kOutTiles][4],
                                 const WorkTile& work, int query, int lane) {
  const int rows = (int)p.problem.q.rows;
  if (work.splits == 1) {
    const auto target = Rows<typename C::T>::of(p.d_q, work.batch_index, work.head);
    return store_rows(d_q, p.problem.scale, target, query, work.query_rows, rows, lane);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (query + half * 8 >= rows) continue;
    const int64_t row = partial_row(p.problem, work.split, work.batch_index, work.head, query + half * 8);
    float2* out = (float2*)(p.partial_d_q + row * C::kHeadDim);
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n++) out[n * 4 + lane % 4] = make_float2(d_q[n][half * 2], d_q[n][half * 2 + 1]);
  }
}

template <class C>
SEGATTN_FN void consume_query_grad(const SegattnBackwardParams& p, QueryGradShared<C>& shared) {
  using QT = typename C::QueryTile;
  const int thread = threadIdx.x - C::kProducerThreads, lane = thread & 31;
  const int warp_row = thread / 32 * 16, row = warp_row + lane / 4;
  uint32_t first_iteration = 0;
  for (uint32_t n = 0;; n++) {
    shared.row_ring.wait_full(n);
    if (shared.work[n % kWorkBuffers].none) return;
    const WorkTile& work = shared.work[n % kWorkBuffers].work;
    float d_q[C::kOutTiles][4];
    clear(d_q);
    const int first = work.query_tile * C::kRows, group = thread / 128 * 64;
    const int total = max(0, work.end_kv_tile - work.first_kv_tile);
    const int last_query = min(first + group + 64, work.query_rows) - 1;
    const int count = last_query < first + group ? 0 : min(total, max(0, work.keys.template tiles_of<C::kKeys>(last_query) - work.first_kv_tile));
    const int key_tiles = ceil_div((int)p.problem.prior_k.rows, 64) + ceil_div((int)p.problem.k.rows, 64), query_tiles = ceil_div((int)p.problem.q.rows, 64);
    const uint4* tiles = (const uint4*)p.d_past_gate + (((int64_t)(work.batch_index * p.problem.q_heads + work.head) * query_tiles + (first + group) / 64) * key_tiles + work.first_kv_tile) * 512 + thread % 128 / 32 * 128 + lane;
    query_grad_mainloop<C>(d_q, shared, tiles, first_iteration, count, total, lane);
    first_iteration += total;
    shared.row_ring.release(n, lane);
    store_query_grad<C>(p, d_q, work, first + row, lane);
  }
}

template <class C>
SEGATTN_FN void attention_query_grad(const SegattnBackwardParams& p) {
  QueryGradShared<C>& shared = *(QueryGradShared<C>*)shared_memory();
  run_warpgroups<C>(shared, [&] { produce_query_grad<C>(p, shared); }, [&] { consume_query_grad<C>(p, shared); });
}

template <class C>
constexpr SegattnKernelInfo query_grad_info() {
  return {C::kThreads,   (int)sizeof(QueryGradShared<C>),   C::kBlocks, C::kRows, C::kKeys,
          C::kSplitKeys, (int)sizeof(SegattnBackwardParams)};
}
