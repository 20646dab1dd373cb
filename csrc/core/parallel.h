// How the core spreads work over threads: through a function its host supplies, so that the core needs no torch and
// the wheel uses torch's own pool. Without one everything runs on the calling thread.
#pragma once
#include <cstdint>

namespace panda {

using ParallelBody = void (*)(void* context, int64_t first, int64_t last);
using ParallelFor = void (*)(int64_t count, ParallelBody body, void* context);

void set_parallel_for(ParallelFor);
void run_parallel(int64_t count, ParallelBody body, void* context, int64_t least);

// body(first, last) over pieces of [0, count), a few a thread, so that others can do the work of one that is held up;
// none of fewer than `least`, unless its thread's equal part is. What is computed must not depend on how it is cut.
template <class Body>
void parallel_for(int64_t count, const Body& body, int64_t least = 1) {
  run_parallel(
      count, [](void* context, int64_t first, int64_t last) { (*static_cast<const Body*>(context))(first, last); },
      const_cast<Body*>(&body), least);
}

}  // namespace panda
