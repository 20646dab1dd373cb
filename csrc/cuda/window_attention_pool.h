// Attention of each window's query to the window's four tokens, in the folded form (docs/numerics.md).
#pragma once
#include <cstdint>

#include "types.h"

namespace panda::cuda {

// Pointers are 16-byte aligned.
struct WindowAttention {
  Dtype dtype;              // bfloat16 or float16, of all that says nothing else
  const void* x;            // [frames, h, w, C] tokens
  const int64_t* places;    // [windows]: the first token of each window of 2 x 2
  const float* norms;       // [2, 4, windows]: the means of the windows' tokens, then their reciprocal deviations
  const void* q;            // [windows, C]
  const void* norm_weight;  // [C]
  const void* norm_bias;    // [C]
  const void* wkv;          // [2C, C]: the rows of k, then those of v
  void* out;                // [windows, C]: the heads' outputs
  int64_t windows;
  int w, c, heads;  // C a multiple of 32, an even number of heads, each a multiple of 16 wide and at most 176
  float scale;
};

// 0, or CUDA's error code; cudaErrorInvalidValue, 1, for what it does not serve.
int attend(const WindowAttention& p, void* stream);

}  // namespace panda::cuda
