// C = epilogue(A W^T) with W, a Linear layer's [n, k] weight, packed once: the product under every kernel of the tower.
// The epilogue adds the bias, applies the activation, adds the residual and stores, in that order.
#pragma once
#include <cstddef>
#include <cstdint>

#include "types.h"

namespace panda {

enum class Activation { none, gelu_erf };

// Packed weights are panels of 32 columns of C, padded with zero columns:
//   float32   [panels][k][32]
//   bfloat16  [panels][kp / 2][32][2], kp being k rounded up to 32, padded with zeros
// The same for every tier, so that set_tier() does not invalidate them. Pointers to them must be 64-byte aligned.
constexpr int64_t kPanel = 32;
constexpr int64_t kFlush = 256;  // float32 sums over k are flushed into a second-level sum this often

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }  // std::min would be shared between tiers
constexpr int64_t panels(int64_t n) { return round_up(n, kPanel) / kPanel; }
constexpr int64_t padded_k(Dtype dtype, int64_t k) { return dtype == Dtype::float32 ? k : round_up(k, 32); }

constexpr int64_t packed_bytes(Dtype dtype, int64_t n, int64_t k) {
  return panels(n) * kPanel * padded_k(dtype, k) * size_of(dtype);
}

// Packs w[i * row_stride + j * column_stride], i < n, j < k (strides in elements; a transposed weight has row_stride
// 1). float32 sources pack to float32 or, rounded to nearest even, to bfloat16; bfloat16 sources to bfloat16 only.
void pack(Dtype to, Dtype from, const void* w, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k,
          void* packed);

// pack() of a weight [n][k] in the type it is to have, its rows contiguous and `stride` elements apart.
struct PackedWeight {
  Dtype dtype;
  const void* w;
  int64_t stride, n, k;
  void* packed;
};

// One product. Strides are in elements. bias is float32 [n] or null, residual [rows, n] or null.
// float32: a, c and residual are float32. bfloat16: a is bfloat16, accumulation float32, c and residual either type;
// rows of a must be readable up to k rounded up to 32 and finite there (the packed weights are zero there).
// c may be the residual itself, but may not overlap a.
struct Gemm {
  const void* a;
  int64_t lda;
  const void* b;  // packed
  int64_t k, n;
  void* c;
  int64_t ldc;
  bool c_is_float = false;
  const float* bias = nullptr;
  Activation activation = Activation::none;
  const void* residual = nullptr;
  int64_t ldr = 0;
  bool residual_is_float = false;
  const int64_t* places = nullptr;  // where not null, row i of the product is row places[i] of c
};

// Computes rows [row0, row1) of column panels [panel0, panel1) in the calling thread. In a given tier every element is
// summed in one order, so that any division of the rows and panels among calls gives the same bits.
void gemm(Dtype dtype, const Gemm& g, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1);

}  // namespace panda
