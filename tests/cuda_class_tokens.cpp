// What the tests call of csrc/cuda/class_tokens.cu, compiled for the CPU by cuda_emulation.h.
#include "cuda/class_tokens.h"

#include "cuda/device.h"

using namespace panda::cuda;

namespace {

ValueWeights value_weights(void* const* t, int heads) { return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], heads}; }

}  // namespace

// tensors: what was pooled of the clips and of the frames, the clips' and the frames' attention, MLP, fusion, y.
extern "C" void run_class_tokens(int dtype, void* const* tensors, float* workspace, int64_t clips, int frames, int c,
                                 int clip_heads, int frame_heads, float eps, bool backwards) {
  // Little memory, so that few rows need more than one filling.
  const panda::emulation::Conditions conditions(backwards, 72 * 1024);
  void *const *mlp = tensors + 16, *const *fusion = mlp + 6;
  class_tokens({Dtype(dtype),
                tensors[0],
                tensors[1],
                value_weights(tensors + 2, clip_heads),
                value_weights(tensors + 9, frame_heads),
                {mlp[0], mlp[1], mlp[2], mlp[3], mlp[4], mlp[5]},
                {fusion[0], fusion[1], fusion[2], fusion[3], fusion[4]},
                tensors[27],
                workspace,
                clips,
                frames,
                c,
                eps},
               nullptr);
}

extern "C" int64_t workspace_of_class_tokens(int64_t clips, int frames, int c) {
  return class_tokens_workspace(clips, frames, c);
}
