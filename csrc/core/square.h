// Transposing as many vectors as a vector has lanes.
#pragma once
#include <utility>

#include "vec.h"

namespace panda::PANDA_TIER {

template <int kStep, size_t... l>
PANDA_INLINE void exchange(vf& a, vf& b, std::index_sequence<l...>) {
  const vf upper = __builtin_shufflevector(a, b, ((l & kStep) == 0 ? int(l) : kLanes + int(l) - kStep)...);
  b = __builtin_shufflevector(a, b, ((l & kStep) == 0 ? int(l) + kStep : kLanes + int(l))...);
  a = upper;
}

// A square of kLanes x kLanes, its blocks of kStep exchanged across the diagonal.
template <int kStep = kLanes / 2>
PANDA_INLINE void transpose(vf (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes>());
  if constexpr (kStep > 1) transpose<kStep / 2>(rows);
}

}  // namespace panda::PANDA_TIER
