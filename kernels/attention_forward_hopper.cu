// Segment attention, forward, for Hopper: the prefill of attention_forward.cu on wgmma. Key tiles, chunks and
// sections are the same, and a wgmma has the bits of a chain of m16n8k16, so the results have the same bits.
//
//   producer warps:  next work tile; Q of it, for each consumer warpgroup; K and V of each key tile -> ring. Tiles of
//                    valid rows are bulk copies (TMA), the others cp.async
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
// does not fit beside them and is read from shared memory by each product. Shared memory: Q, the totals of chunks, and
// what is left for tiles of K and V.
template <class T_, int kHeadDim>
struct ForwardConfig : WarpSpecialization<kHeadDim, kHeadDim == 64 ? 4 : 3, kHeadDim == 64 ? 16 : 5,
                                          kHeadDim == 64 ? 32 : 56, kHeadDim == 64 ? 112 : 152> {
  using T = T_;
  static constexpr bool kPackGqa = false;
  static constexpr int kRowTiles = 1, kRows = 64 * ForwardConfig::kConsumerWarpgroups, kKeys = 64;
  // Rows that cp.async copies at a time: the addresses of more take more registers than a producer has.
  static constexpr int kCopyRows = 8;
  static constexpr int kSplitKeys = kChunkKeys * kSectionChunks, kChunkTiles = kChunkKeys / kKeys;
  static constexpr int kColTiles = kKeys / 8;
  using KeyTile = Tile<T, kKeys, kHeadDim>;
  using QueryTile = KeyTile;  // of one consumer warpgroup
  static_assert(kKeys == 64, "a warpgroup's queries, too, are copied as a box of the tensor maps");
  static_assert(ForwardConfig::kStages > 2, "K and V of a tile are copied before either is waited for");
  static_assert(kKeys == tile_keys(kHeadDim),
                "rows have the bits of the other forward kernels only on the same key tiles");
  static_assert(kChunkKeys % kKeys == 0, "a chunk is made of whole key tiles");
  static_assert(kCopyRows % 8 == 0 && kKeys % kCopyRows == 0, "a tile is copied in whole periods of the swizzle");
};

template <class C>
struct ForwardLaunch {
  static constexpr int kThreads = C::kProducerThreads + C::kConsumerThreads, kBlocks = 1;
};

// The block's n-th work tile lies in buffer n % 2: one is computed while the next one is found.
constexpr int kWorkBuffers = 2;
static_assert(kWorkBuffers == 2, "~n % kWorkBuffers is the other buffer only if there are two");

struct ForwardWork {
  WorkTile work;
  uint32_t first_iteration;  // key tiles of the work tiles before
  bool none;                 // no work tile is left

  __device__ __forceinline__ int kv_tiles() const { return max(0, work.end_kv_tile - work.first_kv_tile); }
};

// What a key tile has in the ring.
enum KvPart { kKeyPart, kValuePart, kParts };

// The tensor maps of a launch, in the order of SegattnProblem's tensors: K of a source, followed by its V. The sinks
// are rows of the past.
constexpr int kQueryMap = 0, kMaps = 7;
SEGATTN_FN int key_map(Source source) { return 1 + 2 * (kCurrent - (source == kSinks ? kPast : source)); }

template <class C>
struct ForwardShared {
  typename C::KeyTile q[C::kConsumerWarpgroups];
  typename C::KeyTile kv[C::kStages];
  float4 total_out[C::kOutTiles * C::kConsumerThreads];  // of the chunks before the current one
  RowState total_rows[C::kRows];
  SourceRows<typename C::T> sources;
  int32_t batch_coordinates[kMaps];  // of the work tile's batch element
  ForwardWork work[kWorkBuffers];
  Ring<kWorkBuffers> work_ring;
  Ring<1> q_ring[C::kConsumerWarpgroups];
  // Iterations 2 i and 2 i + 1 are K and V of the i-th key tile.
  Ring<C::kStages> kv_ring;

  __device__ __forceinline__ void init_barriers() {
    work_ring.init(1, C::kConsumerWarps);
    for (auto& ring : q_ring) ring.init(1, 4);
    kv_ring.init(1, C::kConsumerWarps);
  }
};

// ---------------------------------------------------------------------------------------------------- producer warps

template <class C>
SEGATTN_FN void find_work(const SegattnForwardParams& p, ForwardWork& buffer, const ForwardWork& before, bool first) {
  buffer.first_iteration = first ? 0 : before.first_iteration + before.kv_tiles();
  buffer.none = !next_query_work<C>(p, buffer.work, first);
}

