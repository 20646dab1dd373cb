#include "window_pool.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "tuning.h"

namespace panda {

std::vector<int64_t> window_tokens_of(const Windows& a) {
  std::vector<int64_t> tokens;
  for (int64_t frame = 0; frame < a.frames; ++frame) {
    const int64_t* c = a.corners + frame * 4;
    for (int64_t i = c[0]; i + a.window <= c[1]; i += a.window)
      for (int64_t j = c[2]; j + a.window <= c[3]; j += a.window)
        for (int64_t k = 0; k < a.window * a.window; ++k)
          tokens.push_back((frame * a.h + i + k / a.window) * a.w + j + k % a.window);
  }
  return tokens;
}

WindowPool::WindowPool(Dtype dtype, const WindowPoolWeights& weights, int64_t capacity)
    : dtype_(dtype),
      weights_(weights),
      stride_(padded_k(dtype, weights.c)),
      block_(tuning().block_windows),
      xhat_(capacity * weights.size * stride_ * size_of(dtype)),
      mean_(capacity * weights.c * int64_t(sizeof(float))),
      normalised_(capacity * stride_ * size_of(dtype)),
      query_(capacity * stride_ * size_of(dtype)),
      pooled_(capacity * stride_ * size_of(dtype)),
      result_(capacity * weights.c * size_of(dtype)) {
  std::memset(pooled_.data(), 0, capacity * stride_ * size_of(dtype));
}

void WindowPool::head(const KeptWindows& rows, int64_t head, int64_t first, int64_t last) {
  const int64_t c = weights_.c, width = c / weights_.heads, size = size_of(dtype_);
  Scratch<float> folded((last - first) * c);
  Scratch<char> z((last - first) * stride_ * size);
  const char* keys = static_cast<const char*>(weights_.keys) + head * packed_bytes(dtype_, c, width);
  const ProductRows query(dtype_, last - first, width);
  Gemm fold{query.get(rows.query + (first * stride_ + head * width) * size, stride_, last - first),
            query.stride(stride_),
            keys,
            width,
            c,
            folded.data(),
            c};
  fold.c_is_float = true;
  gemm(dtype_, fold, 0, last - first, 0, panels(c));
  const WindowAttention attention{dtype_, folded.data(), xhat_.data(), z.data(), weights_.size, c, stride_};
  kernels().window_attention(attention, first, last);
  const char* values = static_cast<const char*>(weights_.values) + head * packed_bytes(dtype_, width, c);
  const Gemm project{z.data(), stride_, values, c, width, rows.heads + (first * stride_ + head * width) * size,
                     stride_};
  gemm(dtype_, project, 0, last - first, 0, panels(width));
}

void WindowPool::run(const void* const* tokens, const void* const* added, int64_t count, void* const* out,
                     const KeptWindows& kept) {
  if (count == 0) return;
  const KeptWindows rows = kept.query ? kept : KeptWindows{query_.data(), pooled_.data()};
  const int64_t c = weights_.c, row = c * size_of(dtype_);
  const WindowTokens windows{dtype_,
                             tokens,
                             added,
                             weights_.size,
                             c,
                             stride_,
                             weights_.eps,
                             xhat_.data(),
                             reinterpret_cast<float*>(mean_.data()),
                             normalised_.data()};
  parallel_for(count, [&](int64_t first, int64_t last) { kernels().window_tokens(windows, first, last); });

  Gemm query{normalised_.data(), stride_, weights_.query, c, c, rows.query, stride_};
  query.bias = weights_.query_bias;
  product(dtype_, query, count);

  const int64_t blocks = (count + block_ - 1) / block_;
  parallel_for(weights_.heads * blocks, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t window = item / weights_.heads * block_;  // all heads of a block in turn: its tokens stay cached
      head(rows, item % weights_.heads, window, std::min(count, window + block_));
    }
  });

  Gemm project{rows.heads, stride_, weights_.out, c, c, result_.data(), c};
  project.bias = weights_.out_bias;
  project.residual = mean_.data();
  project.ldr = c;
  project.residual_is_float = true;
  product(dtype_, project, count);
  for (int64_t m = 0; m < count; ++m) std::memcpy(out[m], result_.data() + m * row, row);
}

}  // namespace panda
