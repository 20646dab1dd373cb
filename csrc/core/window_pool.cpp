#include "window_pool.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "scratch.h"
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

namespace {

// One head of windows [first, last): from their queries to the heads' outputs, rows `stride` apart.
void pool_head(Dtype dtype, const WindowPoolWeights& weights, const char* xhat, const KeptWindows& rows, int64_t head,
               int64_t first, int64_t last) {
  const int64_t c = weights.c, stride = padded_k(dtype, c), width = c / weights.heads, size = size_of(dtype);
  Scratch<float> folded((last - first) * c);
  Scratch<char> z((last - first) * stride * size);
  const char* keys = static_cast<const char*>(weights.keys) + head * packed_bytes(dtype, c, width);
  const ProductRows query(dtype, last - first, width);
  Gemm fold{query.get(rows.query + (first * stride + head * width) * size, stride, last - first),
            query.stride(stride),
            keys,
            width,
            c,
            folded.data(),
            c};
  fold.c_is_float = true;
  gemm(dtype, fold, 0, last - first, 0, panels(c));
  kernels().window_attention({dtype, folded.data(), xhat, z.data(), weights.size, c, stride}, first, last);
  const char* values = static_cast<const char*>(weights.values) + head * packed_bytes(dtype, width, c);
  const Gemm project{z.data(), stride, values, c, width, rows.heads + (first * stride + head * width) * size, stride};
  gemm(dtype, project, 0, last - first, 0, panels(width));
}

}  // namespace

void pool_windows(const WindowList& windows, const WindowPoolWeights& weights, void* const* out,
                  const KeptWindows& kept) {
  const int64_t count = windows.count, c = weights.c, stride = padded_k(windows.dtype, c);
  const int64_t size = size_of(windows.dtype), bytes = count * stride * size;
  if (count == 0) return;
  // One piece: smaller ones would be kept for the next call, each for itself, and not lent to the stages before.
  const Scratch<char> memory(count * c * int64_t(sizeof(float)) + (weights.size + (kept.query ? 1 : 3)) * bytes);
  float* mean = reinterpret_cast<float*>(memory.data());
  char *xhat = reinterpret_cast<char*>(mean + count * c), *normalised = xhat + weights.size * bytes;
  const KeptWindows own{normalised + bytes, normalised + 2 * bytes}, rows = kept.query ? kept : own;
  if (stride > c && !kept.query) std::memset(rows.heads, 0, bytes);
  const WindowTokens tokens{windows.dtype, windows.tokens, windows.added, weights.size, c,
                            stride,        weights.eps,    xhat,          mean,         normalised};
  parallel_for(count, [&](int64_t first, int64_t last) { kernels().window_tokens(tokens, first, last); });

  Gemm project{normalised, stride, weights.query, c, c, rows.query, stride};
  project.bias = weights.query_bias;
  product(windows.dtype, project, count);

  const int64_t block = tuning().block_windows, blocks = (count + block - 1) / block;
  parallel_for(weights.heads * blocks, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t window = item / weights.heads * block;  // all heads of a block in turn: its tokens stay cached
      pool_head(windows.dtype, weights, xhat, rows, item % weights.heads, window, std::min(count, window + block));
    }
  });

  char* result = normalised;  // whose product is done
  Gemm join{rows.heads, stride, weights.out, c, c, result, c};
  join.bias = weights.out_bias;
  join.residual = mean;
  join.ldr = c;
  join.residual_is_float = true;
  product(windows.dtype, join, count);
  for (int64_t m = 0; m < count; ++m) std::memcpy(out[m], result + m * c * size, c * size);
}

}  // namespace panda
