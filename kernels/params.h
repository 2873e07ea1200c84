/* The launch parameters: one struct per kernel family, passed by value. Plain C, so that the host's mirror can be
 * generated. Strides and offsets are 64-bit numbers of elements. The comment of a pointer gives the shape. */
#ifndef SEGATTN_PARAMS_H
#define SEGATTN_PARAMS_H

#include <stdint.h>

/* A tensor [batch, rows, heads, head_dim] of 16-bit elements; head_dim is contiguous, every row starts at a
 * multiple of 16 bytes. Batch element b begins at batch_offsets[b], or at b * batch_stride where that is null. */
typedef struct SegattnTensor {
  void* data;                   /* [batch, rows, heads, head_dim] */
  const int64_t* batch_offsets; /* [batch] or null */
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
  int64_t rows; /* rows of a batch element, valid and padding together */
} SegattnTensor;

/* Queries of one segment and the three sources they read (docs/contract.md, section 1). */
typedef struct SegattnProblem {
  SegattnTensor q; /* [batch, rows, q_heads, head_dim], row 0 at position query_start[b] */
  SegattnTensor k, v;
  SegattnTensor prior_k, prior_v;
  SegattnTensor past_k, past_v;
  const int32_t* segment_len; /* [batch]: valid rows of k and v */
  const int32_t* prior_len;   /* [batch]: valid rows of prior_k and prior_v */
  const int32_t* past_len;    /* [batch] or [batch, kv_heads], see the two strides */
  const int32_t* sink_len;    /* like past_len, with strides of its own, or null: 0; at most past_len */
  const int32_t* query_start; /* [batch] or null: 0 */
  /* [batch + 1] or null: the query rows before each batch element, and of all. Then there are no padding rows of q,
   * out, d_out, d_q, d_k and d_v: behind an element's valid rows, those of the next may begin. */
  const int32_t* row_offsets;
  const float* past_gate;     /* [q_heads], 0: of the past only the sinks are read */
  const uint8_t* prior_heads; /* [q_heads], whether the prior rows are read */
  int32_t past_len_batch_stride;
  int32_t past_len_head_stride; /* 0: one length for all KV heads */
  int32_t sink_len_batch_stride;
  int32_t sink_len_head_stride;
  int32_t batch;
  int32_t q_heads;
  int32_t kv_heads;
  float scale;
} SegattnProblem;

/* attention_forward: out and lse, or partial results where a row's keys are split. */
typedef struct SegattnForwardParams {
  SegattnProblem problem;
  SegattnTensor out;      /* like q */
  float* lse;             /* [batch, q_heads, rows]; with row_offsets element by element, [q_heads, its rows] each */
  float* partial_out;     /* [splits of a tile, batch, q_heads, rows, head_dim], only if there are several */
  float* partial_state;   /* [splits of a tile, batch, q_heads, rows, 2]: running maximum (base 2) and sum */
  float* chunk_totals;    /* [blocks of the grid, head_dim * tile rows]: totals of chunks before the current one */
  uint32_t* work_counter; /* [1], zero before the launch: next work tile */
  int32_t packed_heads;   /* PackGQA: query heads of a group that share a tile; they must read the same sources */
  int32_t tiles;          /* query tiles: ceil(rows * packed_heads / tile rows) */
  int32_t max_splits;     /* most KV splits of a tile */
} SegattnForwardParams;

/* A tensor map of the driver (CUtensorMap): opaque. */
typedef struct SegattnTensorMap {
  uint64_t words[16];
} __attribute__((aligned(64))) SegattnTensorMap;

/* attention_forward on Hopper: the same, and maps by which bulk copies move 64 rows of a head. A map is of a tensor
 * [batch coordinates, heads, head_dim / 64, rows, 64]; a batch element's coordinate says where it begins. */
typedef struct SegattnHopperForwardParams {
  SegattnTensorMap maps[7]; /* of q, k, v, prior_k, prior_v, past_k, past_v */
  SegattnForwardParams forward;
  const int32_t* batch_coordinates; /* [batch, 7] */
  uint32_t mapped;                  /* bit i: maps[i] is there */
} SegattnHopperForwardParams;

/* attention_backward and its preparation. query_start is 0. */
typedef struct SegattnBackwardParams {
  SegattnProblem problem;
  SegattnTensor out;                  /* like q */
  SegattnTensor d_out;                /* like q */
  const float* lse;                   /* [batch, q_heads, rows] */
  const float* d_lse;                 /* [batch, q_heads, rows] or null */
  SegattnTensor d_q;                  /* like q */
  SegattnTensor d_k, d_v;             /* like k */
  SegattnTensor d_prior_k, d_prior_v; /* like prior_k; data null: read_only_prior */
  float* d_past_gate;                 /* [batch, q_heads] */
  float* row_lse;                     /* [batch, q_heads, row_pitch]: lse in base 2, +inf for padding */
  float* row_delta;                   /* [batch, q_heads, row_pitch]: d_out . out - d_lse, 0 for padding */
  float* partial_d_q;     /* [splits of a tile, batch, q_heads, rows, head_dim], only if there are several */
  float* partial_gate;    /* [splits of a tile, batch, q_heads, rows, 3]: see GateSum */
  uint32_t* work_counter; /* [2], zero before the launches: next work tile of d_q and of d_k */
  uint32_t* ds;           /* [groups, heads of a group, blocks of a head, 64, 64] of 16 bits (stored_ds.cuh), or null */
  int32_t row_pitch;      /* rows rounded up to a multiple of 128 */
  int32_t tiles;          /* query tiles of the d_q pass */
  int32_t max_splits;     /* most KV splits of a tile */
  /* A group is a pair of batch element and KV head, with the query heads that read it. The d_q and d_k passes of a
   * launch take those from first_group on, of all in the order [batch, kv_heads]. */
  int32_t first_group;
  int32_t groups;
} SegattnBackwardParams;

/* What the host needs to know to launch an entry point: the constant <entry>_info of each. */
typedef struct SegattnKernelInfo {
  int32_t threads;
  int32_t shared_bytes;
  int32_t blocks_per_multiprocessor; /* that fit by registers */
  int32_t tile_rows;                 /* query rows (d_k, d_v: key rows) of a block */
  int32_t key_rows;                  /* rows of a key tile (d_k, d_v: of a query tile) */
  int32_t split_keys;                /* keys of a KV split, 0: keys are not split */
  int32_t params_bytes;
} SegattnKernelInfo;

#endif
