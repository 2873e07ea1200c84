/* The launch parameters of the layers around attention: one struct per kernel family, passed by value. Plain C,
 * mirrored like params.h. Strides are 64-bit numbers of elements. The comment of a pointer gives the shape. */
#ifndef SEGATTN_LAYER_PARAMS_H
#define SEGATTN_LAYER_PARAMS_H

#include <stdint.h>

/* Rows of a matrix: row r begins at element r * stride of data. A row is contiguous and, where not said otherwise,
 * begins at a multiple of 16 bytes and has a multiple of 8 elements. */
typedef struct SegattnRows {
  void* data;
  int64_t stride;
} SegattnRows;

/* copy: rows of either precision. */
typedef struct SegattnCopyParams {
  SegattnRows src; /* [rows, width], any alignment */
  SegattnRows dst; /* [rows, width], any alignment */
  int64_t rows;
  int32_t width;
  int32_t vectors; /* whether rows begin at multiples of 16 bytes and have a multiple of 8 elements */
  int32_t add;     /* dst += instead of = */
  float factor;    /* on src */
} SegattnCopyParams;

/* rms_norm and its gradients. Width: a multiple of 8; at most 16384 where a row is summed. Row r of `rows` is group
 * r % groups of row r / groups of memory: its element 0 lies r % groups * width behind the first of that row. */
typedef struct SegattnNormParams {
  SegattnRows x;        /* bf16 [rows, width]; weight gradient: data null: x rstd is 1, so d_y is summed */
  SegattnRows residual; /* bf16 [rows, width], added to x before the norm; data null: none */
  SegattnRows x_sum;    /* bf16 [rows, width]: x + residual; used where there is a residual; may be x or residual */
  const float* weight;  /* [width] */
  SegattnRows y;        /* bf16 [rows, width] */
  float* rstd;          /* [rows]: written by the forward, read by the gradients */
  SegattnRows d_y;      /* bf16 [rows, width] */
  SegattnRows d_x;      /* bf16 [rows, width] */
  float* d_weight;      /* [width] */
  float* sums;          /* of the groups of a row: [width / 32 up, rows / 4 up, 32, 4] */
  int64_t rows;         /* rms_norm_group_sums and rms_norm_chain: of memory */
  int32_t width;
  int32_t groups; /* 1: the rows are those of memory; rms_norm_weight_grad: 1 */
  int32_t add;    /* whether d_x is added to (+=) or set (=) */
  float eps;
} SegattnNormParams;

/* rms_norm_group_sums and rms_norm_chain: of one norm, or of two in one launch. */
typedef struct SegattnNormsParams {
  SegattnNormParams norms[2];
  int32_t blocks; /* of the first; the other blocks are those of the second */
} SegattnNormsParams;

/* The norms of q's and k's heads, of at most 256 elements, in rows [q, k, v] of (q_heads + 2 kv_heads) * head_dim. */
typedef struct SegattnHeadNorms {
  const float* q_weight; /* [head_dim] */
  const float* k_weight; /* [head_dim] */
  float* q_rstd;         /* [rows, q_heads]: written by the forward, read by the gradient */
  float* k_rstd;         /* [rows, kv_heads] */
  float eps;             /* gradient: unused */
} SegattnHeadNorms;

/* head_norms_grad. */
typedef struct SegattnHeadNormsParams {
  SegattnRows d_y; /* bf16 rows [q, k, v]: gradients of the norms' results, and of v */
  SegattnRows x;   /* the same rows before the norms; v is not read */
  SegattnRows d_x; /* gradients of x, set; v is copied */
  SegattnHeadNorms norms;
  int64_t rows;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t head_dim; /* a multiple of 8 */
} SegattnHeadNormsParams;

/* rope: rotates the heads of rows. */
typedef struct SegattnRopeParams {
  SegattnRows src;       /* bf16 [rows, heads * head_dim] */
  SegattnRows dst;       /* bf16 [rows, heads * head_dim]; may be src */
  const float* cos;      /* [positions, head_dim / 2] */
  const float* sin;      /* [positions, head_dim / 2] */
  const int32_t* angles; /* [rows]: row of the tables; null: first_angle + row */
  int64_t rows;
  int32_t first_angle;
  int32_t heads;
  int32_t head_dim; /* a multiple of 16 */
  int32_t inverse;  /* rotates backwards: the gradient */
  int32_t add;      /* dst += instead of = */
} SegattnRopeParams;

