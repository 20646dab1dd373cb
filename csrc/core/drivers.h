// The ops of the CPU backend as whole calls on all threads, each a few lines over the kernels. Arrays are contiguous,
// matrices packed, affines folded; strides that a bfloat16 product asks for are made here.
#pragma once
#include <cstdint>

#include "depthwise.h"
#include "gemm.h"
#include "linear.h"
#include "local_encoding.h"
#include "patches.h"
#include "window_pool.h"

namespace panda {

void depthwise_conv3d(Depthwise);
void depthwise_gradient(DepthwiseGradient);

// pixels -> out [frames][grid.h][grid.w][c]; `packed` is [c, 3 * patch^2], bias [c] or null.
void patch_embed(Dtype, const Pixels&, int64_t frames, int64_t h, int64_t w, const void* packed, const float* bias,
                 int64_t c, void* out);

// The gradients [c][3 * patch^2] of that weight and [c] of that bias, from that of out; with `add` to what they hold.
void patch_embed_gradient(Dtype, const Pixels&, int64_t frames, int64_t h, int64_t w, const void* grad, int64_t c,
                          bool add, float* weight, float* bias);

// x0, out [clips][frames][h][w][c]; `squeeze` packed [r, c].
void local_encoding(Dtype, int64_t clips, Grid, const void* x0, const void* squeeze, const float* squeeze_bias,
                    const LocalEncodingWeights&, void* out);

// Sample s pools tokens [offsets[s], offsets[s + 1]) of x by its n queries, `query_stride` floats apart from sample to
// sample (0: shared); z is [samples][n][c] float.
struct Pooling {
  Dtype dtype;
  const void* x;
  const int64_t* offsets;
  int64_t samples;
  const float* queries;
  int64_t query_stride, n, c;
  float eps;
  float* z;
};
void attention_pool(const Pooling&);

// Gradients of all `tokens` of x, zero where they are in no sample, and of the queries, summed over the samples that
// share them; grad is that of z, which is not written.
void attention_pool_gradient(const Pooling&, const float* grad, int64_t tokens, void* grad_x, float* grad_queries);

// Corners as in tower.h; y [windows][c].
void window_attention_pool(Dtype, const Windows&, const WindowPoolWeights&, void* y, const KeptWindows& kept = {});

// Per frame [f; row of y; split; row of y; split; ...].
void assemble_tokens(Dtype, const void* y, const void* f, const void* split, const int64_t* corners, int64_t frames,
                     int64_t window, int64_t c, void* tokens);

// The gradients of y, f and, summed over all rows of windows, the split token, from that of the tokens.
void assemble_tokens_gradient(Dtype, const void* grad, const int64_t* corners, int64_t frames, int64_t window,
                              int64_t c, void* y, void* f, float* split);

void linear(const Linear&);

// out [rows][n] = gelu(x w1^T + b1) w2^T + b2; w1 packed [hidden, c], w2 packed [n, hidden]. Rows of x that repeat an
// earlier one bit by bit are copied, not computed.
struct TokenMlp {
  Dtype dtype;
  const void* x;
  int64_t rows, c, hidden, n;
  const void* w1;
  const float* b1;
  const void* w2;
  const float* b2;
  void* out;
};
void token_mlp(const TokenMlp&);

}  // namespace panda
