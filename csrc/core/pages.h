// Memory that the system has not backed with pages yet.
#pragma once
#include <cstdint>

namespace panda {

// Fresh memory is faulted in and zeroed a page at a time as it is first written: for a large result that takes longer
// than the kernel (33 MB: 8 ms in pages of 4 KiB, 2 ms in pages of 2 MiB).
void prefer_large_pages(void* data, int64_t bytes);

}  // namespace panda
