// A matrix product on all threads.
#pragma once
#include "gemm.h"
#include "scratch.h"

namespace panda {

// All rows and columns of g. Bits do not depend on the number of threads.
void product(Dtype dtype, const Gemm& g, int64_t rows);

// Rows of depth k as a bfloat16 product reads them, up to the next multiple of 32: as they are where k is one, else
// copied with zeros behind them. What follows a row in memory may be another sample's NaN, which zero weights keep.
class ProductRows {
 public:
  ProductRows(Dtype dtype, int64_t capacity, int64_t k);
  const void* get(const void* x, int64_t stride, int64_t rows) const;
  int64_t stride(int64_t given) const { return padded_ == k_ ? given : padded_; }

 private:
  int64_t k_, padded_, size_;
  Scratch<char> copy_;
};

}  // namespace panda
