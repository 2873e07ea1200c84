// Copies in flight: a ring of kStages key tiles, K and V each a group of their own, committed in the order
// K0 V0 K1 V1 ... One group is committed per call, empty or not, so that counting groups says what arrived.
#pragma once
#include "tile.cuh"

template <int kStages>
SEGATTN_FN int stage_of(int iteration) { return kStages == 1 ? 0 : kStages == 2 ? iteration & 1 : iteration % kStages; }

// Waits until the oldest copies that are needed have landed for every thread of the block, and until every
// thread is done with what it read before.
template <int kInFlight>
SEGATTN_FN void arrive_and_wait() {
  cp_async_wait<kInFlight>();
  __syncthreads();
}
