// AdamW with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) of all tensors in one launch. For a
// gradient g after clipping and update number t, with step = lr / (1 - beta1^t) and root = 1 / sqrt(1 - beta2^t):
//   adamw_norm    the sum of squares of every chunk of every gradient, in f64
//   adamw_scale   grad_norm = sqrt(sum of chunks), clip = min(1, clip_norm / grad_norm), whether to update at all
//   adamw_update  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
//                 w = keep w - step m / (sqrt(v) root + eps),  bf16 weights = w
//                 in place, unless the norm is not finite
// The host is not asked: a square of an f32 cannot overflow in f64, so the norm is finite exactly if every gradient is.
// Bits: chunks are of a tensor, summed by a tree and added up in an order that the table decides; every element is
// computed alone, with the roundings of the CPU. Bytes an element: norm 4, update 28, with bf16 weights 30.
#include "reduce.cuh"
#include "vectors.cuh"

// Two vectors of four a thread and round, all loaded before the first is used: the update has eight loads in flight.
struct AdamwConfig {
  static constexpr int kThreads = 256, kBlocks = 3;
  static constexpr int kLoads = 2;
  static constexpr int kRound = kThreads * kLoads * 4;  // elements
  static constexpr int kChunk = 8 * kRound;
};
struct AdamwScaleConfig {
  static constexpr int kThreads = 1024, kBlocks = 1;
};

struct AdamwShared {
  double warps[kMaxWarps];
};

// The tensor that a chunk belongs to: the last whose first chunk is not after it.
SEGATTN_FN const SegattnAdamwTensor& tensor_of(const SegattnAdamwParams& p, int64_t chunk) {
  int low = 0, high = p.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.tensors[middle].first_chunk <= chunk) low = middle;
    else high = middle - 1;
  }
  return p.tensors[low];
}

// Four elements from `at` on; those at or beyond `len` are 0 and not touched.
SEGATTN_FN float4 load_four(const float* g, int64_t at, int64_t len) {
  if (at + 4 <= len) return *(const float4*)(g + at);
  const float4 x = {at < len ? g[at] : 0.f, at + 1 < len ? g[at + 1] : 0.f, at + 2 < len ? g[at + 2] : 0.f, 0.f};
  return x;
}
SEGATTN_FN void store_four(float* g, int64_t at, int64_t len, float4 x) {
  if (at + 4 <= len) {
    *(float4*)(g + at) = x;
    return;
  }
  if (at < len) g[at] = x.x;
  if (at + 1 < len) g[at + 1] = x.y;
  if (at + 2 < len) g[at + 2] = x.z;
}
SEGATTN_FN void store_four(uint16_t* g, int64_t at, int64_t len, float4 x) {
  const uint2 pairs = make_uint2(pack<Bf16>(x.x, x.y), pack<Bf16>(x.z, x.w));
  if (at + 4 <= len) {
    *(uint2*)(g + at) = pairs;
    return;
  }
  if (at < len) g[at] = (uint16_t)pairs.x;
  if (at + 1 < len) g[at + 1] = (uint16_t)(pairs.x >> 16);
  if (at + 2 < len) g[at + 2] = (uint16_t)pairs.y;
}

SEGATTN_FN void adamw_norm(const SegattnAdamwParams& p) {
  using C = AdamwConfig;
  AdamwShared& shared = *(AdamwShared*)shared_memory();
  const SegattnAdamwTensor& tensor = tensor_of(p, blockIdx.x);
  const int64_t first = (blockIdx.x - tensor.first_chunk) * C::kChunk;
  double sum = 0.;
  for (int round = 0; round < C::kChunk; round += C::kRound) {
    float4 g[C::kLoads];
#pragma unroll
    for (int i = 0; i < C::kLoads; i++)
      g[i] = load_four(tensor.grads, first + round + (i * C::kThreads + threadIdx.x) * 4, tensor.len);
#pragma unroll
    for (int i = 0; i < C::kLoads; i++) {
      const double x = g[i].x, y = g[i].y, z = g[i].z, w = g[i].w;
      sum += (x * x + y * y) + (z * z + w * w);
    }
  }
  sum = block_sum(sum, shared.warps);
  if (threadIdx.x == 0) p.chunk_squares[blockIdx.x] = sum;
}

