#include "weight_gradient.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "product.h"

namespace panda {

namespace {

constexpr int64_t kBlock = 1024;  // rows at a time, whose two operands stay in the third-level cache
constexpr int64_t kLine = 64;     // bytes; between turned rows, that they do not fall into one cache set

}  // namespace

void weight_gradient(const WeightGradient& a, int64_t rows) {
  if (rows == 0 && !a.add) {
    std::memset(a.w, 0, a.n * a.k * sizeof(float));
    if (a.b) std::memset(a.b, 0, a.n * sizeof(float));
  }
  const int64_t size = size_of(a.dtype), stride = round_up(std::min(rows, kBlock), 32) + kLine / size;
  Scratch<char> turned(a.n * stride * size), packed(packed_bytes(a.dtype, a.k, std::min(rows, kBlock)));
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t count = std::min(kBlock, rows - row);
    const bool add = a.add || row > 0;
    const TurnedRows turn{a.dtype,
                          static_cast<const char*>(a.grad) + row * a.grad_stride * size,
                          a.grad_stride,
                          count,
                          round_up(count, 32),
                          turned.data(),
                          stride,
                          a.b,
                          add};
    const PackedRows pack{a.dtype,      static_cast<const char*>(a.x) + row * a.x_stride * size, a.x_stride, count, a.k,
                          packed.data()};
    parallel_for(panels(a.n), [&](int64_t first, int64_t last) {
      kernels().turn_rows(turn, first * kPanel, std::min(a.n, last * kPanel));
    });
    parallel_for(panels(a.k), [&](int64_t first, int64_t last) { kernels().pack_rows(pack, first, last); });
    Gemm g{turned.data(), stride, packed.data(), count, a.k, a.w, a.k};
    g.c_is_float = true;
    g.residual = add ? a.w : nullptr;
    g.ldr = a.k;
    g.residual_is_float = true;
    product(a.dtype, g, a.n);
  }
}

}  // namespace panda
