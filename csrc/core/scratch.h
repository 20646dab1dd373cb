// Aligned working memory that outlives the call: a fresh mapping each time would cost a page fault every 4 KiB.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace panda {

// Blocks given back by this thread and waiting for its next call; as many as the tower holds at once.
class ScratchPool {
 public:
  static constexpr int kBlocks = 24;

  static ScratchPool& of_this_thread() {
    static thread_local ScratchPool pool;
    return pool;
  }

  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  // The smallest kept block that is large enough, else a new one.
  Block take(size_t bytes) {
    Block* best = nullptr;
    for (Block& b : kept_)
      if (b.data && b.bytes >= bytes && (!best || b.bytes < best->bytes)) best = &b;
    if (best) {
      const Block taken = *best;
      *best = Block{};
      return taken;
    }
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(4096, rounded);
    if (!data) throw std::bad_alloc();
    return {data, rounded};
  }

  // Keeps the largest blocks.
  void give(Block block) {
    for (Block& b : kept_)
      if (b.bytes < block.bytes) {
        const Block smaller = b;
        b = block;
        block = smaller;
      }
    std::free(block.data);
  }

  ~ScratchPool() {
    for (Block& b : kept_) std::free(b.data);
  }

 private:
  Block kept_[kBlocks];
};

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : block_(ScratchPool::of_this_thread().take(count * sizeof(T))) {}
  ~Scratch() { ScratchPool::of_this_thread().give(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return static_cast<T*>(block_.data); }

 private:
  ScratchPool::Block block_;
};

}  // namespace panda
