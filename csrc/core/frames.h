// Frames on their way to packed tokens: what the tower of clips and that of images have in common.
#pragma once
#include <cstdint>
#include <vector>

#include "bands.h"
#include "patches.h"
#include "window_pool.h"

namespace panda {

struct Frames {
  Dtype dtype;
  Pixels pixels;
  int64_t clips;
  Grid grid;
  const int64_t* corners;  // [clips * frames][4]: row0, row1, col0, col1 in patches, ends exclusive
  void* tokens;            // [total][c]; the first row of each frame is left for its class token
  float* frame_pooled;     // [clips * frames][frame_heads][c]

  char* token(int64_t i, int64_t c) const { return static_cast<char*>(tokens) + i * c * size_of(dtype); }
};

struct FrameWeights {
  WindowPoolWeights windows;
  int64_t window;              // side
  const float* frame_queries;  // [frame_heads][c], FSRA
  int64_t frame_heads;
  const void* split;  // [c]
  float eps;
};

struct Rectangle {
  int64_t row0, col0, rows, cols;  // rows and cols of windows
  int64_t first_token;             // of this frame's packed tokens

  int64_t row_start(int64_t row) const { return first_token + 1 + row * (cols + 1); }
};

std::vector<Rectangle> rectangles(const Frames& frames, int64_t window);

// FSRA's pooling of all frames, once their tokens are there.
void pool_frames(const Frames& frames, const FrameWeights& weights, const std::vector<Rectangle>& all);

}  // namespace panda
