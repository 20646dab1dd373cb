// Work shared among threads of a host of this test's own.
#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

static int64_t threads = 1;

// As a thread pool does it: even parts of [0, count), at most one a thread.
static void host(int64_t count, panda::ParallelBody body, void* context) {
  const int64_t part = (count + threads - 1) / threads;
  std::vector<std::thread> pool;
  for (int64_t first = 0; first < count; first += part)
    pool.emplace_back(body, context, first, std::min(count, first + part));
  for (std::thread& thread : pool) thread.join();
}

static void require(bool holds, const char* what, int64_t count, int64_t least) {
  if (holds) return;
  std::printf("%s: %lld items, %lld threads, pieces of %lld\n", what, (long long)count, (long long)threads,
              (long long)least);
  std::exit(1);
}

static void every_item_once(int64_t count, int64_t least) {
  std::vector<std::atomic<int>> visits(count);
  std::atomic<int> small = 0;
  const int64_t share = (count + threads - 1) / threads;
  panda::parallel_for(
      count,
      [&](int64_t first, int64_t last) {
        small += last - first < std::min(least, share);
        for (int64_t i = first; i < last; ++i) ++visits[i];
      },
      least);
  for (const auto& n : visits) require(n == 1, "not every item once", count, least);
  // A thread whose part is smaller than the others' takes smaller pieces.
  require(count % threads != 0 || small <= 1, "more small pieces than the last", count, least);
}

// The first piece, less than its thread's share, ends when all others are done: other threads do the rest.
static void a_thread_held_up_leaves_its_share_to_others(int64_t count) {
  std::atomic<int64_t> done = 0;
  panda::parallel_for(count, [&](int64_t first, int64_t last) {
    require(last - first < count / threads, "a whole share in one piece", count, 1);
    const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (first == 0 && done < count - last) {
      require(std::chrono::steady_clock::now() < late, "work waits for a thread", count, 1);
      std::this_thread::yield();
    }
    done += last - first;
  });
}

int main() {
  every_item_once(100, 1);  // without a host
  panda::set_parallel_for(host);
  for (threads = 1; threads <= 5; ++threads)
    for (int64_t count : {1, 2, 3, 7, 64, 1000})
      for (int64_t least : {1, 10, 400}) every_item_once(count, least);
  threads = 2;
  a_thread_held_up_leaves_its_share_to_others(64);
}
