// The numbers that kernels and their callers speak of.
#pragma once
#include <cstdint>

namespace panda::cuda {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

enum class Dtype : int { float32, bfloat16, float16 };

}  // namespace panda::cuda
