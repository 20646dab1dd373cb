#include "window_pool_gradient.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "tuning.h"
#include "weight_gradient.h"

namespace panda {

namespace {

constexpr int64_t kChunk = 256;  // windows whose intermediates exist at a time

class ChunkGradient {
 public:
  ChunkGradient(Dtype dtype, const WindowPoolWeights& weights, const WindowPoolReturn& back, int64_t capacity)
      : dtype_(dtype),
        size_(size_of(dtype)),
        c_(weights.c),
        stride_(padded_k(dtype, weights.c)),
        width_(weights.c / weights.heads),
        capacity_(capacity),
        w_(weights),
        back_(back),
        grad_rows_(dtype, capacity, weights.c),
        xhat_(capacity * weights.size * stride_ * size_),
        normalised_(row_bytes()),
        query_(row_bytes()),
        heads_(row_bytes()),
        grad_heads_(row_bytes()),
        grad_query_(row_bytes()),
        pooled_(weights.heads * row_bytes()),
        grad_folded_(weights.heads * row_bytes()),
        mean_(capacity * c_),
        grad_normalised_(capacity * c_),
        grad_xhat_(capacity * weights.size * c_) {
    for (const Scratch<char>* rows : {&query_, &heads_, &grad_heads_, &grad_query_})
      std::memset(rows->data(), 0, row_bytes());
  }

  // grad [count][c]; tokens and added as in WindowTokens, places as in WindowTokensGradient.
  void run(const void* grad, const void* const* tokens, const void* const* added, void* const* places, int64_t count,
           const WindowPoolSums& sums, bool add, const KeptWindows& kept) {
    const KeptWindows rows = kept.query ? kept : KeptWindows{query_.data(), heads_.data()};
    const WindowTokens windows{dtype_,  tokens, added,        w_.size,      c_,
                               stride_, w_.eps, xhat_.data(), mean_.data(), normalised_.data()};
    parallel_for(count, [&](int64_t first, int64_t last) { kernels().window_tokens(windows, first, last); });
    if (!kept.query) multiply(normalised_.data(), w_.query, w_.query_bias, query_.data(), count);
    multiply(grad_rows_.get(grad, c_, count), back_.out, nullptr, grad_heads_.data(), count);
    const int64_t most = tuning().block_windows;
    parallel_for(
        count,
        [&](int64_t first, int64_t last) {
          const int64_t blocks = (last - first + most - 1) / most;
          const auto start = [=](int64_t block) { return first + block * (last - first) / blocks; };
          for (int64_t block = 0; block < blocks; ++block)
            for (int64_t head = 0; head < w_.heads; ++head)
              through_head(rows, !kept.heads, head, start(block), start(block + 1));
        },
        most);
    Gemm g{grad_query_.data(), stride_, back_.query, c_, c_, grad_normalised_.data(), c_};
    g.c_is_float = true;
    product(dtype_, g, count);
    const WindowTokensGradient out{
        dtype_, tokens,  added, grad,  mean_.data(), grad_normalised_.data(), grad_xhat_.data(),
        places, w_.size, c_,    w_.eps};
    parallel_for(count, [&](int64_t first, int64_t last) { kernels().window_tokens_gradient(out, first, last); });
    add_sums(rows, grad, count, sums, add);
  }

 private:
  int64_t row_bytes() const { return capacity_ * stride_ * size_; }

  void multiply(const void* rows, const void* weight, const float* bias, void* to, int64_t count) const {
    Gemm g{rows, stride_, weight, c_, c_, to, stride_};
    g.bias = bias;
    product(dtype_, g, count);
  }

  // Rows from `first` on of a head's slice of channels.
  char* slice(char* rows, int64_t first, int64_t head) const {
    return rows + (first * stride_ + head * width_) * size_;
  }

  // A slice by a packed [c, width]: float [count][c].
  void spread(char* rows, int64_t first, int64_t count, int64_t head, const void* weights, float* to) const {
    const ProductRows input(dtype_, count, width_);
    const char* packed = static_cast<const char*>(weights) + head * packed_bytes(dtype_, c_, width_);
    Gemm g{input.get(slice(rows, first, head), stride_, count), input.stride(stride_), packed, width_, c_, to, c_};
    g.c_is_float = true;
    gemm(dtype_, g, 0, count, 0, panels(c_));
  }

