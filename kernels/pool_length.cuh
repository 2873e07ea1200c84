// A pool that is too long (docs/contract.md, section 2, "Length of the pool"): which tokens are dropped, and the rest
// copied to another pool.
#pragma once
#include "pool.cuh"

// A thread has one block; by the second rule a token, whose neighbours are those whose whole windows have it in them.
SEGATTN_FN void pool_unwanted(const SegattnRetrievalParams& p, uint32_t thread_block) {
  if (p.score_pitch == 0) return;
  const int64_t index = thread_of(thread_block), head = index / p.score_pitch, block = index % p.score_pitch;
  if (head >= p.heads) return;
  const Blocks eligible = eligible_blocks(p, (int)head);
  if (block < eligible.begin || block >= eligible.end) return;
  const int first = max(eligible.begin, (int)block - (p.window_len - 1 - p.window_before));
  const int end = min(eligible.end, (int)block + p.window_before + 1);
  const float* g_scores = p.scores + head * p.score_pitch;
  float best = -INFINITY;
  for (int other = first; other < end; other++) best = max_f32(best, g_scores[other]);
  p.unwanted[head * p.score_pitch + block] = -best;
}

// How many of the dropped blocks of a head stand before block `kept` of those that are left.
SEGATTN_FN int dropped_before(const SegattnRetrievalParams& p, int head, int64_t kept) {
  const int32_t* g_dropped = p.selected + (int64_t)head * p.max_selected;
  int low = 0, high = p.selected_count[head];
  while (low < high) {
    const int middle = (low + high) / 2;
    if (g_dropped[middle] - middle <= kept) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Copies eight elements of a head of k or of v from one pool to another of as many bits.
SEGATTN_FN void copy_held(const SegattnRetrievalParams& p, void* from, int64_t from_unit, void* to, int64_t to_unit,
                          int column) {
  const unsigned char* place = elements_at(p, from, from_unit, column);
  unsigned char* copy = elements_at(p, to, to_unit, column);
  if (p.bits == 16) *(uint4*)copy = *(const uint4*)place;
  else if (p.bits == 8) *(uint2*)copy = *(const uint2*)place;
  else *(uint32_t*)copy = *(const uint32_t*)place;
  if (p.bits < 16 && column % kStepGroup == 0)
    *largest_at(p, to, to_unit, column) = *largest_at(p, from, from_unit, column);
}

// The pool's tokens from p.token on, counted without those dropped, to the same tokens of the other pool.
SEGATTN_FN void pool_keep(const SegattnRetrievalParams& p, uint32_t block) {
  const uint32_t index = thread_of(block), head_units = p.head_dim / kVector, row_units = head_units * p.heads;
  const int64_t row = index / row_units;
  if (row >= p.rows) return;
  const int head = index % row_units / head_units, column = index % head_units * kVector;
  const int64_t to = p.token + row;
  const int64_t from = to + (int64_t)dropped_before(p, head, to / p.block_len) * p.block_len;
  const SegattnPoolChunk& src = chunk_of(p, from);
  const SegattnPoolChunk& dst = p.kept[to / p.chunk_tokens];
  const int64_t src_unit = pool_unit(p, from, head), dst_unit = to % p.chunk_tokens * p.heads + head;
  copy_held(p, src.k, src_unit, dst.k, dst_unit, column);
  copy_held(p, src.v, src_unit, dst.v, dst_unit, column);
}
