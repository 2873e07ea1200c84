// Segment attention from C: a forward and a backward call on the CPU, or with --cuda on GPU 0, compared with plain
// loops in double. Keys and values lie side by side in one tensor, as many libraries keep them.
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "segattn.h"

// Batch, rows of the segment, of the prior and of the past, query heads, KV heads, elements of a row.
enum { B = 2, S = 48, P = 16, M = 24, HQ = 4, HK = 2, D = 32, Q = B * S * HQ * D, KV = B * S * 2 * HK * D };
static const int32_t segment_len[B] = {48, 31}, prior_len[B] = {16, 0}, past_len[B] = {24, 9}, sink_len[B] = {2, 0};
static const uint8_t prior_heads[HQ] = {1, 0, 1, 0};
static const float past_gate[HQ] = {1, 0.5f, 0, 0};

static float q[Q], kv[KV], prior[B * P * 2 * HK * D], past[B * M * 2 * HK * D], d_out[Q];
static float out[Q], lse[B * HQ * S], d_q[Q], d_k[Q / 2], d_v[Q / 2], d_prior_k[B * P * HK * D],
    d_prior_v[B * P * HK * D], d_gate[B * HQ];
static int on_gpu;
static void* driver;

static void check(int status, const char* what) {
  if (status == 0) return;
  fprintf(stderr, "%s: status %d: %s\n", what, status, segattn_last_error());
  exit(1);
}
// A call of CUDA's driver, which is loaded at run time, as the library does.
#define CU(name, types, ...) check(((int(*) types)dlsym(driver, #name))(__VA_ARGS__), #name)

// What the library gets: the numbers themselves, or a copy of n of them in device memory, as bf16 or as they are.
static void* place(float* numbers, size_t n, int is_tensor) {
  if (!on_gpu) return numbers;
  size_t bytes = n * (is_tensor ? 2 : 4);
  uint16_t* rounded = malloc(bytes);
  for (size_t i = 0; is_tensor && i < n; i++) rounded[i] = ((uint16_t*)&numbers[i])[1];
  uint64_t address = 0;
  CU(cuMemAlloc_v2, (uint64_t*, size_t), &address, bytes);
  CU(cuMemcpyHtoD_v2, (uint64_t, const void*, size_t), address, is_tensor ? (void*)rounded : numbers, bytes);
  free(rounded);
  return (void*)(uintptr_t)address;
}
static void back(float* numbers, size_t n, int is_tensor, void* from) {
  if (!on_gpu) return;
  CU(cuMemcpyDtoH_v2, (void*, uint64_t, size_t), numbers, (uintptr_t)from, n * (is_tensor ? 2 : 4));
  for (size_t i = n; is_tensor && i-- > 0;) {
    uint32_t bits = (uint32_t)((uint16_t*)numbers)[i] << 16;
    memcpy(&numbers[i], &bits, 4);
  }
}

static void fill(float* numbers, size_t n, unsigned seed) {
  for (size_t i = 0; i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    numbers[i] = (float)((int)(seed >> 24) - 128) / 128;  // 8 bits: exact in bf16
  }
}

static SegattnTensor tensor(void* data, size_t rows, size_t heads) {
  SegattnTensor packed = {data, {B, rows, heads, D}, {rows * heads * D, heads * D, D}, NULL};
  return packed;
}
// The keys (which = 0) or values (1) of a tensor [B, rows, 2, HK, D].
static SegattnTensor half(void* data, size_t rows, size_t which) {
  size_t element = on_gpu ? 2 : 4, row = 2 * HK * D;
  SegattnTensor part = {(char*)data + which * HK * D * element, {B, rows, HK, D}, {rows * row, row, D}, NULL};
  return part;
}

