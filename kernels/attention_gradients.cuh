// What the backward kernels share: the rows that preparation writes, the work tiles of the key-stationary pass, and
// the sum of d_q over KV splits.
#pragma once
#include "work_tiles.cuh"
#include "softmax.cuh"

// The kernels that have one warp a row.
struct PrepareConfig {
  static constexpr int kThreads = 128, kBlocks = 8;
};

SEGATTN_FN int64_t prepared_row(const SegattnBackwardParams& p, int batch_index, int head, int query) {
  return ((int64_t)batch_index * p.problem.q_heads + head) * p.row_pitch + query;
}

// The scale in base 2, with its sign (scale_log2 in softmax.cuh has none).
SEGATTN_FN float signed_scale_log2(float scale) { return scale < 0.f ? -scale_log2(scale) : scale_log2(scale); }

// What is summed over the keys of a row for the gradient of its head's gate. With them, the sum of ds over past keys is
// corrected for the error of delta: `out` was rounded, which costs every ds of the row p times the same error, and the
// sum of all ds, which is d_lse, shows it. Without the correction that error would hide the gradient where the past has
// little or nearly all of the weight.
enum GateSum { kPastWeight, kPastGrad, kOtherGrad, kGateSums };  // sums of p, of ds, of ds over the other keys

// Adds a tile's row sums to one of the sums of each of a warp's 16 rows. The first thread of a row alone touches them.
template <int kColTiles>
SEGATTN_FN void add_row_sums(float (*sums)[kGateSums], GateSum which, const float (&x)[kColTiles][4], int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kColTiles; n++) sum += x[n][half * 2] + x[n][half * 2 + 1];
    sum = quad_sum(sum);
    if (lane % 4 == 0) sums[half * 8 + lane / 4][which] += sum;
  }
}

// Sets the sums of a warp's 16 rows to zero.
SEGATTN_FN void clear_row_sums(float (*sums)[kGateSums], int lane) {
  if (lane % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < kGateSums; i++) sums[half * 8 + lane / 4][i] = 0.f;
}

// Stores the sums of a warp's 16 rows, of which the first is query `query`.
SEGATTN_FN void store_row_sums(const SegattnBackwardParams& p, const WorkTile& work, const float (*sums)[kGateSums],
                               int query, int lane) {
  if (lane % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = half * 8 + lane / 4;
    if (query + row >= work.query_rows) continue;
    float* to =
        p.partial_gate + partial_row(p.problem, work.split, work.batch_index, work.head, query + row) * kGateSums;
#pragma unroll
    for (int i = 0; i < kGateSums; i++) to[i] = sums[row][i];
  }
}

// The sum of a row's ds over past keys, from what its KV splits left.
template <class C>
SEGATTN_FN float row_gate_grad(const SegattnBackwardParams& p, const KeyList& keys, int batch_index, int head,
                               int query, int query_rows) {
  const int tiles = visible_kv_tiles<C::kRows, C::kKeys>(keys, query / C::kRows, 1, query_rows);
  const int splits = max(1, ceil_div(tiles, C::kSplitKeys / C::kKeys));
  float sums[kGateSums] = {};
  for (int split = 0; split < splits; split++) {
    const float* part = p.partial_gate + partial_row(p.problem, split, batch_index, head, query) * kGateSums;
#pragma unroll
    for (int i = 0; i < kGateSums; i++) sums[i] += part[i];
  }
  const float d_lse = p.d_lse ? p.d_lse[partial_row(p.problem, 0, batch_index, head, query)] : 0.f;
  const float error = (sums[kPastGrad] + sums[kOtherGrad]) - d_lse;
  return sums[kPastGrad] - sums[kPastWeight] * error;
}

// A tile of keys, and the queries that see them: those from first_query on, of the heads of the group that read the
// source.
struct KeyWorkTile {
  int batch_index, kv_head, end_head;  // the group ends before query head end_head
  int first;                           // first key row
  int len;                             // valid keys of the source
  int rows;                            // rows of the gradients, valid and padding together
  int query_rows, first_query;
  bool prior;
};

// A position in the loop over heads and query tiles.
struct QueryCursor {
  int head, query;  // head == end_head of the work tile: the loop has ended

