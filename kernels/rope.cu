// Rotary position embedding, "rotate half" (Su et al. 2021): elements i and i + head_dim / 2 of a head are a pair,
//   lo' = lo cos - hi sin,  hi' = hi cos + lo sin      with the angle's row of the tables; sin negative for the inverse
//   rope       dst (+)= rotated src, heads of rows [rows, heads * head_dim]; the inverse is also the gradient
//   move_rows  the same, or a copy, for many pieces of rows that lie anywhere, in one launch
//   split_qkv  one pass over rows [q | k | v]: rotated q; rotated k, unrotated k and v to the row's row of the cache;
//              unrotated q to the row's row of the probes, if it has one
//   join_qkv   the gradient of split_qkv: d_qkv = [d_q rotated back | d_k rotated back | d_v]
// A thread rotates eight pairs. There are no sums, so a row's bits do not depend on other rows. Bytes a row and
// element: rope 4 (6 for +=), split_qkv 4 and 2 more for k, join_qkv 4.
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
