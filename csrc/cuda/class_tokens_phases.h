// What the phases of class_tokens.cu compute: a few products each, that need nothing of one another.
#pragma once
#include "class_tokens.h"
#include "device.h"

namespace panda::cuda::tail {

constexpr int EXPANSION = 4;           // of the MLP
constexpr int WARPS = 8, COLUMNS = 2;  // of a block; that a warp takes together

enum Phase { VALUES, OUTPUTS, HIDDEN, MLP_OUTPUT, FUSION, PHASES };

__device__ __forceinline__ int phases(const ClassTokens& p) { return p.frames > 1 ? PHASES : HIDDEN; }

// y = x w^T of a few rows x, and what comes before and after it.
template <class T>
struct Product {
  const T* w;  // [columns, k]
  int columns, k, rows;
  // x: an affine of pooled tokens; or `from`; or, if there is a balance, a mix of `from` of the clip and `frame` of the
  // frame. The last two are normalised if there is a norm.
  const T* pooled;
  int64_t pooled_stride;
  const float *from, *frame;
  const T* balance;
  const T *norm_weight, *norm_bias;
  // y: bias and query are added where they are not null; then QuickGELU, or what `to` holds is added.
  const T *bias, *query;
  bool quick_gelu, residual;
  float* to;  // or `out`
  T* out;
  int stride;
};

// The float32 intermediates.
struct Workspace {
  float *clip_values, *frame_values, *clip, *frame, *hidden;

  __device__ __forceinline__ explicit Workspace(const ClassTokens& p) {
    const int64_t clips = p.clips * p.c, frames = clips * p.frames;
    frame_values = p.workspace;
    frame = frame_values + frames;
    clip_values = frame + frames;
    clip = clip_values + clips;
    hidden = clip + clips;
  }
};

template <class T>
__device__ __forceinline__ const T* typed(const void* pointer) {
  return static_cast<const T*>(pointer);
}

__device__ __forceinline__ int products(const ClassTokens& p, int phase) {
  const bool temporal = p.frames > 1;
  if (phase == VALUES) return p.frame.heads + (temporal ? p.clip.heads : 0);
  return phase == OUTPUTS && temporal ? 2 : 1;
}

// One head's values.
template <class T>
__device__ __forceinline__ void set_values(Product<T>& product, const ClassTokens& p, const ValueWeights& w,
                                           const void* pooled, float* to, int head) {
  const int width = p.c / w.heads, first = head * width;
  product.w = typed<T>(w.wv) + int64_t(first) * p.c;
  product.columns = width;
  product.pooled = typed<T>(pooled) + int64_t(head) * p.c;
  product.pooled_stride = int64_t(w.heads) * p.c;
  product.norm_weight = typed<T>(w.norm_weight);
  product.norm_bias = typed<T>(w.norm_bias);
  product.bias = w.bv ? typed<T>(w.bv) + first : nullptr;
  product.to = to + first;
}

template <class T>
__device__ __forceinline__ void set_output(Product<T>& product, const ValueWeights& w, const float* from, float* to) {
  product.w = typed<T>(w.wp);
  product.from = from;
  product.bias = typed<T>(w.bp);
  product.query = typed<T>(w.query);
  product.to = to;
}

template <class T>
__device__ __forceinline__ Product<T> describe(const ClassTokens& p, int phase, int index) {
  const Workspace workspace(p);
  Product<T> product{};
  product.columns = product.k = product.stride = p.c;
  const bool of_frames = phase == FUSION || (phase == VALUES && index < p.frame.heads) || (phase == OUTPUTS && !index);
  product.rows = int(p.clips) * (of_frames ? p.frames : 1);
  if (phase == VALUES && of_frames) {
    set_values(product, p, p.frame, p.frame_pooled, workspace.frame_values, index);
  } else if (phase == VALUES) {
    set_values(product, p, p.clip, p.clip_pooled, workspace.clip_values, index - p.frame.heads);
  } else if (phase == OUTPUTS && of_frames) {
    set_output(product, p.frame, workspace.frame_values, workspace.frame);
    if (p.frames == 1) product.out = static_cast<T*>(p.y);
  } else if (phase == OUTPUTS) {
    set_output(product, p.clip, workspace.clip_values, workspace.clip);
  } else if (phase == HIDDEN) {
    product.w = typed<T>(p.mlp.w1);
    product.columns = product.stride = EXPANSION * p.c;
    product.from = workspace.clip;
    product.norm_weight = typed<T>(p.mlp.norm_weight);
    product.norm_bias = typed<T>(p.mlp.norm_bias);
    product.bias = typed<T>(p.mlp.b1);
    product.quick_gelu = true;
    product.to = workspace.hidden;
  } else if (phase == MLP_OUTPUT) {
    product.w = typed<T>(p.mlp.w2);
    product.k = EXPANSION * p.c;
    product.from = workspace.hidden;
    product.bias = typed<T>(p.mlp.b2);
    product.residual = true;
    product.to = workspace.clip;
  } else {
    product.w = typed<T>(p.fusion.w);
    product.from = workspace.clip;
    product.frame = workspace.frame;
    product.balance = typed<T>(p.fusion.balance);
    product.norm_weight = typed<T>(p.fusion.norm_weight);
    product.norm_bias = typed<T>(p.fusion.norm_bias);
    product.bias = typed<T>(p.fusion.b);
    product.out = static_cast<T*>(p.y);
  }
  return product;
}

__device__ __forceinline__ int units(int columns) { return (columns + COLUMNS - 1) / COLUMNS; }

// What a block has to do of a product, in units of COLUMNS columns, and which of these a warp begins with. A phase's
// units lie one after another, an equal part for each block, so that a block meets few heads.
struct Share {
  int begin, end, first;

  __device__ __forceinline__ Share(const ClassTokens& p, int phase, int index, int columns) {
    const int whole = units(p.c), block = int(blockIdx.x), blocks = int(gridDim.x), warp = int(threadIdx.x) / 32;
    const int of_frame = units(p.c / p.frame.heads);
    int before = index * whole, total = products(p, phase) * whole;
    if (phase == HIDDEN) total = units(EXPANSION * p.c);
    if (phase == VALUES) {
      const int all_frames = p.frame.heads * of_frame;
      before = index < p.frame.heads ? index * of_frame : all_frames + (index - p.frame.heads) * units(columns);
      total = all_frames + (p.frames > 1 ? p.clip.heads * units(p.c / p.clip.heads) : 0);
    }
    const int from = total * block / blocks, to = total * (block + 1) / blocks;
    begin = (from > before ? from : before) - before;
    end = (to < before + units(columns) ? to : before + units(columns)) - before;
    // Every other phase begins with the other half of the warps: the last two have units for half of them only.
    const int turn = begin + before - from + phase * (WARPS / 2);
    first = begin + (warp + WARPS - turn % WARPS) % WARPS;
  }
};

}  // namespace panda::cuda::tail
