// Segment attention, forward, for Hopper: the prefill of attention_forward.cu on wgmma. Key tiles, chunks and
// sections are the same, and a wgmma has the bits of a chain of m16n8k16, so the results have the same bits.
//
//   producer warps:  next work tile -> q (two buffers); K and V of each key tile -> ring
//   consumer warps:  S = Q K^T (SS), softmax in registers, O += P V (RS); S of the next key tile is issued before P V
//                    of this one
//
// The kernel is bound by the latency of a warp's own instructions, which other warpgroups hide. So there are as many
// consumer warpgroups as the registers allow (docs/kernels.md).
#include "attention_rows.cuh"
#include "layout.cuh"
#include "warp_specialization.cuh"
#include "warpgroups.cuh"

// A consumer warpgroup has 64 query rows. Registers of a consumer at D 128: O 64, S 32, P 16, and some 35 others. Q
// does not fit beside them and is read from shared memory by each product.
template <class T_, int kHeadDim>
struct ForwardConfig : WarpSpecialization<kHeadDim, kHeadDim == 64 ? 4 : 3, kHeadDim == 64 ? 8 : 4,
                                          kHeadDim == 64 ? 32 : 56, kHeadDim == 64 ? 112 : 152> {
  using T = T_;
  static constexpr bool kPackGqa = false;
  static constexpr int kRowTiles = 1, kRows = 64 * ForwardConfig::kConsumerWarpgroups, kKeys = 64;
  // Rows of a tile that are copied at a time: the addresses of more take more registers than a producer has.
  static constexpr int kCopyRows = kHeadDim == 64 ? 8 : 32;
  static constexpr int kSplitKeys = kChunkKeys * kSectionChunks, kChunkTiles = kChunkKeys / kKeys;
  static constexpr int kColTiles = kKeys / 8;
  using QueryTile = Tile<T, kRows, kHeadDim>;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  static_assert(kKeys == tile_keys(kHeadDim),
                "rows have the bits of the other forward kernels only on the same key tiles");
  static_assert(kChunkKeys % kKeys == 0, "a chunk is made of whole key tiles");
  static_assert(kCopyRows % 8 == 0 && kKeys % kCopyRows == 0, "a tile is copied in whole periods of the swizzle");
};

template <class C>
struct ForwardLaunch {
  static constexpr int kThreads = C::kProducerThreads + C::kConsumerThreads, kBlocks = 1;
};

// The block's n-th work tile and its queries lie in buffer n % 2: one is computed while the next one is copied.
constexpr int kWorkBuffers = 2;
static_assert(kWorkBuffers == 2, "~n % kWorkBuffers is the other buffer only if there are two");

struct ForwardWork {
  WorkTile work;
  uint32_t first_iteration;  // of the K and V ring
  bool none;                 // no work tile is left

  __device__ __forceinline__ int kv_tiles() const { return max(0, work.end_kv_tile - work.first_kv_tile); }
};

// Parts of a stage of the K and V ring.
enum KvPart { kKeyPart, kValuePart };

template <class C>
struct ForwardShared {
  typename C::QueryTile q[kWorkBuffers];
  typename C::KeyTile k[C::kStages], v[C::kStages];
  SourceRows<typename C::T> sources;
  ForwardWork work[kWorkBuffers];
  RowState totals[C::kRows];  // of the chunks before the current one
  Ring<kWorkBuffers> work_ring;
  Ring<C::kStages, 2> kv_ring;

  __device__ __forceinline__ void init_barriers() {
    work_ring.init(C::kProducerThreads, C::kConsumerWarps);
    kv_ring.init(32, C::kConsumerWarps);
  }
};

// ---------------------------------------------------------------------------------------------------- producer warps

template <class C>
SEGATTN_FN void find_work(const SegattnForwardParams& p, ForwardWork& buffer, const ForwardWork& before, bool first) {
  buffer.first_iteration = first ? 0 : before.first_iteration + before.kv_tiles();
  buffer.none = !next_query_work<C>(p, buffer.work, first);
}

// Starts copying rows `first`... to a tile, kPart rows at a time.
template <class Tile, int kThreads, int kPart, class T>
SEGATTN_FN void copy_in_parts(const Tile& tile, Rows<T> rows, int first, int end, int thread) {
#pragma unroll 1
  for (int row = 0; row < Tile::kRows; row += kPart)
    copy_rows_async<Tile, kThreads, kPart>(shared_address(&tile) + row * Tile::kRowBytes, rows, first + row, end,
                                           thread);
  cp_async_commit();
}

