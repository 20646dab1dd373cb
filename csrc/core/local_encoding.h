// LSTE streamed by bands of image rows: temporal convolution, second product, 3x3x3 convolution, with no intermediate
// larger than two bands. What comes before, the first product, is the caller's: from tokens or straight from pixels.
#pragma once
#include <cstdint>

#include "bands.h"
#include "gemm.h"

namespace panda {

struct LocalEncodingWeights {
  int64_t c, r;
  const float* time_taps;      // [3][r]
  const float* time_bias;      // [r]
  const void* expand;          // packed [c, r]
  const float* expand_bias;    // [c]
  const float* position_taps;  // [27][c], the residual in the centre tap
  const float* position_bias;  // [c]
};

// One clip, bands of `band` rows in order, each: expand(), convolve().
class LocalEncoder {
 public:
  LocalEncoder(Dtype dtype, Grid grid, const LocalEncodingWeights& weights, int64_t band);

  // Rows [i0, i0 + rows): from the output of the first product, hidden [frames][rows * w][r], and these rows of the
  // residual, x0[frame], contiguous in each frame.
  void expand(int64_t i0, int64_t rows, const void* hidden, const void* const* x0);

  // The first row that still lacks a neighbour below once rows up to `expanded` are in.
  int64_t ready(int64_t expanded) const { return expanded == grid_.h ? expanded : expanded - 1; }

  // Output rows [i0, i1); out[(i - i0) * frames + frame] receives a row of w tokens.
  void convolve(int64_t i0, int64_t i1, void* const* out);

 private:
  Dtype dtype_;
  Grid grid_;
  LocalEncodingWeights weights_;
  TwoBands x1_;
};

}  // namespace panda
