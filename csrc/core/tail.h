// Loads and stores of what is left of a row: whole vectors, or the last few elements.
#pragma once
#include "vec.h"

namespace panda::PANDA_TIER {

template <class T>
PANDA_INLINE vf load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, int(n));
}

template <class T>
PANDA_INLINE void store_some(T* p, int64_t n, vf v) {
  if (n >= kLanes)
    store(p, v);
  else
    store_n(p, int(n), v);
}

// Mean and reciprocal deviation of one token, in two passes as LayerNorm asks for: the variance of what is left
// after the mean, never the difference of two large sums.
struct Moments {
  float mean, rstd;
};

template <class T>
PANDA_INLINE Moments moments(const T* x, int64_t c, float eps) {
  vf sum{}, second{};
  for (int64_t i = 0; i < c; i += kLanes) sum += load_some(x + i, c - i);
  const float mean = hsum(sum) / float(c);
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) {
    const vf d = load(x + i) - mean;
    second = fma(d, d, second);
  }
  float variance = hsum(second);
  for (; i < c; ++i) variance += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  return {mean, 1.0f / __builtin_sqrtf(variance / float(c) + eps)};
}

}  // namespace panda::PANDA_TIER
