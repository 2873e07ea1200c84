// RMS norm (Zhang and Sennrich 2019), of rows [rows, width], or of groups of rows:
//   rms_norm              x' = x + residual (rounded; x' = x where there is none)
//                         rstd = 1 / sqrt(mean(x'^2) + eps),  y = x' rstd weight
//   rms_norm_grad         d_x (+)= rstd weight d_y - x rstd^3 mean(weight d_y x)
//   head_norms_grad  d_x = that of q's and k's heads in rows [q | k | v], with d_v copied
//   rms_norm_weight_grad  d_weight += sum over rows of d_y x rstd, one chain over rows in ascending order;
//                         without x, of d_y: the gradient of a bias
//   rms_norm_group_sums   sums = sum over the groups of a row of memory of d_y x rstd, in ascending order from zero
//   rms_norm_chain        d_weight += sum over rows of sums, one chain over rows of memory in ascending order
// The last two are the gradient of a weight that the groups of a row share: the heads' norms, q's and k's together.
// Bits: the width of a row decides the threads and the tree that sum it. The sum over rows is one chain, so it does
// not matter how many rows a call holds. Bytes a row and element: forward 4 (with residual 8), gradient 6 (+ 2 for
// +=), weight 4; the sums of groups are written and read again, 8 for all groups together.
#include "head_norm.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

// ---------------------------------------------------------------------------------------------------- a block a row

// A row stays in registers between its two uses, two vectors a thread, which leaves room for 1536 resident threads.
struct RowConfig {
  static constexpr int kThreads = 1024, kBlocks = 1;
  static constexpr int kVectors = 2;
  static constexpr int kMaxWidth = kThreads * kVectors * kVector;
};

// Threads of a row. The number decides the order of the sum, and so the bits.
SEGATTN_FN int row_threads(int width) {
  return min(RowConfig::kThreads, max(1, ceil_div(width, RowConfig::kVectors * kVector * 32)) * 32);
}

SEGATTN_FN int vector_column(int i) { return (threadIdx.x + i * blockDim.x) * kVector; }

// A row of the norm: a group of a row of memory.
template <class T>
SEGATTN_FN T* group_of(const SegattnNormParams& p, const SegattnRows& rows, int64_t row) {
  if (p.groups == 1) return row_of<T>(rows, row);
  return row_of<T>(rows, row / p.groups) + row % p.groups * p.width;
}

struct RowShared {
  float warps[kMaxWarps];
};

SEGATTN_FN void rms_norm(const SegattnNormParams& p) {
  if ((int)blockDim.x != row_threads(p.width)) __trap();
  RowShared& shared = *(RowShared*)shared_memory();
  const int64_t row = blockIdx.x;
  uint4 r_held[RowConfig::kVectors];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < RowConfig::kVectors; i++) {
    const int column = vector_column(i);
    if (column >= p.width) break;
    r_held[i] = *(const uint4*)(group_of<const Bf16>(p, p.x, row) + column);
    float r_x[kVector];
    unpack_vector(r_x, r_held[i]);
    if (p.residual.data) {
      float r_residual[kVector];
      load_vector(r_residual, group_of<const Bf16>(p, p.residual, row) + column);
#pragma unroll
      for (int e = 0; e < kVector; e++) r_x[e] += r_residual[e];
      r_held[i] = pack_vector(r_x);
      *(uint4*)(group_of<Bf16>(p, p.x_sum, row) + column) = r_held[i];
      unpack_vector(r_x, r_held[i]);
    }
#pragma unroll
    for (int e = 0; e < kVector; e++) squares = fma_rn(r_x[e], r_x[e], squares);
  }
  squares = block_reduce<SumOf>(squares, shared.warps);
  const float rstd = 1.f / sqrtf(squares / (float)p.width + p.eps);
  if (threadIdx.x == 0) p.rstd[row] = rstd;
#pragma unroll
  for (int i = 0; i < RowConfig::kVectors; i++) {
    const int column = vector_column(i);
    if (column >= p.width) break;
    float r_x[kVector], r_weight[kVector];
    unpack_vector(r_x, r_held[i]);
    load_vector(r_weight, p.weight + column);
#pragma unroll
    for (int e = 0; e < kVector; e++) r_x[e] = mul_rn(mul_rn(r_x[e], rstd), r_weight[e]);
    store_vector(group_of<Bf16>(p, p.y, row) + column, r_x);
  }
}

