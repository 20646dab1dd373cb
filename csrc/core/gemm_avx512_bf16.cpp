// bfloat16 product with VDPBF16PS: two products of neighbouring k at a time, accumulated in float32.
#define PANDA_TIER avx512_bf16
#include "gemm_tile.h"

namespace panda::avx512_bf16 {

struct DotPairs {
  PANDA_INLINE vf add(vf a, vf b, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

void gemm_bfloat16(const Gemm& g, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
  const int64_t pairs = padded_k(Dtype::bfloat16, g.k) / 2, row_bytes = 2 * g.lda;
  const int64_t block = smaller(block_rows(4 * pairs, kRows), row1 - row0);
  float* sums = static_cast<float*>(scratch(size_t(4 * kPanel * block)));
  const Finish done = finish_for_bfloat16(g);
  for (int64_t row = row0; row < row1; row += block) {
    const int64_t rows = smaller(row1 - row, block);
    const Operands o{static_cast<const char*>(g.a) + row * row_bytes, row_bytes, static_cast<const uint32_t*>(g.b), pairs};
    for (int64_t panel = panel0; panel < panel1; ++panel)
      multiply_panel<DotPairs>(g, o, done, sums, row, rows, panel, panel);
  }
}

}  // namespace panda::avx512_bf16
