// Patches of an image as rows of a matrix, pixels cast and uint8 frames normalised on the way.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda {

enum class PixelType { float32, bfloat16, uint8 };

struct Pixels {
  PixelType type;
  const void* data;
  int64_t batch_stride, frame_stride, channel_stride, row_stride, column_stride;  // in elements
  int64_t frames;                                                                 // frames of one clip
  const bool* present;  // [clips * frames] or null: a frame marked false reads as zeros
  int patch;
  float scale[3], shift[3];  // uint8 only: value * scale + shift
};

// `columns` patches from `column` on of grid row `row` of frame `frame`, one patch a row of `out`, [columns][stride]:
// channels, then rows, then columns of the patch, then zeros up to the stride.
struct PatchRow {
  Dtype dtype;
  void* out;
  int64_t stride;
};

}  // namespace panda
