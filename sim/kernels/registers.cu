// A block of three warpgroups whose registers go from the first to the others: 168 each, afterwards 88 and 208.
#include "simulator.h"

struct Out {
  uint32_t* done;  // [threads]
};

extern "C" __global__ void hand_over(const __grid_constant__ Out p) {
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    sim_set_registers(88, 0, sim_site());
  } else {
    sim_set_registers(208, 1, sim_site());
  }
  p.done[threadIdx.x] = 1 + warpgroup;
}

// Two warpgroups, 248 each: both have nearly all at some time, the first only once the second has given them back.
extern "C" __global__ void back_and_forth(const __grid_constant__ Out p) {
  if (threadIdx.x < 128) {
    sim_set_registers(40, 0, sim_site());
    sim_barrier_sync(1, 256, sim_site());
    sim_set_registers(248, 1, sim_site());
  } else {
    sim_set_registers(256, 1, sim_site());
    sim_barrier_sync(1, 256, sim_site());
    sim_set_registers(48, 0, sim_site());
  }
  p.done[threadIdx.x] = 1;
}
