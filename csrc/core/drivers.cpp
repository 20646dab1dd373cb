#include "drivers.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "pool_items.h"
#include "product.h"
#include "tuning.h"
#include "weight_gradient.h"

namespace panda {

namespace {

int64_t rows_for(int64_t tokens, int64_t least) {
  return std::max((tuning().band_tokens + tokens - 1) / tokens, least);
}

}  // namespace

void depthwise_conv3d(Depthwise a) {
  a.rows = tuning().stencil_rows;
  a.staged = tuning().staged_channels;
  parallel_for(depthwise_items(a), [&](int64_t first, int64_t last) { kernels().depthwise(a, first, last); });
}

// Threads share the channels, whose sums are whole: nothing is left to add up between them.
void depthwise_gradient(DepthwiseGradient a) {
  a.staged = tuning().staged_channels;
  parallel_for(depthwise_chunks(a.c), [&](int64_t first, int64_t last) {
    kernels().depthwise_gradient(a, first * kDepthwiseChunk, std::min(a.c, last * kDepthwiseChunk));
  });
}

namespace {

// Grid rows [row0, row0 + rows) of all frames as patches.
void extract(Dtype dtype, const Pixels& pixels, int64_t h, int64_t w, int64_t row0, int64_t rows, int64_t stride,
             char* patches) {
  parallel_for(rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      kernels().patch_row(pixels, (row0 + row) / h, (row0 + row) % h, 0, w,
                          {dtype, patches + row * w * stride * size_of(dtype), stride});
  });
}

}  // namespace

void patch_embed(Dtype dtype, const Pixels& pixels, int64_t frames, int64_t h, int64_t w, const void* packed,
                 const float* bias, int64_t c, void* out) {
  const int64_t k = 3 * pixels.patch * pixels.patch, stride = padded_k(dtype, k), size = size_of(dtype);
  const int64_t band = rows_for(w, 1);
  Scratch<char> patches(band * w * stride * size);
  for (int64_t row0 = 0; row0 < frames * h; row0 += band) {
    const int64_t rows = std::min(band, frames * h - row0);
    extract(dtype, pixels, h, w, row0, rows, stride, patches.data());
    Gemm g{patches.data(), stride, packed, k, c, static_cast<char*>(out) + row0 * w * c * size, c};
    g.bias = bias;
    product(dtype, g, rows * w);
  }
}

void patch_embed_gradient(Dtype dtype, const Pixels& pixels, int64_t frames, int64_t h, int64_t w, const void* grad,
                          int64_t c, bool add, float* weight, float* bias) {
  const int64_t k = 3 * pixels.patch * pixels.patch, token = c * size_of(dtype), band = rows_for(w, 1);
  Scratch<char> patches(band * w * k * size_of(dtype));
  for (int64_t row = 0; row < frames * h; row += band) {
    const int64_t rows = std::min(band, frames * h - row);
    extract(dtype, pixels, h, w, row, rows, k, patches.data());
    weight_gradient({dtype, static_cast<const char*>(grad) + row * w * token, c, c, patches.data(), k, k, weight, bias,
                     add || row > 0},
                    rows * w);
  }
}

void local_encoding(Dtype dtype, int64_t clips, Grid grid, const void* x0, const void* squeeze,
                    const float* squeeze_bias, const LocalEncodingWeights& weights, void* out) {
  const int64_t band = rows_for(grid.frames * grid.w, 2), size = size_of(dtype), c = weights.c, r = weights.r;
  const int64_t row = grid.w * c * size;
  LocalEncoder encoder(dtype, grid, weights, band);
  Scratch<char> hidden(grid.frames * band * grid.w * r * size);
  ProductRows input(dtype, band * grid.w, c);
  for (int64_t clip = 0; clip < clips; ++clip) {
    const auto at = [&](int64_t frame, int64_t i) { return ((clip * grid.frames + frame) * grid.h + i) * row; };
    int64_t done = 0;
    for (int64_t i0 = 0; i0 < grid.h; i0 += band) {
      const int64_t rows = std::min(band, grid.h - i0), tokens = rows * grid.w;
      std::vector<const void*> residual;
      for (int64_t frame = 0; frame < grid.frames; ++frame) {
        residual.push_back(static_cast<const char*>(x0) + at(frame, i0));
        char* squeezed = hidden.data() + frame * tokens * r * size;
        Gemm g{input.get(residual.back(), c, tokens), input.stride(c), squeeze, c, r, squeezed, r};
        g.bias = squeeze_bias;
        product(dtype, g, tokens);
      }
      encoder.expand(i0, rows, hidden.data(), residual.data());
      const int64_t ready = encoder.ready(i0 + rows);
      std::vector<void*> to;
      for (int64_t i = done; i < ready; ++i)
        for (int64_t frame = 0; frame < grid.frames; ++frame) to.push_back(static_cast<char*>(out) + at(frame, i));
      encoder.convolve(done, ready, to.data());
      done = ready;
    }
  }
}

