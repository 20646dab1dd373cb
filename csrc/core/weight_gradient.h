// The gradients of a linear layer's weight and bias, products over tokens: W = G^T X and the sums of G's rows.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda {

// Strides are in elements; w is [n][k] and b, [n] or null, float. With `add` to what they hold.
struct WeightGradient {
  Dtype dtype;
  const void* grad;  // [rows][n]
  int64_t grad_stride, n;
  const void* x;  // [rows][k]
  int64_t x_stride, k;
  float* w;
  float* b;
  bool add;
};

// On all threads. Bits do not depend on their number, but on how the rows are divided among calls.
void weight_gradient(const WeightGradient&, int64_t rows);

// The operands of that product, made of a block of rows: the columns of `in` as rows of `out`, `out_stride` apart and
// zero from `rows` up to `depth`, a multiple of 32; and panels as pack() makes them of the transpose.
struct TurnedRows {
  Dtype dtype;
  const void* in;
  int64_t in_stride, rows, depth;
  void* out;
  int64_t out_stride;
  float* sums;  // of each column, or null
  bool add;
};
struct PackedRows {
  Dtype dtype;
  const void* in;
  int64_t in_stride, rows, n;
  void* packed;
};

}  // namespace panda
