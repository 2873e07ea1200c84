// Rotary position embedding, "rotate half" (Su et al. 2021): elements i and i + head_dim / 2 of a head are a pair,
//   lo' = lo cos - hi sin,  hi' = hi cos + lo sin      with the angle's row of the tables; sin negative for the inverse
//   rope       dst (+)= rotated src, heads of rows [rows, heads * head_dim]; the inverse is also the gradient
//   move_rows  the same, or a copy, for many pieces of rows that lie anywhere, in one launch
//   split_qkv  one pass over rows [q | k | v]: rotated q; rotated k, unrotated k and v to the row's row of the cache;
//              unrotated q to the row's row of the probes, if it has one
//   split_qkv_norm  the same with q and k normed first, head by head; their rstd for the gradient (head_norms_grad)
//   join_qkv   the gradient of split_qkv: d_qkv = [d_q rotated back | d_k rotated back | d_v]
// A thread rotates eight pairs; with norms a lane has a vector, and gets that of the other half by shuffle. Sums are of
// one head, so a row's bits do not depend on other rows. Bytes a row and element: rope 4 (6 for +=), split_qkv 4 and 2
// more for k, with norms or without, join_qkv 4.
#include "head_norm.cuh"
#include "rotation.cuh"

// No data is reused, so only the number of loads in flight counts.
struct RopeConfig {
  static constexpr int kThreads = 256, kBlocks = 5;
};

// The eight pairs of a thread: their row, head and column.
struct PairPlace {
  int64_t row;
  int head, pair, half;
};
SEGATTN_FN PairPlace pair_place(uint32_t index, int heads, int head_dim) {
  const int half = head_dim / 2;
  const uint32_t head_units = half / kVector, row_units = heads * head_units, unit = index % row_units;
  return {index / row_units, (int)(unit / head_units), (int)(unit % head_units) * kVector, half};
}

// Stores the eight pairs of a thread, or adds them to those that are there.
SEGATTN_FN void put_pairs(Bf16* g_head, const PairPlace& at, Pairs y, bool add) {
  if (add) {
    const Pairs before = load_pairs(g_head, at.pair, at.half);
#pragma unroll
    for (int e = 0; e < kVector; e++) {
      y.lo[e] += before.lo[e];
      y.hi[e] += before.hi[e];
    }
  }
  store_pairs(g_head, at.pair, at.half, y);
}

SEGATTN_FN void rope(const SegattnRopeParams& p) {
  const PairPlace at = pair_place(thread_index(), p.heads, p.head_dim);
  if (at.row >= p.rows) return;
  const int64_t angle = p.angles ? p.angles[at.row] : p.first_angle + at.row;
  const int64_t head = (int64_t)at.head * p.head_dim;
  const Pairs x = load_pairs(row_of<const Bf16>(p.src, at.row) + head, at.pair, at.half);
  const Pairs y = turned(x, p.cos, p.sin, angle * at.half + at.pair, p.inverse ? -1.f : 1.f);
  put_pairs(row_of<Bf16>(p.dst, at.row) + head, at, y, p.add);
}

// The move of a block: the last that begins at it or before.
SEGATTN_FN const SegattnMove& move_of(const SegattnMoveParams& p, int block) {
  int low = 0, high = p.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.moves[middle].first_block <= block) low = middle;
    else high = middle;
  }
  return p.moves[low];
}

SEGATTN_FN void move_rows(const SegattnMoveParams& p) {
  const SegattnMove& move = move_of(p, blockIdx.x);
  const uint32_t thread = (blockIdx.x - move.first_block) * blockDim.x + threadIdx.x;
  const PairPlace at = pair_place(thread, move.heads, p.head_dim);
  if (at.row >= move.rows) return;
  const int64_t head = (int64_t)at.head * p.head_dim;
  Pairs x = load_pairs(row_of<const Bf16>(move.src, at.row) + head, at.pair, at.half);
  if (move.first_angle >= 0)
    x = turned(x, p.cos, p.sin, (move.first_angle + at.row) * at.half + at.pair, p.inverse ? -1.f : 1.f);
  put_pairs(row_of<Bf16>(move.dst, at.row) + head, at, x, p.add);
}

