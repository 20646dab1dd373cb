// Aligned working memory that outlives the call: a fresh mapping each time would cost a page fault every 4 KiB.
#pragma once
#include <cstddef>
#include <cstdint>

namespace panda {

struct ScratchBlock {
  void* data = nullptr;
  size_t bytes = 0;
};

// From and to what this thread keeps for its next call. Throws std::bad_alloc.
ScratchBlock take_scratch(size_t bytes);
void give_scratch(ScratchBlock);

// `count` elements, page-aligned and uninitialised. Always inlined: files of every SIMD tier include this, and a
// function left out of line in one of them could be the copy that the linker keeps for all.
template <class T>
class Scratch {
 public:
  __attribute__((always_inline)) explicit Scratch(int64_t count) : block_(take_scratch(size_t(count) * sizeof(T))) {}
  __attribute__((always_inline)) ~Scratch() { give_scratch(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  __attribute__((always_inline)) T* data() const { return static_cast<T*>(block_.data); }

 private:
  ScratchBlock block_;
};

}  // namespace panda