SEGATTN_FN void rms_norm_grad(const SegattnNormParams& p) {
  if ((int)blockDim.x != row_threads(p.width)) __trap();
  RowShared& shared = *(RowShared*)shared_memory();
  const int64_t row = blockIdx.x;
  const float rstd = p.rstd[row];
  uint4 r_held_x[RowConfig::kVectors], r_held_d_y[RowConfig::kVectors];
  float along = 0.f;
#pragma unroll
  for (int i = 0; i < RowConfig::kVectors; i++) {
    const int column = vector_column(i);
    if (column >= p.width) break;
    r_held_x[i] = *(const uint4*)(group_of<const Bf16>(p, p.x, row) + column);
    r_held_d_y[i] = *(const uint4*)(group_of<const Bf16>(p, p.d_y, row) + column);
    float r_x[kVector], r_d_y[kVector], r_weight[kVector];
    unpack_vector(r_x, r_held_x[i]);
    unpack_vector(r_d_y, r_held_d_y[i]);
    load_vector(r_weight, p.weight + column);
#pragma unroll
    for (int e = 0; e < kVector; e++) along = fma_rn(mul_rn(r_d_y[e], r_weight[e]), r_x[e], along);
  }
  along = block_reduce<SumOf>(along, shared.warps);
  const float pull = along / (float)p.width * rstd * rstd * rstd;
#pragma unroll
  for (int i = 0; i < RowConfig::kVectors; i++) {
    const int column = vector_column(i);
    if (column >= p.width) break;
    Bf16* g_d_x = group_of<Bf16>(p, p.d_x, row) + column;
    float r_x[kVector], r_d_y[kVector], r_weight[kVector], r_d_x[kVector] = {};
    unpack_vector(r_x, r_held_x[i]);
    unpack_vector(r_d_y, r_held_d_y[i]);
    load_vector(r_weight, p.weight + column);
    if (p.add) load_vector(r_d_x, g_d_x);
#pragma unroll
    for (int e = 0; e < kVector; e++) r_d_x[e] += fma_rn(mul_rn(r_d_y[e], r_weight[e]), rstd, -mul_rn(r_x[e], pull));
    store_vector(g_d_x, r_d_x);
  }
}

// --------------------------------------------------------------------------------------------- q's and k's heads

SEGATTN_FN void head_norms_grad(const SegattnHeadNormsParams& p) {
  const HeadPlace at = head_place(thread_index(), p.q_heads + 2 * p.kv_heads, p.head_dim);
  const bool is_inside = at.row < p.rows && at.column < p.head_dim;
  const bool is_normed = is_inside && at.head < p.q_heads + p.kv_heads;
  const int64_t column = (int64_t)at.head * p.head_dim + at.column;
  uint4 r_held = make_uint4(0, 0, 0, 0);
  float r_d_y[kVector] = {}, r_x[kVector] = {}, along = 0.f, rstd = 0.f;
  if (is_inside) r_held = *(const uint4*)(row_of<const Bf16>(p.d_y, at.row) + column);
  if (is_normed) {
    load_vector(r_x, row_of<const Bf16>(p.x, at.row) + column);
    rstd = *rstd_at(p.norms, at, p.q_heads, p.kv_heads);
    float r_weight[kVector];
    load_vector(r_weight, (at.head < p.q_heads ? p.norms.q_weight : p.norms.k_weight) + at.column);
    unpack_vector(r_d_y, r_held);
#pragma unroll
    for (int e = 0; e < kVector; e++) {
      r_d_y[e] = mul_rn(r_d_y[e], r_weight[e]);
      along = fma_rn(r_d_y[e], r_x[e], along);
    }
  }
  along = sum_of_head(along, at.lanes);
  if (!is_inside) return;
  if (is_normed) {
    const float pull = along / (float)p.head_dim * rstd * rstd * rstd;
    // A sum that begins at zero, as that of rms_norm_grad does: it has no negative zeros.
#pragma unroll
    for (int e = 0; e < kVector; e++) r_x[e] = 0.f + fma_rn(r_d_y[e], rstd, -mul_rn(r_x[e], pull));
    r_held = pack_vector(r_x);
  }
  *(uint4*)(row_of<Bf16>(p.d_x, at.row) + column) = r_held;
}

