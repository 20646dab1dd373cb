// Sums over tokens, channel by channel: mean and variance, and the affine map that their gradient is; and of some rows.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda {

constexpr int64_t kStatisticsRows = 64;  // of a block, which stays in the second-level cache between its two passes

// Blocks of rows of x [rows][c]: each block's mean and sum of squared distances from it, [blocks][2][c].
struct BlockMoments {
  Dtype dtype;
  const void* x;
  int64_t rows, c;
  float* moments;
};

inline int64_t moment_blocks(int64_t rows) { return (rows + kStatisticsRows - 1) / kStatisticsRows; }

// y = x * scale + shift, all [rows][c] but the two [c].
struct AffineRows {
  Dtype dtype;
  const void* x;
  int64_t c;
  const float* scale;
  const float* shift;
  void* y;
};

// sum [c] of `count` rows of x, in that order.
struct RowSum {
  Dtype dtype;
  const void* x;
  const int64_t* rows;
  int64_t count, c;
  float* sum;
};

// x [rows][c] -> result [2][c]: mean and biased variance. Bits do not depend on the number of threads.
void batch_statistics(Dtype, const void* x, int64_t rows, int64_t c, float* result);

void affine(const AffineRows&, int64_t rows);

}  // namespace panda
