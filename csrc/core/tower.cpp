#include "tower.h"

#include <algorithm>
#include <cstring>
#include <optional>
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

struct Rectangle {
  int64_t row0, col0, rows, cols;  // rows and cols of windows
  int64_t first_token;             // of this frame's packed tokens

  int64_t row_start(int64_t row) const { return first_token + 1 + row * (cols + 1); }
};

std::vector<Rectangle> rectangles(const Tower& tower, int64_t window) {
  std::vector<Rectangle> all;
  int64_t first = 0;
  for (int64_t frame = 0; frame < tower.clips * tower.grid.frames; ++frame) {
    const int64_t* c = tower.corners + frame * 4;
    all.push_back({c[0], c[2], (c[1] - c[0]) / window, (c[3] - c[2]) / window, first});
    first += 1 + all.back().rows * (all.back().cols + 1);
  }
  return all;
}

// One clip on its way through the bands.
class Clip {
 public:
  Clip(const Tower& tower, const TowerWeights& weights, const Rectangle* rectangles, int64_t clip);
  void run();

 private:
  void encode(int64_t i0, int64_t rows);
  void embed(int64_t i0, int64_t rows, char* hidden);
  void pool_clip(int64_t i0, int64_t i1);
  void downsample(int64_t i0, int64_t i1);
  char* x2_row(int64_t frame, int64_t i) const;
  bool video() const { return weights_.squeeze != nullptr; }

  const Tower& tower_;
  const TowerWeights& weights_;
  const Rectangle* rectangles_;
  const int64_t clip_, band_, depth_, row_bytes_;
  TwoBands x0_;
  // [kept][frames][w][c]: written a row late, so its rows are not a band's, and kept until they make a window.
  const int64_t kept_;
  Scratch<char> x2_;
  std::optional<LocalEncoder> encoder_;
  const Pool pool_;
  Scratch<float> states_;  // of the clip, then one a row of a band
};

Clip::Clip(const Tower& tower, const TowerWeights& weights, const Rectangle* rectangles, int64_t clip)
    : tower_(tower),
      weights_(weights),
      rectangles_(rectangles),
      clip_(clip),
      band_(band_rows(tower.grid, weights.window)),
      depth_(padded_k(tower.dtype, 3 * tower.pixels.patch * tower.pixels.patch)),
      row_bytes_(tower.grid.w * weights.windows.c * size_of(tower.dtype)),
      x0_(tower.grid, band_, row_bytes_),
      kept_(band_ + weights.window),
      x2_(weights.squeeze ? kept_ * tower.grid.frames * row_bytes_ : 1),
      pool_{tower.dtype, weights.clip_queries, weights.clip_heads, weights.windows.c, weights.eps},
      states_(weights.squeeze ? (band_ + 2) * pool_state_floats(pool_.n, pool_.c) : 1) {
  if (video()) encoder_.emplace(tower.dtype, tower.grid, weights.local, band_);
}

char* Clip::x2_row(int64_t frame, int64_t i) const {
  return x2_.data() + (i % kept_ * tower_.grid.frames + frame) * row_bytes_;
}

// Patches of the band, and from them its embedding and, for a video, the first product of LSTE.
void Clip::embed(int64_t i0, int64_t rows, char* hidden) {
  const int64_t w = tower_.grid.w, frames = tower_.grid.frames, tokens = frames * rows * w;
  Scratch<char> patches(tokens * depth_ * size_of(tower_.dtype));
  parallel_for(frames * rows, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const PatchRow to{tower_.dtype, patches.data() + item * w * depth_ * size_of(tower_.dtype), depth_};
      kernels().patch_row(tower_.pixels, clip_ * frames + item / rows, i0 + item % rows, w, to);
    }
  });
  const int64_t k = 3 * tower_.pixels.patch * tower_.pixels.patch, c = weights_.windows.c;
  product(tower_.dtype, {patches.data(), depth_, weights_.embed, k, c, x0_.row(0, i0), c}, tokens);
  if (!video()) return;
  const int64_t r = weights_.local.r;
  Gemm squeeze{patches.data(), depth_, weights_.squeeze, k, r, hidden, r};
  squeeze.bias = weights_.squeeze_bias;
  product(tower_.dtype, squeeze, tokens);
}

// The band to what the 3x3x3 convolution meets, or of an image to x0; what lies between is gone before the windows.
void Clip::encode(int64_t i0, int64_t rows) {
  const Grid& grid = tower_.grid;
  Scratch<char> hidden(video() ? grid.frames * rows * grid.w * weights_.local.r * size_of(tower_.dtype) : 1);
  embed(i0, rows, hidden.data());
  if (!video()) return;
  std::vector<const void*> x0;
  for (int64_t frame = 0; frame < grid.frames; ++frame) x0.push_back(x0_.row(frame, i0));
  encoder_->expand(i0, rows, hidden.data(), x0.data());
}

