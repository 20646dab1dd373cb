// Blocks and threads of a CUDA kernel on the CPU, for the tests of csrc/cuda: what device.h asks for, and no more.
//
// Every thread of a block is a context of its own that runs until it meets a barrier or another collective; then the
// next one runs. So a barrier that not all threads reach, or a warp that is not complete, is found (a deadlock, which
// aborts with a message), and so are many missing barriers: threads run forwards in one run of a test and backwards in
// another. Shared memory starts as NaN. A copy to shared memory is made as late as it is waited for.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __expf(x) std::exp(x)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace panda::emulation {

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

// Arrivals of those who wait for one another; `turn` rises when all have come.
struct Barrier {
  unsigned expected, arrived = 0, turn = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) char slots[32][64];
};

struct Block {
  dim3 index;
  unsigned threads;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
};

constexpr size_t STACK = 256 * 1024;
inline std::vector<std::unique_ptr<char[]>> free_stacks;

struct Stack {
  std::unique_ptr<char[]> memory;
  Stack() {
    if (free_stacks.empty()) free_stacks.emplace_back(new char[STACK]);
    memory = std::move(free_stacks.back());
    free_stacks.pop_back();
  }
  ~Stack() { free_stacks.push_back(std::move(memory)); }
};

struct Thread {
  ucontext_t context;
  Stack stack;
  Block* block;
  dim3 index;
  bool finished = false;
  const Barrier* barrier = nullptr;  // that it waits at, and for which turn to end
  unsigned turn = 0;
  std::deque<std::vector<Copy>> committed;
  std::vector<Copy> copies;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Block>> blocks;
  ucontext_t scheduler;
  Thread* current = nullptr;
  dim3 grid;
  Barrier together{};   // of all threads of a cooperative launch
  uint64_t events = 0;  // a round of all threads without one is a deadlock
  std::function<void()> kernel;
};

inline Machine* machine = nullptr;
inline bool backwards = false;
inline int largest_shared_memory = 227 * 1024;

// The order of threads and the shared memory of a device while this lives.
struct Conditions {
  bool before_backwards = backwards;
  int before_memory = largest_shared_memory;

  Conditions(bool run_backwards, int shared_memory) {
    backwards = run_backwards;
    largest_shared_memory = shared_memory;
  }
  ~Conditions() {
    backwards = before_backwards;
    largest_shared_memory = before_memory;
  }
};

inline void yield() { swapcontext(&machine->current->context, &machine->scheduler); }

inline void arrive_and_wait(Barrier& barrier) {
  machine->current->barrier = &barrier;
  machine->current->turn = barrier.turn;
  ++machine->events;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.turn;
  } else {
    yield();
  }
}

inline void enter() {
  machine->kernel();
  machine->current->finished = true;
  ++machine->events;
  yield();
}

inline void make_block(dim3 index, unsigned count, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->threads = count;
  block->barrier.expected = count;
  for (unsigned first = 0; first < count; first += 32)
    block->warps.push_back({{count - first < 32 ? count - first : 32}, {}});
  block->shared.reset(new (std::align_val_t(128)) char[shared_bytes + 1]);
  std::memset(block->shared.get(), 0xff, shared_bytes);
  for (unsigned i = 0; i < count; ++i) {
    auto thread = std::make_unique<Thread>();
    thread->block = block.get();
    thread->index = {i};
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.memory.get();
    thread->context.uc_stack.ss_size = STACK;
    thread->context.uc_link = nullptr;
    makecontext(&thread->context, enter, 0);
    machine->threads.push_back(std::move(thread));
  }
  machine->blocks.push_back(std::move(block));
}

// Every thread from `first` that can go on does so up to the next collective; whether any is unfinished.
inline bool run_block(size_t first, size_t count) {
  auto& threads = machine->threads;
  bool unfinished = false;
  for (size_t i = first; i < first + count; ++i) {
    Thread* thread = threads[backwards ? threads.size() - 1 - i : i].get();
    if (thread->finished) continue;
    unfinished = true;
    if (thread->barrier && thread->barrier->turn == thread->turn) continue;
    machine->current = thread;
    swapcontext(&machine->scheduler, &thread->context);
  }
  return unfinished;
}

// A block runs as far as it can before the next one does: so it is far ahead of it where it should have waited.
inline void run_to_the_end() {
  const size_t count = machine->blocks.empty() ? 1 : machine->blocks[0]->threads;
  for (bool unfinished = true; unfinished;) {
    unfinished = false;
    const uint64_t before = machine->events;
    for (size_t first = 0; first < machine->threads.size(); first += count) {
      uint64_t seen;
      bool waits;
      do {
        seen = machine->events;
        waits = run_block(first, count);
      } while (machine->events != seen);
      unfinished |= waits;
    }
    if (unfinished && machine->events == before) {
      std::fprintf(stderr, "cuda_emulation: a deadlock: some threads wait for others that will never come\n");
      std::abort();
    }
  }
  machine->threads.clear();
  machine->blocks.clear();
}

