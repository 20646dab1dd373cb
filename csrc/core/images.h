// The tower of images, which have no temporal stages: their tokens are embedded patches E p, so that LSD needs none of
// them. Its products meet the patches, composed with E, and the normalisation the length of R p (docs/numerics.md): 588
// numbers instead of 1024 and a quarter of the embedding, 4.3 million multiply-adds a window instead of 6.6.
#pragma once
#include <cstdint>
#include <vector>

#include "frames.h"

namespace panda {

// Rows of R, an upper triangle, that are packed together, from the first column on in which the first of them is not
// zero.
constexpr int64_t kTriangleRows = 128;

struct ImageWeights {
  const void* embed;                  // packed [c, k]
  std::vector<const void*> triangle;  // packed [rows, k - first column] each, min(c, k) rows in all
};

// weights.windows meets patches: its k is that of the embedding.
void run_images(const Frames& frames, const FrameWeights& weights, const ImageWeights& image_weights);

}  // namespace panda
