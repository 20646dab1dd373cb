#include "tuning.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace panda {

namespace {

thread_local Tuning current;

// A count from 1 to `most`, in steps of `step`.
void check(const char* name, int64_t value, int64_t most, int64_t step = 1) {
  if (value >= 1 && value <= most && value % step == 0) return;
  const std::string steps = step == 1 ? "an integer" : "a multiple of " + std::to_string(step);
  throw std::invalid_argument(std::string("tuning: ") + name + ": expected " + steps + " from " + std::to_string(step) +
                              " to " + std::to_string(most) + ", got " + std::to_string(value));
}

}  // namespace

const Tuning& tuning() { return current; }

Tuning set_tuning(const Tuning& t) {
  check("band_tokens", t.band_tokens, 1 << 16);
  check("product_rows", t.product_rows, 1 << 16);
  check("block_windows", t.block_windows, 1 << 12);
  check("stencil_rows", t.stencil_rows, kMostStencilRows);
  check("staged_channels", t.staged_channels, 1 << 12, 64);
  return std::exchange(current, t);
}

}  // namespace panda
