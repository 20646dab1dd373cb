// Channels-last depthwise 3-D convolution, zero padding that keeps the grid.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda {

// `taps` is [kt * kh * kw][c]; a residual is folded into its centre by the caller. `bias` may be null.
struct Depthwise {
  Dtype dtype;
  const void* x;  // [b][t][h][w][c]
  const float* taps;
  const float* bias;
  void* y;
  int64_t b, t, h, w, c;
  int kt, kh, kw;
  int64_t rows = 0, staged = 0;  // from the tuning
};

// 3x3x3 over `rows` output rows of up to four frames: what the op and the streamed tower share.
// input[row * (frames + 2) + f] is the start of a row of w tokens, for `rows + 2` rows and `frames + 2` frames, the
// neighbours on every side included; null where the grid ends. output[row * frames + f] receives the result.
constexpr int kMaxFrames = 4;
struct DepthwiseRows {
  Dtype dtype;
  const void* const* input;
  void* const* output;
  int64_t rows;
  int frames;
  int64_t w, c;
  const float* taps;  // [27][c]
  const float* bias;  // [c] or null
  int64_t staged;     // channels at once
};
constexpr int64_t kDepthwiseChunk = 64;  // channels a work item takes

template <class Op>
inline bool is_333(const Op& a) {
  return a.kt == 3 && a.kh == 3 && a.kw == 3;
}
inline int64_t depthwise_bands(const Depthwise& a) { return (a.h + a.rows - 1) / a.rows; }
inline int64_t depthwise_groups(const Depthwise& a) { return (a.t + kMaxFrames - 1) / kMaxFrames; }
inline int64_t depthwise_chunks(int64_t c) { return (c + kDepthwiseChunk - 1) / kDepthwiseChunk; }
// What a call is cut into; any split of the items among threads gives the same bits.
inline int64_t depthwise_items(const Depthwise& a) {
  return a.b * (is_333(a) ? depthwise_groups(a) * depthwise_bands(a) * depthwise_chunks(a.c) : a.h);
}

// Gradients of the taps and of the bias from that of the result, both of which are written.
struct DepthwiseGradient {
  Dtype dtype;
  const void* x;     // [b][t][h][w][c]
  const void* grad;  // [b][t][h][w][c]
  float* taps;       // [kt * kh * kw][c]
  float* bias;       // [c]
  int64_t b, t, h, w, c;
  int kt, kh, kw;
  int64_t staged = 0;
};

}  // namespace panda