// ---------------------------------------------------------------------------------------------------- rows to one

// A block sums 16 columns, which are whole sectors of memory. Eight warps multiply 256 rows at a time into shared
// memory, while one warp adds the products of the previous 256 in order: the sum is one chain, but all warps load.
struct ColumnConfig {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr int kColumns = 16, kRowVectors = kColumns / kVector;
  static constexpr int kLoads = 2;  // rows of a thread, loaded before the first is used
  static constexpr int kStep = kThreads / kRowVectors, kRows = kLoads * kStep;
  static constexpr int kPitch = kColumns + 4;
};

struct ColumnShared {
  alignas(16) float products[2][ColumnConfig::kRows][ColumnConfig::kPitch];
};

// The rows that a thread multiplies: first, first + kStep, ..., of one vector of columns.
struct ColumnLoads {
  uint4 d_y[ColumnConfig::kLoads], x[ColumnConfig::kLoads];
  float rstd[ColumnConfig::kLoads];
};

SEGATTN_FN void load_columns(ColumnLoads& r, const SegattnNormParams& p, int64_t first, int column) {
#pragma unroll
  for (int i = 0; i < ColumnConfig::kLoads; i++) {
    const int64_t row = first + i * ColumnConfig::kStep;
    if (row >= p.rows || column >= p.width) continue;
    r.d_y[i] = *(const uint4*)(row_of<const Bf16>(p.d_y, row) + column);
    if (!p.x.data) continue;
    r.x[i] = *(const uint4*)(row_of<const Bf16>(p.x, row) + column);
    r.rstd[i] = p.rstd[row];
  }
}

SEGATTN_FN void store_products(ColumnShared& shared, int stage, const ColumnLoads& r, const SegattnNormParams& p,
                               int64_t first, int tile_row, int tile_column, int column) {
#pragma unroll
  for (int i = 0; i < ColumnConfig::kLoads; i++) {
    const int row = tile_row + i * ColumnConfig::kStep;
    if (first + row >= p.rows || column >= p.width) continue;
    float r_products[kVector], r_x[kVector];
    unpack_vector(r_products, r.d_y[i]);
    if (p.x.data) {
      unpack_vector(r_x, r.x[i]);
#pragma unroll
      for (int e = 0; e < kVector; e++) r_products[e] = mul_rn(r_products[e], mul_rn(r_x[e], r.rstd[i]));
    }
    store_vector(&shared.products[stage][row][tile_column], r_products);
  }
}

SEGATTN_FN void rms_norm_weight_grad(const SegattnNormParams& p) {
  using C = ColumnConfig;
  if (p.groups != 1) __trap();
  ColumnShared& shared = *(ColumnShared*)shared_memory();
  const int first_column = blockIdx.x * C::kColumns, thread = threadIdx.x;
  const int tile_row = thread / C::kRowVectors, tile_column = thread % C::kRowVectors * kVector;
  const int column = first_column + tile_column;
  const bool sums = thread < C::kColumns && first_column + thread < p.width;
  float sum = sums ? p.d_weight[first_column + thread] : 0.f;
  ColumnLoads r_loads;
  load_columns(r_loads, p, tile_row, column);
  int stage = 0;
  for (int64_t first = 0; first < p.rows; first += C::kRows, stage ^= 1) {
    store_products(shared, stage, r_loads, p, first, tile_row, tile_column, column);
    load_columns(r_loads, p, first + C::kRows + tile_row, column);
    __syncthreads();
    if (!sums) continue;
    const int rows = (int)min((int64_t)C::kRows, p.rows - first);
#pragma unroll 16
    for (int row = 0; row < rows; row++) sum += shared.products[stage][row][thread];
  }
  if (sums) p.d_weight[first_column + thread] = sum;
}

// ---------------------------------------------------------------------------------------------------- groups to one

// A block's norm, and its number among that norm's blocks.
SEGATTN_FN const SegattnNormParams& norm_of(const SegattnNormsParams& p) {
  return p.norms[(int)blockIdx.x < p.blocks ? 0 : 1];
}
SEGATTN_FN int block_of(const SegattnNormsParams& p) {
  return (int)blockIdx.x < p.blocks ? blockIdx.x : blockIdx.x - p.blocks;
}