static double worst;
static void compare(double expected, float got) {
  double error = isinf(expected) ? (expected == got ? 0 : INFINITY) : fabs(expected - got) / (1 + fabs(expected));
  if (!(error <= worst)) worst = error;
}
// One query row: its keys in the order past, prior, current.
static double e_k[Q / 2], e_v[Q / 2], e_prior_k[B * P * HK * D], e_prior_v[B * P * HK * D], e_gate[B * HQ];
static void row(int b, int h, int i) {
  enum { MOST = M + P + S };
  const float *keys[MOST], *query = q + ((b * S + i) * HQ + h) * D, *grad = d_out + ((b * S + i) * HQ + h) * D;
  double score[MOST], *to_k[MOST], *to_v[MOST], gate[MOST], sum = 0, o[D] = {0}, dq[D] = {0}, delta = 0, far = 0;
  int n = 0, g = h / (HQ / HK), valid = i < segment_len[b];
  for (int j = 0; valid && j < past_len[b]; j++) {
    if (j >= sink_len[b] && past_gate[h] == 0) continue;
    keys[n] = past + ((b * M + j) * 2 * HK + g) * D;
    to_k[n] = NULL, gate[n++] = j < sink_len[b] ? 0 : past_gate[h];
  }
  for (int j = 0; valid && prior_heads[h] && j < prior_len[b]; j++) {
    int at = ((b * P + j) * HK + g) * D;
    keys[n] = prior + ((b * P + j) * 2 * HK + g) * D;
    to_k[n] = e_prior_k + at, to_v[n] = e_prior_v + at, gate[n++] = 0;
  }
  for (int j = 0; valid && j <= i; j++) {
    int at = ((b * S + j) * HK + g) * D;
    keys[n] = kv + ((b * S + j) * 2 * HK + g) * D;
    to_k[n] = e_k + at, to_v[n] = e_v + at, gate[n++] = 0;
  }
  for (int j = 0; j < n; j++) {
    double dot = 0;
    for (int e = 0; e < D; e++) dot += (double)query[e] * keys[j][e];
    score[j] = exp(dot / sqrt(D)) * (gate[j] > 0 ? gate[j] : 1);
    sum += score[j];
  }
  for (int j = 0; j < n; j++)
    for (int e = 0; e < D; e++) o[e] += score[j] / sum * keys[j][HK * D + e];
  for (int e = 0; e < D; e++) delta += o[e] * grad[e];
  for (int j = 0; j < n; j++) {
    double p = score[j] / sum, dp = 0;
    for (int e = 0; e < D; e++) dp += (double)grad[e] * keys[j][HK * D + e];
    double ds = p * (dp - delta);
    far += gate[j] > 0 ? ds / gate[j] : 0;
    for (int e = 0; e < D; e++) {
      dq[e] += ds * keys[j][e] / sqrt(D);
      if (to_k[j]) to_k[j][e] += ds * query[e] / sqrt(D), to_v[j][e] += p * grad[e];
    }
  }
  e_gate[b * HQ + h] += far;
  compare(n ? log(sum) : -INFINITY, lse[(b * HQ + h) * S + i]);
  for (int e = 0; e < D; e++) {
    compare(o[e], out[((b * S + i) * HQ + h) * D + e]);
    compare(dq[e], d_q[((b * S + i) * HQ + h) * D + e]);
  }
}

