// Rows of one clip of which only the last two bands exist.
#pragma once
#include <algorithm>
#include <cstdint>

#include "scratch.h"

namespace panda {

struct Grid {
  int64_t frames, h, w;
};

// [2][frames][rows of the band][row_bytes]: the frames of a band follow one another, so that a band is one matrix.
class TwoBands {
 public:
  TwoBands(const Grid& grid, int64_t band, int64_t row_bytes)
      : frames_(grid.frames), h_(grid.h), band_(band), row_bytes_(row_bytes), rows_(2 * frames_ * band * row_bytes) {}

  char* row(int64_t frame, int64_t i) const {
    const int64_t rows = std::min(band_, h_ - i / band_ * band_);
    return rows_.data() + (i / band_ % 2 * frames_ * band_ + frame * rows + i % band_) * row_bytes_;
  }

 private:
  int64_t frames_, h_, band_, row_bytes_;
  Scratch<char> rows_;
};

}  // namespace panda
