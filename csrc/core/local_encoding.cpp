#include "local_encoding.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "tuning.h"

namespace panda {

LocalEncoder::LocalEncoder(Dtype dtype, Grid grid, const LocalEncodingWeights& weights, int64_t band)
    : dtype_(dtype), grid_(grid), weights_(weights), x1_(grid, band, grid.w * weights.c * size_of(dtype)) {}

void LocalEncoder::expand(int64_t i0, int64_t rows, const void* hidden, const void* const* x0) {
  const int64_t tokens = rows * grid_.w, c = weights_.c, r = weights_.r, depth = padded_k(dtype_, r);
  Scratch<char> mixed(grid_.frames * tokens * depth * size_of(dtype_));
  const Temporal over_time{
      dtype_, hidden, mixed.data(), r, depth, grid_.frames, tokens, r, weights_.time_taps, weights_.time_bias};
  parallel_for(tokens, [&](int64_t first, int64_t last) { kernels().temporal(over_time, first, last); });
  Gemm g{mixed.data(), depth, weights_.expand, r, c, x1_.row(0, i0), c};
  g.bias = weights_.expand_bias;
  g.ldr = c;
  // Frames that follow one another in x0 too, as the tower's do, are one product.
  const int64_t frame_bytes = tokens * c * size_of(dtype_);
  int64_t together = 1;
  while (together < grid_.frames && x0[together] == static_cast<const char*>(x0[0]) + together * frame_bytes)
    ++together;
  const int64_t step = together == grid_.frames ? together : 1;
  for (int64_t frame = 0; frame < grid_.frames; frame += step) {
    g.residual = x0[frame];
    product(dtype_, g, step * tokens);
    g.a = static_cast<const char*>(g.a) + tokens * depth * size_of(dtype_);
    g.c = static_cast<char*>(g.c) + frame_bytes;
  }
}

void LocalEncoder::convolve(int64_t i0, int64_t i1, void* const* out) {
  if (i0 >= i1) return;
  const int64_t rows = i1 - i0, c = weights_.c;
  for (int64_t t0 = 0; t0 < grid_.frames; t0 += kMaxFrames) {
    const int frames = int(std::min<int64_t>(kMaxFrames, grid_.frames - t0));
    std::vector<const void*> input;
    std::vector<void*> output;
    for (int64_t i = i0 - 1; i <= i1; ++i)
      for (int64_t t = t0 - 1; t <= t0 + frames; ++t)
        input.push_back(i >= 0 && i < grid_.h && t >= 0 && t < grid_.frames ? x1_.row(t, i) : nullptr);
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t t = t0; t < t0 + frames; ++t) output.push_back(out[(i - i0) * grid_.frames + t]);
    const DepthwiseRows a{dtype_,
                          input.data(),
                          output.data(),
                          rows,
                          frames,
                          grid_.w,
                          c,
                          weights_.position_taps,
                          weights_.position_bias,
                          tuning().staged_channels};
    parallel_for((c + kDepthwiseChunk - 1) / kDepthwiseChunk, [&](int64_t first, int64_t last) {
      kernels().depthwise_rows(a, first * kDepthwiseChunk, std::min(c, last * kDepthwiseChunk));
    });
  }
}

}  // namespace panda
