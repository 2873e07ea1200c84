// What bounds a forward pass on Hopper: one part taken out at a time, one table a run.
//
//   nvcc -std=c++17 -O3 -DDIM=128 -gencode=arch=compute_90a,code=sm_90a -Ikernels benches/forward_limit.cu -o limit
//   ./limit [keys of a query tile] [query tiles of a block] [seconds a variant]
//
// DIM is the head size, 64 or 128. A variant is: consumer warpgroups of 64 rows, keys of a tile, schedule, whether
// warpgroups take turns, whether key tiles are copied, whether queries are operands in registers, whether `out` is
// rescaled without a branch.
//
// Every block works through query tiles of kConsumers * 64 rows; each reads the same key tiles. Nothing is masked and
// there are no chunk totals, so TFLOP/s are of all pairs. Without copies the key tiles stay in shared memory.
// `clock` is the multiprocessor's mean clock (cycles over nanoseconds), `tensor` the share of cycles in which the
// tensor cores must multiply (64 x N x 16 takes N / 2 cycles).
#include <cstdio>
#include <cstdlib>
#include <cmath>
#include <vector>
#include <algorithm>
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include "params.h"
#include "warpgroups.cuh"
#include "softmax.cuh"
#include "ring.cuh"

#define CHECK(x)                                     \
  do {                                               \
    cudaError_t e = (x);                             \
    if (e != cudaSuccess) {                          \
      printf("%s: %s\n", #x, cudaGetErrorString(e)); \
      exit(1);                                       \
    }                                                \
  } while (0)

enum Schedule {
  kProducts,  // no softmax
  kSerial,    // scores, wait, softmax, values, wait
  kOverlap,  // scores of the next tile before values of this one; softmax between the two waits (where ptxas leaves it)
  kOverlapLate,    // the same, `out` is rescaled while the next scores run
  kOverlapPinned,  // kOverlap with the exponentials kept before the wait for the values
};
#ifndef DIM
#define DIM 128
#endif
constexpr int kDim = DIM;

template <int kConsumers_, int kKeys_, Schedule kSchedule_, bool kTurns_, bool kCopies_, bool kQueriesInRegisters_,
          bool kAlwaysRescale_>
struct Config {
  static constexpr int kConsumers = kConsumers_, kKeys = kKeys_;
  static constexpr Schedule kSchedule = kSchedule_;
  static constexpr bool kTurns = kTurns_, kCopies = kCopies_, kQueriesInRegisters = kQueriesInRegisters_,
                        kAlwaysRescale = kAlwaysRescale_;
  static constexpr int kStages = (kKeys == 64 ? 4 : 2) * 128 / kDim, kColTiles = kKeys / 8;
  static constexpr int kRegisters = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112, kProducerRegisters = 24;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  using Keys = Tile<Bf16, kKeys, kDim>;
  using Queries = Tile<Bf16, kConsumers * 64, kDim>;
};

template <class C>
struct Shared {
  typename C::Queries q;
  typename C::Keys k[C::kStages], v[C::kStages];
  float pins[C::kConsumers * 128];
  Ring<C::kStages> k_ring, v_ring;
};

struct Params {
  const unsigned char *q, *k, *v;  // images of tiles, as they lie in shared memory
  __nv_bfloat16* out;              // [block][item][rows][DIM]
  int items, tiles;
  float scale_log2;
  unsigned long long* clocks;  // [block][2]: cycles, nanoseconds
};

__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void turn_wait(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void turn_give(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

template <class C>
__device__ __forceinline__ void issue_scores(float (&s)[C::kColTiles][4], const uint32_t (&queries)[kDim / 16][4],
                                             Shared<C>& shared, int first_row, uint32_t n) {
  const uint32_t stage = n % C::kStages;
  if (C::kCopies) shared.k_ring.wait_full(n);
  wgmma_fence();
  if constexpr (C::kQueriesInRegisters) wgmma_rs<Bf16, typename C::Keys>(s, queries, shared_address(&shared.k[stage]));
  else
    wgmma_ss<Bf16, typename C::Queries, typename C::Keys>(s, shared_address(&shared.q), first_row,
                                                          shared_address(&shared.k[stage]));
  wgmma_commit();
}
template <class C>
__device__ __forceinline__ void issue_values(float (&out)[kDim / 8][4], const uint32_t (&p)[C::kColTiles / 2][4],
                                             Shared<C>& shared, uint32_t n) {
  const uint32_t stage = n % C::kStages;
  if (C::kCopies) shared.v_ring.wait_full(n);
  wgmma_fence();
  wgmma_rs_mn_major<Bf16, typename C::Keys>(out, p, shared_address(&shared.v[stage]));
  wgmma_commit();
}
template <class C>
__device__ __forceinline__ void free_stage(Ring<C::kStages>& ring, uint32_t n, int lane) {
  if (C::kCopies) ring.release(n, lane);
}
template <bool kAlways>
__device__ __forceinline__ void rescale_out(float (&out)[kDim / 8][4], const float (&factor)[2]) {
  if (!kAlways && !warp_any(factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
  for (int n = 0; n < kDim / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) out[n][e] = mul_rn(out[n][e], factor[e / 2]);
}

// What `x` is computed from is computed before any later wait: ptxas keeps a store before it.
__device__ __forceinline__ void pin(float x, float* place) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared_address(place)), "f"(x) : "memory");
}

template <class C>
__device__ __forceinline__ void consume(const Params& p, Shared<C>& shared) {
  const int thread = threadIdx.x - 128, lane = thread & 31, warp = thread >> 5, group = warp / 4,
            first_row = group * 64;
  uint32_t queries[kDim / 16][4];
  if constexpr (C::kQueriesInRegisters)
    load_fragments<typename C::Queries>(queries, shared_address(&shared.q), warp * 16, lane);
  uint32_t n = 0;
  if (C::kTurns && group == 1) turn_give(8);
  for (int item = 0; item < p.items; item++) {
    float out[kDim / 8][4], s[C::kColTiles][4], factor[2] = {1.f, 1.f};
    uint32_t p_operand[C::kColTiles / 2][4];
    RowState rows[2] = {{SEGATTN_NEG_INF, 0.f}, {SEGATTN_NEG_INF, 0.f}};
    clear(out);
    const auto softmax = [&] {
#pragma unroll
      for (int half = 0; half < 2; half++) factor[half] = softmax_row(s, half, rows[half], p.scale_log2, 0.f);
      fence_operand(s);
    };
    if constexpr (C::kSchedule == kProducts) {
#pragma unroll
      for (int i = 0; i < C::kColTiles / 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) p_operand[i][e] = 0x3c003c00u + lane;
#pragma unroll 1
      for (int tile = 0; tile < p.tiles; tile++, n++) {
        issue_scores<C>(s, queries, shared, first_row, n);
        issue_values<C>(out, p_operand, shared, n);
        wgmma_wait<0>();
        free_stage<C>(shared.k_ring, n, lane);
        free_stage<C>(shared.v_ring, n, lane);
        fence_operand(s);
        fence_operand(out);
      }
      rows[0].sum = rows[1].sum = s[0][0];
    } else if constexpr (C::kSchedule == kSerial) {
#pragma unroll 1
      for (int tile = 0; tile < p.tiles; tile++, n++) {
        if (C::kTurns) turn_wait(8 + group);
        fence_operand(s);
        issue_scores<C>(s, queries, shared, first_row, n);
        wgmma_wait<0>();
        free_stage<C>(shared.k_ring, n, lane);
        if (C::kTurns) turn_give(9 - group);
        fence_operand(s);
        softmax();
        pack_operands<Bf16>(p_operand, s);
        rescale_out<C::kAlwaysRescale>(out, factor);
        fence_operand(out);
        issue_values<C>(out, p_operand, shared, n);
        wgmma_wait<0>();
        free_stage<C>(shared.v_ring, n, lane);
        fence_operand(out);
      }
    } else {
      if (C::kTurns) turn_wait(8 + group);
      issue_scores<C>(s, queries, shared, first_row, n);
      if (C::kTurns) turn_give(9 - group);
      wgmma_wait<0>();
      free_stage<C>(shared.k_ring, n, lane);
      fence_operand(s);
      softmax();
      pack_operands<Bf16>(p_operand, s);
#pragma unroll 1
      for (int tile = 1; tile < p.tiles; tile++, n++) {
        fence_operand(out);
        fence_operand(s);
        if (C::kTurns) turn_wait(8 + group);
        issue_scores<C>(s, queries, shared, first_row, n + 1);
        if constexpr (C::kSchedule == kOverlapLate) {
          rescale_out<C::kAlwaysRescale>(out, factor);
          fence_operand(out);
        }
        issue_values<C>(out, p_operand, shared, n);
        if (C::kTurns) turn_give(9 - group);
        wgmma_wait<1>();
        free_stage<C>(shared.k_ring, n + 1, lane);
        softmax();
        if constexpr (C::kSchedule == kOverlapPinned) pin(rows[0].sum + rows[1].sum, &shared.pins[thread]);
        wgmma_wait<0>();
        free_stage<C>(shared.v_ring, n, lane);
        pack_operands<Bf16>(p_operand, s);
        if constexpr (C::kSchedule != kOverlapLate) rescale_out<C::kAlwaysRescale>(out, factor);
      }
      fence_operand(out);
      if constexpr (C::kSchedule == kOverlapLate) {
        rescale_out<C::kAlwaysRescale>(out, factor);
        fence_operand(out);
      }
      issue_values<C>(out, p_operand, shared, n);
      wgmma_wait<0>();
      free_stage<C>(shared.v_ring, n, lane);
      fence_operand(out);
      n++;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float inverse = 1.f / quad_sum(rows[half].sum);
      __nv_bfloat16* to =
          p.out + (((size_t)blockIdx.x * p.items + item) * C::Queries::kRows + warp * 16 + half * 8 + lane / 4) * kDim +
          lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kDim / 8; i++)
        *(uint32_t*)(to + i * 8) = pack<Bf16>(out[i][half * 2] * inverse, out[i][half * 2 + 1] * inverse);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) limit(const Params p) {
  Shared<C>& shared = *(Shared<C>*)shared_memory();
  __shared__ uint64_t ready;
  const unsigned long long begin = clock64(), begin_ns = nanoseconds();
  if (threadIdx.x == 0) {
    mbarrier_init(&ready, 1);
    shared.k_ring.init(1, C::kConsumers * 4);
    shared.v_ring.init(1, C::kConsumers * 4);
    fence_mbarrier_init();
    expect_bytes(&ready, sizeof(shared.q) + (C::kCopies ? 0 : C::kStages * 2 * sizeof(typename C::Keys)));
    bulk_copy(shared_address(&shared.q), p.q, sizeof(shared.q), &ready);
    if (!C::kCopies)
      for (int i = 0; i < C::kStages; i++) {
        bulk_copy(shared_address(&shared.k[i]), p.k + i * sizeof(typename C::Keys), sizeof(typename C::Keys), &ready);
        bulk_copy(shared_address(&shared.v[i]), p.v + i * sizeof(typename C::Keys), sizeof(typename C::Keys), &ready);
      }
  }
  __syncthreads();
  mbarrier_wait(&ready, 0);
  if (threadIdx.x < 128) {
    setmaxnreg_decrease<C::kProducerRegisters>();
    if (C::kCopies && threadIdx.x == 0) {
      uint32_t n = 0;
      const uint32_t bytes = sizeof(typename C::Keys);
      const auto fill = [&](Ring<C::kStages>& ring, void* to, const unsigned char* from) {
        ring.wait_empty(n);
        uint64_t* full = &ring.full[0][ring.stage(n)];
        expect_bytes(full, bytes);
        bulk_copy(shared_address(to), from, bytes, full);
      };
      for (int item = 0; item < p.items; item++)
        for (int tile = 0; tile < p.tiles; tile++, n++) {
          fill(shared.k_ring, &shared.k[n % C::kStages], p.k + (size_t)tile * bytes);
          fill(shared.v_ring, &shared.v[n % C::kStages], p.v + (size_t)tile * bytes);
        }
    }
  } else {
    setmaxnreg_increase<C::kRegisters>();
    consume<C>(p, shared);
    if (threadIdx.x == 128) {
      p.clocks[blockIdx.x * 2] = clock64() - begin;
      p.clocks[blockIdx.x * 2 + 1] = nanoseconds() - begin_ns;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- host

struct Data {
  std::vector<float> q, k, v;  // rows of 128, rounded to bf16
};
static float rounded(float x) { return __bfloat162float(__float2bfloat16(x)); }
static std::vector<float> random_rows(int rows, float scale, unsigned seed) {
  std::vector<float> x((size_t)rows * kDim);
  unsigned s = seed;
  const auto uniform = [&] {
    s = s * 1664525u + 1013904223u;
    return ((s >> 8) + 1) / 16777217.f;
  };
  for (auto& e : x) e = rounded(scale * sqrtf(-2 * logf(uniform())) * cosf(6.2831853f * uniform()));
  return x;
}
// Rows as a sequence of tiles' images.
static std::vector<uint16_t> images(const std::vector<float>& rows, int tile_rows) {
  std::vector<uint16_t> image(rows.size());
  for (size_t i = 0; i < rows.size() / kDim; i++)
    for (int c = 0; c < kDim; c++) {
      const size_t tile = i / tile_rows, row = i % tile_rows, chunk = c % 64 / 8;
      const size_t at =
          tile * tile_rows * kDim + (c / 64) * tile_rows * 64 + row * 64 + ((chunk ^ (row & 7)) * 8) + c % 8;
      const __nv_bfloat16 x = __float2bfloat16(rows[i * kDim + c]);
      image[at] = *(const uint16_t*)&x;
    }
  return image;
}
template <class X>
static X* upload(const std::vector<X>& x) {
  X* p;
  CHECK(cudaMalloc(&p, x.size() * sizeof(X)));
  CHECK(cudaMemcpy(p, x.data(), x.size() * sizeof(X), cudaMemcpyHostToDevice));
  return p;
}

static double variant_seconds = 0.15;

template <class C>
static void measure(const char* name, int keys, int items) {
  const int tiles = keys / C::kKeys, rows = C::Queries::kRows, blocks = 132;
  const Data data = {random_rows(rows, 1.5f, 1), random_rows(keys, 1.f, 2), random_rows(keys, 1.f, 3)};
  Params p = {};
  auto *q = upload(images(data.q, rows)), *k = upload(images(data.k, C::kKeys)), *v = upload(images(data.v, C::kKeys));
  p.q = (unsigned char*)q, p.k = (unsigned char*)k, p.v = (unsigned char*)v;
  p.items = items, p.tiles = tiles, p.scale_log2 = kLog2E / sqrtf(kDim);
  CHECK(cudaMalloc(&p.out, (size_t)blocks * items * rows * kDim * 2));
  CHECK(cudaMemset(p.out, 0xff, (size_t)blocks * items * rows * kDim * 2));
  CHECK(cudaMalloc(&p.clocks, blocks * 16));
  CHECK(cudaFuncSetAttribute(limit<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(Shared<C>)));
  cudaFuncAttributes a;
  CHECK(cudaFuncGetAttributes(&a, limit<C>));
  const auto run = [&] { limit<C><<<blocks, C::kThreads, sizeof(Shared<C>)>>>(p); };
  run();
  CHECK(cudaDeviceSynchronize());
  // A row of the last item of the last block against f64.
  double error = 0, norm = 0;
  if (C::kSchedule != kProducts) {
    std::vector<__nv_bfloat16> out((size_t)rows * kDim);
    CHECK(cudaMemcpy(out.data(), p.out + ((size_t)blocks * items - 1) * rows * kDim, out.size() * 2,
                     cudaMemcpyDeviceToHost));
    for (int row = 0; row < rows; row += 13) {
      std::vector<double> s(keys), sum(kDim, 0.0);
      double top = -1e30, total = 0;
      const auto key = [&](int j) {
        return C::kCopies
                   ? j
                   : (int)((((size_t)(items - 1) * tiles + j / C::kKeys) % C::kStages) * C::kKeys + j % C::kKeys);
      };
      for (int j = 0; j < keys; j++) {
        for (int c = 0; c < kDim; c++) s[j] += (double)data.q[row * kDim + c] * data.k[(size_t)key(j) * kDim + c];
        s[j] /= sqrt((double)kDim), top = std::max(top, s[j]);
      }
      for (int j = 0; j < keys; j++) {
        const double w = exp(s[j] - top);
        total += w;
        for (int c = 0; c < kDim; c++) sum[c] += w * data.v[(size_t)key(j) * kDim + c];
      }
      for (int c = 0; c < kDim; c++) {
        const double e = sum[c] / total, d = __bfloat162float(out[row * kDim + c]) - e;
        error += d * d, norm += e * e;
      }
    }
  }
  cudaEvent_t from, to;
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  float ms = 0;
  CHECK(cudaEventRecord(from));
  run();
  CHECK(cudaEventRecord(to));
  CHECK(cudaEventSynchronize(to));
  CHECK(cudaEventElapsedTime(&ms, from, to));
  const int repeats = std::max(3, (int)(variant_seconds * 1e3 / ms));
  std::vector<float> times;
  for (int i = 0; i < repeats; i++) {
    CHECK(cudaEventRecord(from));
    run();
    CHECK(cudaEventRecord(to));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    if (i >= repeats / 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  ms = times[times.size() / 2];
  std::vector<unsigned long long> clocks(blocks * 2);
  CHECK(cudaMemcpy(clocks.data(), p.clocks, blocks * 16, cudaMemcpyDeviceToHost));
  double cycles = 0, ns = 0;
  for (int i = 0; i < blocks; i++) cycles += clocks[i * 2], ns += clocks[i * 2 + 1];
  const double flops = 4.0 * kDim * rows * keys * items * blocks;
  const double tensor = 2.0 * C::kConsumers * (double)keys * items * kDim / 32 / (cycles / blocks);
  printf("%-64s %3d regs %3d local  %6.1f TFLOP/s  clock %4.0f MHz  tensor %5.1f%%  error %.5f\n", name, a.numRegs,
         (int)a.localSizeBytes, flops / ms * 1e-9, cycles / ns * 1e3, tensor * 100,
         norm > 0 ? sqrt(error / norm) : 0.0);
  fflush(stdout);
  CHECK(cudaFree(q));
  CHECK(cudaFree(k));
  CHECK(cudaFree(v));
  CHECK(cudaFree(p.out));
  CHECK(cudaFree(p.clocks));
  CHECK(cudaEventDestroy(from));
  CHECK(cudaEventDestroy(to));
}

int main(int argc, char** argv) {
  const int keys = argc > 1 ? atoi(argv[1]) : 3072, items = argc > 2 ? atoi(argv[2]) : 16;
  if (argc > 3) variant_seconds = atof(argv[3]);
  printf("%d keys, %d query tiles a block\n", keys, items);
#define RUN(...) measure<Config<__VA_ARGS__>>(#__VA_ARGS__, keys, items)
#if DIM == 128
  RUN(2, 128, kProducts, false, false, false, false);
  RUN(2, 128, kProducts, false, false, true, false);
  RUN(3, 64, kProducts, false, false, false, false);
  RUN(2, 128, kProducts, false, true, true, false);
  RUN(3, 64, kProducts, false, true, false, false);
  RUN(3, 64, kSerial, false, false, false, false);
  RUN(3, 64, kOverlap, false, false, false, false);
  RUN(3, 64, kOverlapPinned, false, false, false, false);
  RUN(3, 128, kSerial, false, false, false, true);
  RUN(2, 128, kSerial, true, false, false, true);
  RUN(2, 128, kOverlap, false, false, false, false);
  RUN(2, 128, kOverlap, true, false, false, true);
  RUN(2, 128, kOverlapLate, true, false, false, true);
  RUN(2, 128, kOverlapPinned, true, false, false, true);
  RUN(3, 64, kOverlap, false, true, false, false);
  RUN(3, 64, kOverlapPinned, false, true, false, false);
  RUN(3, 128, kSerial, false, true, false, true);
  RUN(2, 128, kOverlap, true, true, false, true);
  RUN(2, 128, kOverlapLate, true, true, false, true);
  RUN(2, 128, kOverlapPinned, true, true, false, true);
#else
  RUN(3, 128, kProducts, false, false, false, false);
  RUN(4, 64, kProducts, false, false, false, false);
  RUN(4, 64, kOverlap, false, false, false, false);
  RUN(4, 64, kOverlapPinned, false, false, false, false);
  RUN(3, 128, kOverlap, false, false, false, true);
  RUN(3, 128, kOverlapPinned, false, false, false, true);
  RUN(4, 64, kOverlap, false, true, false, false);
  RUN(4, 64, kOverlapPinned, false, true, false, false);
  RUN(3, 128, kOverlap, false, true, false, true);
  RUN(3, 128, kOverlapPinned, false, true, false, false);
  RUN(3, 128, kOverlapPinned, false, true, false, true);
#endif
}
