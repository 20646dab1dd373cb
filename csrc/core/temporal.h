// The depthwise convolution over time between LSTE's two pointwise products.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda {

// Frame t of `frames`, tokens [first, last) of its `tokens`: out[t][n] = bias + sum_k taps[k] * in[t + k - 1][n],
// frames outside the clip left out. `in` is [frames][tokens][in_stride] and `out` [frames][tokens][out_stride];
// channels from c up to out_stride are zeroed, so that a row can feed a product padded in its depth.
struct Temporal {
  Dtype dtype;
  const void* in;
  void* out;
  int64_t in_stride, out_stride, frames, tokens, c;
  const float* taps;  // [3][c]
  const float* bias;  // [c]
};

}  // namespace panda
