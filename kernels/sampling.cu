// The next token of every row of logits [rows, vocab], as the host's sampler chooses it:
//   1. repetition penalty: logits of tokens seen, positive ones divided by it, others multiplied
//   2. temperature; at 0 the highest logit wins, ties to the lower id
//   3. top-k: the k highest, ties to the lower id
//   4. top-p: of these the shortest run from the highest whose mass reaches p, ties to the lower id
//   5. min-p: tokens below min_p times the likeliest fall out
//   6. draw: u from ChaCha12 of (seed, stream, position); the token at which the mass of those left, in order of id,
//      passes u times their total
// Its log-probability is that of the loss kernel, to the bit. Weights are f32, their sums over threads f64, in an order
// that the vocabulary decides; a token differs from the host's only where u lies within that rounding. One block a row,
// so that nothing waits for the host: the row (512 KB of 128k logits) stays in L2, and is read 6 times, with top-k
// or top-p 12 times more each.
#include "row_softmax.cuh"

struct SampleConfig {
  static constexpr int kThreads = kMaxRowThreads, kBlocks = 1;
  static constexpr int kSearchBits = 3, kWays = 1 << kSearchBits;
};

struct SampleShared {
  RowSoftmaxShared softmax;
  double sums[SampleConfig::kWays][kMaxWarps];
  uint32_t keys[kMaxWarps];
  int32_t found[kMaxWarps];
  uint32_t cipher[16];
  double uniform;
};

// ---------------------------------------------------------------------------------------------------- the row

// A logit's place in the order, as an integer: 0 for a token that is excluded, the largest for no number.
SEGATTN_FN uint32_t rank_key(float logit) {
  if (logit != logit) return 0xffffffffu;
  if (logit == SEGATTN_NEG_INF) return 0;
  const uint32_t bits = __float_as_uint(logit + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
SEGATTN_FN float logit_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
constexpr uint32_t kInfinityKey = 0xff800000u;

struct SampleRow {
  const float* g_logits;
  const uint32_t* g_seen;
  int vocab;
  float penalty, temperature;
  float best;  // the highest logit after the penalty

  __device__ __forceinline__ uint32_t key(int id) const {
    const float x = g_logits[id];
    if (penalty == 1.f || !(g_seen[id / 32] >> (id % 32) & 1)) return rank_key(x);
    return rank_key(x > 0.f ? x / penalty : mul_rn(x, penalty));
  }
  // Relative to the likeliest token.
  __device__ __forceinline__ float weight(uint32_t key) const {
    return key == 0 ? 0.f : exp_of((logit_of(key) - best) / temperature);
  }
  // The ids of a thread where order counts: one after the other.
  __device__ __forceinline__ int first_id() const { return min(vocab, (int)threadIdx.x * ceil_div(vocab, blockDim.x)); }
  __device__ __forceinline__ int end_id() const { return min(vocab, ((int)threadIdx.x + 1) * ceil_div(vocab, blockDim.x)); }
};

// ---------------------------------------------------------------------------------------------------- over the block

SEGATTN_FN uint32_t highest_key(const SampleRow& row, SampleShared& shared) {
  uint32_t top = 0;
  for (int id = threadIdx.x; id < row.vocab; id += blockDim.x) top = max(top, row.key(id));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, mask));
  if ((threadIdx.x & 31) == 0) shared.keys[threadIdx.x >> 5] = top;
  __syncthreads();
  for (int warp = 0; warp < (int)blockDim.x / 32; warp++) top = max(top, shared.keys[warp]);
  return top;
}

// Sums over the block of several numbers a thread, in sums[way][0].
SEGATTN_FN void block_sums(const float (&x)[SampleConfig::kWays], SampleShared& shared) {
  __syncthreads();
#pragma unroll
  for (int way = 0; way < SampleConfig::kWays; way++) {
    double sum = x[way];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if ((threadIdx.x & 31) == 0) shared.sums[way][threadIdx.x >> 5] = sum;
  }
  __syncthreads();
  if (threadIdx.x < SampleConfig::kWays)
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) shared.sums[threadIdx.x][0] += shared.sums[threadIdx.x][warp];
  __syncthreads();
}

// Sum of x over this thread and those before it, and over all.
struct Prefix {
  double through, total;
};
SEGATTN_FN Prefix block_prefix(double x, SampleShared& shared) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const double before = shuffle_up(x, delta);
    if (lane >= delta) x += before;
  }
  __syncthreads();
  if (lane == 31) shared.sums[0][threadIdx.x >> 5] = x;
  __syncthreads();
  double before = 0., total = 0.;
  for (int warp = 0; warp < (int)blockDim.x / 32; warp++) {
    if (warp == (int)threadIdx.x >> 5) before = total;
    total += shared.sums[0][warp];
  }
  return {before + x, total};
}

