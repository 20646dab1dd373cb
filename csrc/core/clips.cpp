#include "clips.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "tuning.h"

namespace panda {

namespace {

int64_t band_rows(const Grid& grid, int64_t window) {
  const int64_t tokens = grid.frames * grid.w, rows = (tuning().band_tokens + tokens - 1) / tokens;
  return std::max<int64_t>({rows, window, 2});  // a band lends the next one its last `window` rows
}

// One clip on its way through the bands.
class Clip {
 public:
  Clip(const Frames& frames, const FrameWeights& weights, const ClipWeights& clip_weights, const Rectangle* rectangles,
       int64_t clip);
  void run(float* pooled);

 private:
  void encode(int64_t i0, int64_t rows);
  void embed(int64_t i0, int64_t rows, char* hidden);
  void pool_clip(int64_t i0, int64_t i1);
  void downsample(int64_t i0, int64_t i1);
  char* x2_row(int64_t frame, int64_t i) const;

  const Frames& frames_;
  const FrameWeights& weights_;
  const ClipWeights& clip_weights_;
  const Rectangle* rectangles_;
  const int64_t clip_, band_, depth_, row_bytes_;
  TwoBands x0_;
  // [kept][frames][w][c]: written a row late, so its rows are not a band's, and kept until they make a window.
  const int64_t kept_;
  Scratch<char> x2_;
  LocalEncoder encoder_;
  const Pool pool_;
  Scratch<float> states_;  // of the clip, then one a row of a band
};

Clip::Clip(const Frames& frames, const FrameWeights& weights, const ClipWeights& clip_weights,
           const Rectangle* rectangles, int64_t clip)
    : frames_(frames),
      weights_(weights),
      clip_weights_(clip_weights),
      rectangles_(rectangles),
      clip_(clip),
      band_(band_rows(frames.grid, weights.window)),
      depth_(padded_k(frames.dtype, 3 * frames.pixels.patch * frames.pixels.patch)),
      row_bytes_(frames.grid.w * weights.windows.c * size_of(frames.dtype)),
      x0_(frames.grid, band_, row_bytes_),
      kept_(band_ + weights.window),
      x2_(kept_ * frames.grid.frames * row_bytes_),
      encoder_(frames.dtype, frames.grid, clip_weights.local, band_),
      pool_{frames.dtype, clip_weights.queries, clip_weights.heads, weights.windows.c, weights.eps},
      states_((band_ + 2) * pool_state_floats(pool_.n, pool_.c)) {}

char* Clip::x2_row(int64_t frame, int64_t i) const {
  return x2_.data() + (i % kept_ * frames_.grid.frames + frame) * row_bytes_;
}

// Patches of the band, and from them its embedding and the first product of LSTE.
void Clip::embed(int64_t i0, int64_t rows, char* hidden) {
  const int64_t w = frames_.grid.w, frames = frames_.grid.frames, tokens = frames * rows * w;
  Scratch<char> patches(tokens * depth_ * size_of(frames_.dtype));
  parallel_for(frames * rows, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const PatchRow to{frames_.dtype, patches.data() + item * w * depth_ * size_of(frames_.dtype), depth_};
      kernels().patch_row(frames_.pixels, clip_ * frames + item / rows, i0 + item % rows, 0, w, to);
    }
  });
  const int64_t k = 3 * frames_.pixels.patch * frames_.pixels.patch, c = weights_.windows.c;
  product(frames_.dtype, {patches.data(), depth_, clip_weights_.embed, k, c, x0_.row(0, i0), c}, tokens);
  const int64_t r = clip_weights_.local.r;
  Gemm squeeze{patches.data(), depth_, clip_weights_.squeeze, k, r, hidden, r};
  squeeze.bias = clip_weights_.squeeze_bias;
  product(frames_.dtype, squeeze, tokens);
}

