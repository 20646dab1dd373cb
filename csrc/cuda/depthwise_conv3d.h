// The 3x3x3 depthwise convolution of channels-last tokens [B, T, h, w, C], and the gradient of its weight.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda::cuda {

struct Stencil {
  Dtype dtype;
  const void* x;     // [B, T, h, w, C], 16-byte aligned, C a multiple of 16 bytes
  const void* taps;  // [27, C]
  const void* bias;  // [C], or null
  const void* add;   // null, or a row of C numbers for each token, `add_stride` apart: added to the result into `sum`
  void* y;           // [B, T, h, w, C]
  void* sum;         // [B, T, h, w, C]: y + add, if there is `add`
  int64_t clips;
  int frames, h, w, c;
  int64_t add_stride;       // in numbers, a multiple of 16 bytes
  bool mirrored, residual;  // taps in reverse order; y is the convolution plus x
};

struct StencilGradient {
  Dtype dtype;
  const void* x;
  const void* grad;
  float* partial;  // [segments, 28, C]: sums of a share of the rows, taps first, then the bias
  int64_t clips;
  int frames, h, w, c, segments;
};

// 0, or CUDA's error code.
int stencil(const Stencil& p, void* stream);
int stencil_gradient(const StencilGradient& p, void* stream);

}  // namespace panda::cuda