  // Rows of all channels by a packed [width, c], into a slice.
  void gather(const char* rows, int64_t count, int64_t head, const void* weights, char* to, int64_t first) const {
    const char* packed = static_cast<const char*>(weights) + head * packed_bytes(dtype_, width_, c_);
    const Gemm g{rows, stride_, packed, c_, width_, slice(to, first, head), stride_};
    gemm(dtype_, g, 0, count, 0, panels(width_));
  }

  void through_head(const KeptWindows& rows, bool project, int64_t head, int64_t first, int64_t last) const {
    const int64_t count = last - first;
    Scratch<float> folded(count * c_), grad_pooled(count * c_);
    spread(rows.query, first, count, head, w_.keys, folded.data());
    spread(grad_heads_.data(), first, count, head, back_.values, grad_pooled.data());
    char* pooled = pooled_.data() + head * row_bytes() + first * stride_ * size_;
    char* grad_folded = grad_folded_.data() + head * row_bytes() + first * stride_ * size_;
    kernels().window_gradient({dtype_, folded.data(), grad_pooled.data(), xhat_.data(), pooled, grad_folded,
                               grad_xhat_.data(), head > 0, w_.size, c_, stride_},
                              first, last);
    if (project) gather(pooled, count, head, w_.values, rows.heads, first);
    gather(grad_folded, count, head, back_.keys, grad_query_.data(), first);
  }

  void add_sums(const KeptWindows& rows, const void* grad, int64_t count, const WindowPoolSums& sums, bool add) const {
    const auto of = [&](const void* grads, int64_t grad_stride, int64_t n, const char* x, float* w, float* b) {
      weight_gradient({dtype_, grads, grad_stride, n, x, stride_, c_, w, b, add}, count);
    };
    of(grad, c_, c_, rows.heads, sums.out, sums.out_bias);
    of(grad_query_.data(), stride_, c_, normalised_.data(), sums.query, sums.query_bias);
    // One parallel region for all heads; those within it have one thread each.
    parallel_for(2 * w_.heads, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t head = item / 2, at = head * width_;
        if (item % 2)
          of(slice(rows.query, 0, head), stride_, width_, grad_folded_.data() + head * row_bytes(), sums.keys + at * c_,
             nullptr);
        else
          of(slice(grad_heads_.data(), 0, head), stride_, width_, pooled_.data() + head * row_bytes(),
             sums.values + at * c_, sums.values_bias + at);
      }
    });
  }

  Dtype dtype_;
  int64_t size_, c_, stride_, width_, capacity_;
  const WindowPoolWeights& w_;
  const WindowPoolReturn& back_;
  ProductRows grad_rows_;
  Scratch<char> xhat_, normalised_, query_, heads_, grad_heads_, grad_query_;
  Scratch<char> pooled_, grad_folded_;  // [heads][capacity][stride]
  Scratch<float> mean_, grad_normalised_, grad_xhat_;
};

}  // namespace

void window_attention_pool_gradient(Dtype dtype, const void* grad, const Windows& windows,
                                    const WindowPoolWeights& weights, const WindowPoolReturn& back, void* grad_x,
                                    const WindowPoolSums& sums, const KeptWindows& kept) {
  const int64_t token = weights.c * size_of(dtype), frame = windows.h * windows.w * token;
  parallel_for(windows.frames, [&](int64_t first, int64_t last) {
    std::memset(static_cast<char*>(grad_x) + first * frame, 0, (last - first) * frame);
  });
  const std::vector<int64_t> held = window_tokens_of(windows);
  const int64_t size = weights.size, count = int64_t(held.size()) / size;
  ChunkGradient chunk(dtype, weights, back, std::min(count, kChunk));
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t some = std::min(kChunk, count - first), *here = held.data() + first * size;
    const auto tokens = rows_at(windows.x, here, some * size, token);
    const auto added = rows_at(windows.added, here, some * size, token);
    const auto places = rows_at(grad_x, here, some * size, token);
    chunk.run(static_cast<const char*>(grad) + first * token, tokens.data(), windows.added ? added.data() : nullptr,
              places.data(), some, sums, first > 0, kept.from(first * padded_k(dtype, weights.c) * size_of(dtype)));
  }
}

}  // namespace panda