// The first (or last) thread for which the predicate holds; -1 where there is none.
SEGATTN_FN int find_thread(bool predicate, bool last, SampleShared& shared) {
  const uint32_t lanes = __ballot_sync(0xffffffffu, predicate);
  const int lane = last ? 31 - __clz(lanes) : __ffs(lanes) - 1;
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared.found[threadIdx.x >> 5] = lanes ? (int)threadIdx.x + lane : -1;
  __syncthreads();
  int found = -1;
  for (int warp = 0; warp < (int)blockDim.x / 32; warp++)
    if (shared.found[warp] >= 0 && (last || found < 0)) found = shared.found[warp];
  return found;
}

// ---------------------------------------------------------------------------------------------------- what is left

// Tokens above the threshold, and the first `ties` of those at it.
struct Cut {
  uint32_t threshold, ties;
};

// What a token counts: its weight, or one.
template <bool kByWeight>
SEGATTN_FN float measure(const SampleRow& row, uint32_t key) {
  return kByWeight ? row.weight(key) : key == 0 ? 0.f : 1.f;
}

template <bool kByWeight>
SEGATTN_FN double measure_above(const SampleRow& row, uint32_t threshold, SampleShared& shared) {
  float x[SampleConfig::kWays] = {};
  for (int id = threadIdx.x; id < row.vocab; id += blockDim.x) {
    const uint32_t key = row.key(id);
    if (key > threshold) x[0] += measure<kByWeight>(row, key);
  }
  block_sums(x, shared);
  return shared.sums[0][0];
}

// The highest threshold at or above which tokens measure at least `goal` together, three bits a pass; 0: all do not.
template <bool kByWeight>
SEGATTN_FN uint32_t find_threshold(const SampleRow& row, double goal, SampleShared& shared) {
  using C = SampleConfig;
  uint32_t threshold = 0;
  for (int shift = 30; shift >= 0; shift -= C::kSearchBits) {
    float x[C::kWays] = {};
    for (int id = threadIdx.x; id < row.vocab; id += blockDim.x) {
      const uint32_t key = row.key(id), digits = (key - threshold) >> shift;
      if (key < threshold) continue;
      const float counts = measure<kByWeight>(row, key);
#pragma unroll
      for (uint32_t way = 1; way < C::kWays; way++) x[way] += digits >= way ? counts : 0.f;
    }
    block_sums(x, shared);
    uint32_t digit = 0;
    for (uint32_t way = 1; way < (shift == 30 ? 4 : C::kWays); way++)
      if (shared.sums[way][0] >= goal) digit = way;
    threshold |= digit << shift;
  }
  return threshold;
}

// The k highest.
SEGATTN_FN Cut cut_top_k(const SampleRow& row, uint32_t k, SampleShared& shared) {
  const uint32_t threshold = find_threshold<false>(row, k, shared);
  if (threshold == 0) return {0, 0};
  return {threshold, k - (uint32_t)measure_above<false>(row, threshold, shared)};
}

// Of those left by top-k the fewest from the highest that reach the share p of their mass.
SEGATTN_FN Cut cut_top_p(const SampleRow& row, const Cut& left, float p, SampleShared& shared) {
  const double above = measure_above<true>(row, left.threshold, shared), at = row.weight(left.threshold);
  const double goal = (double)p * (above + left.ties * at);
  const auto ties = [&](double missing, double weight) { return (uint32_t)fmax(1., ceil(missing / weight)); };
  if (above < goal) return {left.threshold, min(left.ties, ties(goal - above, at))};
  const uint32_t threshold = find_threshold<true>(row, goal, shared);
  const double rest = goal - measure_above<true>(row, threshold, shared);
  return {threshold, ties(rest, row.weight(threshold))};
}

// ---------------------------------------------------------------------------------------------------- the draw

// Two words of ChaCha12's key stream (Bernstein 2008): the number in [0, 1) of (seed, stream, position), as
// rand_chacha gives it to the host. By one thread, in shared memory.
SEGATTN_FN void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  const auto rotate = [](uint32_t x, int bits) { return x << bits | x >> (32 - bits); };
  a += b; d = rotate(d ^ a, 16);
  c += d; b = rotate(b ^ c, 12);
  a += b; d = rotate(d ^ a, 8);
  c += d; b = rotate(b ^ c, 7);
}