/* move_rows: rows of heads from one place to another, rotated or not. */
typedef struct SegattnMove {
  SegattnRows src; /* bf16 [rows, heads * head_dim] */
  SegattnRows dst; /* bf16 [rows, heads * head_dim]; no other move's */
  int32_t rows;
  int32_t heads;
  int32_t first_angle; /* row of the tables for the first row, those of the next rows follow; negative: not rotated */
  int32_t first_block; /* blocks of the moves before */
} SegattnMove;

typedef struct SegattnMoveParams {
  const SegattnMove* moves; /* [count], at least one block each */
  const float* cos;         /* [positions, head_dim / 2] */
  const float* sin;         /* [positions, head_dim / 2] */
  int32_t count;
  int32_t head_dim; /* a multiple of 16 */
  int32_t inverse;  /* rotates backwards: the gradient */
  int32_t add;      /* dst += instead of = */
} SegattnMoveParams;

/* split_qkv: from the product's rows to what attention reads; split_qkv_norm: with the norms before all else; join_qkv:
 * gradients back. */
typedef struct SegattnQkvParams {
  SegattnRows qkv;         /* bf16 [rows, (q_heads + 2 kv_heads) * head_dim]: q, k, v; join: their gradients, set */
  SegattnRows q;           /* bf16 [rows, q_heads * head_dim], rotated; join: its gradient */
  SegattnRows k, raw_k, v; /* split: bf16 [cache rows, kv_heads * head_dim], rotated, not rotated (data null: none), and
                                values; split_qkv_norm: data null in all: none of them;
                                join: gradients of k and v [rows, ...], raw_k unused */
  SegattnRows probes;      /* split: bf16 [probe rows, q_heads * head_dim], q before rotation; data null: none */
  const float* cos;        /* [positions, head_dim / 2] */
  const float* sin;        /* [positions, head_dim / 2] */
  const int32_t* angles;   /* [rows]: row of the tables */
  const int32_t* cache_rows; /* split: [rows]: row of k, raw_k and v */
  const int32_t* probe_rows; /* split: [rows]: row of probes, negative: none */
  SegattnHeadNorms norms;    /* split_qkv_norm */
  int64_t rows;
  int32_t q_heads;
  int32_t kv_heads; /* split: 0: queries alone */
  int32_t head_dim; /* a multiple of 16 */
} SegattnQkvParams;

/* swiglu and its gradient. */
typedef struct SegattnSwigluParams {
  SegattnRows gate_up;   /* bf16 [rows, 2 * inner]: gate, up */
  SegattnRows y;         /* bf16 [rows, inner]; gradient: data may be null, else the forward's result again */
  SegattnRows d_y;       /* bf16 [rows, inner] */
  SegattnRows d_gate_up; /* bf16 [rows, 2 * inner], set */
  int64_t rows;
  int32_t inner; /* a multiple of 8 */
} SegattnSwigluParams;

/* sink_logits, its gradient, and the sums for the gradient of the logits. */
typedef struct SegattnSinkParams {
  const float* logits;       /* [q_heads] */
  const float* lse;          /* [q_heads, rows of a span], spans one after another */
  const int32_t* span_start; /* [spans + 1]: first row of each span, and behind the last; every span has rows */
  SegattnRows out;           /* bf16 [rows, q_heads * head_dim]: attention's output */
  SegattnRows y;             /* bf16 [rows, q_heads * head_dim] */
  SegattnRows d_y;           /* gradient: bf16 [rows, q_heads * head_dim] */
  SegattnRows d_out;         /* gradient: bf16 [rows, q_heads * head_dim], set */
  float* d_lse;              /* gradient: as lse, set; sums: read */
  float* d_logits;           /* sums: [spans, q_heads], set */
  int64_t rows;
  int32_t spans;
  int32_t q_heads;
  int32_t head_dim; /* a multiple of 8, at most 256 */
} SegattnSinkParams;