// Starts copying rows `first`... to a tile, kCopyRows rows at a time. By all lanes of a warp.
template <class C>
SEGATTN_FN void copy_rows(const typename C::KeyTile& tile, Rows<const typename C::T> rows, int first, int end,
                          int lane) {
  using Tile = typename C::KeyTile;
#pragma unroll 1
  for (int row = 0; row < Tile::kRows; row += C::kCopyRows)
    copy_rows_async<Tile, 32, C::kCopyRows>(shared_address(&tile) + row * Tile::kRowBytes, rows, first + row, end,
                                            lane);
  cp_async_commit();
}

// By one lane: starts the bulk copy of a tile whose rows are all valid.
template <class C, class Ring>
SEGATTN_FN void copy_whole(const typename C::KeyTile& tile, const SegattnTensorMap& map, int first, int head,
                           int batch_coordinate, Ring& ring, uint32_t iteration) {
  const int32_t at[5] = {0, first, 0, head, batch_coordinate};
  tensor_copy(shared_address(&tile), map, at, ring.arrive_before_bytes(iteration, sizeof(tile)));
}

// Q of a work tile, 64 rows for each consumer warpgroup as soon as it has no use for those of the work tile before.
template <class C>
SEGATTN_FN void produce_q(const SegattnHopperForwardParams& p, ForwardShared<C>& shared, const WorkTile& work,
                          uint32_t n, int warp, int lane) {
  constexpr int kWarps = C::kProducerWarps - 1;
  for (int group = warp; group < C::kConsumerWarpgroups; group += kWarps) {
    auto& ring = shared.q_ring[group];
    const int first = work.query_tile * C::kRows + group * 64;
    ring.wait_empty(n);
    if (p.mapped >> kQueryMap & 1 && first + 64 <= work.query_rows) {
      if (lane == 0)
        copy_whole<C>(shared.q[group], p.maps[kQueryMap], first, work.head,
                      p.batch_coordinates[work.batch_index * kMaps + kQueryMap], ring, n);
    } else {
      const auto rows = Rows<const typename C::T>::of(p.forward.problem.q, work.batch_index, work.head);
      copy_rows<C>(shared.q[group], rows, first, work.query_rows, lane);
      ring.template arrive_warp<0>(n, lane);
    }
  }
}

// K and V of a work tile, by one warp. Rows beyond a source's length may hold anything, NaN too, and must become zero:
// so the last tile goes by cp.async, and so do sources without maps.
template <class C>
SEGATTN_FN void produce_kv(const SegattnHopperForwardParams& p, ForwardShared<C>& shared, const ForwardWork& buffer,
                           int lane) {
  const WorkTile& work = buffer.work;
  const SegattnProblem& problem = p.forward.problem;
  const int kv_head = work.head / (problem.q_heads / problem.kv_heads);
  __syncwarp();
  shared.sources.fill(problem, work.batch_index, kv_head, lane);
  if (lane < kMaps) shared.batch_coordinates[lane] = p.batch_coordinates[work.batch_index * kMaps + lane];
  __syncwarp();
  auto& ring = shared.kv_ring;
  for (int i = 0; i < buffer.kv_tiles(); i++) {
    const KeyTile tile = work.keys.template tile<C::kKeys>(work.first_kv_tile + i);
    const uint32_t iteration = (buffer.first_iteration + i) * kParts;
    const int map = key_map(tile.source);
    const bool whole = (p.mapped >> map & 3) == 3 && tile.first + C::kKeys <= tile.end;
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      ring.wait_empty(iteration + part);
      const auto& to = shared.kv[ring.stage(iteration + part)];
      if (!whole) {
        const auto& rows = part == kKeyPart ? shared.sources.k[tile.source] : shared.sources.v[tile.source];
        copy_rows<C>(to, rows, tile.first, tile.end, lane);
      } else if (lane == 0) {
        copy_whole<C>(to, p.maps[map + part], tile.first, kv_head, shared.batch_coordinates[map + part], ring,
                      iteration + part);
      }
    }
    if (whole) continue;
    ring.template arrive_warp<1>(iteration + kKeyPart, lane);
    ring.template arrive_warp<0>(iteration + kValuePart, lane);
  }
}