SEGATTN_FN void split_qkv(const SegattnQkvParams& p) {
  const PairPlace at = pair_place(thread_index(), p.q_heads + 2 * p.kv_heads, p.head_dim);
  if (at.row >= p.rows) return;
  const Pairs x = load_pairs(row_of<const Bf16>(p.qkv, at.row) + (int64_t)at.head * p.head_dim, at.pair, at.half);
  const int64_t angle = p.angles[at.row];
  if (at.head < p.q_heads) {
    const int64_t head = (int64_t)at.head * p.head_dim;
    store_pairs(row_of<Bf16>(p.q, at.row) + head, at.pair, at.half,
                turned(x, p.cos, p.sin, angle * at.half + at.pair, 1.f));
    if (!p.probes.data || p.probe_rows[at.row] < 0) return;
    store_pairs(row_of<Bf16>(p.probes, p.probe_rows[at.row]) + head, at.pair, at.half, x);
    return;
  }
  const int64_t place = p.cache_rows[at.row];
  const bool is_key = at.head < p.q_heads + p.kv_heads;
  const int64_t head = (int64_t)(at.head - p.q_heads - (is_key ? 0 : p.kv_heads)) * p.head_dim;
  const SegattnRows& plain = is_key ? p.raw_k : p.v;
  if (plain.data) store_pairs(row_of<Bf16>(plain, place) + head, at.pair, at.half, x);
  if (!is_key) return;
  store_pairs(row_of<Bf16>(p.k, place) + head, at.pair, at.half,
              turned(x, p.cos, p.sin, angle * at.half + at.pair, 1.f));
}

// A vector of a head, normed and rounded: what state, pool and probes get. All lanes of the warp call it.
SEGATTN_FN uint4 normed_vector(const SegattnQkvParams& p, const HeadPlace& at, bool is_normed, uint4 r_held) {
  float r_x[kVector];
  unpack_vector(r_x, r_held);
  const float rstd = rstd_of_head(r_x, at, p.head_dim, p.norms.eps);
  if (!is_normed) return r_held;
  if (at.column == 0) *rstd_at(p.norms, at, p.q_heads, p.kv_heads) = rstd;
  float r_weight[kVector];
  load_vector(r_weight, (at.head < p.q_heads ? p.norms.q_weight : p.norms.k_weight) + at.column);
#pragma unroll
  for (int e = 0; e < kVector; e++) r_x[e] = mul_rn(mul_rn(r_x[e], rstd), r_weight[e]);
  return pack_vector(r_x);
}

// A lane's vector of a rotated head, from its own and that of the other half.
SEGATTN_FN uint4 turned_vector(const SegattnQkvParams& p, const HeadPlace& at, uint4 r_own, uint4 r_other) {
  const int half = p.head_dim / 2;
  const bool is_low = at.column < half;
  const int64_t angle = p.angles[at.row] * (int64_t)half + (is_low ? at.column : at.column - half);
  float r_x[kVector], r_across[kVector], r_cos[kVector], r_sin[kVector];
  unpack_vector(r_x, r_own);
  unpack_vector(r_across, r_other);
  load_vector(r_cos, p.cos + angle);
  load_vector(r_sin, p.sin + angle);
#pragma unroll
  for (int e = 0; e < kVector; e++)
    r_x[e] = fma_rn(r_x[e], r_cos[e], mul_rn(r_across[e], is_low ? -r_sin[e] : r_sin[e]));
  return pack_vector(r_x);
}