// `together`: all blocks at once, as a cooperative launch has them; else one after the other.
inline void run(dim3 grid, int threads, size_t shared_bytes, bool together, std::function<void()> kernel) {
  Machine here;
  here.grid = grid;
  here.kernel = std::move(kernel);
  machine = &here;
  const unsigned blocks = grid.x * grid.y * grid.z;
  here.together.expected = blocks * unsigned(threads);
  for (unsigned n = 0; n < blocks; ++n) {
    const unsigned i = backwards ? blocks - 1 - n : n;
    make_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, unsigned(threads), shared_bytes);
    if (!together) run_to_the_end();
  }
  run_to_the_end();
  machine = nullptr;
}

inline unsigned lane() { return machine->current->index.x % 32; }
inline Warp& warp() { return machine->current->block->warps[machine->current->index.x / 32]; }

// Every lane publishes `mine`; the slots stay until every lane has come back to `release`.
template <class T>
inline void publish(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]));
  std::memcpy(warp().slots[lane()], &mine, sizeof(T));
  arrive_and_wait(warp().barrier);
}

template <class T>
inline T published(unsigned lane) {
  T value;
  std::memcpy(&value, warp().slots[lane], sizeof(T));
  return value;
}

inline void release() { arrive_and_wait(warp().barrier); }

template <class T>
inline T from_lane(const T& mine, unsigned source) {
  publish(mine);
  const T value = published<T>(source);
  release();
  return value;
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace panda::emulation

#define threadIdx (panda::emulation::machine->current->index)
#define blockIdx (panda::emulation::machine->current->block->index)
#define gridDim (panda::emulation::machine->grid)

inline void __syncthreads() { panda::emulation::arrive_and_wait(panda::emulation::machine->current->block->barrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return panda::emulation::from_lane(value, panda::emulation::lane() ^ unsigned(mask));
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }

namespace panda::cuda {

inline void wait_for_blocks() { emulation::arrive_and_wait(emulation::machine->together); }

inline char* shared_memory() { return emulation::machine->current->block->shared.get(); }

inline void copy_async(void* to, const void* from, bool inside) {
  emulation::machine->current->copies.push_back({to, from, inside});
}

inline void commit_copies() {
  auto* thread = emulation::machine->current;
  thread->committed.push_back(std::move(thread->copies));
  thread->copies.clear();
}

template <int pending>
void wait_for_copies() {
  auto& committed = emulation::machine->current->committed;
  for (; committed.size() > pending; committed.pop_front())
    for (const auto& copy : committed.front())
      copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

template <bool transposed = false>
void load_matrices(uint32_t (&to)[4], const void* row) {
  emulation::publish(row);
  const unsigned lane = emulation::lane();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned along = lane % 4 * 2 + i, across = lane / 4;
      const unsigned r = transposed ? along : across, c = transposed ? across : along;
      pair[i] = emulation::published<const uint16_t*>(matrix * 8 + r)[c];
    }
    to[matrix] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
  emulation::release();
}

inline float widen(bfloat16 x) { return emulation::bits_to_float(uint32_t(x.bits) << 16); }

inline void narrow(float x, bfloat16& y) {
  const uint32_t bits = emulation::float_to_bits(x);
  y.bits = std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widen(float16 x) {
  _Float16 value;
  std::memcpy(&value, &x, 2);
  return float(value);
}

inline void narrow(float x, float16& y) {
  const auto value = _Float16(x);
  std::memcpy(&y, &value, 2);
}

// Element i of the A fragment lies at row lane / 4 + i / 2 % 2 * 8, column lane % 4 * 2 + i % 2 + i / 4 * 8; of B at
// row lane % 4 * 2 + i % 2 + i / 2 * 8, column lane / 4; of C at row lane / 4 + i / 2 * 8, column lane % 4 * 2 + i % 2.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  struct Fragments {
    T a[8], b[4];
  } mine;
  const uint32_t b[2] = {b0, b1};
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  emulation::publish(mine);
  const unsigned lane = emulation::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const auto left = emulation::published<Fragments>(row % 8 * 4 + k % 8 / 2);
      const auto right = emulation::published<Fragments>(column * 4 + k % 8 / 2);
      sum += double(widen(left.a[k % 2 + row / 8 * 2 + k / 8 * 4])) * widen(right.b[k % 2 + k / 8 * 2]);
    }
    c[i] = float(sum);
  }
  emulation::release();
}

inline int largest_shared_memory(int& bytes) {
  bytes = emulation::largest_shared_memory;
  return 0;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void*, Arguments... arguments) {
  emulation::run(grid, threads, shared_bytes, false, [=] { kernel(Parameters(arguments)...); });
  return 0;
}

template <class... Parameters, class... Arguments>
int launch_together(void (*kernel)(Parameters...), int wanted, int threads, size_t shared_bytes, void*,
                    Arguments... arguments) {
  const int fitting = wanted < 3 ? wanted : 3;  // a device of three multiprocessors
  emulation::run(dim3(fitting), threads, shared_bytes, true, [=] { kernel(Parameters(arguments)...); });
  return 0;
}

}  // namespace panda::cuda
