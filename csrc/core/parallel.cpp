#include "parallel.h"

#include <algorithm>
#include <atomic>

namespace panda {

namespace {

ParallelFor host_parallel_for = nullptr;

// The work of one call, of which a thread takes half of its even share of what is left, and again.
class Shared {
 public:
  Shared(int64_t count, ParallelBody body, void* context, int64_t least)
      : count_(count), least_(least), body_(body), context_(context) {}

  // Called once by every thread, with its share in equal parts.
  void work(int64_t share) {
    if (share == count_) return body_(context_, 0, count_);
    const int64_t threads = (count_ + share - 1) / share;
    const int64_t least = std::max({int64_t(1), share / 4, std::min(least_, share)});
    for (int64_t first = next_; first < count_;) {
      const int64_t last = std::min(count_, first + std::max(least, (count_ - first) / (2 * threads)));
      if (!next_.compare_exchange_weak(first, last)) continue;
      body_(context_, first, last);
      first = next_;
    }
  }

 private:
  const int64_t count_, least_;
  const ParallelBody body_;
  void* const context_;
  std::atomic<int64_t> next_ = 0;
};

}  // namespace

void set_parallel_for(ParallelFor f) { host_parallel_for = f; }

void run_parallel(int64_t count, ParallelBody body, void* context, int64_t least) {
  if (count <= 0) return;
  if (!host_parallel_for || count == 1) return body(context, 0, count);
  Shared shared(count, body, context, least);
  const auto work = [](void* to, int64_t first, int64_t last) { static_cast<Shared*>(to)->work(last - first); };
  host_parallel_for(count, work, &shared);
}

}  // namespace panda
