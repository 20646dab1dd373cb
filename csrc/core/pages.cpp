#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace panda {

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLarge = uintptr_t(2) << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kLarge - 1) / kLarge * kLarge, last = (start + uintptr_t(bytes)) / kLarge * kLarge;
  // Smaller results come from memory that the allocator keeps, and is written already.
  if (last >= first + 4 * kLarge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace panda
