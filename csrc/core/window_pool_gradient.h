// The gradient of LSD: what the forward has not kept is recomputed window by window, the products' gradients are sums
// over blocks of windows in order.
#pragma once
#include <cstdint>

#include "window_pool.h"

namespace panda {

// Besides the forward's keys and, unless their results are kept, query and values, the same matrices packed the other
// way, through which gradients return.
struct WindowPoolReturn {
  const void* query;   // packed transpose, [c, c]
  const void* keys;    // packed [c / heads, c], one a head
  const void* values;  // packed [c, c / heads], one a head
  const void* out;     // packed transpose, [c, c]
};

// Of the folded matrices, [c][c] each, and what is added to queries, values and result, [c] each.
struct WindowPoolSums {
  float *query, *query_bias, *keys, *values, *values_bias, *out, *out_bias;
};

// Windows and weights as in window_attention_pool(), grad that of its result. grad_x, of the tokens, is zero outside
// the windows.
void window_attention_pool_gradient(Dtype, const void* grad, const Windows&, const WindowPoolWeights&,
                                    const WindowPoolReturn&, void* grad_x, const WindowPoolSums&,
                                    const KeptWindows& kept = {});

}  // namespace panda
