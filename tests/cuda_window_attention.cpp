// What the tests call of csrc/cuda/window_attention_pool.cu, compiled for the CPU by cuda_emulation.h.
#include "cuda/window_attention_pool.h"

#include "cuda/device.h"

extern "C" int attend(int dtype, const void* x, const int64_t* places, const float* norms, const void* q,
                      const void* norm_weight, const void* norm_bias, const void* wkv, void* out, int64_t windows,
                      int w, int c, int heads, float scale, int backwards, int shared_memory) {
  const panda::emulation::Conditions conditions(backwards, shared_memory);
  return panda::cuda::attend(
      {panda::cuda::Dtype(dtype), x, places, norms, q, norm_weight, norm_bias, wkv, out, windows, w, c, heads, scale},
      nullptr);
}