/* embed and its gradient. */
typedef struct SegattnEmbedParams {
  SegattnRows table;        /* bf16 [vocab, width] */
  const uint32_t* tokens;   /* [rows] */
  SegattnRows y;            /* bf16 [rows, width]; gradient: its gradient */
  SegattnRows d_table;      /* f32 [vocab, width], added to */
  const int32_t* order;     /* gradient: [rows]: rows sorted by token, equal tokens in ascending order */
  const int32_t* run_start; /* gradient: [runs + 1]: where in order the rows of the next token begin */
  int64_t rows;
  int32_t runs;  /* distinct tokens */
  int32_t width; /* a multiple of 8 */
} SegattnEmbedParams;

/* cross_entropy: log-probabilities of targets, and the gradient by the logits. */
typedef struct SegattnLossParams {
  SegattnRows logits;      /* f32 [rows, vocab], any alignment */
  const uint32_t* targets; /* [rows] */
  const float* scales;     /* [rows], finite: d_logits = scale * (softmax - onehot); null where d_logits is none */
  float* log_probability;  /* [rows] */
  SegattnRows d_logits;    /* bf16 [rows, vocab], any alignment; data null: none. A row may begin where the logits' row
                               begins: it then takes the place of the row's first half */
  int64_t rows;
  int32_t vocab;
} SegattnLossParams;

/* divergence: log-probabilities of targets, divergences of rows from a teacher's, and the gradient of both. */
typedef struct SegattnDivergenceParams {
  SegattnRows logits;      /* f32 [rows, vocab], any alignment */
  SegattnRows teacher;     /* the same of the teacher */
  const uint32_t* targets; /* [rows] */
  const float* scales;     /* [rows, 2], finite: of the log-probability, and of the divergence */
  float* log_probability;  /* [rows] */
  float* divergence;       /* [rows] */
  SegattnRows d_logits;    /* bf16 [rows, vocab], any alignment. A row may begin where the logits' row begins, as in
                               SegattnLossParams */
  int64_t rows;
  int32_t vocab;
  float temperature, inverse; /* T and 1 / T */
} SegattnDivergenceParams;

/* One tensor of the optimizer. */
typedef struct SegattnAdamwTensor {
  float* values;      /* [len] */
  const float* grads; /* [len] */
  float* m;           /* [len] */
  float* v;           /* [len] */
  void* weights;      /* bf16 [len] or null: the values once more, rounded */
  int64_t len;
  int64_t first_chunk; /* chunks of the tensors before it, each ceil(len / chunk) */
  float step;          /* lr / (1 - beta1^t) */
  float keep;          /* 1 - lr * weight decay */
  float floor;         /* positive values stay at or above it, others as they are; negative: no floor */
  int32_t changes;     /* 0: counts for the norm and stays as it is */
} SegattnAdamwTensor;

/* The result of an update. */
typedef struct SegattnAdamwResult {
  double grad_norm; /* of all gradients, before clipping */
  float clip;       /* factor on the gradients */
  int32_t applied;
} SegattnAdamwResult;

/* adamw. */
typedef struct SegattnAdamwParams {
  const SegattnAdamwTensor* tensors; /* [count], none of them empty */
  double* chunk_squares;             /* [chunks] */
  SegattnAdamwResult* result;        /* [1] */
  int64_t chunks;
  double clip_norm; /* negative: no clipping */
  int32_t count;
  int32_t only_measure;
  float beta1, beta2;
  float rest1, rest2; /* 1 - beta */
  float root;         /* 1 / sqrt(1 - beta2^t) */
  float eps;
} SegattnAdamwParams;

/* Keys and values of tokens of a pool, in one range of memory. */
typedef struct SegattnPoolChunk {
  void* k; /* [chunk_tokens, heads, head_dim] of so many bits, then steps: see pool.cuh */
  void* v;
} SegattnPoolChunk;

/* One KV head that reads the past. */
typedef struct SegattnPoolHead {
  int32_t kv_head;
  int32_t eligible_begin, eligible_end; /* scores: tokens [begin, end) may be selected */
  int32_t end_angle;                    /* gather: row of the tables after the last selected token's */
} SegattnPoolHead;

/* The best token of a tile that is in no window yet, and its rank key (kernels/select.cuh). */
typedef struct SegattnBestToken {
  uint32_t key;
  uint32_t token;
} SegattnBestToken;

/* Retrieval (kernels/retrieval.cu). The pool holds keys before rotation. Its tiles have 128 tokens each, from token 0
   on; only those with tokens that a head may select are written. */