SEGATTN_FN void split_qkv_norm(const SegattnQkvParams& p) {
  const HeadPlace at = head_place(thread_index(), p.q_heads + 2 * p.kv_heads, p.head_dim);
  const int half = p.head_dim / 2, normed_heads = p.q_heads + p.kv_heads;
  const bool is_inside = at.row < p.rows && at.column < p.head_dim, is_value = at.head >= normed_heads;
  uint4 r_x = make_uint4(0, 0, 0, 0);
  if (is_inside) r_x = *(const uint4*)(row_of<const Bf16>(p.qkv, at.row) + (int64_t)at.head * p.head_dim + at.column);
  r_x = normed_vector(p, at, is_inside && !is_value, r_x);
  const int across = (at.column < half ? half : -half) / kVector;
  const uint4 r_other = vector_of_lane(r_x, (threadIdx.x + across) & 31);
  if (!is_inside) return;
  if (at.head < p.q_heads) {
    const int64_t column = (int64_t)at.head * p.head_dim + at.column;
    *(uint4*)(row_of<Bf16>(p.q, at.row) + column) = turned_vector(p, at, r_x, r_other);
    if (!p.probes.data || p.probe_rows[at.row] < 0) return;
    *(uint4*)(row_of<Bf16>(p.probes, p.probe_rows[at.row]) + column) = r_x;
    return;
  }
  if (!p.k.data) return;
  const int64_t place = p.cache_rows[at.row];
  const int64_t column = (int64_t)(at.head - (is_value ? normed_heads : p.q_heads)) * p.head_dim + at.column;
  const SegattnRows& plain = is_value ? p.v : p.raw_k;
  if (plain.data) *(uint4*)(row_of<Bf16>(plain, place) + column) = r_x;
  if (!is_value) *(uint4*)(row_of<Bf16>(p.k, place) + column) = turned_vector(p, at, r_x, r_other);
}

SEGATTN_FN void join_qkv(const SegattnQkvParams& p) {
  const PairPlace at = pair_place(thread_index(), p.q_heads + 2 * p.kv_heads, p.head_dim);
  if (at.row >= p.rows) return;
  const bool is_query = at.head < p.q_heads, is_value = at.head >= p.q_heads + p.kv_heads;
  const SegattnRows& src = is_query ? p.q : is_value ? p.v : p.k;
  const int src_head = at.head - (is_query ? 0 : is_value ? p.q_heads + p.kv_heads : p.q_heads);
  Pairs x = load_pairs(row_of<const Bf16>(src, at.row) + (int64_t)src_head * p.head_dim, at.pair, at.half);
  if (!is_value) x = turned(x, p.cos, p.sin, (int64_t)p.angles[at.row] * at.half + at.pair, -1.f);
  store_pairs(row_of<Bf16>(p.qkv, at.row) + (int64_t)at.head * p.head_dim, at.pair, at.half, x);
}

// ---------------------------------------------------------------------------------------------------- entry points

// A thread eight pairs: rows * heads * head_dim / 16 threads, where split_qkv and join_qkv count q_heads + 2 kv_heads.
// move_rows: so many of each move, in whole blocks.
#define ROPE(name, Params, body)                                                                                 \
  SEGATTN_INFO(name, (SegattnKernelInfo{RopeConfig::kThreads, 0, RopeConfig::kBlocks, 0, 0, 0, sizeof(Params)})) \
  SEGATTN_KERNEL(name, RopeConfig, Params) { body(params); }

ROPE(rope_bf16, SegattnRopeParams, rope)
ROPE(move_rows_bf16, SegattnMoveParams, move_rows)
ROPE(split_qkv_bf16, SegattnQkvParams, split_qkv)
ROPE(join_qkv_bf16, SegattnQkvParams, join_qkv)
// split_qkv_norm: a thread a lane of a head: rows * (q_heads + 2 kv_heads) * (head_dim / 8, up to a power of two).
SEGATTN_INFO(split_qkv_norm_bf16,
             (SegattnKernelInfo{HeadConfig::kThreads, 0, HeadConfig::kBlocks, 0, 0, 0, sizeof(SegattnQkvParams)}))
SEGATTN_KERNEL(split_qkv_norm_bf16, HeadConfig, SegattnQkvParams) { split_qkv_norm(params); }
