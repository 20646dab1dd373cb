// From what the two global poolings left to each frame's class token, in one launch: stages 3, 7 and 8 behind the
// pooling.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda::cuda {

// Of an attention by one query: its values' norm and projection, its output's projection. Matrices [out, in], 16-byte
// aligned.
struct ValueWeights {
  const void* query;                    // [C]
  const void *norm_weight, *norm_bias;  // [C]
  const void *wv, *bv;                  // [C, C] and [C], or null
  const void *wp, *bp;                  // [C, C] and [C]
  int heads;                            // a divisor of C
};

struct MLPWeights {
  const void *norm_weight, *norm_bias;  // [C]
  const void *w1, *b1;                  // [4C, C] and [4C]
  const void *w2, *b2;                  // [C, 4C] and [C]
};

struct FusionWeights {
  const void* balance;                  // [C], before its sigmoid
  const void *norm_weight, *norm_bias;  // [C]
  const void *w, *b;                    // [C, C] and [C]
};

struct ClassTokens {
  Dtype dtype;               // of everything but the workspace
  const void* clip_pooled;   // [clips, clip.heads, C]; not read, nor are clip, mlp and fusion, if frames is 1: images
  const void* frame_pooled;  // [clips * frames, frame.heads, C]
  ValueWeights clip, frame;
  MLPWeights mlp;
  FusionWeights fusion;
  void* y;           // [clips * frames, C]
  float* workspace;  // class_tokens_workspace numbers, 16-byte aligned
  int64_t clips;
  int frames, c;  // C a multiple of 16 bytes
  float eps;
};

int64_t class_tokens_workspace(int64_t clips, int frames, int c);

// 0, or CUDA's error code.
int class_tokens(const ClassTokens& p, void* stream);

}  // namespace panda::cuda