void Clip::pool_clip(int64_t i0, int64_t i1) {
  const int64_t size = pool_state_floats(pool_.n, pool_.c), frames = tower_.grid.frames;
  const auto state = [&](int64_t k) { return pool_state(states_.data() + k * size, pool_.n); };
  parallel_for(i1 - i0, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels().pool_reset(pool_, state(1 + row));
      for (int64_t frame = 0; frame < frames; ++frame)
        kernels().pool_tokens(pool_, state(1 + row), x2_row(frame, i0 + row), tower_.grid.w);
    }
  });
  for (int64_t row = 0; row < i1 - i0; ++row) kernels().pool_merge(pool_, state(0), state(1 + row));
}

// The windows whose last row is among [i0, i1): those complete since the band before.
void Clip::downsample(int64_t i0, int64_t i1) {
  const int64_t s = weights_.window, token = weights_.windows.c * size_of(tower_.dtype);
  std::vector<const void*> tokens, added;
  std::vector<void*> out;
  for (int64_t frame = 0; frame < tower_.grid.frames; ++frame) {
    const Rectangle& r = rectangles_[clip_ * tower_.grid.frames + frame];
    for (int64_t row = 0; row < r.rows; ++row) {
      const int64_t top = r.row0 + row * s;
      if (top + s <= i0 || top + s > i1) continue;
      for (int64_t col = 0; col < r.cols; ++col) {
        for (int64_t j = 0; j < s * s; ++j) {
          const int64_t i = top + j / s, offset = (r.col0 + col * s + j % s) * token;
          tokens.push_back((video() ? x2_row(frame, i) : x0_.row(frame, i)) + offset);
          if (video()) added.push_back(x0_.row(frame, i) + offset);
        }
        out.push_back(static_cast<char*>(tower_.tokens) + (r.row_start(row) + col) * token);
      }
      std::memcpy(static_cast<char*>(tower_.tokens) + (r.row_start(row) + r.cols) * token, weights_.split, token);
    }
  }
  pool_windows({tower_.dtype, tokens.data(), video() ? added.data() : nullptr, int64_t(out.size())}, weights_.windows,
               out.data());
}

void Clip::run() {
  const Grid& grid = tower_.grid;
  if (video()) kernels().pool_reset(pool_, pool_state(states_.data(), pool_.n));
  int64_t done = 0;  // rows whose x3 exists
  for (int64_t i0 = 0; i0 < grid.h; i0 += band_) {
    const int64_t rows = std::min(band_, grid.h - i0);
    encode(i0, rows);
    int64_t ready = i0 + rows;
    if (video()) {
      ready = encoder_->ready(i0 + rows);
      std::vector<void*> x2;
      for (int64_t i = done; i < ready; ++i)
        for (int64_t frame = 0; frame < grid.frames; ++frame) x2.push_back(x2_row(frame, i));
      encoder_->convolve(done, ready, x2.data());
      pool_clip(done, ready);
    }
    downsample(done, ready);
    done = ready;
  }
  if (video())
    kernels().pool_finish(pool_, pool_state(states_.data(), pool_.n), tower_.clip_pooled + clip_ * pool_.n * pool_.c);
}

void pool_frames(const Tower& tower, const TowerWeights& weights, const std::vector<Rectangle>& all) {
  const Pool pool{tower.dtype, weights.frame_queries, weights.frame_heads, weights.windows.c, weights.eps};
  const int64_t token = pool.c * size_of(tower.dtype);
  parallel_for(int64_t(all.size()), [&](int64_t first, int64_t last) {
    Scratch<float> memory(pool_state_floats(pool.n, pool.c));
    const PoolState state = pool_state(memory.data(), pool.n);
    for (int64_t frame = first; frame < last; ++frame) {
      kernels().pool_reset(pool, state);
      for (int64_t row = 0; row < all[frame].rows; ++row)
        kernels().pool_tokens(pool, state, static_cast<char*>(tower.tokens) + all[frame].row_start(row) * token,
                              all[frame].cols);
      kernels().pool_finish(pool, state, tower.frame_pooled + frame * pool.n * pool.c);
    }
  });
}

}  // namespace

void run_tower(const Tower& tower, const TowerWeights& weights) {
  const std::vector<Rectangle> all = rectangles(tower, weights.window);
  for (int64_t clip = 0; clip < tower.clips; ++clip) Clip(tower, weights, all.data(), clip).run();
  pool_frames(tower, weights, all);
}

}  // namespace panda