void attention_pool(const Pooling& a) {
  const int64_t floats = pool_state_floats(a.n, a.c);
  Scratch<float> states(a.samples * floats);
  const auto total = [&](int64_t sample) { return pool_state(states.data() + sample * floats, a.n); };
  const auto pool = [&](int64_t sample) { return Pool{a.dtype, a.queries + sample * a.query_stride, a.n, a.c, a.eps}; };
  for (int64_t s = 0; s < a.samples; ++s) kernels().pool_reset(pool(s), total(s));
  in_order(
      pool_items(a), floats,
      [&](int64_t, const PoolItem& item, float* partial) {
        const PoolState state = pool_state(partial, a.n);
        kernels().pool_reset(pool(item.sample), state);
        kernels().pool_tokens(pool(item.sample), state,
                              static_cast<const char*>(a.x) + item.first * a.c * size_of(a.dtype), item.count);
      },
      [&](const PoolItem& item, float* partial) {
        kernels().pool_merge(pool(item.sample), total(item.sample), pool_state(partial, a.n));
      });
  for (int64_t s = 0; s < a.samples; ++s) kernels().pool_finish(pool(s), total(s), a.z + s * a.n * a.c);
}

void window_attention_pool(Dtype dtype, const Windows& windows, const WindowPoolWeights& weights, void* y,
                           const KeptWindows& kept) {
  const int64_t token = weights.c * size_of(dtype), size = weights.size;
  const std::vector<int64_t> held = window_tokens_of(windows);
  const int64_t count = int64_t(held.size()) / size;
  const int64_t block = std::min(count, tuning().band_tokens);
  for (int64_t first = 0; first < count; first += block) {
    const int64_t end = std::min(count, first + block);
    const int64_t* here = held.data() + first * size;
    const auto tokens = rows_at(windows.x, here, (end - first) * size, token);
    const auto added = rows_at(windows.added, here, (end - first) * size, token);
    std::vector<void*> out;
    for (int64_t m = first; m < end; ++m) out.push_back(static_cast<char*>(y) + m * token);
    pool_windows({dtype, tokens.data(), windows.added ? added.data() : nullptr, end - first}, weights, out.data(),
                 kept.from(first * padded_k(dtype, weights.c) * size_of(dtype)));
  }
}

namespace {

// frame(token, i) and row(token, first window, windows), in order: where each frame's token, each row of windows and
// the split token behind it lie.
template <class Frame, class Row>
void over_tokens(const int64_t* corners, int64_t frames, int64_t window, const Frame& frame, const Row& row) {
  int64_t token = 0, first = 0;
  for (int64_t i = 0; i < frames; ++i) {
    const int64_t* r = corners + i * 4;
    const int64_t rows = (r[1] - r[0]) / window, cols = (r[3] - r[2]) / window;
    frame(token++, i);
    for (int64_t j = 0; j < rows; ++j, token += cols + 1, first += cols) row(token, first, cols);
  }
}

}  // namespace

void assemble_tokens(Dtype dtype, const void* y, const void* f, const void* split, const int64_t* corners,
                     int64_t frames, int64_t window, int64_t c, void* tokens) {
  const int64_t size = c * size_of(dtype);
  const auto put = [&](int64_t token, const void* from, int64_t i, int64_t count) {
    std::memcpy(static_cast<char*>(tokens) + token * size, static_cast<const char*>(from) + i * size, count * size);
  };
  over_tokens(
      corners, frames, window, [&](int64_t token, int64_t frame) { put(token, f, frame, 1); },
      [&](int64_t token, int64_t first, int64_t cols) {
        put(token, y, first, cols);
        put(token + cols, split, 0, 1);
      });
}

void assemble_tokens_gradient(Dtype dtype, const void* grad, const int64_t* corners, int64_t frames, int64_t window,
                              int64_t c, void* y, void* f, float* split) {
  const int64_t size = c * size_of(dtype);
  const auto get = [&](int64_t token, void* to, int64_t i, int64_t count) {
    std::memcpy(static_cast<char*>(to) + i * size, static_cast<const char*>(grad) + token * size, count * size);
  };
  std::vector<int64_t> ends;
  over_tokens(
      corners, frames, window, [&](int64_t token, int64_t frame) { get(token, f, frame, 1); },
      [&](int64_t token, int64_t first, int64_t cols) {
        get(token, y, first, cols);
        ends.push_back(token + cols);
      });
  kernels().sum_rows({dtype, grad, ends.data(), int64_t(ends.size()), c, split});
}

void linear(const Linear& a) {
  parallel_for(linear_items(a), [&](int64_t first, int64_t last) { kernels().linear(a, first, last); });
}

}  // namespace panda
