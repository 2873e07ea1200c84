// Online softmax of the rows that a thread holds. In the accumulators of m16n8k16 these are rows lane / 4 and lane /
// 4 + 8, columns 2 * (lane % 4) and the next. Scores are in base 2 and the scale is part of the exponent:
// p = exp2(s * scale_log2 + bias - max).
//
// Bits: a tile of which a row sees no key leaves max, sum and output of the row unchanged (factor exactly 1, summand
// 0). So skipping such a tile changes no bit.
#pragma once
#include "ptx.cuh"

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
#define SEGATTN_NEG_INF (-INFINITY)

struct RowState {
  float max;  // of the scores seen, in base 2
  float sum;  // of exp2(score - max): over this thread's columns until quad_sum, then over all
};

SEGATTN_FN float finite_max(float max) { return max == SEGATTN_NEG_INF ? 0.f : max; }

// Reductions over the four threads that share a row, in the same order in each of them.
SEGATTN_FN float quad_max(float x) {
  x = max_f32(x, shuffle_xor(x, 1));
  return max_f32(x, shuffle_xor(x, 2));
}
SEGATTN_FN float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// The update of a row by a tile's highest score in base 2, bias included: the new maximum, the factor that rescales
// what was accumulated before, and the offset of the tile's exponents.
struct RowUpdate {
  float max, factor, offset;
};
SEGATTN_FN RowUpdate update_row(float row_max, float tile_max_log2, float bias) {
  const float max = max_f32(row_max, tile_max_log2), reference = finite_max(max);
  return {max, exp2_approx(row_max - reference), bias - reference};
}
SEGATTN_FN float probability(float score, float scale_log2, const RowUpdate& update) {
  return exp2_approx(fma_rn(score, scale_log2, update.offset));
}

// Turns one row's scores of a tile (elements half * 2 and half * 2 + 1 of each accumulator) into probabilities
// relative to the new maximum, updates the row, and returns the factor that rescales what was accumulated before.
template <int kColTiles>
SEGATTN_FN float softmax_row(float (&s)[kColTiles][4], int half, RowState& row, float scale_log2, float bias) {
  float tile_max = s[0][half * 2];
#pragma unroll
  for (int n = 0; n < kColTiles; n++) tile_max = max_f32(tile_max, max_f32(s[n][half * 2], s[n][half * 2 + 1]));
  tile_max = quad_max(tile_max);
  const RowUpdate update = update_row(row.max, fma_rn(tile_max, scale_log2, bias), bias);
  float even = 0.f, odd = 0.f;
#pragma unroll
  for (int n = 0; n < kColTiles; n++) {
    s[n][half * 2] = probability(s[n][half * 2], scale_log2, update);
    s[n][half * 2 + 1] = probability(s[n][half * 2 + 1], scale_log2, update);
    even += s[n][half * 2];
    odd += s[n][half * 2 + 1];
  }
  row.sum = fma_rn(row.sum, update.factor, even + odd);
  row.max = update.max;
  return update.factor;
}

// Factors that bring the total so far and the next partial result of a row to their common maximum.
struct MergeFactors {
  float total, partial, max;
};
SEGATTN_FN MergeFactors merge_factors(float total_max, float partial_max) {
  const float max = max_f32(total_max, partial_max), reference = finite_max(max);
  return {exp2_approx(total_max - reference), exp2_approx(partial_max - reference), max};
}
SEGATTN_FN float merge_value(float total, float partial, const MergeFactors& f) {
  return fma_rn(partial, f.partial, mul_rn(total, f.total));
}

// The magnitude of the scale, in base 2; its sign goes into the queries. 0 becomes a positive number so small that
// every exponent is 0, because 0 times a masked score (-inf) would be NaN.
SEGATTN_FN float scale_log2(float scale) {
  const float magnitude = mul_rn(scale < 0.f ? -scale : scale, kLog2E);
  return max_f32(magnitude, 1e-37f);
}
