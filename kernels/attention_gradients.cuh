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

// A tile of keys, and the queries that see them: those from first_query on, of the heads of the group that read the
// source.
struct KeyWorkTile {
  int batch_index, kv_head, end_head;  // the group ends before query head end_head
  int first;                           // first key row
  int len;                             // valid keys of the source
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
  const int heads = p.problem.kv_heads * p.problem.batch, longer = prior_tiles + current_tiles - last_tiles;
  const int rest = index - longer * heads;
  const int tile = rest < 0 ? index % longer : longer + rest / heads, head = rest < 0 ? index / longer : rest % heads;
  KeyWorkTile work;
  work.kv_head = head % p.problem.kv_heads;
  work.end_head = (work.kv_head + 1) * (p.problem.q_heads / p.problem.kv_heads);
  work.batch_index = head / p.problem.kv_heads;
  work.prior = tile < prior_tiles;
  work.first = (work.prior ? tile : tile - prior_tiles) * C::kKeys;
  const int segment_len = p.problem.segment_len[work.batch_index];
  work.len = work.prior ? p.problem.prior_len[work.batch_index] : segment_len;
  work.query_rows = work.first < work.len ? min(segment_len, (int)p.problem.q.rows) : 0;
  work.first_query = work.prior ? 0 : work.first / C::kQueries * C::kQueries;
  return work;
}

// One warp a row: sums d_q over the KV splits of the row's tile, in order. The warp of a head's first row also sums
// the head's gate gradients; if no tile has several splits, only these warps run.
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
  if (splits > 1) {
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
  if (query != 0 || lane != 0) return;
  float sum = 0.f;
  const float gate = p.problem.past_gate[head];
  for (int tile = 0; keys.past_len > keys.sinks && tile < p.tiles; tile++) {
    const int parts = max(1, ceil_div(visible_kv_tiles<C::kRows, C::kKeys>(keys, tile, 1, query_rows), kSplitTiles));
    for (int split = 0; split < parts; split++)
      sum += p.partial_gate[(((int64_t)split * p.problem.batch + batch_index) * p.problem.q_heads + head) * p.tiles +
                            tile];
  }
  p.d_past_gate[(int64_t)batch_index * p.problem.q_heads + head] = gate > 0.f ? sum / gate : 0.f;
}
