// Samples the next token of every row of logits [rows, vocab], by the same rules as the host's sampler:
//   1. repetition penalty: logits of tokens seen, positive ones divided by it, others multiplied
//   2. temperature; at 0 the highest logit wins, ties to the lower id
//   3. top-k: the k highest, ties to the lower id
//   4. top-p: of these the shortest run from the highest whose mass reaches p, ties to the lower id
//   5. min-p: removes tokens below min_p times the probability of the likeliest
//   6. draw: u from ChaCha12 of (seed, stream, position); the token at which the cumulative mass of the remaining
//      tokens, in order of id, exceeds u times their total
// The log-probability is that of the loss kernel, to the bit. Weights are f32 and their sums over threads f64, in an
// order that the vocabulary decides; a token differs from the host's only if u lies within that rounding. One block
// has one row, and the host is not asked. The row (512 KB of 128k logits) stays in L2. It is read twice for the
// highest logit, 4 times for a draw from all, 7 with top-k up to 1024, 9 with top-p alone; 19 times more if top-p
// needs more than 1024 tokens.
#include "row_softmax.cuh"
#include "select.cuh"

struct SampleConfig {
  static constexpr int kThreads = kMaxRowThreads, kBlocks = 1;
  static constexpr int kSearchBits = 2, kWays = 1 << kSearchBits;
  static constexpr int kListLen = 1024;  // tokens that top-k and top-p are decided among, as a rule
};

struct SampleShared {
  RowSoftmaxShared softmax;
  SelectShared select;
  CompactionShared compaction;
  Highest highest[kMaxWarps];
  double sums[SampleConfig::kWays][kMaxWarps];
  int32_t found[kMaxWarps];
  uint32_t cipher[16];
  double uniform;
  // In shared memory because the registers are full.
  int64_t index;  // of the block's row
  const uint32_t* g_seen;
  SegattnSampler sampler;
  uint32_t list_keys[SampleConfig::kListLen], list_ids[SampleConfig::kListLen];
};

// ---------------------------------------------------------------------------------------------------- the row

// Logits after the penalty, as rank keys (select.cuh); an excluded token has the least key.
struct LogitRow {
  const float* g_logits;
  int count;
  float penalty;

  // Eight keys from a multiple of 8 on; 0 beyond the end.
  __device__ __forceinline__ void load(uint32_t (&keys)[kVector], int first) const {
    float x[kVector];
    load_logits(x, g_logits, first, count);
    const uint32_t seen = penalty == 1.f ? 0 : ((SampleShared*)shared_memory())->g_seen[first / 32] >> (first % 32);
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      if (seen >> i & 1) x[i] = x[i] > 0.f ? x[i] / penalty : mul_rn(x[i], penalty);
      keys[i] = first + i < count ? rank_key(x[i]) : 0;
    }
  }
};

// The list of the k highest tokens, in order of id.
struct ListRow {
  const uint32_t* s_keys;
  int count;

  __device__ __forceinline__ void load(uint32_t (&keys)[kVector], int first) const {
#pragma unroll
    for (int i = 0; i < kVector; i++) keys[i] = first + i < count ? s_keys[first + i] : 0;
  }
};

template <class Row, class F>
SEGATTN_FN void for_each_key(const Row& row, const F& f) {
  for (int first = threadIdx.x * kVector; first < row.count; first += blockDim.x * kVector) {
    uint32_t keys[kVector];
    row.load(keys, first);
#pragma unroll
    for (int i = 0; i < kVector; i++)
      if (keys[i] != 0) f(keys[i], first + i);
  }
}

// Probabilities relative to the likeliest token's.
struct Weights {
  float best, inverse_temperature;
  __device__ __forceinline__ float of(uint32_t key) const {
    return exp_of(mul_rn(value_of(key) - best, inverse_temperature));
  }
};

// ---------------------------------------------------------------------------------------------------- over the block

template <class Row>
SEGATTN_FN Highest highest(const Row& row, SampleShared& shared) {
  Highest top = {0, 0};
  for_each_key(row, [&](uint32_t key, int id) { top = HighestOf::join(top, {key, (uint32_t)id}); });
  return block_reduce<HighestOf>(top, shared.highest);
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
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++)
      shared.sums[threadIdx.x][0] += shared.sums[threadIdx.x][warp];
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

// The first (or last) thread for which the predicate holds; -1 if there is none.
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

// Mass of the tokens above a threshold.
template <class Row>
SEGATTN_FN double mass_above(const Row& row, const Weights& weights, uint32_t threshold, SampleShared& shared) {
  float x[SampleConfig::kWays] = {};
  for_each_key(row, [&](uint32_t key, int) { x[0] += key > threshold ? weights.of(key) : 0.f; });
  block_sums(x, shared);
  return shared.sums[0][0];
}