// K and V of a work tile, each warp every kProducerWarps-th key tile: so a warp waits for no copies but its own.
template <class C>
SEGATTN_FN void produce_kv(ForwardShared<C>& shared, const ForwardWork& buffer, int warp, int lane) {
  using KT = typename C::KeyTile;
  const WorkTile& work = buffer.work;
  auto& ring = shared.kv_ring;
  int i = ring.template iterations_until_turn<C::kProducerWarps>(buffer.first_iteration, warp);
  for (; i < buffer.kv_tiles(); i += C::kProducerWarps) {
    const KeyTile tile = work.keys.template tile<C::kKeys>(work.first_kv_tile + i);
    const uint32_t iteration = buffer.first_iteration + i, stage = ring.stage(iteration);
    const auto &k = shared.sources.k[tile.source], &v = shared.sources.v[tile.source];
    ring.wait_empty(iteration);
    copy_in_parts<KT, 32, C::kCopyRows>(shared.k[stage], k, tile.first, tile.end, lane);
    copy_in_parts<KT, 32, C::kCopyRows>(shared.v[stage], v, tile.first, tile.end, lane);
    ring.template arrive<1>(iteration, kKeyPart);
    ring.template arrive<0>(iteration, kValuePart);
  }
}

template <class C>
SEGATTN_FN void produce(const SegattnForwardParams& p, ForwardShared<C>& shared) {
  using T = typename C::T;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  for (uint32_t n = 0;; n++) {
    ForwardWork& buffer = shared.work[n % kWorkBuffers];
    shared.work_ring.wait_empty(n);
    if (thread == 0) find_work<C>(p, buffer, shared.work[~n % kWorkBuffers], n == 0);
    sync_producers<C>();
    if (buffer.none) return shared.work_ring.arrive_without_copies(n);
    const WorkTile& work = buffer.work;
    const int kv_head = work.head / (p.problem.q_heads / p.problem.kv_heads);
    shared.sources.fill(p.problem, work.batch_index, kv_head, thread);
    sync_producers<C>();
    const Rows<const T> queries = Rows<const T>::of(p.problem.q, work.batch_index, work.head);
    copy_in_parts<typename C::QueryTile, C::kProducerThreads, 64>(shared.q[n % kWorkBuffers], queries,
                                                                  work.query_tile * C::kRows, work.query_rows, thread);
    shared.work_ring.template arrive<0>(n);
    produce_kv(shared, buffer, warp, lane);
  }
}

// ---------------------------------------------------------------------------------------------------- consumer warps

// The key tiles of a work tile as one warpgroup sees them. The same in all lanes of a warp.
template <class C>
struct KvRange {
  int first_kv_tile, end_kv_tile;  // from end_kv_tile on no row of the warpgroup sees a key
  int work_end;                    // end of the work tile: the warpgroup releases the stages up to here
  uint32_t first_iteration;        // the ring's iteration of first_kv_tile
  int work_buffer, first_row;      // buffer of the queries, and the warpgroup's first row in it
  int sink_tiles, past_end;        // key tiles [sink_tiles, past_end) are of the past and get the gate
  // Tiles of which some row of the warp may not see all keys: the last one of the sinks, that of past and prior if it
  // is not full (else -1), and all from first_masked on.
  int partial_past_tile, partial_prior_tile, first_masked;