typedef struct SegattnRetrievalParams {
  const SegattnPoolChunk* chunks; /* tokens from first_token on, chunk_tokens each */
  const SegattnPoolHead* head;    /* [heads] */
  SegattnRows q;    /* probes: bf16 [query_capacity, q_heads * head_dim], before rotation: a ring, whose query t is row
                    (first_query + t) % query_capacity */
  SegattnRows k, v; /* append: bf16 [rows, kv_heads * head_dim] read; read: written; gather: [past rows, ...] written */
  void* probes;     /* bf16 [3, heads, group * windows, head_dim]: three parts that add up to the probe */
  float* sums;      /* [heads, tiles, group * windows, 2]: of a tile, maximum of s and sum of exp2(s - maximum) */
  float* lse;       /* [heads, group * windows]: log2 of the sum of exp2(s) */
  float* scores;    /* [heads, score_pitch]: of blocks; second rule: of tokens */
  SegattnBestToken* best;       /* [heads, tiles] */
  int32_t* selected;            /* [heads, max_selected]: blocks, or tokens, in ascending order; keep: those dropped */
  int32_t* selected_count;      /* [heads] */
  float* unwanted;              /* [heads, score_pitch]: the negative of what a block, or token, is kept for */
  const SegattnPoolChunk* kept; /* keep: chunks of the pool that is written, chunk_tokens each from token 0 on */
  int32_t* past_len;            /* gather: [kv_heads]: tokens gathered, written for the heads named; or null */
  const float* cos;             /* [positions, head_dim / 2] */
  const float* sin;             /* [positions, head_dim / 2] */
  int64_t first_token;          /* token 0 of chunks[0] */
  int64_t chunk_tokens;
  int64_t token; /* append, read, keep: token of row 0 */
  int64_t rows;  /* append, read, keep */
  int64_t score_pitch;
  int32_t heads;
  int32_t head_dim; /* a multiple of 16 */
  int32_t group;    /* query heads of a KV head */
  int32_t windows;  /* of a query head; second rule: its queries, each a probe by itself */
  int32_t window;   /* queries of a window */
  int32_t stride;   /* queries between the starts of two windows */
  int32_t first_query;
  int32_t query_capacity;
  int32_t block_len;
  int32_t first_block; /* scores: of this launch */
  int32_t blocks;      /* scores: of this launch */
  int32_t max_selected;
  int32_t tiles;         /* second rule: up to the last token that any head may select */
  int32_t window_len;    /* tokens of a window */
  int32_t window_before; /* tokens of a whole window before its best token */
  float scale_log2;      /* s = scale_log2 * probe . key: the scale of attention, in base 2 */
  int32_t bits;          /* of an element of the pool: 16, 8 or 4 */
  int32_t padding;       /* so that every byte of a table of calls is set */
} SegattnRetrievalParams;

/* Calls of one of its kernels, which do not depend on each other: a launch has `blocks` blocks for each. */
typedef struct SegattnRetrievalCalls {
  const SegattnRetrievalParams* calls;
  int64_t blocks; /* what a call has no work for does nothing */
} SegattnRetrievalCalls;

/* How a sequence's next token is chosen, and where its random stream stands. */
typedef struct SegattnSampler {
  uint64_t seed;
  uint64_t stream;
  uint64_t position; /* tokens chosen so far; goes up by one with every token */
  float temperature; /* 0: the highest logit */
  float top_p;       /* in (0, 1] */
  float min_p;       /* in [0, 1] */
  float penalty;     /* above 0; 1: none */
  uint32_t top_k;    /* 0: all */
  int32_t failure;   /* written: 0, or 1: a logit is NaN or +inf, 2: no logit is finite; then nothing was chosen */
} SegattnSampler;

/* sample: the next token of every row. */
typedef struct SegattnSampleParams {
  SegattnRows logits;      /* f32 [rows, vocab], any alignment */
  SegattnSampler* sampler; /* [rows] */
  uint32_t* seen;   /* [rows, seen_pitch]: bit t % 32 of word t / 32: t is in the history; the token chosen is added */
  uint32_t* tokens; /* [rows] */
  float* log_probability; /* [rows]: of the token, by the logits as they are */
  const int32_t* indices; /* [rows of the launch] or null: which row of all of the above is meant */
  int64_t seen_pitch;     /* words, at least ceil(vocab / 32) */
  int64_t rows;           /* of the launch */
  int32_t vocab;
} SegattnSampleParams;

#endif
