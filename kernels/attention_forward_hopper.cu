// Segment attention, forward, for Hopper: the prefill of attention_forward.cu on products of a warpgroup, with the same key
// tiles, chunks and sections and therefore the same bits.
//
// The first warpgroup of a block fetches: its warp w keeps every fourth stage of the ring full, so that a warp waits for nothing
// but its own copies. The others multiply, 64 query rows each. What bounds them is the latency of their own instructions, which
// they hide from each other: so many warpgroups as there are registers for (docs/kernels.md).
#include "attention_rows.cuh"
#include "layout.cuh"
#include "warpgroups.cuh"

// 64 rows a warpgroup that multiplies: as many of these as there are registers for (out 64 at D 128, scores 32, weights 16,
// and some 35), so queries are read from shared memory, product by product.
template <class T_, int kHeadDim_>
struct WarpgroupConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kPackGqa = false;
  static constexpr int kConsumerWarpgroups = kHeadDim == 64 ? 4 : 3, kRowTiles = 1, kRows = 64 * kConsumerWarpgroups, kKeys = 64;
  static constexpr int kConsumerWarps = kConsumerWarpgroups * 4, kConsumerThreads = kConsumerWarps * 32;  // that multiply
  static constexpr int kProducerWarps = 4, kProducerThreads = kProducerWarps * 32, kStages = kHeadDim == 64 ? 8 : 4;
  static constexpr int kProducerRegisters = kHeadDim == 64 ? 32 : 56, kConsumerRegisters = kHeadDim == 64 ? 112 : 152;
  static constexpr int kCopyRows = kHeadDim == 64 ? 8 : 32;  // of a tile at a time: the addresses of more need more registers
  static constexpr int kSplitKeys = kChunkKeys * kSectionChunks, kChunkTiles = kChunkKeys / kKeys;
  static constexpr int kColTiles = kKeys / 8, kOutTiles = kHeadDim / 8;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  static_assert(registers_fit(kProducerThreads, kProducerRegisters, kConsumerThreads, kConsumerRegisters), "or the launch waits for ever");
};

template <class C>
struct WarpgroupLaunch {
  static constexpr int kThreads = C::kProducerThreads + C::kConsumerThreads, kBlocks = 1;
};

// The block's n-th work tile and its queries lie at n % 2: one is worked on while the next one is fetched.
struct ForwardWork {
  WorkTile work;
  uint32_t first_iteration;  // the work tile's first step, counted over all work tiles of the block
  bool none;            // there is no work tile any more

  __device__ __forceinline__ int kv_tiles() const { return max(0, work.end_kv_tile - work.first_kv_tile); }
};

template <class C>
struct ForwardShared {
  typename C::QueryTile q[2];
  typename C::KeyTile k[C::kStages], v[C::kStages];
  SourceRows<typename C::T> sources;
  ForwardWork work[2];
  RowState totals[C::kRows];   // of the chunks before the current one
  uint64_t full[2], done[2];   // a work tile and its queries are there; it is finished
  uint64_t k_full[C::kStages], v_full[C::kStages], empty[C::kStages];
};

template <class C>
SEGATTN_FN void start_barriers(ForwardShared<C>& shared) {
  for (int buffer = 0; buffer < 2; buffer++) {
    mbarrier_init(&shared.full[buffer], C::kProducerThreads);
    mbarrier_init(&shared.done[buffer], C::kConsumerWarps);
  }
  for (int stage = 0; stage < C::kStages; stage++) {
    mbarrier_init(&shared.k_full[stage], 32);
    mbarrier_init(&shared.v_full[stage], 32);
    mbarrier_init(&shared.empty[stage], C::kConsumerWarps);
  }
  fence_mbarrier_init();
}

// ---------------------------------------------------------------------------------------------------- the producer warps

// The block's next work tile that is there (tiles have fewer work tiles than the longest), the first without asking.
template <class C>
SEGATTN_FN void find_work(const SegattnForwardParams& p, ForwardWork& buffer, const ForwardWork& before, bool first) {
  const uint32_t work_tiles = (uint32_t)p.max_splits * p.tiles * p.problem.q_heads * p.problem.batch;
  buffer.first_iteration = first ? 0 : before.first_iteration + before.kv_tiles();
  do {
    const uint32_t index = first ? blockIdx.x : gridDim.x + atomic_add(p.work_counter, 1);
    first = false;
    buffer.none = index >= work_tiles;
    if (buffer.none) return;
    buffer.work = work_tile_at<C::kRows, C::kKeys, C::kSplitKeys>(p.problem, index, p.tiles, 1, p.max_splits);
  } while (buffer.work.split >= buffer.work.splits);
}