  SEGATTN_FN KvRange of(const ForwardWork& buffer, int work_buffer, int warp) {
    const WorkTile& work = buffer.work;
    const KeyList& keys = work.keys;
    const int first_row = warp / 4 * 64, first = work.query_tile * C::kRows + first_row;
    const int last = min(first + 64, work.query_rows) - 1;
    const int position = keys.query_start + work.query_tile * C::kRows + warp * 16;  // of the warp's first row
    const int sinks = keys.template sink_tiles<C::kKeys>(), past = sinks + keys.template past_tiles<C::kKeys>(),
              prior = past + keys.template prior_tiles<C::kKeys>();
    const int visible = keys.template tiles_of<C::kKeys>(keys.query_start + last);
    const int end = first <= last ? min(work.end_kv_tile, visible) : 0;
    return {uniform(work.first_kv_tile),
            uniform(max(end, work.first_kv_tile)),
            uniform(max(work.end_kv_tile, work.first_kv_tile)),
            (uint32_t)uniform(buffer.first_iteration),
            uniform(work_buffer),
            uniform(first_row),
            sinks,
            past,
            (keys.past_len - keys.sinks) % C::kKeys ? past - 1 : -1,
            keys.prior_len % C::kKeys ? prior - 1 : -1,
            prior + min(position + 1, keys.segment_len) / C::kKeys};
  }
  __device__ __forceinline__ bool masked(int kv_tile) const {
    return kv_tile == sink_tiles - 1 || kv_tile == partial_past_tile || kv_tile == partial_prior_tile ||
           kv_tile >= first_masked;
  }
  __device__ __forceinline__ uint32_t iteration(int kv_tile) const {
    return first_iteration + (kv_tile - first_kv_tile);
  }
};

// Issues S = Q K^T of a key tile.
template <class C>
SEGATTN_FN void issue_qk(float (&s)[C::kColTiles][4], ForwardShared<C>& shared, const KvRange<C>& range, int kv_tile) {
  const uint32_t iteration = range.iteration(kv_tile), stage = shared.kv_ring.stage(iteration);
  shared.kv_ring.wait_full(iteration, kKeyPart);
  wgmma_fence();
  wgmma_ss<typename C::T, typename C::QueryTile, typename C::KeyTile>(
      s, shared_address(&shared.q[range.work_buffer]), range.first_row, shared_address(&shared.k[stage]));
  wgmma_commit();
}

// Issues O += P V of a key tile.
template <class C>
SEGATTN_FN void issue_pv(float (&out)[C::kOutTiles][4], const uint32_t (&probs)[C::kColTiles / 2][4],
                         ForwardShared<C>& shared, const KvRange<C>& range, int kv_tile) {
  const uint32_t iteration = range.iteration(kv_tile), stage = shared.kv_ring.stage(iteration);
  shared.kv_ring.wait_full(iteration, kValuePart);
  wgmma_fence();
  wgmma_rs_mn_major<typename C::T, typename C::KeyTile>(out, probs, shared_address(&shared.v[stage]));
  wgmma_commit();
}

// S to P in place; `factor` is what O and the row sums accumulated so far are multiplied by.
template <class C>
SEGATTN_FN void mask_and_softmax(float (&s)[C::kColTiles][4], float (&factor)[2], RowState (&rows)[2],
                                 const WorkTile& work, const KvRange<C>& range, int kv_tile, int first_row, float gate,
                                 float scale, int lane) {
  if (range.masked(kv_tile)) mask_rows<C>(s, work, work.keys.template tile<C::kKeys>(kv_tile), first_row, 1, lane);
  const float bias = kv_tile >= range.sink_tiles && kv_tile < range.past_end ? gate : 0.f;
#pragma unroll
  for (int half = 0; half < 2; half++) factor[half] = softmax_row(s, half, rows[half], scale, bias);
}

// The key tiles of a warpgroup, at least one. S of tile t + 1 is issued before P V of tile t, so that the softmax of
// t + 1 begins as soon as S is there; P V of t ends before O is rescaled.
template <class C>
SEGATTN_FN void mainloop(Accumulator<C>& acc, ForwardShared<C>& shared, const WorkTile& work, const KvRange<C>& range,
                         int first_row, float* chunk_totals, float scale, int thread) {
  const int lane = thread & 31;
  const float gate = work.keys.gate_log2;
  float (&out)[C::kOutTiles][4] = acc.out[0];
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
      shared.kv_ring.release(range.iteration(kv_tile), lane);
      pack_operands<typename C::T>(probs, s);
      rescale(out, factor);
    }
    const bool last = end == range.end_kv_tile;
    fence_operand(out);
    fence_operand(s);
    // Each branch has a wait of its own: with one wait behind both, ptxas serialises the products.
    if (last) {
      issue_pv<C>(out, probs, shared, range, kv_tile);
      wgmma_wait<0>();
    } else {
      issue_qk<C>(s, shared, range, end);
      issue_pv<C>(out, probs, shared, range, kv_tile);
      wgmma_wait<0>();
    }
    shared.kv_ring.release(range.iteration(kv_tile), lane);
    merge_chunk<C>(acc, shared.totals + first_row, chunk_totals, first, last, thread);
    if (last) return;
    acc.clear();
  }
}

