#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace panda {

namespace {

uint16_t rounded(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return x == x ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t((u | 0x400000u) >> 16);
}

// Columns of W taken at a time, so that a row is read a cache line at a time and what is written stays in the caches.
constexpr int64_t kPackDepth = 32;

// Where element (i, j) of a panel goes: pairs of j side by side for bfloat16.
template <class To>
int64_t packed_index(int64_t i, int64_t j) {
  return sizeof(To) == 4 ? j * kPanel + i : (j / 2 * kPanel + i) * 2 + j % 2;
}

float convert(float x, float*) { return x; }
uint16_t convert(float x, uint16_t*) { return rounded(x); }
uint16_t convert(bfloat16 x, uint16_t*) { return x.bits; }

template <class From, class To>
void pack_panels(const From* w, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k, int64_t depth,
                 To* packed) {
  parallel_for(panels(n), [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      To* to = packed + panel * depth * kPanel;
      for (int64_t j0 = 0; j0 < depth; j0 += kPackDepth)
        for (int64_t i = 0; i < kPanel; ++i) {
          const int64_t row = panel * kPanel + i, end = std::min(j0 + kPackDepth, depth);
          for (int64_t j = j0; j < end; ++j)
            to[packed_index<To>(i, j)] =
                row < n && j < k ? convert(w[row * row_stride + j * column_stride], to) : To(0);
        }
    }
  });
}

}  // namespace

void pack(Dtype to, Dtype from, const void* w, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k,
          void* packed) {
  const int64_t depth = padded_k(to, k);
  if (to == from && column_stride == 1)
    parallel_for(panels(n), [&](int64_t first, int64_t last) {
      kernels().pack_weight({to, w, row_stride, n, k, packed}, first, last);
    });
  else if (to == from && row_stride == 1)
    parallel_for(panels(n), [&](int64_t first, int64_t last) {
      kernels().pack_rows({to, w, column_stride, k, n, packed}, first, last);
    });
  else if (to == Dtype::float32)
    pack_panels(static_cast<const float*>(w), row_stride, column_stride, n, k, depth, static_cast<float*>(packed));
  else if (from == Dtype::float32)
    pack_panels(static_cast<const float*>(w), row_stride, column_stride, n, k, depth, static_cast<uint16_t*>(packed));
  else
    pack_panels(static_cast<const bfloat16*>(w), row_stride, column_stride, n, k, depth,
                static_cast<uint16_t*>(packed));
}

void gemm(Dtype dtype, const Gemm& g, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
  if (dtype == Dtype::float32)
    kernels().gemm_float32(g, row0, row1, panel0, panel1);
  else
    kernels().gemm_bfloat16(g, row0, row1, panel0, panel1);
}

}  // namespace panda