// Starts a copy of rows `first`... to a tile, in parts: all at once their addresses would not fit into the registers.
template <class Tile, int kThreads, int kPart, class T>
SEGATTN_FN void copy_in_parts(const Tile& tile, Rows<T> rows, int first, int end, int thread) {
#pragma unroll 1
  for (int row = 0; row < Tile::kRows; row += kPart)
    copy_rows_async<Tile, kThreads, kPart>(shared_address(&tile) + row * Tile::kRowBytes, rows, first + row, end, thread);
  cp_async_commit();
}

template <class C>
SEGATTN_FN void produce(const SegattnForwardParams& p, ForwardShared<C>& shared) {
  using T = typename C::T;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  for (uint32_t n = 0;; n++) {
    ForwardWork& buffer = shared.work[n & 1];
    wait_empty(&shared.done[n & 1], n / 2);
    if (thread == 0) find_work<C>(p, buffer, shared.work[~n & 1], n == 0);
    barrier_sync<C::kProducerThreads>(1);
    if (buffer.none) {
      mbarrier_arrive(&shared.full[n & 1]);
      return;
    }
    const WorkTile& work = buffer.work;
    shared.sources.fill(p.problem, work.batch_index, work.head / (p.problem.q_heads / p.problem.kv_heads), thread);
    barrier_sync<C::kProducerThreads>(1);
    copy_in_parts<typename C::QueryTile, C::kProducerThreads, 64>(shared.q[n & 1], Rows<const T>::of(p.problem.q, work.batch_index, work.head),
                                                                  work.query_tile * C::kRows, work.query_rows, thread);
    signal_landed<0>(&shared.full[n & 1]);
    for (int i = (warp - buffer.first_iteration) % C::kProducerWarps; i < buffer.kv_tiles(); i += C::kProducerWarps) {
      const KeyTile tile = work.keys.template tile<C::kKeys>(work.first_kv_tile + i);
      const uint32_t iteration = buffer.first_iteration + i, stage = iteration % C::kStages;
      wait_empty(&shared.empty[stage], iteration / C::kStages);
      copy_in_parts<typename C::KeyTile, 32, C::kCopyRows>(shared.k[stage], shared.sources.k[tile.source], tile.first, tile.end, lane);
      copy_in_parts<typename C::KeyTile, 32, C::kCopyRows>(shared.v[stage], shared.sources.v[tile.source], tile.first, tile.end, lane);
      signal_landed<1>(&shared.k_full[stage]);
      signal_landed<0>(&shared.v_full[stage]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- the consumer warps

// An work tile as a warpgroup sees it: the same numbers in all of a warp's lanes.
template <class C>
struct KvRange {
  int first_kv_tile, end_kv_tile;  // of the key list; beyond the end none of the warpgroup's rows sees anything
  int work_end;
  uint32_t first_iteration;                      // the ring's number of first_step
  int work_buffer, first_row;                     // where the work tile and its queries lie; the warpgroup's first row of them
  int past_tiles;
  int partial_past_tile, partial_prior_tile, first_masked;  // tiles of which a row does not see all: two, and all from one on

  SEGATTN_FN KvRange of(const ForwardWork& buffer, int work_buffer, int warp) {
    const WorkTile& work = buffer.work;
    const KeyList& keys = work.keys;
    const int first_row = warp / 4 * 64, first = work.query_tile * C::kRows + first_row, last = min(first + 64, work.query_rows) - 1;
    const int position = keys.query_start + work.query_tile * C::kRows + warp * 16;  // of the warp's first row
    const int past = ceil_div(keys.past_len, C::kKeys), prior = ceil_div(keys.prior_len, C::kKeys);
    const int end = first <= last ? min(work.end_kv_tile, keys.template tiles_of<C::kKeys>(keys.query_start + last)) : 0;
    return {uniform(work.first_kv_tile), uniform(max(end, work.first_kv_tile)), uniform(max(work.end_kv_tile, work.first_kv_tile)),
            (uint32_t)uniform(buffer.first_iteration), uniform(work_buffer), uniform(first_row), past,
            keys.past_len % C::kKeys ? past - 1 : -1, keys.prior_len % C::kKeys ? past + prior - 1 : -1,
            past + prior + min(position + 1, keys.segment_len) / C::kKeys};
  }
  __device__ __forceinline__ bool masked(int kv_tile) const { return kv_tile == partial_past_tile || kv_tile == partial_prior_tile || kv_tile >= first_masked; }
  __device__ __forceinline__ uint32_t iteration(int kv_tile) const { return first_iteration + (kv_tile - first_kv_tile); }
};

// s = q k^T, begun.
template <class C>
SEGATTN_FN void issue_qk(float (&s)[C::kColTiles][4], ForwardShared<C>& shared, const KvRange<C>& range, int kv_tile) {
  const uint32_t iteration = range.iteration(kv_tile), stage = iteration % C::kStages;
  mbarrier_wait(&shared.k_full[stage], phase(iteration / C::kStages));
  wgmma_fence();
  wgmma_ss<typename C::T, typename C::QueryTile, typename C::KeyTile>(s, shared_address(&shared.q[range.work_buffer]), range.first_row, shared_address(&shared.k[stage]));
  wgmma_commit();
}

// out += p v, begun.
template <class C>
SEGATTN_FN void issue_pv(float (&out)[C::kOutTiles][4], const uint32_t (&probs)[C::kColTiles / 2][4], ForwardShared<C>& shared,
                             const KvRange<C>& range, int kv_tile) {
  const uint32_t iteration = range.iteration(kv_tile), stage = iteration % C::kStages;
  mbarrier_wait(&shared.v_full[stage], phase(iteration / C::kStages));
  wgmma_fence();
  wgmma_rs_mn_major<typename C::T, typename C::KeyTile>(out, probs, shared_address(&shared.v[stage]));
  wgmma_commit();
}

// Scores to weights, which stay where the scores were; factors for what was accumulated before.
template <class C>
SEGATTN_FN void mask_and_softmax(float (&s)[C::kColTiles][4], float (&factor)[2], RowState (&rows)[2], const WorkTile& work, const KvRange<C>& range,
                             int kv_tile, int first_row, float gate, float scale, int lane) {
  if (range.masked(kv_tile)) mask_rows<C>(s, work, work.keys.template tile<C::kKeys>(kv_tile), first_row, 1, lane);
  const float bias = kv_tile < range.past_tiles ? gate : 0.f;
#pragma unroll
  for (int half = 0; half < 2; half++) factor[half] = softmax_row(s, half, rows[half], scale, bias);
}

// A warpgroup's part of a work tile, which is not empty. Scores of the next tile are begun before the values of this one.
template <class C>
SEGATTN_FN void mainloop(Accumulator<C>& acc, ForwardShared<C>& shared, const WorkTile& work, const KvRange<C>& range, int first_row, float* chunk_totals,
                              float scale, int thread) {
  const int lane = thread & 31;
  const float gate = work.keys.gate_log2;
  float(&out)[C::kOutTiles][4] = acc.out[0];
  float s[C::kColTiles][4], factor[2];
  uint32_t probs[C::kColTiles / 2][4];
  const auto softmax = [&](int kv_tile) {
    mask_and_softmax<C>(s, factor, acc.rows[0], work, range, kv_tile, first_row, gate, scale, lane);
    fence_operand(s);
  };
  issue_qk<C>(s, shared, range, range.first_kv_tile);
  wgmma_wait<0>();
  for (int kv_tile = range.first_kv_tile;; kv_tile++) {
    softmax(kv_tile);
    pack_operands<typename C::T>(probs, s);
    const int end = min(range.end_kv_tile, kv_tile + C::kChunkTiles);
    const bool first = kv_tile == range.first_kv_tile;
    for (; kv_tile + 1 < end; kv_tile++) {
      fence_operand(out);
      fence_operand(s);
      issue_qk<C>(s, shared, range, kv_tile + 1);
      issue_pv<C>(out, probs, shared, range, kv_tile);
      wgmma_wait<1>();
      softmax(kv_tile + 1);
      wgmma_wait<0>();
      release(&shared.empty[range.iteration(kv_tile) % C::kStages], lane);
      pack_operands<typename C::T>(probs, s);
      rescale(out, factor);
    }
    const bool last = end == range.end_kv_tile;
    fence_operand(out);
    fence_operand(s);
    if (last) {  // the wait stands in both branches, or ptxas lets no product overlap another
      issue_pv<C>(out, probs, shared, range, kv_tile);
      wgmma_wait<0>();
    } else {
      issue_qk<C>(s, shared, range, end);
      issue_pv<C>(out, probs, shared, range, kv_tile);
      wgmma_wait<0>();
    }
    release(&shared.empty[range.iteration(kv_tile) % C::kStages], lane);
    merge_chunk<C>(acc, shared.totals + first_row, chunk_totals, first, last, thread);
    if (last) return;
    acc.clear();
  }
}

template <class C>
SEGATTN_FN void store_final_rows(const SegattnForwardParams& p, const WorkTile& work, Accumulator<C>& acc, int first_row, int lane) {
  finish_rows<C>(p, work, acc, first_row, lane);
  const int query = work.query_tile * C::kRows + first_row + lane / 4;
  store_rows(acc.out[0], 1.f, Rows<typename C::T>::of(p.out, work.batch_index, work.head), query, work.query_rows, (int)p.problem.q.rows, lane);
}

template <class C>
SEGATTN_FN void consume(const SegattnForwardParams& p, ForwardShared<C>& shared) {
  const int thread = threadIdx.x - C::kProducerThreads, lane = thread & 31, warp = thread >> 5, first_row = warp * 16;
  const float scale = scale_log2(p.problem.scale);
  float* chunk_totals = p.chunk_totals + (int64_t)blockIdx.x * (C::kRows * C::kHeadDim);
  for (uint32_t n = 0;; n++) {
    mbarrier_wait(&shared.full[n & 1], phase(n / 2));
    if (shared.work[n & 1].none) return;
    const WorkTile& work = shared.work[n & 1].work;
    const KvRange<C> range = KvRange<C>::of(shared.work[n & 1], n & 1, warp);
    if (p.problem.scale < 0.f) {
      negate_queries<C>(shared.q[n & 1], warp, lane);
      fence_proxy_async_shared();
      barrier_sync<128>(2 + warp / 4);
    }
    Accumulator<C> acc;
    acc.clear();
    if (range.first_kv_tile < range.end_kv_tile) mainloop<C>(acc, shared, work, range, first_row, chunk_totals, scale, thread);
    // Not before the tile is there: the release would count for the one that another warpgroup still reads.
    for (int kv_tile = range.end_kv_tile; kv_tile < range.work_end; kv_tile++) {
      const uint32_t iteration = range.iteration(kv_tile), stage = iteration % C::kStages;
      mbarrier_wait(&shared.v_full[stage], phase(iteration / C::kStages));
      release(&shared.empty[stage], lane);
    }
    if (work.splits > 1)
      store_partial<C>(p, work, acc, first_row, lane);
    else
      store_final_rows<C>(p, work, acc, first_row, lane);
    release(&shared.done[n & 1], lane);
  }
}

template <class C>
SEGATTN_FN void attention_forward_hopper(const SegattnForwardParams& p) {
  ForwardShared<C>& shared = *(ForwardShared<C>*)shared_memory();
  if (threadIdx.x == 0) start_barriers(shared);
  __syncthreads();
  if (threadIdx.x < C::kProducerThreads) {
    setmaxnreg_decrease<C::kProducerRegisters>();
    produce<C>(p, shared);
  } else {
    setmaxnreg_increase<C::kConsumerRegisters>();
    consume<C>(p, shared);
  }
}

template <class C>
constexpr SegattnKernelInfo forward_info() {
  return {WarpgroupLaunch<C>::kThreads, (int)sizeof(ForwardShared<C>), 1, C::kRows, C::kKeys, C::kSplitKeys, (int)sizeof(SegattnForwardParams)};
}

#define FORWARD(name, T, kHeadDim)                                                                                \
  using Config_##name = WarpgroupConfig<T, kHeadDim>;                                                             \
  SEGATTN_INFO(attention_prefill_hopper_##name, forward_info<Config_##name>())                                    \
  SEGATTN_KERNEL(attention_prefill_hopper_##name, WarpgroupLaunch<Config_##name>, SegattnForwardParams) {         \
    attention_forward_hopper<Config_##name>(params);                                                              \
  }                                                                                                               \
  SEGATTN_INFO(combine_prefill_hopper_##name, kCombineInfo)                                                       \
  SEGATTN_KERNEL(combine_prefill_hopper_##name, CombineConfig, SegattnForwardParams) {                            \
    attention_combine<Config_##name>(params);                                                                     \
  }

FORWARD(bf16_d64, Bf16, 64)
FORWARD(bf16_d128, Bf16, 128)
FORWARD(f16_d64, F16, 64)
FORWARD(f16_d128, F16, 128)

SEGATTN_LAYOUT(attention_forward_hopper)
