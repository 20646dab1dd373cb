// The whole tower of clips in one call, streamed by bands of patch rows: from pixels to packed tokens, with no
// intermediate larger than a few bands. What it leaves to the caller is the handful of small products after the two
// global poolings.
#pragma once
#include <cstdint>

#include "frames.h"
#include "local_encoding.h"

namespace panda {

struct ClipWeights {
  const void* embed;          // packed [c, 3 * patch^2]
  const void* squeeze;        // packed [r, 3 * patch^2]: LSTE's first product composed with the embedding
  const float* squeeze_bias;  // [r]
  LocalEncodingWeights local;
  const float* queries;  // [heads][c], GSTRA
  int64_t heads;
};

// pooled: [clips][heads][c].
void run_clips(const Frames& frames, const FrameWeights& weights, const ClipWeights& clip_weights, float* pooled);

}  // namespace panda
