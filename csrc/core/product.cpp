#include "product.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "tuning.h"

namespace panda {

// Threads share the columns first: each reads its part of the weights once, and all of them the same rows, which are
// cut evenly, as the threads' shares are counted in blocks.
void product(Dtype dtype, const Gemm& g, int64_t rows) {
  const int64_t most = tuning().product_rows, across = panels(g.n), down = (rows + most - 1) / most;
  parallel_for(across * down, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t block = first / across, panel = first % across;
      const int64_t end = std::min(across, panel + last - first);
      gemm(dtype, g, block * rows / down, (block + 1) * rows / down, panel, end);
      first += end - panel;
    }
  });
}

ProductRows::ProductRows(Dtype dtype, int64_t capacity, int64_t k)
    : k_(k),
      padded_(padded_k(dtype, k)),
      size_(size_of(dtype)),
      copy_(padded_ == k ? 1 : capacity * padded_ * size_of(dtype)) {}

const void* ProductRows::get(const void* x, int64_t stride, int64_t rows) const {
  if (padded_ == k_) return x;
  std::memset(copy_.data(), 0, rows * padded_ * size_);
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(copy_.data() + i * padded_ * size_, static_cast<const char*>(x) + i * stride * size_, k_ * size_);
  return copy_.data();
}

}  // namespace panda