// The band to what the 3x3x3 convolution meets; what lies between is gone before the windows.
void Clip::encode(int64_t i0, int64_t rows) {
  const Grid& grid = frames_.grid;
  Scratch<char> hidden(grid.frames * rows * grid.w * clip_weights_.local.r * size_of(frames_.dtype));
  embed(i0, rows, hidden.data());
  std::vector<const void*> x0;
  for (int64_t frame = 0; frame < grid.frames; ++frame) x0.push_back(x0_.row(frame, i0));
  encoder_.expand(i0, rows, hidden.data(), x0.data());
}

void Clip::pool_clip(int64_t i0, int64_t i1) {
  const int64_t size = pool_state_floats(pool_.n, pool_.c), frames = frames_.grid.frames;
  const auto state = [&](int64_t k) { return pool_state(states_.data() + k * size, pool_.n); };
  parallel_for(i1 - i0, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels().pool_reset(pool_, state(1 + row));
      for (int64_t frame = 0; frame < frames; ++frame)
        kernels().pool_tokens(pool_, state(1 + row), x2_row(frame, i0 + row), frames_.grid.w);
    }
  });
  for (int64_t row = 0; row < i1 - i0; ++row) kernels().pool_merge(pool_, state(0), state(1 + row));
}

// The windows whose last row is among [i0, i1): those complete since the band before.
void Clip::downsample(int64_t i0, int64_t i1) {
  const int64_t s = weights_.window, token = weights_.windows.c * size_of(frames_.dtype);
  std::vector<const void*> tokens, added;
  std::vector<void*> out;
  for (int64_t frame = 0; frame < frames_.grid.frames; ++frame) {
    const Rectangle& r = rectangles_[clip_ * frames_.grid.frames + frame];
    for (int64_t row = 0; row < r.rows; ++row) {
      const int64_t top = r.row0 + row * s;
      if (top + s <= i0 || top + s > i1) continue;
      for (int64_t col = 0; col < r.cols; ++col) {
        for (int64_t j = 0; j < s * s; ++j) {
          const int64_t i = top + j / s, offset = (r.col0 + col * s + j % s) * token;
          tokens.push_back(x2_row(frame, i) + offset);
          added.push_back(x0_.row(frame, i) + offset);
        }
        out.push_back(frames_.token(r.row_start(row) + col, weights_.windows.c));
      }
      std::memcpy(frames_.token(r.row_start(row) + r.cols, weights_.windows.c), weights_.split, token);
    }
  }
  pool_windows({frames_.dtype, tokens.data(), added.data(), int64_t(out.size())}, weights_.windows, out.data());
}

void Clip::run(float* pooled) {
  const Grid& grid = frames_.grid;
  kernels().pool_reset(pool_, pool_state(states_.data(), pool_.n));
  int64_t done = 0;  // rows whose x3 exists
  for (int64_t i0 = 0; i0 < grid.h; i0 += band_) {
    const int64_t rows = std::min(band_, grid.h - i0);
    encode(i0, rows);
    const int64_t ready = encoder_.ready(i0 + rows);
    std::vector<void*> x2;
    for (int64_t i = done; i < ready; ++i)
      for (int64_t frame = 0; frame < grid.frames; ++frame) x2.push_back(x2_row(frame, i));
    encoder_.convolve(done, ready, x2.data());
    pool_clip(done, ready);
    downsample(done, ready);
    done = ready;
  }
  kernels().pool_finish(pool_, pool_state(states_.data(), pool_.n), pooled);
}

}  // namespace

void run_clips(const Frames& frames, const FrameWeights& weights, const ClipWeights& clip_weights, float* pooled) {
  const std::vector<Rectangle> all = rectangles(frames, weights.window);
  for (int64_t clip = 0; clip < frames.clips; ++clip)
    Clip(frames, weights, clip_weights, all.data(), clip).run(pooled + clip * clip_weights.heads * weights.windows.c);
  pool_frames(frames, weights, all);
}

}  // namespace panda