// The highest threshold such that the mass at or above it is at least `goal`, found two bits at a time; 0 if all is
// less.
template <class Row>
SEGATTN_FN uint32_t mass_threshold(const Row& row, const Weights& weights, double goal, SampleShared& shared) {
  using C = SampleConfig;
  uint32_t threshold = 0;
  for (int shift = 30; shift >= 0; shift -= C::kSearchBits) {
    float x[C::kWays] = {};
    for_each_key(row, [&](uint32_t key, int) {
      if (key < threshold) return;
      const uint32_t digits = (key - threshold) >> shift;
      const float weight = weights.of(key);
#pragma unroll
      for (uint32_t way = 1; way < C::kWays; way++) x[way] += digits >= way ? weight : 0.f;
    });
    block_sums(x, shared);
    uint32_t digit = 0;
    for (uint32_t way = 1; way < C::kWays; way++)
      if (shared.sums[way][0] >= goal) digit = way;
    threshold |= digit << shift;
  }
  return threshold;
}

// Of the tokens above a threshold, the smallest set from the highest down whose mass reaches the goal.
template <class Row>
SEGATTN_FN Threshold cut_mass(const Row& row, const Weights& weights, const Threshold& left, double goal,
                              SampleShared& shared) {
  const auto ties = [&](double missing, uint32_t key) { return (uint32_t)fmax(1., ceil(missing / weights.of(key))); };
  const double above = mass_above(row, weights, left.key, shared);
  if (above < goal) return {left.key, left.ties ? min(left.ties, ties(goal - above, left.key)) : 0};
  const uint32_t key = mass_threshold(row, weights, goal, shared);
  return {key, ties(goal - mass_above(row, weights, key, shared), key)};
}

// The k highest as a list in order of id.
SEGATTN_FN ListRow list_of(const LogitRow& row, const Threshold& threshold, uint32_t k, SampleShared& shared) {
  Compaction<kVector> compaction;
  for (int step = 0; step < row.count; step += blockDim.x * kVector) {
    const int first = step + threadIdx.x * kVector;
    uint32_t keys[kVector] = {};
    if (first < row.count) row.load(keys, first);
    compaction.next(keys, threshold, shared.compaction, [&](int i, uint32_t index) {
      shared.list_keys[index] = keys[i];
      shared.list_ids[index] = first + i;
    });
  }
  __syncthreads();
  return {shared.list_keys, (int)k};
}

// ---------------------------------------------------------------------------------------------------- the draw

// Two words of ChaCha12's key stream (Bernstein 2008): the number in [0, 1) of (seed, stream, position), as
// rand_chacha gives it to the host. By one thread, in shared memory.
SEGATTN_FN void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  const auto rotate = [](uint32_t x, int bits) { return x << bits | x >> (32 - bits); };
  a += b;
  d = rotate(d ^ a, 16);
  c += d;
  b = rotate(b ^ c, 12);
  a += b;
  d = rotate(d ^ a, 8);
  c += d;
  b = rotate(b ^ c, 7);
}

