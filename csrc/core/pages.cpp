#include "pages.h"

#include <cstddef>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace panda {

namespace {

constexpr size_t kUnit = size_t(1) << 16;

// Free memory is lent to the system once there is more of it than is taken, and at least this much: lending interrupts
// the other processors, and what is about to be taken again gains nothing by it.
constexpr size_t kLeastLent = size_t(64) << 20;

#ifdef __linux__
constexpr size_t kRegion = size_t(16) << 30;  // addresses asked for at a time; only what is written takes memory

// Null if there is none.
char* reserve(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return data == MAP_FAILED ? nullptr : static_cast<char*>(data);
}
#else
constexpr size_t kRegion = 0;

char* reserve(size_t bytes) { return static_cast<char*>(std::aligned_alloc(kUnit, bytes)); }
#endif

// Free blocks and taken ones by address. A block is cut from the first that is large enough, and joins its neighbours
// when it is given back, so that what is taken stays together at the low addresses.
struct Pages {
  std::mutex mutex;
  std::map<char*, size_t> free, taken;
  size_t in_use = 0, unlent = 0;  // bytes; unlent is what was given back since the last lending, less what was taken

  char* cut(size_t bytes) {
    for (auto block = free.begin(); block != free.end(); ++block) {
      const auto [data, size] = *block;
      if (size < bytes) continue;
      free.erase(block);
      if (size > bytes) free[data + bytes] = size - bytes;
      taken[data] = bytes;
      in_use += bytes;
      unlent -= bytes < unlent ? bytes : unlent;
      return data;
    }
    return nullptr;
  }

  void join(char* data, size_t bytes) {
    auto block = free.emplace(data, bytes).first;
    const auto next = std::next(block);
    if (next != free.end() && data + bytes == next->first) {
      block->second += next->second;
      free.erase(next);
    }
    if (block == free.begin()) return;
    const auto before = std::prev(block);
    if (before->first + before->second != data) return;
    before->second += block->second;
    free.erase(block);
  }

  void give(char* data) {
    const auto found = taken.find(data);
    const size_t bytes = found->second;
    taken.erase(found);
    join(data, bytes);
    in_use -= bytes;
    unlent += bytes;
    if (unlent > in_use && unlent >= kLeastLent) lend();
  }

  void lend() {
#ifdef MADV_FREE
    for (const auto& [data, bytes] : free) madvise(data, bytes, MADV_FREE);
#endif
    unlent = 0;
  }

  void grow(size_t bytes) {
    const size_t most = bytes > kRegion ? bytes : kRegion;
    char* data = reserve(most);
    const size_t got = data ? most : bytes;
    if (!data) data = reserve(bytes);
    if (!data) throw std::bad_alloc();
    join(data, got);
  }
};

// Never destroyed: tensors may outlive every other static object.
Pages& pages() {
  static Pages* all = new Pages;
  return *all;
}

// The threads of a stage come for their scratch at once, and what they do here is shorter than falling asleep is.
std::unique_lock<std::mutex> lock(std::mutex& mutex) {
  for (int attempt = 0; attempt < 1000; ++attempt)
    if (mutex.try_lock()) return {mutex, std::adopt_lock};
  return std::unique_lock<std::mutex>(mutex);
}

}  // namespace

void* take_pages(int64_t count) {
  const size_t bytes = (size_t(count) + kUnit - 1) / kUnit * kUnit;
  Pages& all = pages();
  const auto held = lock(all.mutex);
  char* data = all.cut(bytes);
  if (data) return data;
  all.grow(bytes);
  return all.cut(bytes);
}

void give_pages(void* data) {
  Pages& all = pages();
  const auto held = lock(all.mutex);
  all.give(static_cast<char*>(data));
}

}  // namespace panda