  SEGATTN_FN QueryCursor first(const SegattnProblem& p, const KeyWorkTile& work) {
    QueryCursor at = {work.kv_head * (p.q_heads / p.kv_heads), work.first_query};
    at.skip(p, work);
    return at;
  }
  template <int kQueries>
  __device__ __forceinline__ QueryCursor next(const SegattnProblem& p, const KeyWorkTile& work) const {
    if (query + kQueries < work.query_rows) return {head, query + kQueries};
    QueryCursor at = {head + 1, work.first_query};
    at.skip(p, work);
    return at;
  }
  // Moves to the first head at or after `head` that reads the source.
  __device__ __forceinline__ void skip(const SegattnProblem& p, const KeyWorkTile& work) {
    if (work.first_query >= work.query_rows) head = work.end_head;
    while (head < work.end_head && work.prior && !p.prior_heads[head]) head++;
  }
};

// The work tile of an index: head by head; the current keys that the fewest queries see come last, of all heads, so
// that the blocks end together.
template <class C>
SEGATTN_FN KeyWorkTile key_work_tile(const SegattnBackwardParams& p, int index) {
  const int prior_tiles = p.d_prior_k.data ? ceil_div((int)p.d_prior_k.rows, C::kKeys) : 0;
  const int current_tiles = ceil_div((int)p.d_k.rows, C::kKeys), last_tiles = current_tiles / 4;
  const int heads = p.groups, longer = prior_tiles + current_tiles - last_tiles;
  const int rest = index - longer * heads;
  const int tile = rest < 0 ? index % longer : longer + rest / heads;
  const int head = p.first_group + (rest < 0 ? index / longer : rest % heads);
  KeyWorkTile work;
  work.kv_head = head % p.problem.kv_heads;
  work.end_head = (work.kv_head + 1) * (p.problem.q_heads / p.problem.kv_heads);
  work.batch_index = head / p.problem.kv_heads;
  work.prior = tile < prior_tiles;
  work.first = (work.prior ? tile : tile - prior_tiles) * C::kKeys;
  const int segment_len = p.problem.segment_len[work.batch_index];
  work.len = work.prior ? p.problem.prior_len[work.batch_index] : segment_len;
  work.rows = work.prior ? (int)p.d_prior_k.rows : p.problem.row_offsets ? segment_len : (int)p.d_k.rows;
  work.query_rows = work.first < work.len ? min(segment_len, (int)p.problem.q.rows) : 0;
  work.first_query = work.prior ? 0 : work.first / C::kQueries * C::kQueries;
  return work;
}

// One warp a row: sums d_q over the KV splits of the row's tile, in order. The warp of a head's first row also sums
// the head's gate gradients: each lane every 32nd row, then over the lanes. If no tile has several splits, only these
// warps run.
template <class C>
SEGATTN_FN void attention_query_grad_sum(const SegattnBackwardParams& p) {
  using T = typename C::T;
  const int lane = threadIdx.x & 31, rows = p.max_splits > 1 ? (int)p.problem.q.rows : 1;
  const int64_t index = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
  if (index >= (int64_t)p.problem.batch * p.problem.q_heads * rows) return;
  const int query = (int)(index % rows), head = (int)(index / rows % p.problem.q_heads),
            batch_index = (int)(index / rows / p.problem.q_heads);
  const KeyList keys = KeyList::of(p.problem, batch_index, head);
  const int query_rows = keys.query_rows((int)p.problem.q.rows);
  constexpr int kSplitTiles = C::kSplitKeys / C::kKeys;
  const int splits = ceil_div(visible_kv_tiles<C::kRows, C::kKeys>(keys, query / C::kRows, 1, query_rows), kSplitTiles);
  if (splits > 1 && query < written_rows(p.problem, query_rows)) {
    const float4* parts =
        (const float4*)(p.partial_d_q + partial_row(p.problem, 0, batch_index, head, query) * C::kHeadDim);
    const int64_t pitch = partial_row(p.problem, 1, 0, 0, 0) * C::kHeadDim / 4;
    uint2* out = (uint2*)Rows<T>::of(p.d_q, batch_index, head).row(query);
    const float scale = p.problem.scale;
#pragma unroll
    for (int i = lane; i < C::kHeadDim / 4; i += 32) {
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
      for (int split = 0; split < splits; split++) {
        const float4 part = parts[split * pitch + i];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const uint2 value = make_uint2(pack<T>(sum.x * scale, sum.y * scale), pack<T>(sum.z * scale, sum.w * scale));
      out[i] = query < query_rows ? value : make_uint2(0, 0);
    }
  }
  if (query != 0) return;
  float sum = 0.f;
  if (keys.past_len > keys.sinks)
    for (int row = lane; row < query_rows; row += 32)
      sum += row_gate_grad<C>(p, keys, batch_index, head, row, query_rows);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  const float gate = p.problem.past_gate[head];
  if (lane == 0) p.d_past_gate[(int64_t)batch_index * p.problem.q_heads + head] = gate > 0.f ? sum / gate : 0.f;
}
