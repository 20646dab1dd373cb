// LSD on a list of windows: four products of C x C a window instead of ten, through queries folded into the keys and
// values projected after pooling (SPEC, "The same function, cheaper").
#pragma once
#include <cstdint>
#include <type_traits>
#include <vector>

#include "gemm.h"

namespace panda {

// LayerNorm affines, the scale of the logits and the bias that the values' affine leaves are folded in by the caller.
struct WindowPoolWeights {
  int64_t c, k, heads, size;  // k: numbers of a token, c or those of a patch; size: tokens of a window
  float eps;
  const void* query = nullptr;        // packed [c, k]
  const float* query_bias = nullptr;  // [c]
  const void* keys = nullptr;         // packed [k, c / heads], one a head, packed_bytes() apart
  const void* values = nullptr;       // packed [c / heads, k], one a head
  const void* out = nullptr;          // packed [c, c]
  const float* out_bias = nullptr;    // [c]
};

// What a gradient can take over from the forward, [windows][stride] each, zero beyond c: the projected queries, and the
// heads' outputs that the last product takes. Null: the gradient computes them again.
struct KeptWindows {
  char *query = nullptr, *heads = nullptr;

  KeptWindows from(int64_t bytes) const { return query ? KeptWindows{query + bytes, heads + bytes} : KeptWindows{}; }
};

// The windows of all rectangles of a grid of tokens: x, or x + added where that is not null.
struct Windows {
  const void* x;      // [frames][h][w][c]
  const void* added;  // as x
  const int64_t* corners;
  int64_t frames, h, w, window;
};

// Which tokens they hold, [windows][window^2].
std::vector<int64_t> window_tokens_of(const Windows&);

// Where `count` of them lie in a tensor of rows of `bytes`; empty if that is null.
template <class Void>
std::vector<Void*> rows_at(Void* data, const int64_t* tokens, int64_t count, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  std::vector<Void*> rows;
  for (int64_t i = 0; data && i < count; ++i) rows.push_back(static_cast<Byte*>(data) + tokens[i] * bytes);
  return rows;
}

// Window m has tokens[m * size + j] and, where `added` is not null, what is added to each of them.
struct WindowList {
  Dtype dtype;
  const void* const* tokens;
  const void* const* added;
  int64_t count;
};

// Of each window, rows padded_k() of k apart: its tokens normalised, their mean normalised, and what the result adds
// to.
struct NormalisedWindows {
  Dtype dtype;
  int64_t count;
  const char* xhat;   // [count][size]
  const char* query;  // [count]
  const float* mean;  // [count][c]
};

void attend_windows(const NormalisedWindows& windows, const WindowPoolWeights& weights, void* const* out,
                    const KeptWindows& kept = {});

// out[m] receives the row of c channels.
void pool_windows(const WindowList& windows, const WindowPoolWeights& weights, void* const* out,
                  const KeptWindows& kept = {});

}  // namespace panda
