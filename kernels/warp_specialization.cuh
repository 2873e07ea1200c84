// The roles of a block's warps on Hopper. The first warpgroup produces: its warps copy tiles from global memory into
// the stages of a ring (ring.cuh) and need few registers. The other warpgroups consume: each issues the wgmma
// products of 64 rows, with the registers that the producers gave up. A block stays on its multiprocessor and takes
// work tiles from a counter.
#pragma once
#include "ring.cuh"
#include "tile.cuh"
#include "work_tiles.cuh"

// Registers of a multiprocessor and the most shared memory of a block, compute capability 9.0.
constexpr int kMultiprocessorRegisters = 65536, kMaxSharedBytes = 227 * 1024;

// A block is launched with the same number of registers for each thread, a multiple of 8. setmaxnreg only moves them.
constexpr bool registers_fit(int producer_threads, int producer, int consumer_threads, int consumer) {
  const int threads = producer_threads + consumer_threads, each = kMultiprocessorRegisters / threads / 8 * 8;
  return producer_threads * producer + consumer_threads * consumer <= threads * each;
}
constexpr bool is_register_count(int count) { return count % 8 == 0 && count >= 24 && count <= 256; }

// What the configurations of Hopper's kernels have in common.
template <int kHeadDim_, int kConsumerWarpgroups_, int kStages_, int kProducerRegisters_, int kConsumerRegisters_>
struct WarpSpecialization {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kProducerWarps = 4, kProducerThreads = kProducerWarps * 32;
  static constexpr int kConsumerWarpgroups = kConsumerWarpgroups_;
  static constexpr int kConsumerWarps = kConsumerWarpgroups * 4, kConsumerThreads = kConsumerWarps * 32;
  static constexpr int kProducerRegisters = kProducerRegisters_, kConsumerRegisters = kConsumerRegisters_;
  static constexpr int kStages = kStages_;
  static constexpr int kKBlocks = kHeadDim / 16, kOutTiles = kHeadDim / 8;

  static_assert(kHeadDim == 64 || kHeadDim == 128, "wgmma is instantiated for 64 and 128 columns, in panels of 64");
  static_assert(kProducerWarps == 4, "setmaxnreg acts on a whole warpgroup");
  static_assert(is_register_count(kProducerRegisters) && is_register_count(kConsumerRegisters),
                "setmaxnreg takes a multiple of 8 from 24 to 256");
  static_assert(registers_fit(kProducerThreads, kProducerRegisters, kConsumerThreads, kConsumerRegisters),
                "setmaxnreg would deadlock: register budget exceeded");
};

// Barriers of bar.sync. Each is used by one set of threads only.
enum NamedBarrier {
  kBlockBarrier = 0,              // __syncthreads
  kProducerBarrier = 1,           // all producer warps
  kConsumerWarpgroupBarrier = 2,  // one consumer warpgroup each: 2, 3, ...
  kBarriers = 6,
};

template <class C>
SEGATTN_FN void sync_producers() {
  barrier_sync<C::kProducerThreads>(kProducerBarrier);
}
template <class C>
SEGATTN_FN void sync_consumer_warpgroup(int warpgroup) {
  static_assert(kConsumerWarpgroupBarrier + C::kConsumerWarpgroups <= kBarriers,
                "each consumer warpgroup needs a barrier of its own");
  barrier_sync<128>(kConsumerWarpgroupBarrier + warpgroup);
}

// Splits the block into its roles, for good: each ends by returning.
template <class C, class Shared, class Producer, class Consumer>
SEGATTN_FN void run_warpgroups(Shared& shared, const Producer& producer, const Consumer& consumer) {
  static_assert(sizeof(Shared) <= kMaxSharedBytes, "more shared memory than a block can have");
  static_assert(alignof(Shared) % 1024 == 0, "the 128-byte swizzle of a tile has a period of 1024 bytes");
  if (threadIdx.x == 0) {
    shared.init_barriers();
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < C::kProducerThreads) {
    setmaxnreg_decrease<C::kProducerRegisters>();
    producer();
  } else {
    setmaxnreg_increase<C::kConsumerRegisters>();
    consumer();
  }
}

// The number of the block's next work tile: the first without asking, then from the counter of all blocks.
SEGATTN_FN uint32_t next_work_index(uint32_t* work_counter, bool first) {
  return first ? blockIdx.x : gridDim.x + atomic_add(work_counter, 1);
}

// The block's next work tile of queries. Numbers are given out for the most splits that a tile has; those that a tile
// with fewer keys does not have are passed over. False: there is none left.
template <class C, class Params>
SEGATTN_FN bool next_query_work(const Params& p, WorkTile& work, bool first) {
  const HeadRange heads = HeadRange::of(p);
  const uint32_t work_tiles = (uint32_t)p.max_splits * p.tiles * heads.count;
  do {
    const uint32_t index = next_work_index(p.work_counter, first);
    first = false;
    if (index >= work_tiles) return false;
    work = work_tile_at<C::kRows, C::kKeys, C::kSplitKeys>(p.problem, heads, index, p.tiles, p.max_splits);
  } while (work.split >= work.splits);
  return true;
}
