// How much of a call the core takes at a time: what only a measurement on the machine can choose.
#pragma once
#include <cstdint>

namespace panda {

// No value changes a bit of a result, with one exception: the gradient of a weight that patches meet is a sum over
// bands, so that band_tokens changes its rounding.
struct Tuning {
  // Tokens whose intermediates exist at a time: enough rows for the products to reuse a panel of weights, few enough to
  // stay in the caches.
  int64_t band_tokens = 512;
  // Rows of a product that a thread takes at a time.
  int64_t product_rows = 512;
  // Windows whose folded queries, a head's [windows, c], stay in the second-level cache.
  int64_t block_windows = 64;
  // Rows a work item of the 3x3x3 stencil takes: few enough that the pages of all its tokens stay in the translation
  // buffers.
  int64_t stencil_rows = 8;
  // Channels it stages at once: a kilobyte of a token, which the prefetchers follow, while the rows fit the
  // second-level cache.
  int64_t staged_channels = 256;
};

constexpr int64_t kMostStencilRows = 64;

// The calling thread's, which its calls take to the threads that work for them.
const Tuning& tuning();

// Replaces the calling thread's and returns what it was. Throws std::invalid_argument, naming the parameter, what is
// allowed and what came, and then changes nothing.
Tuning set_tuning(const Tuning&);

}  // namespace panda
