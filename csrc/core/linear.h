// A linear layer for a handful of rows: bound by reading the weights, so they are taken as they lie.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda {

// y [rows][matrices][n] = f(x[rows][matrices][k] w[matrices][n][k]^T + bias[matrices][n]), f the identity or
// z sigmoid(1.702 z).
struct Linear {
  Dtype dtype;  // of w
  const float* x;
  int64_t rows, matrices, k, n;
  const void* w;
  const float* bias;
  bool quick_gelu;
  float* y;
};
constexpr int64_t kLinearOutputs = 4;  // outputs a work item takes

inline int64_t linear_items(const Linear& a) { return a.matrices * ((a.n + kLinearOutputs - 1) / kLinearOutputs); }

}  // namespace panda
