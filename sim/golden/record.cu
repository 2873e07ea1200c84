// Runs every kernel of instructions.cu on a GPU and writes inputs and results to a safetensors file: nvcc -std=c++17
// -gencode=arch=compute_90a,code=sm_90a -I../../kernels record.cu -o record && ./record vectors.safetensors Tensors are
// named <kernel>.in, <kernel>.more and <kernel>.out, flat, in the types of instructions.cu. The products of a warpgroup
// (wgmma_*) have the inputs of mma_chain_*, and of their results a digest is kept.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "instructions.cu"

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct Tensor {
  std::string name;
  const char* type;  // as safetensors calls it
  size_t count;
  std::vector<unsigned char> bytes;
};
std::vector<Tensor> tensors;

const char* type_of(const float&) { return "F32"; }
const char* type_of(const uint32_t&) { return "U32"; }
const char* type_of(const int32_t&) { return "I32"; }
const char* type_of(const uint16_t&) { return "U16"; }

template <class T>
void keep(const std::string& name, const std::vector<T>& values) {
  Tensor tensor = {name, type_of(T{}), values.size(), std::vector<unsigned char>(values.size() * sizeof(T))};
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  tensors.push_back(tensor);
}

template <class T>
void* upload(const std::vector<T>& values) {
  void* device = nullptr;
  if (values.empty()) return device;
  check(cudaMalloc(&device, values.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(device, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  return device;
}

using Kernel = void (*)(GoldenParams);

// What `kernel` makes of `count` records.
template <class Out, class In, class More>
std::vector<Out> run(const char* name, Kernel kernel, int count, const std::vector<In>& in,
                     const std::vector<More>& more, size_t outs, int threads = 32, int shared_bytes = 2048) {
  std::vector<Out> out(outs);
  GoldenParams p = {upload(in), upload(more), upload(out), count};
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  kernel<<<1, threads, shared_bytes>>>(p);
  check(cudaGetLastError(), name);
  check(cudaDeviceSynchronize(), name);
  check(cudaMemcpy(out.data(), p.out, outs * sizeof(Out), cudaMemcpyDeviceToHost), name);
  std::printf("%s: %d records\n", name, count);
  std::fflush(stdout);
  return out;
}

// Runs `kernel` on `count` records and keeps what went in and came out.
template <class Out, class In, class More>
void record(const char* name, Kernel kernel, int count, const std::vector<In>& in, const std::vector<More>& more,
            size_t outs) {
  const std::vector<Out> out = run<Out>(name, kernel, count, in, more, outs);
  keep(std::string(name) + ".in", in);
  if (!more.empty()) keep(std::string(name) + ".more", more);
  keep(std::string(name) + ".out", out);
}
#define RECORD(Out, name, count, in, more, outs) record<Out>(#name, golden_##name, count, in, more, outs)

std::mt19937 rng(1);
const std::vector<int> kNone;

float real(float low, float high) { return low + (high - low) * (rng() >> 8) * 0x1p-24f; }
float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Zeros, infinities, NaN, the ends of every range, ones: both signs.
std::vector<float> specials() {
  const uint32_t magnitudes[] = {0,          1,          2,          0x7fffff,   0x800000,   0x800001,
                                 0x3f800000, 0x3f7fffff, 0x3f800001, 0x40000000, 0x33800000, 0x38800000,
                                 0x387fc000, 0x477fe000, 0x477ff000, 0x477fefff, 0x4b800000, 0x7f7fffff,
                                 0x7f7f8000, 0x7f800000, 0x7fc00000, 0x7fa00001};
  std::vector<float> found;
  for (uint32_t magnitude : magnitudes)
    for (uint32_t sign : {0u, 0x80000000u}) found.push_back(from_bits(magnitude | sign));
  return found;
}
// Any bits at all.
float any() { return from_bits(rng()); }

// Truncated to an element; below the normal numbers, zero.
uint16_t narrow(float x, bool bf16) {
  if (std::fabs(x) < 0x1p-14f) return 0;
  return bf16 ? (uint16_t)(to_bits(x) >> 16)
              : (uint16_t)((to_bits(x) >> 16 & 0x8000) | ((to_bits(x) >> 13) - (112 << 10) & 0x7fff));
}

void record_arithmetic() {
  std::vector<float> exponents = specials(), logarithms = specials();
  for (int i = 0; i < 2000; i++) exponents.push_back(real(-160, 130));
  for (int i = 0; i < 1000; i++) exponents.push_back(real(-2, 2));
  for (int i = -150; i <= 129; i++) exponents.push_back((float)i);
  RECORD(float, exp2_approx, (int)exponents.size(), exponents, kNone, exponents.size());
  for (int i = 0; i < 1000; i++) logarithms.push_back(from_bits(rng() & 0x7fffffff));
  for (int i = 0; i < 1000; i++) logarithms.push_back(real(0.25f, 4));
  for (int i = -149; i <= 127; i++) logarithms.push_back(std::ldexp(1.f, i));
  RECORD(float, log2_approx, (int)logarithms.size(), logarithms, kNone, logarithms.size());

  const std::vector<float> special = specials();
  std::vector<float> pairs, triples;
  for (float a : special)
    for (float b : special) pairs.insert(pairs.end(), {a, b});
  for (int i = 0; i < 500; i++) {
    const float x = any();
    pairs.insert(pairs.end(), {x, any(), real(-3, 3), real(-3, 3)});
    // Halfway between two bf16, two f16, and a last bit to either side.
    for (uint32_t tie : {0x8000u, 0x7fffu, 0x8001u, 0x1000u, 0x0fffu, 0x1001u})
      pairs.insert(pairs.end(), {from_bits((to_bits(real(-9, 9)) & ~0xffffu) | tie),
                                 from_bits((rng() & 0x80000000u) | 0x33000000u | (rng() & 0x5ffffff))});
  }
  for (size_t i = 0; i < pairs.size() / 2; i += 3)
    triples.insert(triples.end(), {pairs[2 * i], pairs[2 * i + 1], special[i % special.size()], 0});
  for (int i = 0; i < 1000; i++) {
    const float a = real(-2, 2), b = real(-2, 2);
    triples.insert(triples.end(), {a, b, i % 2 ? -a * b : real(-2, 2), 0});
  }
  const int count = (int)pairs.size() / 2;
  RECORD(float, fma_rn, (int)triples.size() / 4, triples, kNone, triples.size() / 4);
  RECORD(float, mul_rn, count, pairs, kNone, count);
  RECORD(float, max_f32, count, pairs, kNone, count);
  RECORD(uint32_t, pack_two_bf16, count, pairs, kNone, count);
  RECORD(uint32_t, pack_two_f16, count, pairs, kNone, count);
  std::vector<uint16_t> halves;
  for (int i = 0; i < 65536; i += 13) halves.push_back((uint16_t)i);
  for (int sign : {0, 0x8000})
    for (int i : {0, 1, 2, 0x3ff, 0x400, 0x7bff, 0x7c00, 0x7c01, 0x7e00, 0x7fff, 0x7f, 0x80, 0x7f7f, 0x7f80, 0x7f81})
      halves.push_back((uint16_t)(sign | i));
  RECORD(float, widen_bf16, (int)halves.size(), halves, kNone, halves.size());
  RECORD(float, widen_f16, (int)halves.size(), halves, kNone, halves.size());
  const std::vector<int32_t> integers = {0, 1, -1, 12345, INT32_MAX, INT32_MIN};
  RECORD(int32_t, opaque, (int)integers.size(), integers, kNone, integers.size());
}

void record_warp() {
  const std::vector<int32_t> masks = {0, 1, 2, 3, 4, 8, 16, 21, 31};
  std::vector<float> lanes(masks.size() * 32);
  for (size_t i = 0; i < lanes.size(); i++) lanes[i] = (float)i;
  RECORD(float, shuffle_xor, (int)masks.size(), lanes, masks, lanes.size());
  std::vector<uint32_t> bits(lanes.size());
  std::vector<int32_t> numbers(4 * 32);
  std::mt19937 draw(2);
  for (uint32_t& x : bits) x = draw();
  for (int32_t& x : numbers) x = (int32_t)draw();
  RECORD(uint32_t, shuffle_xor_bits, (int)masks.size(), bits, masks, bits.size());
  RECORD(int32_t, uniform, (int)numbers.size() / 32, numbers, kNone, numbers.size());
  std::vector<uint32_t> votes = {0, ~0u, 1, 0x80000000u, 0x00010000u};
  for (int i = 0; i < 5; i++) votes.push_back(rng() & rng() & rng());
  RECORD(uint32_t, warp_any, (int)votes.size(), votes, kNone, votes.size() * 32);
  const std::vector<uint32_t> summands = {0, 1, 15, 0xffffffffu, 0x80000000u, 0x80000000u, 7};
  RECORD(uint32_t, atomic_add, (int)summands.size(), summands, kNone, 33 + summands.size());
}

void record_copies() {
  const int count = 6;
  std::vector<uint32_t> rows(count * 32 * 4), valid(count * 32);
  for (auto& x : rows) x = rng();
  std::vector<int32_t> places(count * 32);
  for (int i = 0; i < count * 32; i++) {
    valid[i] = i < 32 ? 16 : rng() % 2 * 16;
    // In order, reversed, and at random with rows that several lanes point at.
    places[i] = i < 32 ? i : i < 64 ? 63 - i : (int)(rng() % 32);
  }
  RECORD(uint32_t, ldmatrix_x4, count, rows, places, rows.size());
  RECORD(uint32_t, ldmatrix_x4_trans, count, rows, places, rows.size());
  RECORD(uint32_t, cp_async_16, count, rows, valid, rows.size());
}

// Operands of both element types: first those whose sums are exact, then real numbers, then special ones.
constexpr int kExact = 24, kReal = 24, kSpecial = 16;

void record_products(const char* name, Kernel kernel, bool bf16) {
  const int count = kExact + kReal + kSpecial;
  std::vector<uint32_t> operands(count * 32 * 6);
  std::vector<float> sums(count * 32 * 4);
  for (int i = 0; i < count; i++) {
    const bool exact = i < kExact, special = i >= kExact + kReal;
    const float size = special ? 1.f : std::ldexp(1.f, i % 5 * 3 - 6);
    auto value = [&] {
      if (exact) return (float)((int)(rng() % 31) - 15);
      const uint32_t draw = special ? rng() % 64 : 63;
      if (draw == 0) return from_bits((rng() & 0x80000000u) | 0x7f800000u);
      if (draw == 1 && i % 2) return from_bits(0x7fc00000u);
      return real(-size, size);
    };
    auto element = [&]() -> uint32_t {
      const float x = value();
      if (x == 0) return 0;
      if (!std::isfinite(x))
        return std::isnan(x) ? (bf16 ? 0x7fc0 : 0x7e00) : (x < 0 ? 0x8000u : 0u) | (bf16 ? 0x7f80 : 0x7c00);
      // Subnormal elements: tiny ones count on tensor cores.
      if (special && rng() % 8 == 0) return rng() & (bf16 ? 0x807f : 0x83ff);
      return narrow(x, bf16);
    };
    for (int at = 0; at < 32 * 6; at++) {
      const uint32_t low = element();
      operands[i * 32 * 6 + at] = low | element() << 16;
    }
    for (int at = 0; at < 32 * 4; at++) {
      // Exact ones lie within 24 bits, real ones are far larger or smaller than the products too.
      sums[i * 32 * 4 + at] =
          exact ? (float)((int)(rng() % 8001) - 4000) : real(-size, size) * std::ldexp(1.f, (int)(rng() % 9) * 4 - 16);
    }
  }
  record<float>(name, kernel, count, operands, sums, sums.size());
}

// 64 bits of values: FNV-1a over their bytes, low word first.
std::vector<uint32_t> digest(const float* values, size_t count) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < count * 4; i++) hash = (hash ^ ((const unsigned char*)values)[i]) * 0x100000001b3u;
  return {(uint32_t)hash, (uint32_t)(hash >> 32)};
}

struct WarpgroupKernel {
  const char* name;
  Kernel kernel;
  int columns;
};
#define WGMMA(name, columns) {"wgmma_" #name, golden_wgmma_##name, columns}
#define WGMMAS(type)                                                                                         \
  {WGMMA(rs_k_major_64_##type, 64),    WGMMA(rs_k_major_128_##type, 128), WGMMA(rs_mn_major_64_##type, 64),  \
   WGMMA(rs_mn_major_128_##type, 128), WGMMA(ss_k_major_64_##type, 64),   WGMMA(ss_k_major_128_##type, 128), \
   WGMMA(ss_mn_major_64_##type, 64),   WGMMA(ss_mn_major_128_##type, 128)}

// Even rows of a and of b hold small integers, and their sums are exact; the others hold real numbers of many sizes.
void record_warpgroup(const std::string& type, Kernel chain, const std::vector<WarpgroupKernel>& kernels) {
  const bool bf16 = type == "bf16";
  std::vector<uint32_t> operands((kWgmmaRows + kWgmmaCols) * kWgmmaDepth / 2);
  for (size_t i = 0; i < operands.size(); i++) {
    const int row = (int)(i * 2 / kWgmmaDepth);
    auto element = [&]() -> uint32_t {
      const float size = std::ldexp(1.f, row % 5 * 3 - 6);
      return narrow(row % 2 ? real(-size, size) : (float)((int)(rng() % 31) - 15), bf16);
    };
    const uint32_t low = element();
    operands[i] = low | element() << 16;
  }
  std::vector<float> sums(kWgmmaRows * kWgmmaCols);
  for (size_t i = 0; i < sums.size(); i++) {
    // Even rows and columns: small integers too.
    const bool exact = i / 4 % 32 / 4 % 2 == 0 && i % 2 == 0;
    sums[i] = exact ? (float)((int)(rng() % 8001) - 4000) : real(-1, 1) * std::ldexp(1.f, (int)(rng() % 9) * 2 - 10);
  }
  const int shared = sizeof(WgmmaShared<Bf16>);
  const std::string name = "mma_chain_" + type;
  keep(name + ".in", operands);
  keep(name + ".more", sums);
  keep(name + ".out", run<float>(name.c_str(), chain, 1, operands, sums, 2 * sums.size(), 128, shared));
  for (const WarpgroupKernel& k : kernels) {
    const size_t count = kWgmmaRows * k.columns;
    const std::vector<float> out = run<float>(k.name, k.kernel, 1, operands, sums, 2 * count, 128, shared);
    std::vector<uint32_t> digests;
    for (int part = 0; part < 2; part++)
      for (uint32_t word : digest(out.data() + part * count, count)) digests.push_back(word);
    keep(std::string(k.name) + ".out", digests);
  }
}

void write(const char* path) {
  std::string header =
      "{\"__metadata__\":{\"exact\":\"" + std::to_string(kExact) + "\",\"real\":\"" + std::to_string(kReal) + "\"}";
  size_t at = 0;
  for (const Tensor& t : tensors) {
    header += ",\"" + t.name + "\":{\"dtype\":\"" + t.type + "\",\"shape\":[" + std::to_string(t.count) +
              "],\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(at + t.bytes.size()) + "]}";
    at += t.bytes.size();
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  FILE* file = std::fopen(path, "wb");
  if (!file) {
    std::perror(path);
    std::exit(1);
  }
  const uint64_t length = header.size();
  std::fwrite(&length, 8, 1, file);
  std::fwrite(header.data(), 1, header.size(), file);
  for (const Tensor& t : tensors) std::fwrite(t.bytes.data(), 1, t.bytes.size(), file);
  if (std::fclose(file) != 0) {
    std::perror(path);
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: record OUT.safetensors\n");
    return 2;
  }
  record_arithmetic();
  record_warp();
  record_copies();
  record_products("mma_16x8x16_bf16", golden_mma_16x8x16_bf16, true);
  record_products("mma_16x8x16_f16", golden_mma_16x8x16_f16, false);
  record_warpgroup("bf16", golden_mma_chain_bf16, WGMMAS(bf16));
  record_warpgroup("f16", golden_mma_chain_f16, WGMMAS(f16));
  write(argv[1]);
  return 0;
}
