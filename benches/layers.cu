// The layers' kernels on a GPU: `check` compares each with its formula in f64 and 20 repetitions bit by bit; `few` does
// so with small sizes, for compute-sanitizer; `time` gives microseconds, GB/s and the share of a device-to-device
// copy's speed in the same run. Needs nothing but CUDA: nvcc -std=c++17 -O3 -arch=sm_90 -o layers benches/layers.cu &&
// ./layers check && ./layers time
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "../kernels/adamw.cu"
#include "../kernels/embedding.cu"
#include "../kernels/loss.cu"
#include "../kernels/norm.cu"
#include "../kernels/retrieval.cu"
#include "../kernels/rope.cu"
#include "../kernels/sampling.cu"
#include "../kernels/sink_logits.cu"
#include "../kernels/swiglu.cu"

using std::vector;
typedef vector<double> Numbers;

static void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("FAILED %s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

// ---------------------------------------------------------------------------------------------------- memory, values

static vector<void*> owned;
template <class T>
static T* device(size_t count) {
  void* p = nullptr;
  must(cudaMalloc(&p, count * sizeof(T)), "cudaMalloc");
  must(cudaMemset(p, 0xff, count * sizeof(T)), "cudaMemset");
  owned.push_back(p);
  return (T*)p;
}
static void free_all() {
  for (void* p : owned) cudaFree(p);
  owned.clear();
}
template <class T>
static void put(T* to, const vector<T>& from) {
  must(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyDefault), "upload");
}
template <class T>
static T* upload(const vector<T>& from) {
  T* to = device<T>(from.size());
  put(to, from);
  return to;
}
template <class T>
static vector<T> download(const T* from, size_t count) {
  vector<T> to(count);
  must(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDefault), "download");
  return to;
}

static uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
static float of_bf16(uint16_t bits) {
  const uint32_t u = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}
// Around zero with a mean off it, now and then a large one.
static vector<float> values(size_t count, uint64_t salt) {
  vector<float> x(count);
  uint64_t state = salt * 2654435761u + 12345;
  for (float& v : x) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    v = (float)(state >> 40) / (1 << 24) * 2.2f - 1.f;
    if (state >> 20 & 63) continue;
    v *= 20.f;
  }
  return x;
}
static vector<uint16_t> bf16_values(size_t count, uint64_t salt) {
  vector<uint16_t> x(count);
  const vector<float> wide = values(count, salt);
  std::transform(wide.begin(), wide.end(), x.begin(), to_bf16);
  return x;
}
template <class T>
static SegattnRows rows_of(T* data, int64_t stride) {
  return {(void*)data, stride};
}
static int up(int64_t a, int64_t b) { return (int)((a + b - 1) / b); }

// ---------------------------------------------------------------------------------------------------- judging

static int failures = 0;
static void report(const char* name, bool good, const char* what, double got, double allowed) {
  printf("%s %-34s %s %.3g (allowed %.3g)\n", good ? "ok    " : "FAILED", name, what, got, allowed);
  fflush(stdout);
  failures += !good;
}
static double error(const Numbers& got, const Numbers& exact) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < exact.size(); i++) {
    difference += (got[i] - exact[i]) * (got[i] - exact[i]);
    norm += exact[i] * exact[i];
  }
  return std::sqrt(difference / norm);
}
// At most 1.5 times the error of the exact result rounded to bf16.
static void check_bf16(const char* name, const vector<uint16_t>& got, const Numbers& exact) {
  Numbers wide(got.size()), rounded(got.size());
  for (size_t i = 0; i < got.size(); i++) wide[i] = of_bf16(got[i]), rounded[i] = of_bf16(to_bf16((float)exact[i]));
  const double ours = error(wide, exact), allowed = 1.5 * error(rounded, exact);
  report(name, ours <= allowed, "error", ours, allowed);
}
static void check_f32(const char* name, const vector<float>& got, const Numbers& exact, double allowed) {
  const double ours = error(Numbers(got.begin(), got.end()), exact);
  report(name, ours <= allowed, "error", ours, allowed);
}
// Runs again and again; everything under `out` must be the same bits each time.
static int repetitions = 20;
static void repeat(const char* name, const std::function<void()>& run, const vector<std::pair<void*, size_t>>& out) {
  vector<vector<char>> first;
  int other = 0;
  for (int i = 0; i < repetitions; i++) {
    run();
    must(cudaDeviceSynchronize(), name);
    for (size_t o = 0; o < out.size(); o++) {
      vector<char> bytes = download((char*)out[o].first, out[o].second);
      if (i == 0) first.push_back(bytes);
      else other += bytes != first[o];
    }
  }
  if (other) report(name, false, "repetitions with other bits", other, 0);
}

#include "layers_check.cuh"
#include "layers_time.cuh"
#include "layers_sinks.cuh"
#include "layers_divergence.cuh"

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "check";
  if (mode == "check") check_all();
  else if (mode == "few") check_few();
  else if (mode == "time") time_all();
  else return printf("usage: layers check|few|time\n"), 2;
  printf("%s\n", failures ? "SOME FAILED" : "all good");
  return failures != 0;
}
