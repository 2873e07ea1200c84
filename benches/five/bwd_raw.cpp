// bwd_raw Q_OLD K_OLD Q_NEW K_NEW K_NOSTORE: Hopper's backward, seven products against five.
#include <cuda.h>
#include <dlfcn.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include <algorithm>
#include <cmath>
#include "params.h"
static void* lib;
template <class F> F sym(const char* n) { void* p = dlsym(lib, n); if (!p) { printf("no %s\n", n); exit(1); } return (F)p; }
#define S_(x) #x
#define V2(f) S_(f)
#define CALL(f, ...) do { static auto fn = sym<decltype(&f)>(V2(f)); CUresult r = fn(__VA_ARGS__); if (r) { printf("%s: %d line %d\n", V2(f), r, __LINE__); exit(1);} } while (0)
static CUdeviceptr alloc(size_t n) { CUdeviceptr p; CALL(cuMemAlloc, &p, std::max<size_t>(n, 256)); return p; }
static uint32_t state = 1;
static float uniform() { state = state * 1664525 + 1013904223; return (state >> 8) / 8388608.0f - 1.0f; }
static uint16_t bf16(float x) { uint32_t u; memcpy(&u, &x, 4); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
static CUdeviceptr block; static const size_t kBlock = (1 << 22) + 1;
static CUdeviceptr random_tensor(size_t len, int seed) {
  CUdeviceptr p = alloc(len * 2); size_t at = 0, from = seed * 65537ull % kBlock;
  while (at < len) { size_t n = std::min(len - at, kBlock - from); CALL(cuMemcpyDtoD, p + at * 2, block + from * 2, n * 2); at += n; from = 0; }
  return p;
}
template <class T> CUdeviceptr put(const std::vector<T>& v) { CUdeviceptr p = alloc(v.size() * sizeof(T)); CALL(cuMemcpyHtoD, p, v.data(), v.size() * sizeof(T)); return p; }
static SegattnTensor tensor(CUdeviceptr d, int rows, int heads, int dim) { return {(void*)d, nullptr, (int64_t)rows * heads * dim, heads * dim, dim, rows}; }
struct K { CUfunction f; SegattnKernelInfo info; };
static K load(const char* file, const char* entry) { CUmodule m; CALL(cuModuleLoad, &m, file); K k; CALL(cuModuleGetFunction, &k.f, m, entry); CUdeviceptr p; size_t n; CALL(cuModuleGetGlobal, &p, &n, m, (std::string(entry) + "_info").c_str()); CALL(cuMemcpyDtoH, &k.info, p, sizeof k.info); CALL(cuFuncSetAttribute, k.f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, k.info.shared_bytes); int regs, local; CALL(cuFuncGetAttribute, &regs, CU_FUNC_ATTRIBUTE_NUM_REGS, k.f); CALL(cuFuncGetAttribute, &local, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, k.f); printf("%s %s: %d threads %d bytes %d registers %d local\n", file, entry, k.info.threads, k.info.shared_bytes, regs, local); return k; }
int main(int n, char** argv) {
  setvbuf(stdout, 0, _IOLBF, 0);
  lib = dlopen("libcuda.so.1", RTLD_NOW); if (!lib) return 1;
  CALL(cuInit, 0); CUdevice dev; CALL(cuDeviceGet, &dev, 0); CUcontext ctx; CALL(cuDevicePrimaryCtxRetain, &ctx, dev); CALL(cuCtxSetCurrent, ctx); CUstream stream; CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
  CUevent e0, e1; CALL(cuEventCreate, &e0, 0); CALL(cuEventCreate, &e1, 0);
  std::vector<uint16_t> host(kBlock); for (auto& x : host) x = bf16((uniform() + uniform() + uniform() + uniform()) * 0.866f); block = put(host);
  CUdeviceptr work = alloc(8 * 64);
  for (int D : {128, 64}) for (int S : {512, 1024, 2048, 4096, 8192}) {
    std::string q = "attention_query_grad_hopper_bf16_d" + std::to_string(D), k = "attention_key_grad_hopper_bf16_d" + std::to_string(D);
    K q_old = load(argv[1], q.c_str()), k_old = load(argv[2], k.c_str()), q_new = load(argv[3], q.c_str()), k_new = load(argv[4], k.c_str()), k_no = load(argv[5], k.c_str());
    const int B = 16384 / S, H = 16, M = S; std::vector<CUdeviceptr> owned; auto own = [&](CUdeviceptr p) { owned.push_back(p); return p; };
    SegattnBackwardParams p{}; int seed = 1;
    auto T = [&](int rows) { return tensor(own(random_tensor((size_t)B * rows * H * D, seed++)), rows, H, D); };
    p.problem.q = T(S); p.problem.k = T(S); p.problem.v = T(S); p.problem.prior_k = T(M); p.problem.prior_v = T(M); p.problem.past_k = tensor(0, 0, H, D); p.problem.past_v = p.problem.past_k;
    std::vector<int> seg(B, S), pri(B, M), zero(B * H, 0); std::vector<float> gate(H, 1.f); std::vector<uint8_t> heads(H, 1);
    p.problem.segment_len = (int*)own(put(seg)); p.problem.prior_len = (int*)own(put(pri)); p.problem.past_len = (int*)own(put(zero)); p.problem.past_gate = (float*)own(put(gate)); p.problem.prior_heads = (uint8_t*)own(put(heads));
    p.problem.past_len_batch_stride = H; p.problem.past_len_head_stride = 1; p.problem.batch = B; p.problem.q_heads = p.problem.kv_heads = H; p.problem.scale = 1 / sqrtf(D);
    p.out = T(S); p.d_out = T(S); p.row_pitch = (S + 127) / 128 * 128;
    std::vector<float> lse((size_t)B * H * p.row_pitch), delta(lse.size()); for (size_t i = 0; i < lse.size(); i++) { lse[i] = (logf(M + i % p.row_pitch + 1) + 0.5f) * 1.442695f; delta[i] = 0.01f * uniform(); }
    p.row_lse = (float*)own(put(lse)); p.row_delta = (float*)own(put(delta));
    auto out = [&](int rows) { return tensor(own(alloc((size_t)B * rows * H * D * 2)), rows, H, D); };
    p.d_q = out(S); p.d_k = out(S); p.d_v = out(S); p.d_prior_k = out(M); p.d_prior_v = out(M);
    int splits = (S + M + 8191) / 8192; p.max_splits = splits; if (splits > 1) p.partial_d_q = (float*)own(alloc((size_t)splits * B * H * S * D * 4));
    p.partial_gate = (float*)own(alloc((size_t)splits * B * H * S * 3 * 4));
    size_t ws = (size_t)B * H * (S / 64) * ((S + M) / 64) * 8192; p.d_past_gate = (float*)own(alloc(ws)); CALL(cuMemsetD8, (CUdeviceptr)p.d_past_gate, 0, ws);
    int sms = 132;
    double pairs = (double)B * H * ((double)S * M + (double)S * (S + 1) / 2);
    auto launch = [&](K& kk, bool query) { CALL(cuMemsetD8Async, work, 0, 64, stream); p.work_counter = (uint32_t*)work; p.tiles = (S + kk.info.tile_rows - 1) / kk.info.tile_rows; void* a[] = {&p}; (void)query; CALL(cuLaunchKernel, kk.f, sms, 1, 1, kk.info.threads, 1, 1, kk.info.shared_bytes, stream, a, nullptr); };
    auto get = [&](SegattnTensor& t, int rows) { std::vector<uint16_t> v((size_t)B * rows * H * D); CALL(cuMemcpyDtoH, v.data(), (CUdeviceptr)t.data, v.size() * 2); return v; };
    CALL(cuCtxSynchronize);
    // Bits.
    launch(k_old, false); launch(q_old, true); CALL(cuCtxSynchronize); auto dq0 = get(p.d_q, S), dk0 = get(p.d_k, S), dv0 = get(p.d_v, S);
    std::vector<float> part0; if (splits > 1) { part0.resize((size_t)splits * B * H * S * D); CALL(cuMemcpyDtoH, part0.data(), (CUdeviceptr)p.partial_d_q, part0.size() * 4); CALL(cuMemsetD8, (CUdeviceptr)p.partial_d_q, 0xff, part0.size() * 4); }
    CALL(cuMemsetD8, (CUdeviceptr)p.d_q.data, 0xff, dq0.size() * 2); CALL(cuMemsetD8, (CUdeviceptr)p.d_k.data, 0xff, dq0.size() * 2); CALL(cuCtxSynchronize);
    launch(k_new, false); launch(q_new, true); CALL(cuCtxSynchronize); auto dq1 = get(p.d_q, S), dk1 = get(p.d_k, S), dv1 = get(p.d_v, S);
    size_t bad[4] = {}; for (size_t i = 0; i < dq0.size(); i++) bad[0] += dq0[i] != dq1[i], bad[1] += dk0[i] != dk1[i], bad[2] += dv0[i] != dv1[i];
    if (splits > 1) { std::vector<float> part1(part0.size()); CALL(cuMemcpyDtoH, part1.data(), (CUdeviceptr)p.partial_d_q, part1.size() * 4); for (size_t i = 0; i < part0.size(); i++) bad[3] += memcmp(&part0[i], &part1[i], 4) != 0; }
    printf("D%d S%d: workspace %.2f GB, bits: d_q %zu, d_k %zu, d_v %zu, partial %zu of %zu differ\n", D, S, ws / 1e9, bad[0], bad[1], bad[2], bad[3], dq0.size());
    auto time = [&](const char* name, std::vector<K*> ks, int products) { std::vector<double> t; for (int s = 0; s < 12; s++) { CALL(cuEventRecord, e0, stream); for (auto* kk : ks) launch(*kk, false); CALL(cuEventRecord, e1, stream); CALL(cuEventSynchronize, e1); float ms; CALL(cuEventElapsedTime, &ms, e0, e1); t.push_back(ms); } std::sort(t.begin(), t.end()); printf("  %s %.3f (%.3f) ms", name, t[0], t[6]); if (products) printf(" %.0f TFLOP/s", 2.0 * products * D * pairs / t[0] / 1e9); };
    for (int round = 0; round < 2; round++) { printf("D%d S%d:", D, S); time("k_old", {&k_old}, 0); time("k_nostore", {&k_no}, 0); time("k_new", {&k_new}, 0); time("q_old", {&q_old}, 0); time("q_new", {&q_new}, 0); time("seven", {&k_old, &q_old}, 5); time("five", {&k_new, &q_new}, 5); printf("\n"); }
    for (auto x : owned) CALL(cuMemFree, x);
  }
}