template <class C>
SEGATTN_FN void produce(const SegattnHopperForwardParams& p, ForwardShared<C>& shared) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  for (uint32_t n = 0;; n++) {
    ForwardWork& buffer = shared.work[n % kWorkBuffers];
    shared.work_ring.wait_empty(n);
    if (thread == 0) {
      find_work<C>(p.forward, buffer, shared.work[~n % kWorkBuffers], n == 0);
      shared.work_ring.arrive_without_copies(n);
    }
    sync_producers<C>();
    if (buffer.none) return;
    if (warp == 0) produce_kv(p, shared, buffer, lane);
    else produce_q(p, shared, buffer.work, n, warp - 1, lane);
  }
}

// ---------------------------------------------------------------------------------------------------- consumer warps

// The key tiles of a work tile as one warpgroup sees them. The same in all lanes of a warp.
template <class C>
struct KvRange {
  int first_kv_tile, end_kv_tile;  // from end_kv_tile on no row of the warpgroup sees a key
  int work_end;                    // end of the work tile: the warpgroup releases the stages up to here
  uint32_t first_iteration;        // key tiles of the block before first_kv_tile
  uint32_t work_index;             // of the work tile among the block's
  int warpgroup;
  int sink_tiles, past_end;  // key tiles [sink_tiles, past_end) are of the past and get the gate
  // Tiles of which some row of the warp may not see all keys: the last one of the sinks, that of past and prior if it
  // is not full (else -1), and all from first_masked on.
  int partial_past_tile, partial_prior_tile, first_masked;

  SEGATTN_FN KvRange of(const ForwardWork& buffer, uint32_t work_index, int warp) {
    const WorkTile& work = buffer.work;
    const KeyList& keys = work.keys;
    const int first = work.query_tile * C::kRows + warp / 4 * 64;
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
            (uint32_t)uniform(work_index),
            uniform(warp / 4),
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
  // The ring's iteration.
  __device__ __forceinline__ uint32_t iteration(int kv_tile, int part) const {
    return (first_iteration + (kv_tile - first_kv_tile)) * kParts + part;
  }
};

// Issues S = Q K^T of a key tile.
template <class C>
SEGATTN_FN void issue_qk(float (&s)[C::kColTiles][4], ForwardShared<C>& shared, const KvRange<C>& range, int kv_tile) {
  const uint32_t iteration = range.iteration(kv_tile, kKeyPart), stage = shared.kv_ring.stage(iteration);
  shared.kv_ring.wait_full(iteration);
  wgmma_fence();
  wgmma_ss<typename C::T, typename C::QueryTile, typename C::KeyTile>(s, shared_address(&shared.q[range.warpgroup]), 0,
                                                                      shared_address(&shared.kv[stage]));
  wgmma_commit();
}

// Issues O += P V of a key tile.
template <class C>
SEGATTN_FN void issue_pv(float (&out)[C::kOutTiles][4], const uint32_t (&probs)[C::kColTiles / 2][4],
                         ForwardShared<C>& shared, const KvRange<C>& range, int kv_tile) {
  const uint32_t iteration = range.iteration(kv_tile, kValuePart), stage = shared.kv_ring.stage(iteration);
  shared.kv_ring.wait_full(iteration);
  wgmma_fence();
  wgmma_rs_mn_major<typename C::T, typename C::KeyTile>(out, probs, shared_address(&shared.kv[stage]));
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
                         int first_row, float scale, int thread) {
  const int lane = thread & 31;
  const float gate = work.keys.gate_log2;
  float (&out)[C::kOutTiles][4] = acc.out[0];
  float s[C::kColTiles][4], factor[2];
  uint32_t probs[C::kColTiles / 2][4];
  const auto softmax = [&](int kv_tile) {
    mask_and_softmax<C>(s, factor, acc.rows[0], work, range, kv_tile, first_row, gate, scale, lane);
    fence_operand(s);
  };
  const auto release = [&](int kv_tile, int part) { shared.kv_ring.release(range.iteration(kv_tile, part), lane); };
  issue_qk<C>(s, shared, range, range.first_kv_tile);
  wgmma_wait<0>();
  release(range.first_kv_tile, kKeyPart);
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
      release(kv_tile + 1, kKeyPart);
      softmax(kv_tile + 1);
      if constexpr (C::kHeadDim == 64) complete_before(acc.rows[0][0].sum + acc.rows[0][1].sum, shared.total_rows);
      wgmma_wait<0>();
      release(kv_tile, kValuePart);
      pack_operands<typename C::T>(probs, s);
      rescale(out, factor);
    }
    const bool last = end == range.end_kv_tile;
    fence_operand(out);
    fence_operand(s);
    // Each branch has a wait of its own: with one wait behind both, ptxas serialises the products.
    if (last) {
      shared.q_ring[range.warpgroup].release(range.work_index, lane);
      issue_pv<C>(out, probs, shared, range, kv_tile);
      wgmma_wait<0>();
    } else {
      issue_qk<C>(s, shared, range, end);
      issue_pv<C>(out, probs, shared, range, kv_tile);
      wgmma_wait<0>();
      release(end, kKeyPart);
    }
    release(kv_tile, kValuePart);
    merge_chunk<C>(acc, shared.total_rows + first_row, shared.total_out, first, last, thread);
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
  store_rows(acc.out[0], 1.f, rows, query, work.query_rows, work.rows, lane);
}

