// How attention pooling is cut among threads: runs of tokens of one sample, whose partial sums are merged in order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "drivers.h"
#include "parallel.h"
#include "pooling.h"
#include "scratch.h"

namespace panda {

constexpr int64_t kPoolStates = 64;  // partial results held at a time

struct PoolItem {
  int64_t sample, first, count;
};

inline std::vector<PoolItem> pool_items(const Pooling& a) {
  std::vector<PoolItem> items;
  for (int64_t s = 0; s < a.samples; ++s)
    for (int64_t at = a.offsets[s]; at < a.offsets[s + 1]; at += kPoolTokens)
      items.push_back({s, at, std::min(kPoolTokens, a.offsets[s + 1] - at)});
  return items;
}

// work(number, item, floats) on all threads, each with `floats` of its own, and then merge(item, floats) in order.
template <class Work, class Merge>
void in_order(const std::vector<PoolItem>& items, int64_t floats, const Work& work, const Merge& merge) {
  Scratch<float> partial(kPoolStates * floats);
  for (int64_t base = 0; base < int64_t(items.size()); base += kPoolStates) {
    const int64_t count = std::min<int64_t>(kPoolStates, int64_t(items.size()) - base);
    parallel_for(count, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) work(base + k, items[base + k], partial.data() + k * floats);
    });
    for (int64_t k = 0; k < count; ++k) merge(items[base + k], partial.data() + k * floats);
  }
}

}  // namespace panda
