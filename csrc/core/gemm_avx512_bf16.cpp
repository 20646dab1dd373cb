// bfloat16 product with VDPBF16PS: two products of neighbouring k at a time, accumulated in float32.
#define PANDA_TIER avx512_bf16
#include "gemm_tile.h"

namespace panda::avx512_bf16 {

struct DotPairs {
  PANDA_INLINE vf add(vf a, vf b, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};

void gemm_bfloat16(const Gemm& g, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
  const int64_t pairs = padded_k(Dtype::bfloat16, g.k) / 2;
  multiply_in_place<DotPairs>(g, 2 * g.lda, pairs, finish_for_bfloat16(g), row0, row1, panel0, panel1);
}

}  // namespace panda::avx512_bf16
