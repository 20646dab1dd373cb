#include "batch_statistics.h"

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace panda {

namespace {

// One channel of all blocks: Var[x] = E[Var[x | block]] + Var[E[x | block]], which subtracts no large numbers.
void combine(const float* moments, int64_t blocks, int64_t rows, int64_t c, float* mean, float* variance) {
  const auto count = [&](int64_t block) {
    const int64_t left = rows - block * kStatisticsRows;
    return double(left < kStatisticsRows ? left : kStatisticsRows);
  };
  double sum = 0, second = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += count(block) * moments[block * 2 * c];
  const double centre = sum / double(rows);
  for (int64_t block = 0; block < blocks; ++block) {
    const double d = moments[block * 2 * c] - centre;
    second += moments[(block * 2 + 1) * c] + count(block) * d * d;
  }
  *mean = float(centre);
  *variance = float(second / double(rows));
}

}  // namespace

void batch_statistics(Dtype dtype, const void* x, int64_t rows, int64_t c, float* result) {
  const int64_t blocks = moment_blocks(rows);
  Scratch<float> moments(blocks * 2 * c);
  const BlockMoments parts{dtype, x, rows, c, moments.data()};
  parallel_for(blocks, [&](int64_t first, int64_t last) { kernels().block_moments(parts, first, last); });
  parallel_for(c, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) combine(moments.data() + i, blocks, rows, c, result + i, result + c + i);
  });
}

void affine(const AffineRows& a, int64_t rows) {
  parallel_for(rows, [&](int64_t first, int64_t last) { kernels().affine_rows(a, first, last); });
}

}  // namespace panda
