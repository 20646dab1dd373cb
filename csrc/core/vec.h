// Vectors of float for the kernels of one SIMD tier: `vf`, kLanes wide, with unaligned loads and stores of float and
// bfloat16. Before including it a file defines PANDA_TIER as its tier's name and is compiled with that tier's flags.
// Everything has internal linkage: a file of one tier can never be handed code compiled for another.
#pragma once
#ifndef PANDA_TIER
#error "define PANDA_TIER (portable, avx2, avx512, avx512_bf16 or amx) before including vec.h"
#endif
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif
#include "types.h"

#define PANDA_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

namespace panda::PANDA_TIER {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

PANDA_INLINE vf splat(float x) { return x - vf{}; }  // not vf{} + x, which would lose the sign of -0

PANDA_INLINE vf bits_to_float(vu u) {
  vf v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

PANDA_INLINE vu float_to_bits(vf v) {
  vu u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}

// GCC splits __builtin_convertvector in two and joins the halves again; hence the intrinsics here and in narrow(). Of
// each, the zero-masked form with a full mask: the same instruction, and GCC 12 warns about its own header for the
// other.
PANDA_INLINE vf widen(vh h) {
#if defined(__AVX512F__)
  return bits_to_float((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
#elif defined(__AVX2__)
  return bits_to_float((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return bits_to_float(__builtin_convertvector(h, vu) << 16);
#endif
}

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN. The instruction flushes subnormals to zero.
PANDA_INLINE vh narrow(vf v) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu u = float_to_bits(v);
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const vu nan = u | 0x400000u;
  const vu kept = v == v ? rounded : nan;
#if defined(__AVX512F__)
  return (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(kept >> 16));
#else
  return __builtin_convertvector(kept >> 16, vh);
#endif
#endif
}

PANDA_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

PANDA_INLINE vf load(const bfloat16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}

PANDA_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

PANDA_INLINE void store(bfloat16* p, vf v) {
  const vh h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

PANDA_INLINE float to_float(float x) { return x; }

PANDA_INLINE float to_float(bfloat16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// load_n, store_n: the first n elements, 0 <= n < kLanes; nothing beyond them is touched, missing lanes load as zero.
#if defined(__AVX512F__)
PANDA_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }
PANDA_INLINE vf load_n(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(first(n), p); }
PANDA_INLINE vf load_n(const bfloat16* p, int n) { return widen((vh)_mm256_maskz_loadu_epi16(first(n), p)); }
PANDA_INLINE void store_n(float* p, int n, vf v) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
PANDA_INLINE void store_n(bfloat16* p, int n, vf v) { _mm256_mask_storeu_epi16(p, first(n), (__m256i)narrow(v)); }
#else
#if defined(__AVX2__)
PANDA_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PANDA_INLINE vf load_n(const float* p, int n) { return (vf)_mm256_maskload_ps(p, first(n)); }
PANDA_INLINE void store_n(float* p, int n, vf v) { _mm256_maskstore_ps(p, first(n), (__m256)v); }
#else
PANDA_INLINE vf load_n(const float* p, int n) {
  vf v{};
  for (int i = 0; i < kLanes; ++i)
    if (i < n) v[i] = p[i];
  return v;
}
PANDA_INLINE void store_n(float* p, int n, vf v) {
  for (int i = 0; i < kLanes; ++i)
    if (i < n) p[i] = v[i];
}
#endif
PANDA_INLINE vf load_n(const bfloat16* p, int n) {
  vh h{};
  for (int i = 0; i < kLanes; ++i)
    if (i < n) h[i] = p[i].bits;
  return widen(h);
}
PANDA_INLINE void store_n(bfloat16* p, int n, vf v) {
  const vh h = narrow(v);
  for (int i = 0; i < kLanes; ++i)
    if (i < n) p[i].bits = h[i];
}
#endif

// a * b + c, rounded once wherever the tier has the instruction. Written out because the core is compiled with
// -ffp-contract=off: whether a sum is fused must not depend on how the compiler unrolled the loop around it.
PANDA_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

PANDA_INLINE vf sqrt(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

PANDA_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
PANDA_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

typedef float v4f __attribute__((vector_size(16)));

// The four lanes that remain when the vector is halved until it is four wide.
template <class Op>
PANDA_INLINE v4f fold_to_four(vf v, Op op) {
#if defined(__AVX512F__)
  typedef float v8f __attribute__((vector_size(32)));
  const v8f w =
      op((v8f)_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0), (v8f)_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
  return op((v4f)_mm256_castps256_ps128((__m256)w), (v4f)_mm256_extractf128_ps((__m256)w, 1));
#elif defined(__AVX2__)
  return op((v4f)_mm256_castps256_ps128((__m256)v), (v4f)_mm256_extractf128_ps((__m256)v, 1));
#else
  (void)op;
  return v;
#endif
}

PANDA_INLINE float hsum(vf v) {
  const v4f q = fold_to_four(v, [](auto a, auto b) { return a + b; });
  return (q[0] + q[2]) + (q[1] + q[3]);
}

PANDA_INLINE float hmax(vf v) {
  const v4f q = fold_to_four(v, [](auto a, auto b) { return a > b ? a : b; });
  const float even = q[0] > q[2] ? q[0] : q[2], odd = q[1] > q[3] ? q[1] : q[3];
  return even > odd ? even : odd;
}

}  // namespace panda::PANDA_TIER