template <class C>
SEGATTN_FN void consume(const SegattnForwardParams& p, ForwardShared<C>& shared) {
  const int thread = threadIdx.x - C::kProducerThreads, lane = thread & 31, warp = thread >> 5, first_row = warp * 16;
  const float scale = scale_log2(p.problem.scale);
  for (uint32_t n = 0;; n++) {
    shared.work_ring.wait_full(n);
    const ForwardWork& buffer = shared.work[n % kWorkBuffers];
    if (buffer.none) return;
    const WorkTile& work = buffer.work;
    const KvRange<C> range = KvRange<C>::of(buffer, n, warp);
    shared.q_ring[range.warpgroup].wait_full(n);
    if (p.problem.scale < 0.f) {
      negate_queries<C>(shared.q[range.warpgroup], warp % 4, lane);
      fence_proxy_async_shared();
      sync_consumer_warpgroup<C>(range.warpgroup);
    }
    Accumulator<C> acc;
    acc.clear();
    if (range.first_kv_tile < range.end_kv_tile) mainloop<C>(acc, shared, work, range, first_row, scale, thread);
    else shared.q_ring[range.warpgroup].release(n, lane);
    // Key tiles that only other warpgroups see. Wait for `full` before arriving on `empty`; otherwise the arrival
    // counts for the stage's previous iteration.
    for (int kv_tile = range.end_kv_tile; kv_tile < range.work_end; kv_tile++) {
      for (int part = 0; part < kParts; part++) {
        const uint32_t iteration = range.iteration(kv_tile, part);
        shared.kv_ring.wait_full(iteration);
        shared.kv_ring.release(iteration, lane);
      }
    }
    if (work.splits > 1) store_partial<C>(p, work, acc, first_row, lane);
    else store_final_rows<C>(p, work, acc, first_row, lane);
    shared.work_ring.release(n, lane);
  }
}

// ---------------------------------------------------------------------------------------------------- entry points

template <class C>
SEGATTN_FN void attention_forward_hopper(const SegattnHopperForwardParams& p) {
  ForwardShared<C>& shared = *(ForwardShared<C>*)shared_memory();
  run_warpgroups<C>(shared, [&] { produce<C>(p, shared); }, [&] { consume<C>(p.forward, shared); });
}

template <class C>
constexpr SegattnKernelInfo forward_info() {
  return {ForwardLaunch<C>::kThreads,
          (int)sizeof(ForwardShared<C>),
          1,
          C::kRows,
          C::kKeys,
          C::kSplitKeys,
          (int)sizeof(SegattnHopperForwardParams)};
}

#define FORWARD(name, T, kHeadDim)                                                                            \
  using Config_##name = ForwardConfig<T, kHeadDim>;                                                           \
  SEGATTN_INFO(attention_prefill_hopper_##name, forward_info<Config_##name>())                                \
  SEGATTN_KERNEL(attention_prefill_hopper_##name, ForwardLaunch<Config_##name>, SegattnHopperForwardParams) { \
    attention_forward_hopper<Config_##name>(params);                                                          \
  }                                                                                                           \
  SEGATTN_INFO(combine_prefill_hopper_##name, kCombineInfo)                                                   \
  SEGATTN_KERNEL(combine_prefill_hopper_##name, CombineConfig, SegattnForwardParams) {                        \
    attention_combine<Config_##name>(params);                                                                 \
  }

FORWARD(bf16_d64, Bf16, 64)
FORWARD(bf16_d128, Bf16, 128)
FORWARD(f16_d64, F16, 64)
FORWARD(f16_d128, F16, 128)

SEGATTN_LAYOUT(attention_forward_hopper)