template <class C>
SEGATTN_FN void store_final_rows(const SegattnForwardParams& p, const WorkTile& work, Accumulator<C>& acc,
                                 int first_row, int lane) {
  finish_rows<C>(p, work, acc, first_row, lane);
  const int query = work.query_tile * C::kRows + first_row + lane / 4;
  const auto rows = Rows<typename C::T>::of(p.out, work.batch_index, work.head);
  store_rows(acc.out[0], 1.f, rows, query, work.query_rows, (int)p.problem.q.rows, lane);
}

template <class C>
SEGATTN_FN void consume(const SegattnForwardParams& p, ForwardShared<C>& shared) {
  const int thread = threadIdx.x - C::kProducerThreads, lane = thread & 31, warp = thread >> 5, first_row = warp * 16;
  const float scale = scale_log2(p.problem.scale);
  float* chunk_totals = p.chunk_totals + (int64_t)blockIdx.x * (C::kRows * C::kHeadDim);
  for (uint32_t n = 0;; n++) {
    shared.work_ring.wait_full(n);
    const ForwardWork& buffer = shared.work[n % kWorkBuffers];
    if (buffer.none) return;
    const WorkTile& work = buffer.work;
    const KvRange<C> range = KvRange<C>::of(buffer, n % kWorkBuffers, warp);
    if (p.problem.scale < 0.f) {
      negate_queries<C>(shared.q[n % kWorkBuffers], warp, lane);
      fence_proxy_async_shared();
      sync_consumer_warpgroup<C>(warp / 4);
    }
    Accumulator<C> acc;
    acc.clear();
    if (range.first_kv_tile < range.end_kv_tile)
      mainloop<C>(acc, shared, work, range, first_row, chunk_totals, scale, thread);
    // Key tiles that only other warpgroups see. Wait for `full` before arriving on `empty`; otherwise the arrival
    // counts for the stage's previous iteration.
    for (int kv_tile = range.end_kv_tile; kv_tile < range.work_end; kv_tile++) {
      const uint32_t iteration = range.iteration(kv_tile);
      shared.kv_ring.wait_full(iteration, kValuePart);
      shared.kv_ring.release(iteration, lane);
    }
    if (work.splits > 1) store_partial<C>(p, work, acc, first_row, lane);
    else store_final_rows<C>(p, work, acc, first_row, lane);
    shared.work_ring.release(n, lane);
  }
}

// ---------------------------------------------------------------------------------------------------- entry points

template <class C>
SEGATTN_FN void attention_forward_hopper(const SegattnForwardParams& p) {
  ForwardShared<C>& shared = *(ForwardShared<C>*)shared_memory();
  run_warpgroups<C>(shared, [&] { produce<C>(p, shared); }, [&] { consume<C>(p, shared); });
}

template <class C>
constexpr SegattnKernelInfo forward_info() {
  return {ForwardLaunch<C>::kThreads,       (int)sizeof(ForwardShared<C>), 1, C::kRows, C::kKeys, C::kSplitKeys,
          (int)sizeof(SegattnForwardParams)};
}

#define FORWARD(name, T, kHeadDim)                                                                      \
  using Config_##name = ForwardConfig<T, kHeadDim>;                                                     \
  SEGATTN_INFO(attention_prefill_hopper_##name, forward_info<Config_##name>())                          \
  SEGATTN_KERNEL(attention_prefill_hopper_##name, ForwardLaunch<Config_##name>, SegattnForwardParams) { \
    attention_forward_hopper<Config_##name>(params);                                                    \
  }                                                                                                     \
  SEGATTN_INFO(combine_prefill_hopper_##name, kCombineInfo)                                             \
  SEGATTN_KERNEL(combine_prefill_hopper_##name, CombineConfig, SegattnForwardParams) {                  \
    attention_combine<Config_##name>(params);                                                           \
  }

FORWARD(bf16_d64, Bf16, 64)
FORWARD(bf16_d128, Bf16, 128)
FORWARD(f16_d64, F16, 64)
FORWARD(f16_d128, F16, 128)

SEGATTN_LAYOUT(attention_forward_hopper)
