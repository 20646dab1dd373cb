// Elementary functions on vectors of float; the polynomials are minimax fits made for these ranges (Lawson iteration
// on Chebyshev nodes against 40-digit values). Included after vec.h.
#pragma once
#include "vec.h"

namespace panda::PANDA_TIER {

// How far a result will be rounded by its store: the `half` polynomials err by 2e-4 of the value, a tenth of what
// rounding to bfloat16 costs, and take half the time.
enum class Precision { full, half };

template <int N>
PANDA_INLINE vf polynomial(vf x, const float (&coefficients)[N]) {
  vf value = splat(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) value = fma(value, x, splat(coefficients[i]));
  return value;
}

// 2^x for x <= 0. Results below 2^-125 are zero, NaN stays NaN.
template <Precision precision = Precision::full>
PANDA_INLINE vf exp2_nonpositive(vf x) {
  constexpr float kLowest = -125.0f;
  constexpr float kFull[] = {1.0f,          6.931472e-01f,  2.4022646e-01f, 5.5503286e-02f,
                             9.618489e-03f, 1.3399931e-03f, 1.5345811e-04f};
  constexpr float kHalf[] = {9.9992806e-01f, 6.9326097e-01f, 2.4261113e-01f, 5.5171665e-02f};
  const vf clamped = x < splat(kLowest) ? splat(kLowest) : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const vf shifted = clamped + magic;
  const vf fraction = clamped - (shifted - magic);
  vf mantissa;
  if constexpr (precision == Precision::full)
    mantissa = polynomial(fraction, kFull);
  else
    mantissa = polynomial(fraction, kHalf);
  const vf scale = bits_to_float((float_to_bits(shifted) + 127u) << 23);
  return x < splat(kLowest) ? vf{} : mantissa * scale;
}

// GELU(x) = x Phi(x), Phi the normal distribution function: the exact (erf) form. Phi(-|x|) is computed as
// 2^-p(|x|), p a polynomial: small values keep their relative accuracy, which 1 + erf(x / sqrt(2)) loses to
// cancellation.
template <Precision precision = Precision::full>
PANDA_INLINE vf gelu_erf(vf x) {
  // Fitted on |x| <= 6 with p(0) = 1; beyond, where Phi(x) < 1e-9, p only has to keep growing, and does.
  constexpr float kFull[] = {1.0f,           1.151104e+00f,   4.5922562e-01f,  5.241249e-02f, -6.874244e-03f,
                             -9.565983e-05f, 3.5257987e-04f,  -1.10438676e-4f, 2.087567e-05f, -2.6559744e-06f,
                             2.2311572e-07f, -1.1214969e-08f, 2.5563043e-10f};
  constexpr float kHalf[] = {1.0f, 1.147635e+00f, 4.6842557e-01f, 4.4962972e-02f, -4.8920005e-03f, 2.310879e-04f};
  const vf magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  vf exponent;
  if constexpr (precision == Precision::full)
    exponent = polynomial(magnitude, kFull);
  else
    exponent = polynomial(magnitude, kHalf);
  const vf tail = exp2_nonpositive<precision>(-exponent);
  return x * (x < vf{} ? tail : splat(1.0f) - tail);
}

}  // namespace panda::PANDA_TIER
