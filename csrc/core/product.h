// A matrix product on all threads.
#pragma once
#include "gemm.h"

namespace panda {

// All rows and columns of g. Bits do not depend on the number of threads.
void product(Dtype dtype, const Gemm& g, int64_t rows);

}  // namespace panda
