#include "images.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "scratch.h"
#include "tuning.h"

namespace panda {

namespace {

// Rows of a product that a thread takes: a multiple of the first, and no fewer than the second if it can be, as each
// piece fetches the weight.
constexpr int64_t kRows = 32, kFewestRows = 256;

// Rows of windows of one image: their patches, one row of a window after the other.
class Band {
 public:
  Band(const Frames& frames, const FrameWeights& weights, const ImageWeights& image_weights, const Rectangle& rectangle,
       int64_t frame, int64_t most)
      : frames_(frames),
        weights_(weights),
        image_weights_(image_weights),
        rectangle_(rectangle),
        frame_(frame),
        across_(rectangle.cols * weights.window),
        stride_(padded_k(frames.dtype, weights.windows.k)),
        rank_(std::min(weights.windows.c, weights.windows.k)),
        row_bytes_(stride_ * size_of(frames.dtype)),
        patches_(most * weights.window * across_ * row_bytes_),
        coordinates_(most * weights.window * across_ * rank_) {}

  void run(int64_t row, int64_t rows);

 private:
  void extract(int64_t row, int64_t rows);
  void turn(int64_t tokens);
  std::vector<int64_t> places(int64_t rows) const;
  std::vector<void*> results(int64_t row, int64_t rows) const;

  const Frames& frames_;
  const FrameWeights& weights_;
  const ImageWeights& image_weights_;
  const Rectangle& rectangle_;
  const int64_t frame_, across_, stride_, rank_, row_bytes_;
  Scratch<char> patches_;
  Scratch<float> coordinates_;
};

void Band::extract(int64_t row, int64_t rows) {
  const int64_t s = weights_.window;
  parallel_for(rows * s, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      kernels().patch_row(frames_.pixels, frame_, rectangle_.row0 + row * s + i, rectangle_.col0, across_,
                          {frames_.dtype, patches_.data() + i * across_ * row_bytes_, stride_});
  });
}

// Products with R, whose triangle is cut into steps.
void Band::turn(int64_t tokens) {
  const int64_t k = weights_.windows.k;
  parallel_for((tokens + kRows - 1) / kRows,
               [&](int64_t first, int64_t last) {
                 for (int64_t i = 0; i < int64_t(image_weights_.triangle.size()); ++i) {
                   const int64_t begin = i * kTriangleRows, n = std::min(kTriangleRows, rank_ - begin);
                   Gemm g{patches_.data() + begin * size_of(frames_.dtype),
                          stride_,
                          image_weights_.triangle[i],
                          k - begin,
                          n,
                          coordinates_.data() + begin,
                          rank_};
                   g.c_is_float = true;
                   gemm(frames_.dtype, g, first * kRows, std::min(tokens, last * kRows), 0, panels(n));
                 }
               },
               kFewestRows / kRows);
}

std::vector<int64_t> Band::places(int64_t rows) const {
  const int64_t s = weights_.window;
  std::vector<int64_t> all;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < rectangle_.cols; ++col)
      for (int64_t j = 0; j < s * s; ++j) all.push_back((row * s + j / s) * across_ + col * s + j % s);
  return all;
}

std::vector<void*> Band::results(int64_t row, int64_t rows) const {
  std::vector<void*> all;
  for (int64_t i = row; i < row + rows; ++i)
    for (int64_t col = 0; col < rectangle_.cols; ++col)
      all.push_back(frames_.token(rectangle_.row_start(i) + col, weights_.windows.c));
  return all;
}

void Band::run(int64_t row, int64_t rows) {
  const WindowPoolWeights& w = weights_.windows;
  const int64_t count = rows * rectangle_.cols, bytes = count * row_bytes_;
  extract(row, rows);
  turn(count * w.size);
  const Scratch<char> memory((w.size + 2) * bytes);
  char *xhat = memory.data(), *mean = xhat + w.size * bytes, *query = mean + bytes;
  const std::vector<int64_t> places = this->places(rows);
  const PatchWindows windows{frames_.dtype,
                             patches_.data(),
                             coordinates_.data(),
                             places.data(),
                             w.size,
                             w.k,
                             stride_,
                             rank_,
                             w.c,
                             weights_.eps,
                             xhat,
                             mean,
                             query};
  parallel_for(count, [&](int64_t first, int64_t last) { kernels().patch_windows(windows, first, last); });
  const Scratch<float> embedded(count * w.c);
  Gemm embed{mean, stride_, image_weights_.embed, w.k, w.c, embedded.data(), w.c};
  embed.c_is_float = true;
  product(frames_.dtype, embed, count);
  attend_windows({frames_.dtype, count, xhat, query, embedded.data()}, w, results(row, rows).data());
  for (int64_t i = row; i < row + rows; ++i)
    std::memcpy(frames_.token(rectangle_.row_start(i) + rectangle_.cols, w.c), weights_.split,
                w.c * size_of(frames_.dtype));
}

}  // namespace

void run_images(const Frames& frames, const FrameWeights& weights, const ImageWeights& image_weights) {
  const std::vector<Rectangle> all = rectangles(frames, weights.window);
  for (int64_t frame = 0; frame < int64_t(all.size()); ++frame) {
    const Rectangle& r = all[frame];
    const int64_t tokens = weights.windows.size * r.cols, band = (tuning().band_tokens + tokens - 1) / tokens;
    Band image(frames, weights, image_weights, r, frame, std::min(band, r.rows));
    for (int64_t row = 0; row < r.rows; row += band) image.run(row, std::min(band, r.rows - row));
  }
  pool_frames(frames, weights, all);
}

}  // namespace panda
