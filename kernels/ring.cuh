// A ring of stages in shared memory between producer and consumer warps, with one mbarrier a stage and direction.
//
// Both sides count iterations 0, 1, 2, ... over the whole life of the block. Iteration i uses stage i % kStages, for
// the (i / kStages)-th time, and the parity of that number tells the barriers' phases apart:
//   producer:  wait_empty(i), copy into stage(i), arrive(i)
//   consumer:  wait_full(i), read stage(i), release(i)
// Consumers release iterations in order. The counter has 32 bits: unless kStages is a power of two, a block must end
// before it wraps around.
#pragma once
#include "ptx.cuh"

__host__ __device__ constexpr bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

template <int kStages_>
struct Ring {
  static constexpr int kStages = kStages_;
  static_assert(kStages > 0, "a ring has a stage");
  uint64_t full[kStages], empty[kStages];

  // By one thread of the block, before any other call: the arrivals that complete a phase.
  __device__ __forceinline__ void init(uint32_t full_arrivals, uint32_t empty_arrivals) {
    for (int stage = 0; stage < kStages; stage++) {
      mbarrier_init(&full[stage], full_arrivals);
      mbarrier_init(&empty[stage], empty_arrivals);
    }
  }

  SEGATTN_FN uint32_t stage(uint32_t iteration) { return iteration % kStages; }
  SEGATTN_FN uint32_t parity(uint32_t iteration) { return iteration / kStages & 1; }

  // Waits until all consumers have released the stage's previous iteration; the first use of a stage waits for nothing.
  __device__ __forceinline__ void wait_empty(uint32_t iteration) {
    mbarrier_wait(&empty[stage(iteration)], parity(iteration) ^ 1);
  }

  // Waits until the stage is filled.
  __device__ __forceinline__ void wait_full(uint32_t iteration) {
    mbarrier_wait(&full[stage(iteration)], parity(iteration));
  }

  // Called by each producer thread. Waits for all but its kNewestLeft newest groups of cp.async, makes what they wrote
  // visible to wgmma as well, and arrives on `full`.
  template <int kNewestLeft>
  __device__ __forceinline__ void arrive(uint32_t iteration) {
    cp_async_wait<kNewestLeft>();
    fence_proxy_async_shared();
    mbarrier_arrive(&full[stage(iteration)]);
  }

  // Called by all lanes of the one producer warp of a stage: the same with one arrival of the warp.
  template <int kNewestLeft>
  __device__ __forceinline__ void arrive_warp(uint32_t iteration, int lane) {
    cp_async_wait<kNewestLeft>();
    fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&full[stage(iteration)]);
  }

  // Called by one producer thread before it starts bulk copies of so many bytes, which are to arrive on the returned
  // barrier: its arrival on `full`.
  __device__ __forceinline__ uint64_t* arrive_before_bytes(uint32_t iteration, uint32_t bytes) {
    uint64_t* barrier = &full[stage(iteration)];
    mbarrier_arrive_expect_bytes(barrier, bytes);
    return barrier;
  }

  // Called by each producer thread that copied nothing: arrives on `full`.
  __device__ __forceinline__ void arrive_without_copies(uint32_t iteration) {
    mbarrier_arrive(&full[stage(iteration)]);
  }

  // The ring's iterations are served by kWarps producer warps in turn, iteration i by warp i % kWarps: how many
  // iterations after `first` the next one of `warp` is. `first` may have wrapped around where kWarps is a power of
  // two.
  template <int kWarps>
  SEGATTN_FN int iterations_until_turn(uint32_t first, uint32_t warp) {
    static_assert(kStages >= kWarps,
                  "two producer warps would wait for one stage, and a parity tells only two phases apart");
    if constexpr (is_power_of_two(kWarps)) return (warp - first) % kWarps;
    else return (warp + kWarps - first % kWarps) % kWarps;
  }

  // Called by all lanes of a consumer warp that has read the stage: one arrival on `empty`. Only after
  // wait_full(iteration), or the arrival counts for the stage's previous iteration.
  __device__ __forceinline__ void release(uint32_t iteration, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&empty[stage(iteration)]);
  }
};
