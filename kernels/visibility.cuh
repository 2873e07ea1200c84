// Which keys a query row sees (docs/contract.md, section 1). No other file decides it.
//
// The keys of a head form one list of key tiles: sinks, past, prior, current; each of these begins a new tile. Sinks
// are the first rows of the past tensors. Only the current keys are causal, so a row sees a prefix of the list. From
// its start the list is divided into chunks of kChunkKeys keys, and sections of kSectionChunks chunks. Hence the tile,
// chunk and section of a key depend only on the row's own lengths and head: not on the rest of the batch, on other
// rows, or on the kernel.
#pragma once
#include "ptx.cuh"

constexpr int kChunkKeys = 1024;
constexpr int kSectionChunks = 8;

enum Source { kSinks, kPast, kPrior, kCurrent };

// A key tile: rows [first, end) of a source, at most kKeys of them.
struct KeyTile {
  Source source;
  int first;
  int end;  // of the source's valid rows
};

// The key tiles of one query head in one element of the batch.
struct KeyList {
  int sinks;     // first rows of the past: every head reads them, without the gate
  int past_len;  // rows of the past, sinks included
  int prior_len, segment_len, query_start;
  float gate_log2;  // added to the scores of past keys, in base 2

  SEGATTN_FN KeyList of(const SegattnProblem& p, int batch_index, int head) {
    const int kv_head = head / (p.q_heads / p.kv_heads);
    const float gate = p.past_gate[head];
    KeyList list;
    const int past_len = p.past_len[batch_index * p.past_len_batch_stride + kv_head * p.past_len_head_stride];
    list.sinks = p.sink_len ? p.sink_len[batch_index * p.sink_len_batch_stride + kv_head * p.sink_len_head_stride] : 0;
    list.past_len = gate > 0.f ? past_len : list.sinks;  // no branch, so that both loads are in flight
    list.prior_len = p.prior_heads[head] ? p.prior_len[batch_index] : 0;
    list.segment_len = p.segment_len[batch_index];
    list.query_start = p.query_start ? p.query_start[batch_index] : 0;
    list.gate_log2 = gate > 0.f ? log2_approx(gate) : 0.f;
    return list;
  }

  // Number of tiles.
  template <int kKeys>
  __device__ __forceinline__ int sink_tiles() const {
    return ceil_div(sinks, kKeys);
  }
  template <int kKeys>
  __device__ __forceinline__ int past_tiles() const {
    return ceil_div(past_len - sinks, kKeys);
  }
  template <int kKeys>
  __device__ __forceinline__ int prior_tiles() const {
    return ceil_div(prior_len, kKeys);
  }

  template <int kKeys>
  __device__ __forceinline__ KeyTile tile(int index) const {
    if (index < sink_tiles<kKeys>()) return {kSinks, index * kKeys, sinks};
    index -= sink_tiles<kKeys>();
    if (index < past_tiles<kKeys>()) return {kPast, sinks + index * kKeys, past_len};
    index -= past_tiles<kKeys>();
    if (index < prior_tiles<kKeys>()) return {kPrior, index * kKeys, prior_len};
    index -= prior_tiles<kKeys>();
    return {kCurrent, index * kKeys, segment_len};
  }

  // Number of tiles that the row at `position` sees; 0 for an invalid position.
  template <int kKeys>
  __device__ __forceinline__ int tiles_of(int position) const {
    if (position < 0 || position >= segment_len) return 0;
    return sink_tiles<kKeys>() + past_tiles<kKeys>() + prior_tiles<kKeys>() + position / kKeys + 1;
  }

  // Keys of the tile's source that the row at `position` sees: rows [0, limit).
  __device__ __forceinline__ int limit(const KeyTile& tile, int position) const {
    return tile.source == kCurrent ? min(position + 1, segment_len) : tile.end;
  }

  // Valid query rows, at most `rows`.
  __device__ __forceinline__ int query_rows(int rows) const { return max(0, min(rows, segment_len - query_start)); }
};
