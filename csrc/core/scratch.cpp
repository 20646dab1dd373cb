#include "scratch.h"

#include <cstdlib>
#include <new>
#include <utility>

#include "pages.h"

namespace panda {

namespace {

constexpr size_t kShared = size_t(1) << 19;  // larger blocks wait where results do, for whoever is next

// The blocks of a thread that wait for its next call: more than the tower holds at once.
struct Pool {
  static constexpr int kBlocks = 24;
  static constexpr size_t kPage = 4096;
  ScratchBlock kept[kBlocks];

  ~Pool() {
    for (ScratchBlock& block : kept) std::free(block.data);
  }
};

thread_local Pool pool;

}  // namespace

// The smallest kept block that is large enough, else a new one.
ScratchBlock take_scratch(size_t wanted) {
  const size_t bytes = (wanted + Pool::kPage - 1) / Pool::kPage * Pool::kPage;
  if (bytes >= kShared) return {take_pages(int64_t(bytes)), bytes};
  ScratchBlock* best = nullptr;
  for (ScratchBlock& block : pool.kept)
    if (block.data && block.bytes >= bytes && (!best || block.bytes < best->bytes)) best = &block;
  if (best) return std::exchange(*best, ScratchBlock{});
  void* data = std::aligned_alloc(Pool::kPage, bytes);
  if (!data && bytes) throw std::bad_alloc();
  return {data, bytes};
}

// Keeps the largest blocks.
void give_scratch(ScratchBlock given) {
  if (given.bytes >= kShared) return give_pages(given.data);
  for (ScratchBlock& block : pool.kept)
    if (block.bytes < given.bytes) std::swap(block, given);
  std::free(given.data);
}

}  // namespace panda
