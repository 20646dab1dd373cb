// The whole tower of one call, streamed by bands of patch rows: from pixels to packed tokens, with no intermediate
// larger than a few bands. What it leaves to the caller is the handful of small products after the two global poolings.
#pragma once
#include <cstdint>

#include "local_encoding.h"
#include "patches.h"
#include "pooling.h"
#include "window_pool.h"

namespace panda {

struct TowerWeights {
  const void* embed;    // packed [c, 3 * patch^2]
  const void* squeeze;  // packed [r, 3 * patch^2]: LSTE's first product composed with the embedding; null for images
  const float* squeeze_bias;   // [r]
  LocalEncodingWeights local;  // unused for images
  WindowPoolWeights windows;
  int64_t window;             // side
  const float* clip_queries;  // [clip_heads][c], GSTRA
  int64_t clip_heads;
  const float* frame_queries;  // [frame_heads][c], FSRA
  int64_t frame_heads;
  const void* split;  // [c]
  float eps;
};

struct Tower {
  Dtype dtype;
  Pixels pixels;
  int64_t clips;
  Grid grid;
  const int64_t* corners;  // [clips * frames][4]: row0, row1, col0, col1 in patches, ends exclusive
  void* tokens;            // [total][c]; the first row of each frame is left for its class token
  float* clip_pooled;      // [clips][clip_heads][c]; unused for images
  float* frame_pooled;     // [clips * frames][frame_heads][c]
};

void run_tower(const Tower&, const TowerWeights&);

}  // namespace panda
