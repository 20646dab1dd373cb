#include "frames.h"

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace panda {

std::vector<Rectangle> rectangles(const Frames& frames, int64_t window) {
  std::vector<Rectangle> all;
  int64_t first = 0;
  for (int64_t frame = 0; frame < frames.clips * frames.grid.frames; ++frame) {
    const int64_t* c = frames.corners + frame * 4;
    all.push_back({c[0], c[2], (c[1] - c[0]) / window, (c[3] - c[2]) / window, first});
    first += 1 + all.back().rows * (all.back().cols + 1);
  }
  return all;
}

void pool_frames(const Frames& frames, const FrameWeights& weights, const std::vector<Rectangle>& all) {
  const Pool pool{frames.dtype, weights.frame_queries, weights.frame_heads, weights.windows.c, weights.eps};
  parallel_for(int64_t(all.size()), [&](int64_t first, int64_t last) {
    Scratch<float> memory(pool_state_floats(pool.n, pool.c));
    const PoolState state = pool_state(memory.data(), pool.n);
    for (int64_t frame = first; frame < last; ++frame) {
      kernels().pool_reset(pool, state);
      for (int64_t row = 0; row < all[frame].rows; ++row)
        kernels().pool_tokens(pool, state, frames.token(all[frame].row_start(row), pool.c), all[frame].cols);
      kernels().pool_finish(pool, state, frames.frame_pooled + frame * pool.n * pool.c);
    }
  });
}

}  // namespace panda