// Sums are [tile of 32 columns][four rows][column][row], so that a lane of the chain reads four rows of its column at
// once, and a warp 512 bytes. The last four rows are completed by zeros, which change no sum.
struct SumsLayout {
  static constexpr int kColumns = 32, kRows = 4;
};

SEGATTN_FN int64_t rows_of_sums(const SegattnNormParams& p) {
  return (p.rows + SumsLayout::kRows - 1) / SumsLayout::kRows * SumsLayout::kRows;
}

// Elements from a row of a column on; the next column's are kRows further.
SEGATTN_FN float* sums_at(const SegattnNormParams& p, int64_t row, int column) {
  using L = SumsLayout;
  const int64_t rows_before = column / L::kColumns * rows_of_sums(p) + row / L::kRows * L::kRows;
  return p.sums + rows_before * L::kColumns + column % L::kColumns * L::kRows + row % L::kRows;
}

// A thread sums a vector of columns of a row, and has the loads of several groups in flight.
struct GroupConfig {
  static constexpr int kThreads = 128, kBlocks = 8;
  static constexpr int kLoads = 4;  // groups
};

// Adds kCount groups of a row from `first` on, all loaded before the first is used.
template <int kCount>
SEGATTN_FN void add_groups(float (&r_sum)[kVector], const SegattnNormParams& p, int64_t row, int first, int column) {
  const Bf16* g_d_y = row_of<const Bf16>(p.d_y, row) + first * p.width + column;
  const Bf16* g_x = row_of<const Bf16>(p.x, row) + first * p.width + column;
  uint4 r_held_d_y[kCount], r_held_x[kCount];
  float r_rstd[kCount];
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    r_held_d_y[i] = *(const uint4*)(g_d_y + i * p.width);
    r_held_x[i] = *(const uint4*)(g_x + i * p.width);
    r_rstd[i] = p.rstd[row * p.groups + first + i];
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    float r_d_y[kVector], r_x[kVector];
    unpack_vector(r_d_y, r_held_d_y[i]);
    unpack_vector(r_x, r_held_x[i]);
#pragma unroll
    for (int e = 0; e < kVector; e++) r_sum[e] += mul_rn(r_d_y[e], mul_rn(r_x[e], r_rstd[i]));
  }
}

SEGATTN_FN void rms_norm_group_sums(const SegattnNormParams& p, int block) {
  constexpr int kLoads = GroupConfig::kLoads;
  const uint32_t vectors = p.width / kVector, index = block * blockDim.x + threadIdx.x;
  const int64_t row = index / vectors;
  const int column = index % vectors * kVector;
  if (row >= rows_of_sums(p)) return;
  float r_sum[kVector] = {};
  int group = row < p.rows ? 0 : p.groups;
  for (; group + kLoads <= p.groups; group += kLoads) add_groups<kLoads>(r_sum, p, row, group, column);
  for (; group < p.groups; group++) add_groups<1>(r_sum, p, row, group, column);
  float* g_sums = sums_at(p, row, column);
#pragma unroll
  for (int e = 0; e < kVector; e++) g_sums[e * SumsLayout::kRows] = r_sum[e];
}

// A block chains the 32 columns of a tile. One warp does nothing but add, and is bound by additions that wait for each
// other; the others copy the next rows meanwhile.
struct ChainConfig {
  static constexpr int kThreads = 128, kBlocks = 1;
  static constexpr int kAdding = SumsLayout::kColumns;  // threads
  static constexpr int kRows = 256, kVectors = kRows / SumsLayout::kRows;
};

struct ChainShared {
  float4 sums[2][ChainConfig::kVectors][SumsLayout::kColumns];
};

// Rows from `first` on, of one column. Those beyond the last become zeros.
SEGATTN_FN void copy_sums(ChainShared& shared, int stage, const SegattnNormParams& p, int64_t first, int column) {
  using C = ChainConfig;
  using L = SumsLayout;
  if (first >= p.rows) return;
  const int rows = (int)min((int64_t)C::kRows, p.rows - first);
  const float* g_sums = sums_at(p, first, column);
  for (int i = threadIdx.x / L::kColumns - 1; i < C::kVectors; i += C::kThreads / L::kColumns - 1) {
    const bool valid = i * L::kRows < rows;
    cp_async_16(shared_address(&shared.sums[stage][i][column % L::kColumns]),
                g_sums + (valid ? i : 0) * L::kRows * L::kColumns, valid ? 16 : 0);
  }
}