__constant__ uint32_t kCipherStart[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
__constant__ uint32_t kCipherName[4] = {0x61676573, 0x206e7474, 0x706d6173, 0x676e696c};  // "segattn sampling"

// Word i of the cipher's input: its constant, the key of seed, stream and name, the block's number.
SEGATTN_FN uint32_t cipher_word(const SegattnSampler& s, int i) {
  const uint64_t word = i < 6 ? s.seed : i < 8 ? s.stream : i < 14 ? s.position / 8 : 0;
  return i < 4 ? kCipherStart[i] : i >= 8 && i < 12 ? kCipherName[i - 8] : (uint32_t)(word >> i % 2 * 32);
}

SEGATTN_FN double draw_uniform(const SegattnSampler& s, uint32_t (&x)[16]) {
  for (int i = 0; i < 16; i++) x[i] = cipher_word(s, i);
  for (int round = 0; round < 6; round++) {
    for (int i = 0; i < 4; i++) quarter_round(x[i], x[4 + i], x[8 + i], x[12 + i]);
    for (int i = 0; i < 4; i++) quarter_round(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
  }
  const int at = (int)(s.position % 8) * 2;
  const uint64_t low = x[at] + cipher_word(s, at), high = x[at + 1] + cipher_word(s, at + 1);
  return (double)((high << 32 | (uint32_t)low) >> 11) * 0x1p-53;
}

// Step 6: returns the token's index in the row in the one thread that has it, and -1 in the others. A thread has a
// contiguous range of indices, since the order of the tokens counts.
template <class Row>
SEGATTN_FN int find_drawn(const Row& row, const Weights& weights, const Threshold& left, float min_p, double u,
                          SampleShared& shared) {
  const int own = ceil_div(ceil_div(row.count, blockDim.x), kVector) * kVector;
  const int begin = min(row.count, (int)threadIdx.x * own), end = min(row.count, begin + own);
  const auto walk = [&](const auto& f) {
    for (int first = begin; first < end; first += kVector) {
      uint32_t keys[kVector];
      row.load(keys, first);
#pragma unroll
      for (int i = 0; i < kVector; i++)
        if (keys[i] != 0 && !f(keys[i], first + i)) return;
    }
  };
  double ties_before = 0.;
  if (left.ties > 0) {
    double ties = 0.;
    walk([&](uint32_t key, int) { return ties += key == left.key, true; });
    ties_before = block_prefix(ties, shared).through - ties;
  }
  const auto weight_left = [&](uint32_t key, double& tie) {
    const float weight = key > left.key || (key == left.key && tie++ < left.ties) ? weights.of(key) : 0.f;
    return weight >= min_p ? weight : 0.f;
  };
  double mass = 0., tie = ties_before;
  int last = -1;
  walk([&](uint32_t key, int at) {
    const float weight = weight_left(key, tie);
    if (weight > 0.f) last = at;
    return mass += weight, true;
  });
  const Prefix prefix = block_prefix(mass, shared);
  const double goal = u * prefix.total;
  int thread = find_thread(prefix.through > goal, false, shared);
  // None if u * total was rounded up to the total: then it is the last token.
  if (thread < 0) thread = find_thread(mass > 0., true, shared);
  if ((int)threadIdx.x != thread) return -1;
  double through = prefix.through - mass;
  tie = ties_before;
  walk([&](uint32_t key, int at) {
    through += weight_left(key, tie);
    if (through > goal) last = at;
    return through <= goal;
  });
  return last;
}

// Steps 3 to 6: the token in one thread, -1 in the others.
SEGATTN_FN int draw(const LogitRow& row, const SegattnSampler& s, float best, SampleShared& shared) {
  const Weights weights = {best, 1.f / s.temperature};
  const bool by_number = s.top_k > 0 && s.top_k < (uint32_t)row.count, by_mass = s.top_p < 1.f;
  Threshold left = {0, 0};
  if (!by_number && !by_mass) return find_drawn(row, weights, left, s.min_p, shared.uniform, shared);
  const uint32_t k = by_number ? s.top_k : min(row.count, SampleConfig::kListLen);
  const Threshold highest =
      select_threshold([&](const auto& f) { for_each_key(row, [&](uint32_t key, int) { f(key); }); }, k, shared.select);
  if (by_number) left = highest;
  const bool listed = k <= SampleConfig::kListLen;
  ListRow list = {shared.list_keys, 0};
  if (listed) list = list_of(row, highest, k, shared);
  const double ties_mass = left.ties ? left.ties * (double)weights.of(left.key) : 0.;
  const double goal = by_mass ? s.top_p * (mass_above(row, weights, left.key, shared) + ties_mass) : 0.;
  if (listed) {
    const Threshold all = {0, 0};
    // With top-p alone, the list may hold too little mass.
    if (by_number || mass_above(list, weights, 0, shared) >= goal || k == (uint32_t)row.count) {
      const Threshold cut = by_mass ? cut_mass(list, weights, all, goal, shared) : all;
      const int at = find_drawn(list, weights, cut, s.min_p, shared.uniform, shared);
      return at < 0 ? -1 : (int)shared.list_ids[at];
    }
  }
  if (by_mass) left = cut_mass(row, weights, left, goal, shared);
  return find_drawn(row, weights, left, s.min_p, shared.uniform, shared);
}

// ---------------------------------------------------------------------------------------------------- the kernel

SEGATTN_FN void sample(const SegattnSampleParams& p) {
  if ((int)blockDim.x != softmax_threads(p.vocab)) __trap();
  SampleShared& shared = *(SampleShared*)shared_memory();
  if (threadIdx.x == 0) {
    shared.index = p.indices ? p.indices[blockIdx.x] : blockIdx.x;
    shared.g_seen = p.seen + shared.index * p.seen_pitch;
    shared.sampler = p.sampler[shared.index];
    shared.uniform = draw_uniform(shared.sampler, shared.cipher);
  }
  __syncthreads();
  const LogitRow row = {row_of<const float>(p.logits, shared.index), p.vocab, shared.sampler.penalty};
  const Highest top = highest(row, shared);
  if (top.key == kLeastKey || top.key >= kInfinityKey) {
    if (threadIdx.x == 0) p.sampler[shared.index].failure = top.key == kLeastKey ? 2 : 1;
    return;
  }
  const int greedy = threadIdx.x == 0 ? (int)top.id : -1;
  const int token = shared.sampler.temperature == 0.f ? greedy : draw(row, shared.sampler, value_of(top.key), shared);
  const RowSoftmax softmax = row_softmax(row.g_logits, p.vocab, shared.softmax);
  __syncthreads();  // all have read the history
  if (token < 0) return;
  const int64_t index = shared.index;
  p.tokens[index] = token;
  p.log_probability[index] = softmax.log_probability(row.g_logits[token]);
  p.seen[index * p.seen_pitch + token / 32] |= 1u << (token % 32);
  p.sampler[index].position = shared.sampler.position + 1;
  p.sampler[index].failure = 0;
}

// ---------------------------------------------------------------------------------------------------- entry points

// A block a row, softmax_threads(vocab) threads.
SEGATTN_INFO(sample_f32, (SegattnKernelInfo{SampleConfig::kThreads, sizeof(SampleShared), SampleConfig::kBlocks, 1, 0,
                                            0, sizeof(SegattnSampleParams)}))
SEGATTN_KERNEL(sample_f32, SampleConfig, SegattnSampleParams) { sample(params); }
