#include "pages.h"

#include <cstddef>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace panda {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kWaiting = 32;  // blocks: a training step of the tower takes as many at a time

void* fresh(size_t bytes) {
#ifdef __linux__
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
#else
  void* data = std::aligned_alloc(kPage, bytes);
  if (!data) throw std::bad_alloc();
#endif
  return data;
}

void release(void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  munmap(data, bytes);
#else
  std::free(data);
#endif
}

void lend_to_system([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_FREE
  madvise(data, bytes, MADV_FREE);
#endif
}

struct Pages {
  std::mutex mutex;
  std::map<void*, size_t> taken;
  std::vector<std::pair<void*, size_t>> waiting;  // the oldest first

  // The smallest waiting block that is large enough, unless a quarter of it would lie idle.
  void* again(size_t bytes) {
    auto best = waiting.end();
    for (auto block = waiting.begin(); block != waiting.end(); ++block)
      if (block->second >= bytes && block->second / 4 * 3 < bytes &&
          (best == waiting.end() || block->second < best->second))
        best = block;
    if (best == waiting.end()) return nullptr;
    const auto [data, size] = *best;
    waiting.erase(best);
    taken[data] = size;
    return data;
  }
};

// Never destroyed: tensors may outlive every other static object.
Pages& pages() {
  static Pages* all = new Pages;
  return *all;
}

}  // namespace

void* take_pages(int64_t count) {
  const size_t bytes = (size_t(count) + kPage - 1) / kPage * kPage;
  Pages& all = pages();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (void* data = all.again(bytes)) return data;
  }
  void* data = fresh(bytes);
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.taken[data] = bytes;
  return data;
}

void give_pages(void* data) {
  Pages& all = pages();
  std::pair<void*, size_t> oldest{};
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.taken.find(data);
    lend_to_system(data, found->second);
    all.waiting.push_back(*found);
    all.taken.erase(found);
    if (all.waiting.size() > kWaiting) {
      oldest = all.waiting.front();
      all.waiting.erase(all.waiting.begin());
    }
  }
  if (oldest.first) release(oldest.first, oldest.second);
}

}  // namespace panda