SEGATTN_FN void rms_norm_chain(const SegattnNormParams& p, int block) {
  using C = ChainConfig;
  ChainShared& shared = *(ChainShared*)shared_memory();
  const int lane = threadIdx.x % SumsLayout::kColumns, column = block * SumsLayout::kColumns + lane;
  const bool adds = threadIdx.x < C::kAdding && column < p.width;
  const bool copies = threadIdx.x >= C::kAdding && column < p.width;
  float sum = adds ? p.d_weight[column] : 0.f;
  if (copies) copy_sums(shared, 0, p, 0, column);
  int stage = 0;
  for (int64_t first = 0; first < p.rows; first += C::kRows, stage ^= 1) {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (copies) copy_sums(shared, stage ^ 1, p, first + C::kRows, column);
    if (!adds) continue;
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      const float4 rows = shared.sums[stage][i][lane];
      sum += rows.x;
      sum += rows.y;
      sum += rows.z;
      sum += rows.w;
    }
  }
  if (adds) p.d_weight[column] = sum;
}

// ---------------------------------------------------------------------------------------------------- entry points

// rms_norm and rms_norm_grad: a block a row, row_threads(width) threads.
SEGATTN_INFO(rms_norm_bf16, (SegattnKernelInfo{RowConfig::kThreads, sizeof(RowShared), RowConfig::kBlocks, 1, 0, 0,
                                               sizeof(SegattnNormParams)}))
SEGATTN_KERNEL(rms_norm_bf16, RowConfig, SegattnNormParams) { rms_norm(params); }
SEGATTN_INFO(rms_norm_grad_bf16, (SegattnKernelInfo{RowConfig::kThreads, sizeof(RowShared), RowConfig::kBlocks, 1, 0, 0,
                                                    sizeof(SegattnNormParams)}))
SEGATTN_KERNEL(rms_norm_grad_bf16, RowConfig, SegattnNormParams) { rms_norm_grad(params); }
// head_norms_grad: a thread a lane of a head, as split_qkv_norm of rope.cu.
SEGATTN_INFO(head_norms_grad_bf16,
             (SegattnKernelInfo{HeadConfig::kThreads, 0, HeadConfig::kBlocks, 0, 0, 0, sizeof(SegattnHeadNormsParams)}))
SEGATTN_KERNEL(head_norms_grad_bf16, HeadConfig, SegattnHeadNormsParams) { head_norms_grad(params); }
// rms_norm_weight_grad: a block 16 columns (tile_rows).
SEGATTN_INFO(rms_norm_weight_grad_bf16,
             (SegattnKernelInfo{ColumnConfig::kThreads, sizeof(ColumnShared), ColumnConfig::kBlocks,
                                ColumnConfig::kColumns, 0, 0, sizeof(SegattnNormParams)}))
SEGATTN_KERNEL(rms_norm_weight_grad_bf16, ColumnConfig, SegattnNormParams) { rms_norm_weight_grad(params); }
// rms_norm_group_sums: a thread a vector of columns of a row, in whole blocks for each norm.
SEGATTN_INFO(rms_norm_group_sums_bf16,
             (SegattnKernelInfo{GroupConfig::kThreads, 0, GroupConfig::kBlocks, 0, 0, 0, sizeof(SegattnNormsParams)}))
SEGATTN_KERNEL(rms_norm_group_sums_bf16, GroupConfig, SegattnNormsParams) {
  rms_norm_group_sums(norm_of(params), block_of(params));
}
// rms_norm_chain: a block 32 columns.
SEGATTN_INFO(rms_norm_chain_f32, (SegattnKernelInfo{ChainConfig::kThreads, sizeof(ChainShared), ChainConfig::kBlocks,
                                                    SumsLayout::kColumns, 0, 0, sizeof(SegattnNormsParams)}))
SEGATTN_KERNEL(rms_norm_chain_f32, ChainConfig, SegattnNormsParams) {
  rms_norm_chain(norm_of(params), block_of(params));
}
