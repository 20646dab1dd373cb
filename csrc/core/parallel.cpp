#include "parallel.h"

namespace panda {

static ParallelFor host_parallel_for = nullptr;

void set_parallel_for(ParallelFor f) { host_parallel_for = f; }

void run_parallel(int64_t count, ParallelBody body, void* context) {
  if (count <= 0) return;
  if (host_parallel_for && count > 1)
    host_parallel_for(count, body, context);
  else
    body(context, 0, count);
}

}  // namespace panda
