// Element types of the torch-free core. Plain data only: this header is compiled under every instruction set.
#pragma once
#include <cstdint>

namespace panda {

struct bfloat16 {
  uint16_t bits;
};

enum class Dtype { float32, bfloat16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace panda
