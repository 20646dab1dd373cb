#include <algorithm>
#include <cmath>
#include <cstring>

#include "drivers.h"
#include "kernels.h"
#include "pool_items.h"

namespace panda {

namespace {

// Of all samples, what PoolGradient asks for, and of each item's tokens the products with its sample's 2n rows.
struct Recomputed {
  Recomputed(const Pooling& a, int64_t items)
      : rows(2 * a.samples * a.n * a.c),
        sums(2 * a.samples * a.n),
        largest(a.samples * a.n),
        weight(a.samples * a.n),
        mean(a.samples * a.n),
        dots(2 * a.n * items * kPoolTokens) {}

  Pool pool(const Pooling& a, int64_t sample) const {
    return {a.dtype, rows.data() + 2 * sample * a.n * a.c, 2 * a.n, a.c, a.eps};
  }
  float* dots_of(const Pooling& a, int64_t item) const { return dots.data() + 2 * a.n * item * kPoolTokens; }

  Scratch<float> rows, sums, largest, weight, mean, dots;
};

// The rows that the tokens of each sample meet.
void collect_rows(const Pooling& a, const float* grad, const Recomputed& r) {
  const int64_t result = a.n * a.c;
  for (int64_t s = 0; s < a.samples; ++s) {
    float* both = r.rows.data() + 2 * s * result;
    std::copy_n(a.queries + s * a.query_stride, result, both);
    std::copy_n(grad + s * result, result, both + result);
    for (int64_t q = 0; q < 2 * a.n; ++q) {
      double sum = 0;
      for (int64_t c = 0; c < a.c; ++c) sum += double(both[q * a.c + c]);
      r.sums.data()[2 * s * a.n + q] = float(sum);
    }
  }
}

// The softmax of query q over the items [first, last) of a sample.
void soften(const Pooling& a, const std::vector<PoolItem>& items, int64_t first, int64_t last, int64_t q,
            const Recomputed& r) {
  float largest = -INFINITY;
  const auto each = [&](const auto& body) {
    for (int64_t i = first; i < last; ++i) {
      const float* logits = r.dots_of(a, i) + q * kPoolTokens;
      for (int64_t j = 0; j < items[i].count; ++j) body(logits[j], logits[a.n * kPoolTokens + j]);
    }
  };
  each([&](float logit, float) { largest = logit > largest ? logit : largest; });
  double sum = 0, mean = 0;
  each([&](float logit, float grad_weight) {
    const double weight = std::exp(logit - largest);
    sum += weight;
    mean += weight * double(grad_weight);
  });
  const int64_t at = items[first].sample * a.n + q;
  r.largest.data()[at] = largest;
  r.weight.data()[at] = float(sum);
  r.mean.data()[at] = float(mean / sum);
}

}  // namespace

void attention_pool_gradient(const Pooling& a, const float* grad, int64_t tokens, void* grad_x, float* grad_queries) {
  const int64_t token = a.c * size_of(a.dtype), result = a.n * a.c;
  const std::vector<PoolItem> items = pool_items(a);
  const int64_t count = int64_t(items.size());
  const Recomputed r(a, count);
  collect_rows(a, grad, r);
  const auto tokens_of = [&](const PoolItem& item) { return static_cast<const char*>(a.x) + item.first * token; };
  parallel_for(count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      kernels().pool_dots(r.pool(a, items[i].sample), tokens_of(items[i]), items[i].count, r.dots_of(a, i));
  });
  std::vector<int64_t> firsts;
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || items[i].sample != items[i - 1].sample) firsts.push_back(i);
  firsts.push_back(count);
  parallel_for((int64_t(firsts.size()) - 1) * a.n, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) soften(a, items, firsts[k / a.n], firsts[k / a.n + 1], k % a.n, r);
  });

  std::fill_n(grad_queries, a.query_stride ? a.samples * result : result, 0.0f);
  const int64_t begin = a.samples ? a.offsets[0] : 0, end = a.samples ? a.offsets[a.samples] : 0;
  std::memset(grad_x, 0, begin * token);
  std::memset(static_cast<char*>(grad_x) + end * token, 0, (tokens - end) * token);
  in_order(
      items, result,
      [&](int64_t i, const PoolItem& item, float* partial) {
        const int64_t at = item.sample * a.n;
        std::fill_n(partial, result, 0.0f);
        kernels().pool_gradient({r.pool(a, item.sample), r.sums.data() + 2 * at, r.largest.data() + at,
                                 r.weight.data() + at, r.mean.data() + at},
                                r.dots_of(a, i), tokens_of(item), item.count,
                                static_cast<char*>(grad_x) + item.first * token, partial);
      },
      [&](const PoolItem& item, const float* partial) {
        float* sum = grad_queries + item.sample * a.query_stride;
        for (int64_t c = 0; c < result; ++c) sum[c] += partial[c];
      });
}

}  // namespace panda
