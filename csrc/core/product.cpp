#include "product.h"

#include <algorithm>

#include "parallel.h"

namespace panda {

// Threads share the columns first: each reads its part of the weights once, and all of them the same rows.
constexpr int64_t kRowBlock = 512;

void product(Dtype dtype, const Gemm& g, int64_t rows) {
  const int64_t across = panels(g.n), down = (rows + kRowBlock - 1) / kRowBlock;
  parallel_for(across * down, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t block = first / across, panel = first % across;
      const int64_t end = std::min(across, panel + last - first);
      gemm(dtype, g, block * kRowBlock, std::min(rows, (block + 1) * kRowBlock), panel, end);
      first += end - panel;
    }
  });
}

}  // namespace panda
