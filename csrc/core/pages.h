// Memory of large results, used again once it is given back: the system takes longer to fault in and zero fresh pages
// than most kernels to fill them (33 MB: 8 to 30 ms, against 3 ms).
#pragma once
#include <cstdint>

namespace panda {

// Of any content and aligned to a page. Throws std::bad_alloc.
void* take_pages(int64_t bytes);

// What take_pages() gave, from any thread. It waits for the next taker, and the system may have its pages meanwhile if
// it runs short.
void give_pages(void* data);

}  // namespace panda
