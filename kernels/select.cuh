// The k highest of many numbers, by one block: floats become integers of the same order, and four rounds of an 8-bit
// histogram find the threshold. Counts are integers, so their order does not matter.
#pragma once
#include "reduce.cuh"
#include "vectors.cuh"

// An integer that orders like the float: -0 and 0 are equal, -inf is the least, NaN is 0xffffffff.
SEGATTN_FN uint32_t rank_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
SEGATTN_FN float value_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
constexpr uint32_t kLeastKey = 0x007fffffu, kInfinityKey = 0xff800000u;

// The highest key, and the lowest id that has it.
struct Highest {
  uint32_t key, id;
};
struct HighestOf {
  SEGATTN_FN Highest join(Highest a, Highest b) { return b.key > a.key || (b.key == a.key && b.id < a.id) ? b : a; }
};
SEGATTN_FN Highest shuffle_xor(Highest x, int mask) { return {shuffle_xor(x.key, mask), shuffle_xor(x.id, mask)}; }

constexpr int kSelectBins = 256;

struct SelectShared {
  uint32_t bins[kSelectBins], above[kSelectBins / 32];
  uint32_t digit, wanted;
};

// The highest key that at least k keys reach, and how many of the keys equal to it belong to the k highest; all keys
// above it do. for_each(f) calls f with this thread's keys; the threads of the block have at least k together.
struct Threshold {
  uint32_t key, ties;
};
template <class ForEach>
SEGATTN_FN Threshold select_threshold(const ForEach& for_each, uint32_t k, SelectShared& shared) {
  uint32_t prefix = 0, wanted = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < kSelectBins; bin += blockDim.x) shared.bins[bin] = 0;
    __syncthreads();
    for_each([&](uint32_t key) {
      if (shift == 24 || key >> (shift + 8) == prefix) atomic_add(&shared.bins[key >> shift & 255], 1);
    });
    __syncthreads();
    // One thread walks down the bins, first in groups of 32, then one by one.
    if (threadIdx.x < kSelectBins / 32) {
      uint32_t sum = 0;
      for (int i = 0; i < 32; i++) sum += shared.bins[threadIdx.x * 32 + i];
      shared.above[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int group = kSelectBins / 32 - 1;
      for (; shared.above[group] < wanted; group--) wanted -= shared.above[group];
      int bin = group * 32 + 31;
      for (; shared.bins[bin] < wanted; bin--) wanted -= shared.bins[bin];
      shared.digit = bin;
      shared.wanted = wanted;
    }
    __syncthreads();
    prefix = prefix << 8 | shared.digit;
    wanted = shared.wanted;
  }
  return {prefix, wanted};
}

// Ordered compaction: the output index of every selected key, in the order of the keys. A thread has kOwn
// neighbouring keys in a call, and calls follow one another. Every thread of the block makes every call.
struct CompactionShared {
  uint32_t warps[32];
};
template <int kOwn>
struct Compaction {
  uint32_t above = 0, ties = 0;  // so far

  // Calls f(i, index) for each selected key i of the thread; `index` is its output index.
  template <class F>
  __device__ __forceinline__ void next(const uint32_t (&keys)[kOwn], const Threshold& threshold,
                                       CompactionShared& shared, const F& f) {
    // Two counts in one word: a call has fewer than 2^16 keys.
    static_assert(kOwn * 1024 < 1 << 16, "counts of a call");
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kOwn; i++)
      own += (uint32_t)(keys[i] > threshold.key) << 16 | (uint32_t)(keys[i] == threshold.key);
    uint32_t through = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, through, delta);
      if ((int)(threadIdx.x & 31) >= delta) through += before;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 31) shared.warps[threadIdx.x >> 5] = through;
    __syncthreads();
    uint32_t before = through - own, total = 0;
    for (int warp = 0; warp < (int)blockDim.x / 32; warp++) {
      if (warp < (int)threadIdx.x >> 5) before += shared.warps[warp];
      total += shared.warps[warp];
    }
    uint32_t my_above = above + (before >> 16), my_ties = ties + (before & 0xffff);
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      const bool is_above = keys[i] > threshold.key, is_tie = keys[i] == threshold.key;
      if (is_above || (is_tie && my_ties < threshold.ties)) f(i, my_above + min(my_ties, threshold.ties));
      my_above += is_above;
      my_ties += is_tie;
    }
    above += total >> 16;
    ties += total & 0xffff;
  }
};
