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
void pool_head(const NormalisedWindows& a, const WindowPoolWeights& weights, const KeptWindows& rows, int64_t stride,
               int64_t head, int64_t first, int64_t last) {
  const int64_t k = weights.k, depth = padded_k(a.dtype, k), width = weights.c / weights.heads, size = size_of(a.dtype);
  Scratch<float> folded((last - first) * k);
  Scratch<char> z((last - first) * depth * size);
  const char* keys = static_cast<const char*>(weights.keys) + head * packed_bytes(a.dtype, k, width);
  const ProductRows query(a.dtype, last - first, width);
  Gemm fold{query.get(rows.query + (first * stride + head * width) * size, stride, last - first),
            query.stride(stride),
            keys,
            width,
            k,
            folded.data(),
            k};
  fold.c_is_float = true;
  gemm(a.dtype, fold, 0, last - first, 0, panels(k));
  kernels().window_attention({a.dtype, folded.data(), a.xhat, z.data(), weights.size, k, depth}, first, last);
  const char* values = static_cast<const char*>(weights.values) + head * packed_bytes(a.dtype, width, k);
  const Gemm project{z.data(), depth, values, k, width, rows.heads + (first * stride + head * width) * size, stride};
  gemm(a.dtype, project, 0, last - first, 0, panels(width));
}

}  // namespace

void attend_windows(const NormalisedWindows& a, const WindowPoolWeights& weights, void* const* out,
                    const KeptWindows& kept) {
  const int64_t count = a.count, c = weights.c, stride = padded_k(a.dtype, c), size = size_of(a.dtype);
  const Scratch<char> memory((kept.query ? 1 : 2) * count * stride * size);
  const KeptWindows rows = kept.query ? kept : KeptWindows{memory.data(), memory.data() + count * stride * size};
  if (stride > c && !kept.query) std::memset(rows.heads, 0, count * stride * size);

  Gemm project{a.query, padded_k(a.dtype, weights.k), weights.query, weights.k, c, rows.query, stride};
  project.bias = weights.query_bias;
  product(a.dtype, project, count);

  const int64_t block = tuning().block_windows, blocks = (count + block - 1) / block;
  parallel_for(weights.heads * blocks, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t window = item / weights.heads * block;  // all heads of a block in turn: its tokens stay cached
      pool_head(a, weights, rows, stride, item % weights.heads, window, std::min(count, window + block));
    }
  });

  char* result = memory.data();  // in place of queries that nobody keeps
  Gemm join{rows.heads, stride, weights.out, c, c, result, c};
  join.bias = weights.out_bias;
  join.residual = a.mean;
  join.ldr = c;
  join.residual_is_float = true;
  product(a.dtype, join, count);
  for (int64_t m = 0; m < count; ++m) std::memcpy(out[m], result + m * c * size, c * size);
}

void pool_windows(const WindowList& windows, const WindowPoolWeights& weights, void* const* out,
                  const KeptWindows& kept) {
  const int64_t count = windows.count, c = weights.c, stride = padded_k(windows.dtype, c);
  const int64_t bytes = count * stride * size_of(windows.dtype);
  if (count == 0) return;
  // One piece: smaller ones would be kept for the next call, each for itself, and not lent to the stages before.
  const Scratch<char> memory(count * c * int64_t(sizeof(float)) + (weights.size + 1) * bytes);
  float* mean = reinterpret_cast<float*>(memory.data());
  char *xhat = reinterpret_cast<char*>(mean + count * c), *normalised = xhat + weights.size * bytes;
  const WindowTokens tokens{windows.dtype, windows.tokens, windows.added, weights.size, c,
                            stride,        weights.eps,    xhat,          mean,         normalised};
  parallel_for(count, [&](int64_t first, int64_t last) { kernels().window_tokens(tokens, first, last); });
  attend_windows({windows.dtype, count, xhat, normalised, mean}, weights, out, kept);
}

}  // namespace panda