int main(int argc, char** argv) {
  on_gpu = argc > 1 && strcmp(argv[1], "--cuda") == 0;
  if (segattn_abi() != SEGATTN_ABI) return fprintf(stderr, "another library than the header's\n"), 1;
  SegattnDevice* device = NULL;
  void* stream = NULL;
  if (on_gpu) {
    check(segattn_device_open(0, &device), "opening GPU 0");
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    CU(cuStreamCreate, (void**, unsigned), &stream, 1);
  }
  fill(q, Q, 1), fill(kv, KV, 2), fill(prior, sizeof prior / 4, 3), fill(past, sizeof past / 4, 4), fill(d_out, Q, 5);

  void *at_kv = place(kv, KV, 1), *at_prior = place(prior, sizeof prior / 4, 1),
       *at_past = place(past, sizeof past / 4, 1);
  SegattnProblem problem = {
      .dtype = on_gpu ? SEGATTN_DTYPE_BF16 : SEGATTN_DTYPE_F32,
      .q = tensor(place(q, Q, 1), S, HQ),
      .k = half(at_kv, S, 0),
      .v = half(at_kv, S, 1),
      .prior_k = half(at_prior, P, 0),
      .prior_v = half(at_prior, P, 1),
      .past_k = half(at_past, M, 0),
      .past_v = half(at_past, M, 1),
      .prior_heads = prior_heads,
      .past_gate = past_gate,
      .segment_len = {segment_len, 0},
      .prior_len = {prior_len, 0},
      .past_len = {past_len, 0},
      .sink_len = {sink_len, 0},
  };
  SegattnForward forward = {tensor(place(out, Q, 1), S, HQ), place(lse, sizeof lse / 4, 0)};
  SegattnBackward backward = {
      .out = forward.out,
      .lse = forward.lse,
      .d_out = tensor(place(d_out, Q, 1), S, HQ),
      .d_q = tensor(place(d_q, Q, 1), S, HQ),
      .d_k = tensor(place(d_k, Q / 2, 1), S, HK),
      .d_v = tensor(place(d_v, Q / 2, 1), S, HK),
      .d_prior_k = tensor(place(d_prior_k, sizeof d_prior_k / 4, 1), P, HK),
      .d_prior_v = tensor(place(d_prior_v, sizeof d_prior_v / 4, 1), P, HK),
      .d_past_gate = place(d_gate, B * HQ, 0),
  };
  if (!on_gpu) {
    check(segattn_cpu_forward(&problem, &forward), "forward");
    check(segattn_cpu_backward(&problem, &backward), "backward");
  }
  for (int is_backward = 0; on_gpu && is_backward < 2; is_backward++) {
    SegattnPlan* plan = NULL;
    size_t bytes = 0;
    uint64_t workspace = 0;
    check(is_backward ? segattn_plan_backward(device, &problem, &backward, &plan)
                      : segattn_plan_forward(device, &problem, &forward, &plan),
          "planning");
    check(segattn_plan_workspace_bytes(plan, &bytes), "workspace");
    CU(cuMemAlloc_v2, (uint64_t*, size_t), &workspace, bytes);
    check(segattn_plan_run(plan, stream, (void*)(uintptr_t)workspace, bytes), "running");
    CU(cuStreamSynchronize, (void*), stream);
    CU(cuMemFree_v2, (uint64_t), workspace);
    segattn_plan_free(plan);
  }
  back(out, Q, 1, forward.out.data), back(lse, sizeof lse / 4, 0, forward.lse), back(d_q, Q, 1, backward.d_q.data);
  back(d_k, Q / 2, 1, backward.d_k.data), back(d_v, Q / 2, 1, backward.d_v.data);
  back(d_prior_k, sizeof d_prior_k / 4, 1, backward.d_prior_k.data);
  back(d_prior_v, sizeof d_prior_v / 4, 1, backward.d_prior_v.data);
  back(d_gate, B * HQ, 0, backward.d_past_gate);

  for (int at = 0; at < B * HQ * S; at++) row(at / (HQ * S), at / S % HQ, at % S);
  for (int at = 0; at < Q / 2; at++) compare(e_k[at], d_k[at]), compare(e_v[at], d_v[at]);
  for (int at = 0; at < B * P * HK * D; at++)
    compare(e_prior_k[at], d_prior_k[at]), compare(e_prior_v[at], d_prior_v[at]);
  for (int at = 0; at < B * HQ; at++) compare(e_gate[at], d_gate[at]);
  printf("segattn %s, %s: largest relative error %.1e\n", segattn_version(), on_gpu ? "GPU" : "CPU", worst);
  segattn_device_close(device);
  return worst < (on_gpu ? 2e-2 : 1e-5) ? 0 : 1;
}
