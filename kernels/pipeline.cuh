// A ring of stages filled by cp.async, for kernels whose warps all copy and all compute. Each iteration commits one
// group of copies, empty or not, so that the number of groups still in flight says which iterations have landed.
#pragma once
#include "tile.cuh"

template <int kStages>
SEGATTN_FN int stage_of(int iteration) {
  return kStages == 1 ? 0 : kStages == 2 ? iteration & 1 : iteration % kStages;
}

// Waits until all but the kInFlight newest groups of every thread of the block have landed, and until every thread has
// finished reading the stage that is filled next.
template <int kInFlight>
SEGATTN_FN void arrive_and_wait() {
  cp_async_wait<kInFlight>();
  __syncthreads();
}