SEGATTN_FN void adamw_scale(const SegattnAdamwParams& p) {
  AdamwShared& shared = *(AdamwShared*)shared_memory();
  double sum = 0.;
  for (int64_t chunk = threadIdx.x; chunk < p.chunks; chunk += AdamwScaleConfig::kThreads)
    sum += p.chunk_squares[chunk];
  const double norm = sqrt(block_sum(sum, shared.warps));
  if (threadIdx.x != 0) return;
  p.result->grad_norm = norm;
  p.result->clip = p.clip_norm >= 0. && norm > p.clip_norm ? (float)(p.clip_norm / norm) : 1.f;
  p.result->applied = isfinite(norm) && !p.only_measure;
}

SEGATTN_FN void update_one(float& w, float g, float& m, float& v, const SegattnAdamwParams& p,
                           const SegattnAdamwTensor& tensor, float clip) {
  g = mul_rn(g, clip);
  m = mul_rn(p.beta1, m) + mul_rn(p.rest1, g);
  v = mul_rn(p.beta2, v) + mul_rn(p.rest2, mul_rn(g, g));
  const float step = m / (mul_rn(sqrtf(v), p.root) + p.eps);
  const float next = mul_rn(tensor.keep, w) - mul_rn(tensor.step, step);
  w = tensor.floor < 0.f ? next : w > 0.f ? max_f32(next, tensor.floor) : w;
}

SEGATTN_FN void adamw_update(const SegattnAdamwParams& p) {
  using C = AdamwConfig;
  if (!p.result->applied) return;
  const SegattnAdamwTensor tensor = tensor_of(p, blockIdx.x);
  if (!tensor.changes) return;
  const float clip = p.result->clip;
  const int64_t first = (blockIdx.x - tensor.first_chunk) * C::kChunk + threadIdx.x * 4;
  for (int round = 0; round < C::kChunk && first + round < tensor.len; round += C::kRound) {
    float4 w[C::kLoads], g[C::kLoads], m[C::kLoads], v[C::kLoads];
#pragma unroll
    for (int i = 0; i < C::kLoads; i++) {
      const int64_t at = first + round + i * C::kThreads * 4;
      w[i] = load_four(tensor.values, at, tensor.len);
      g[i] = load_four(tensor.grads, at, tensor.len);
      m[i] = load_four(tensor.m, at, tensor.len);
      v[i] = load_four(tensor.v, at, tensor.len);
    }
#pragma unroll
    for (int i = 0; i < C::kLoads; i++) {
      const int64_t at = first + round + i * C::kThreads * 4;
      update_one(w[i].x, g[i].x, m[i].x, v[i].x, p, tensor, clip);
      update_one(w[i].y, g[i].y, m[i].y, v[i].y, p, tensor, clip);
      update_one(w[i].z, g[i].z, m[i].z, v[i].z, p, tensor, clip);
      update_one(w[i].w, g[i].w, m[i].w, v[i].w, p, tensor, clip);
      store_four(tensor.values, at, tensor.len, w[i]);
      store_four(tensor.m, at, tensor.len, m[i]);
      store_four(tensor.v, at, tensor.len, v[i]);
      if (tensor.weights) store_four((uint16_t*)tensor.weights, at, tensor.len, w[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- entry points

// adamw_norm and adamw_update: a block a chunk, split_keys elements of one tensor; adamw_scale: one block, between
// them.
#define ADAMW(entry, body, Config, shared_bytes)                                                                     \
  SEGATTN_INFO(entry, (SegattnKernelInfo{Config::kThreads, shared_bytes, Config::kBlocks, 0, 0, AdamwConfig::kChunk, \
                                         sizeof(SegattnAdamwParams)}))                                               \
  SEGATTN_KERNEL(entry, Config, SegattnAdamwParams) { body(params); }

ADAMW(adamw_norm_f32, adamw_norm, AdamwConfig, sizeof(AdamwShared))
ADAMW(adamw_scale_f32, adamw_scale, AdamwScaleConfig, sizeof(AdamwShared))
ADAMW(adamw_update_f32, adamw_update, AdamwConfig, 0)