// Word i of the cipher's input: its constant, the key "<seed><stream>segattn sampling", the block's number.
SEGATTN_FN uint32_t cipher_word(const SegattnSampler& s, int i) {
  constexpr uint32_t kFirst[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
  constexpr uint32_t kName[4] = {0x61676573, 0x206e7474, 0x706d6173, 0x676e696c};
  const uint64_t word = i < 6 ? s.seed : i < 8 ? s.stream : i < 14 ? s.position / 8 : 0;
  return i < 4 ? kFirst[i] : i >= 8 && i < 12 ? kName[i - 8] : (uint32_t)(word >> i % 2 * 32);
}

SEGATTN_FN double uniform(const SegattnSampler& s, uint32_t (&x)[16]) {
  for (int i = 0; i < 16; i++) x[i] = cipher_word(s, i);
  for (int round = 0; round < 6; round++) {
    for (int i = 0; i < 4; i++) quarter_round(x[i], x[4 + i], x[8 + i], x[12 + i]);
    for (int i = 0; i < 4; i++) quarter_round(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
  }
  const int at = (int)(s.position % 8) * 2;
  const uint64_t low = x[at] + cipher_word(s, at), high = x[at + 1] + cipher_word(s, at + 1);
  return (double)((high << 32 | (uint32_t)low) >> 11) * 0x1p-53;
}

// The first token of the highest logit.
SEGATTN_FN int pick_highest(const SampleRow& row, uint32_t top, SampleShared& shared) {
  int id = row.first_id();
  while (id < row.end_id() && row.key(id) != top) id++;
  const int thread = find_thread(id < row.end_id(), false, shared);
  return (int)threadIdx.x == thread ? id : -1;
}

// The token at which the mass of those left passes u times their total; in the thread that has it, elsewhere -1.
SEGATTN_FN int pick_drawn(const SampleRow& row, const Cut& cut, float min_p, double u, SampleShared& shared) {
  uint32_t ties = 0;
  for (int id = row.first_id(); id < row.end_id(); id++) ties += row.key(id) == cut.threshold;
  const double ties_before = block_prefix(ties, shared).through - ties;
  double goal = INFINITY, mass = 0.;
  int last = -1;
  // Once for the thread's mass, and once more to find the token in it.
  const auto walk = [&] {
    double tie = ties_before;
    for (int id = row.first_id(); id < row.end_id() && !(mass > goal); id++) {
      const uint32_t key = row.key(id);
      const bool left = key > cut.threshold || (key == cut.threshold && tie++ < cut.ties);
      const float weight = left ? row.weight(key) : 0.f;
      if (weight <= 0.f || weight < min_p) continue;
      mass += weight;
      last = id;
    }
  };
  walk();
  const double own = mass;
  const Prefix prefix = block_prefix(own, shared);
  goal = u * prefix.total;
  int thread = find_thread(prefix.through > goal, false, shared);
  // Only rounding of u * total up to the total finds none: then the last token is it.
  if (thread < 0) thread = find_thread(own > 0., true, shared);
  if ((int)threadIdx.x != thread) return -1;
  mass = prefix.through - own;
  walk();
  return last;
}

// ---------------------------------------------------------------------------------------------------- the kernel

SEGATTN_FN void sample(const SegattnSampleParams& p) {
  if ((int)blockDim.x != softmax_threads(p.vocab)) __trap();
  SampleShared& shared = *(SampleShared*)shared_memory();
  const int64_t index = blockIdx.x;
  SegattnSampler& sampler = p.sampler[index];
  if (threadIdx.x == 0) shared.uniform = uniform(sampler, shared.cipher);
  const float* g_logits = row_of<const float>(p.logits, index);
  uint32_t* g_seen = p.seen + index * p.seen_pitch;
  SampleRow row = {g_logits, g_seen, p.vocab, sampler.penalty, sampler.temperature, 0.f};
  const uint32_t top = highest_key(row, shared);
  if (top == 0 || top >= kInfinityKey) {
    if (threadIdx.x == 0) sampler.failure = top == 0 ? 2 : 1;
    return;
  }
  row.best = logit_of(top);
  int token;
  if (sampler.temperature == 0.f) {
    token = pick_highest(row, top, shared);
  } else {
    Cut cut = {0, 0};
    if (sampler.top_k > 0 && sampler.top_k < (uint32_t)p.vocab) cut = cut_top_k(row, sampler.top_k, shared);
    if (sampler.top_p < 1.f) cut = cut_top_p(row, cut, sampler.top_p, shared);
    token = pick_drawn(row, cut, sampler.min_p, shared.uniform, shared);
  }
  const RowSoftmax softmax = row_softmax(g_logits, p.vocab, shared.softmax);
  __syncthreads();  // all have read the history and the position
  if (token < 0) return;
  p.tokens[index] = token;
  p.log_probability[index] = softmax.log_probability(g_logits[token]);
  g_seen[token / 32] |= 1u << (token % 32);
  sampler.position++;
  sampler.failure = 0;
}

// ---------------------------------------------------------------------------------------------------- entry points

// A block a row, softmax_threads(vocab) threads.
SEGATTN_INFO(sample_f32, (SegattnKernelInfo{SampleConfig::kThreads, sizeof(SampleShared), SampleConfig::kBlocks, 1, 0, 0, sizeof(SegattnSampleParams)}))
SEGATTN_KERNEL(sample_f32, SampleConfig, SegattnSampleParams) { sample(params); }
