// The memory of a pool. A tensor of a chunk has the elements [tokens, heads, head_dim] in p.bits each; below 16 bits
// the largest magnitude of each group follows, bf16 [tokens, heads, head_dim / 32]. An element is then a multiple of
// the step of its group (docs/contract.md, section 2), in two's complement; of 4 bits, the lower half of a byte comes
// first.
#pragma once
#include <float.h>
#include <math.h>

#include "rotation.cuh"

// Elements of a group, which share a step. Divides every head_dim that there are kernels of scores for.
constexpr int kStepGroup = 32;

// The thread's index within its call, in the call's block.
SEGATTN_FN uint32_t thread_of(uint32_t block) { return block * blockDim.x + threadIdx.x; }

SEGATTN_FN const SegattnPoolChunk& chunk_of(const SegattnRetrievalParams& p, int64_t token) {
  return p.chunks[(token - p.first_token) / p.chunk_tokens];
}
// Which of the heads of its chunk's tokens a token's head is.
SEGATTN_FN int64_t pool_unit(const SegattnRetrievalParams& p, int64_t token, int head) {
  return (token - p.first_token) % p.chunk_tokens * p.heads + head;
}
SEGATTN_FN unsigned char* elements_at(const SegattnRetrievalParams& p, void* chunk, int64_t unit, int column) {
  return (unsigned char*)chunk + (unit * p.head_dim + column) * p.bits / 8;
}
SEGATTN_FN Bf16* largest_at(const SegattnRetrievalParams& p, void* chunk, int64_t unit, int column) {
  return (Bf16*)elements_at(p, chunk, p.chunk_tokens * p.heads, 0) + (unit * p.head_dim + column) / kStepGroup;
}

// The blocks that lie wholly inside the eligible tokens of a head.
struct Blocks {
  int begin, end;
};
SEGATTN_FN Blocks eligible_blocks(const SegattnRetrievalParams& p, int head) {
  const SegattnPoolHead info = p.head[head];
  return {ceil_div(info.eligible_begin, p.block_len), info.eligible_end / p.block_len};
}

// The largest multiple of a step.
SEGATTN_FN int pool_limit(const SegattnRetrievalParams& p) { return (1 << (p.bits - 1)) - 1; }

// The largest magnitude of the group around a column of a head: NaN where a number is not finite.
SEGATTN_FN float largest_of(const Bf16* g_head, int column) {
  const int first = column - column % kStepGroup;
  float largest = 0.f;
  bool finite = true;
  for (int i = first; i < first + kStepGroup; i += kVector) {
    float r_x[kVector];
    load_vector(r_x, g_head + i);
#pragma unroll
    for (int e = 0; e < kVector; e++) {
      largest = fmaxf(largest, fabsf(r_x[e]));
      finite &= fabsf(r_x[e]) <= FLT_MAX;
    }
  }
  return finite ? largest : NAN;
}

// Puts eight elements of a head of k or of v into a tensor of the pool.
SEGATTN_FN void store_held(const SegattnRetrievalParams& p, void* chunk, int64_t unit, int column, const Bf16* g_head) {
  unsigned char* place = elements_at(p, chunk, unit, column);
  if (p.bits == 16) {
    *(uint4*)place = *(const uint4*)(g_head + column);
    return;
  }
  const int limit = pool_limit(p);
  const float largest = largest_of(g_head, column), step = largest / (float)limit;
  if (column % kStepGroup == 0) store_one(largest_at(p, chunk, unit, column), largest);
  float r_x[kVector];
  load_vector(r_x, g_head + column);
  uint64_t packed = 0;
#pragma unroll
  for (int e = 0; e < kVector; e++) {
    // A step of NaN is NaN times 0 too.
    const int n = step > 0.f ? max(-limit, min(limit, (int)rintf(r_x[e] / step))) : 0;
    packed |= (uint64_t)((uint32_t)n & ((1u << p.bits) - 1)) << (e * p.bits);
  }
  if (p.bits == 8) *(uint2*)place = make_uint2((uint32_t)packed, (uint32_t)(packed >> 32));
  else *(uint32_t*)place = (uint32_t)packed;
}

// Eight elements that the pool holds, as bf16.
SEGATTN_FN uint4 load_held(const SegattnRetrievalParams& p, void* chunk, int64_t unit, int column) {
  const unsigned char* place = elements_at(p, chunk, unit, column);
  if (p.bits == 16) return *(const uint4*)place;
  const uint2 packed = p.bits == 8 ? *(const uint2*)place : make_uint2(*(const uint32_t*)place, 0);
  const uint64_t numbers = packed.x | (uint64_t)packed.y << 32;
  const float step = load_one(largest_at(p, chunk, unit, column)) / (float)pool_limit(p);
  float r_x[kVector];
#pragma unroll
  for (int e = 0; e < kVector; e++) {
    const int n = (int)((uint32_t)(numbers >> (e * p.bits)) << (32 - p.bits)) >> (32 - p.bits);
    r_x[e] = mul_rn((float)n, step);
  }
  return pack_vector(r_x);
}

// Elements `pair` on of both halves of a head.
SEGATTN_FN Pairs held_pairs(const SegattnRetrievalParams& p, void* chunk, int64_t unit, int pair) {
  Pairs x;
  unpack_vector(x.lo, load_held(p, chunk, unit, pair));
  unpack_vector(x.hi, load_held(p, chunk, unit, p.head_dim / 2 + pair));
  return x;
}
