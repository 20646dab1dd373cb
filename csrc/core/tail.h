// Loads and stores of what is left of a row: whole vectors, or the last few elements.
#pragma once
#include <cmath>

#include "vec.h"

namespace panda::PANDA_TIER {

// Bytes, for pixels.
PANDA_INLINE vf load(const uint8_t* p) {
  typedef uint8_t vb __attribute__((vector_size(kLanes)));
  vb bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
}

PANDA_INLINE vf load_n(const uint8_t* p, int n) {
  vf v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

// How many lanes of a vector a row still has: all of them, known when compiling, or fewer.
struct Whole {
  static constexpr int count = kLanes;
};
struct Tail {
  int count;
};

template <class T>
PANDA_INLINE vf load(const T* p, Whole) {
  return load(p);
}
template <class T>
PANDA_INLINE vf load(const T* p, Tail tail) {
  return load_n(p, tail.count);
}
template <class T>
PANDA_INLINE void store(T* p, vf v, Whole) {
  store(p, v);
}
template <class T>
PANDA_INLINE void store(T* p, vf v, Tail tail) {
  store_n(p, tail.count, v);
}

// body(i, lanes) for every vector of a row of c elements, the last one perhaps a tail.
template <class Body>
PANDA_INLINE void over_row(int64_t c, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) body(i, Whole{});
  if (i < c) body(i, Tail{int(c - i)});
}

// exp(x) of a softmax, x <= 0: zero where it would be subnormal, which costs a hundred cycles wherever it is
// multiplied.
PANDA_INLINE float exp_normal(float x) { return x < -87.0f ? 0.0f : std::exp(x); }

// Mean and reciprocal deviation of one token, in two passes as LayerNorm asks for: the variance of what is left
// after the mean, never the difference of two large sums.
struct Moments {
  float mean, rstd;
};

// `v` in the lanes a row has, zero in those it lacks.
PANDA_INLINE vf only(vf v, Whole) { return v; }
PANDA_INLINE vf only(vf v, Tail tail) {
  for (int k = tail.count; k < kLanes; ++k) v[k] = 0.0f;
  return v;
}

// sum = f(i, lanes, sum) over a row, in four chains: one would wait for each addition before it.
template <class F>
PANDA_INLINE float sum_row(int64_t c, const F& f) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= c; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] = f(i + k * kLanes, Whole{}, sums[k]);
  over_row(c - i, [&](int64_t rest, auto lanes) { sums[0] = f(i + rest, lanes, sums[0]); });
  return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
PANDA_INLINE Moments moments(const T* x, int64_t c, float eps) {
  const float mean = sum_row(c, [&](int64_t i, auto lanes, vf sum) { return sum + load(x + i, lanes); }) / float(c);
  const vf centre = splat(mean);
  const float second = sum_row(c, [&](int64_t i, auto lanes, vf sum) {
    const vf d = load(x + i, lanes) - only(centre, lanes);
    return fma(d, d, sum);
  });
  return {mean, 1.0f / __builtin_sqrtf(second / float(c) + eps)};
}

}  // namespace panda::PANDA_TIER
