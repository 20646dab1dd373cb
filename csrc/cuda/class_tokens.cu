// Five phases of products that need one another's results, of a few rows each: bound by reading the weights once, 13
// C^2 numbers, 27 MB for C = 1024 in 16 bits: 9 us at an H100's 3 TB/s. Four waits of all blocks for one another lie
// between the phases.
//
// What a phase waits for are its rows, never its weights: each warp copies the weights it will need in a ring in shared
// memory, of which 7 KB are under way whatever the warp itself waits for: 7 MB on all multiprocessors, one or two
// phases ahead. What is left between the bytes is latency, predicted as 1 to 1.5 us to stage and normalise the rows,
// 0.5 us of products and 1 to 1.5 us to wait for all blocks: 13 to 16 us for 8 frames of two clips, against 25 launches
// of 2 to 3 us each that it replaces. Rows in shared memory are read 8 R cycles a step for R rows, twice what their
// products take: 3 us in all for 8 frames, 25 us for 64. Images have the first two phases only: 8 MB, predicted as 5
// us.
//
// A warp takes COLUMNS columns of y = x w^T at a time, lanes share out k. A row's sums are made in one order, whatever
// the number of rows, of blocks and of rows that are staged together.
#include "class_tokens.h"

#include "class_tokens_phases.h"
#include "device.h"

namespace panda::cuda {
namespace {

using namespace tail;

constexpr int THREADS = 32 * WARPS, ROWS = 16, DEPTH = 8;
constexpr size_t RING_BYTES = size_t(WARPS) * DEPTH * COLUMNS * 32 * 16;

// Rows that are staged together.
__device__ __forceinline__ int group_rows(int k, int row_numbers) {
  int rows = ROWS;
  while (rows > 1 && rows * k > row_numbers) rows /= 2;
  return rows;
}

// The weights that a warp will need, in the order in which it needs them, DEPTH - 1 steps ahead of it: they know of no
// phases. A lane reads only what it copied itself.
template <class T>
class Weights {
 public:
  __device__ __forceinline__ Weights(const ClassTokens& p, char* ring, int row_numbers)
      : p(p),
        row_numbers(row_numbers),
        slots(reinterpret_cast<Vector<T>*>(ring) + threadIdx.x / 32 * (DEPTH * COLUMNS * 32) + threadIdx.x % 32) {
#pragma unroll 1
    for (taken = 1; taken < DEPTH; ++taken) copy();
    taken = 0;
  }

  // The next step: a vector of each of the unit's columns, 32 vectors from one to the next.
  __device__ __forceinline__ const Vector<T>* next() {
    wait_for_copies<DEPTH - 2>();
    copy();
    return slot(taken++);
  }

 private:
  __device__ __forceinline__ Vector<T>* slot(unsigned number) { return slots + number % DEPTH * (COLUMNS * 32); }

  // To the slot before the one that will be taken.
  __device__ __forceinline__ void copy() {
    if (groups == 0 && phase < phases(p)) next_product();
    if (phase < phases(p)) {
      const int vector = step * 32 + int(threadIdx.x) % 32;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const int column = unit * COLUMNS + j;
        const bool inside = column < columns && vector * Vector<T>::size < k;
        const T* from = inside ? w + int64_t(column) * k + vector * Vector<T>::size : w;
        copy_async(slot(taken + DEPTH - 1) + j * 32, from, inside);
      }
      advance();
    }
    commit_copies();
  }

  __device__ __forceinline__ void advance() {
    if (++step * 32 * Vector<T>::size < k) return;
    step = 0;
    if ((unit += WARPS) < end) return;
    unit = first;
    --groups;
  }

  __device__ __forceinline__ void next_product() {
#pragma unroll 1
    do {
      if (++index == products(p, phase)) {
        index = 0;
        if (++phase == phases(p)) return;
      }
      const auto product = describe<T>(p, phase, index);
      const Share share(p, phase, index, product.columns);
      w = product.w;
      columns = product.columns;
      k = product.k;
      unit = first = share.first;
      end = share.end;
      const int together = group_rows(k, row_numbers);
      groups = (product.rows + together - 1) / together;
    } while (first >= end);
  }

  const ClassTokens& p;
  const int row_numbers;
  Vector<T>* const slots;
  unsigned taken;
  int phase = VALUES, index = -1, step = 0;
  const T* w;
  int columns, k, first, end, unit, groups = 0;
};

// Rows in shared memory lie in fours of numbers: of every vector the first, then of every vector the second. So lanes
// read neighbouring fours.
template <class T>
__device__ __forceinline__ void read_row(float (&x)[Vector<T>::size], const float* row, int vector, int k) {
#pragma unroll
  for (int i = 0; i < Vector<T>::size; i += 4) {
    const auto four = load_vector(row + i / 4 * (k * 4 / Vector<T>::size) + vector * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i + j] = four.numbers[j];
  }
}

template <class T>
__device__ __forceinline__ void write_row(float* row, const float (&x)[Vector<T>::size], int vector, int k) {
#pragma unroll
  for (int i = 0; i < Vector<T>::size; i += 4) {
    const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
    store_vector(row + i / 4 * (k * 4 / Vector<T>::size) + vector * 4, four);
  }
}

template <int N>
__device__ __forceinline__ void load_floats(float (&x)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const auto four = load_vector(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i + j] = four.numbers[j];
  }
}

// read(x, row, channel) of every vector of `count` rows, filled up to `padded` with the last one. Several loads are
// under way before the first is waited for.
template <class T, class Read>
__device__ __forceinline__ void stage(float* rows, int k, int count, int padded, const Read& read) {
  constexpr int N = Vector<T>::size, BATCH = 4;
  const int vectors = k / N, total = padded * vectors;
#pragma unroll 1
  for (int begin = int(threadIdx.x); begin < total; begin += BATCH * THREADS) {
    float x[BATCH][N];
    int row[BATCH], vector[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      const int i = begin + j * THREADS < total ? begin + j * THREADS : total - 1;
      row[j] = i / vectors;
      vector[j] = i - row[j] * vectors;
      read(x[j], row[j] < count ? row[j] : count - 1, vector[j] * N);
    }
#pragma unroll
    for (int j = 0; j < BATCH; ++j) write_row<T>(rows + row[j] * k, x[j], vector[j], k);
  }
}

template <class T>
__device__ __forceinline__ void stage_rows(float* rows, const ClassTokens& p, const Product<T>& product, int first,
                                           int count, int padded) {
  constexpr int N = Vector<T>::size;
  const int k = product.k;
  if (product.pooled)
    stage<T>(rows, k, count, padded, [&](float (&x)[N], int row, int channel) {
      const auto z = load_vector(product.pooled + int64_t(first + row) * product.pooled_stride + channel);
      const auto weight = load_vector(product.norm_weight + channel), bias = load_vector(product.norm_bias + channel);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = widen(z.numbers[i]) * widen(weight.numbers[i]) + widen(bias.numbers[i]);
    });
  else if (product.balance)
    stage<T>(rows, k, count, padded, [&](float (&x)[N], int row, int channel) {
      float frame[N];
      load_floats(frame, product.frame + int64_t(first + row) * k + channel);
      load_floats(x, product.from + int64_t((first + row) / p.frames) * k + channel);
      const auto balance = load_vector(product.balance + channel);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float share = 1 / (1 + __expf(-widen(balance.numbers[i])));
        x[i] = (1 - share) * x[i] + share * frame[i];
      }
    });
  else
    stage<T>(rows, k, count, padded, [&](float (&x)[N], int row, int channel) {
      load_floats(x, product.from + int64_t(first + row) * k + channel);
    });
}

// The sums over all lanes of V numbers each: lane i gets number i / (32 / V). Whatever V is, a number's sum is made in
// the same order.
template <int distance = 16, int V>
__device__ __forceinline__ float add_lanes(const float (&numbers)[V]) {
  constexpr int kept = V > 1 ? V / 2 : 1;
  const bool upper = V > 1 && threadIdx.x & distance;
  float sums[kept];
#pragma unroll
  for (int i = 0; i < kept; ++i) {
    const float sent = upper ? numbers[i] : numbers[V - kept + i];
    sums[i] = (upper ? numbers[V - kept + i] : numbers[i]) + __shfl_xor_sync(~0u, sent, distance);
  }
  if constexpr (distance == 1)
    return sums[0];
  else
    return add_lanes<distance / 2>(sums);
}

// A warp normalises a staged row; a lane meets only its own numbers.
template <class T>
__device__ __forceinline__ void normalise(float* row, const Product<T>& product, float eps) {
  constexpr int N = Vector<T>::size;
  const int k = product.k, vectors = k / N, lane = int(threadIdx.x) % 32;
  float x[N], sum[1] = {}, squares[1] = {};
  for (int v = lane; v < vectors; v += 32) {
    read_row<T>(x, row, v, k);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[0] += x[i];
  }
  const float mean = add_lanes(sum) / float(k);
  for (int v = lane; v < vectors; v += 32) {
    read_row<T>(x, row, v, k);
#pragma unroll
    for (int i = 0; i < N; ++i) squares[0] += (x[i] - mean) * (x[i] - mean);
  }
  const float rstd = rsqrtf(add_lanes(squares) / float(k) + eps);
  for (int v = lane; v < vectors; v += 32) {
    const auto weight = load_vector(product.norm_weight + v * N), bias = load_vector(product.norm_bias + v * N);
    read_row<T>(x, row, v, k);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = (x[i] - mean) * rstd * widen(weight.numbers[i]) + widen(bias.numbers[i]);
    write_row<T>(row, x, v, k);
  }
}

template <class T>
__device__ __forceinline__ void store(const Product<T>& product, int row, int column, float y) {
  if (product.bias) y += widen(product.bias[column]);
  if (product.query) y += widen(product.query[column]);
  if (product.quick_gelu) y = y / (1 + __expf(-1.702f * y));
  const int64_t at = int64_t(row) * product.stride + column;
  if (product.residual) y += product.to[at];
  if (product.out)
    narrow(y, product.out[at]);
  else
    product.to[at] = y;
}

template <int R>
struct Rows {
  static constexpr int count = R;
};

// use(Rows<R>{}) for R rows, a power of two.
template <class Use>
__device__ __forceinline__ void with_rows(int rows, const Use& use) {
  switch (rows) {
    case 1:
      return use(Rows<1>{});
    case 2:
      return use(Rows<2>{});
    case 4:
      return use(Rows<4>{});
    case 8:
      return use(Rows<8>{});
    default:
      return use(Rows<ROWS>{});
  }
}

using Sums = float[ROWS * COLUMNS];

template <int R, class T>
__device__ __forceinline__ void add_products(Sums& sums, const Vector<T>* w, const float* rows, int vector, int k) {
  constexpr int N = Vector<T>::size;
  Vector<T> columns[COLUMNS];
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) columns[j] = w[j * 32];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float x[N];
    read_row<T>(x, rows + r * k, vector, k);
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) sums[r * COLUMNS + j] += x[i] * widen(columns[j].numbers[i]);
  }
}

template <int R>
__device__ __forceinline__ float add_lanes_of_rows(const Sums& sums) {
  float used[R * COLUMNS];
#pragma unroll
  for (int i = 0; i < R * COLUMNS; ++i) used[i] = sums[i];
  return add_lanes(used);
}

// A warp's columns for `padded` staged rows, of which `count` count.
template <class T>
__device__ __forceinline__ void multiply(Weights<T>& weights, const Product<T>& product, const Share& share,
                                         const float* rows, int first, int count, int padded) {
  const int k = product.k, vectors = k / Vector<T>::size, lane = int(threadIdx.x) % 32;
#pragma unroll 1
  for (int unit = share.first; unit < share.end; unit += WARPS) {
    Sums sums = {};
#pragma unroll 1
    for (int vector = lane; vector - lane < vectors; vector += 32) {
      const Vector<T>* w = weights.next();
      if (vector < vectors)
        with_rows(padded, [&](auto r) { add_products<decltype(r)::count>(sums, w, rows, vector, k); });
    }
    float sum;
    with_rows(padded, [&](auto r) { sum = add_lanes_of_rows<decltype(r)::count>(sums); });
    const int lanes = 32 / (padded * COLUMNS), number = lane / lanes;
    const int row = number / COLUMNS, column = unit * COLUMNS + number % COLUMNS;
    if (lane % lanes == 0 && row < count && column < product.columns) store(product, first + row, column, sum);
  }
}

template <class T>
__device__ __forceinline__ void run(Weights<T>& weights, const ClassTokens& p, const Product<T>& product,
                                    const Share& share, float* rows, int together) {
#pragma unroll 1
  for (int first = 0; first < product.rows; first += together) {
    const int count = product.rows - first < together ? product.rows - first : together;
    int padded = 1;
    while (padded < count) padded *= 2;
    __syncthreads();  // the rows before have been read
    stage_rows(rows, p, product, first, count, padded);
    __syncthreads();
    if (product.norm_weight && !product.pooled) {
#pragma unroll 1
      for (int row = int(threadIdx.x) / 32; row < count; row += WARPS)
        normalise(rows + row * product.k, product, p.eps);
      __syncthreads();
    }
    multiply(weights, product, share, rows, first, count, padded);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1) all_phases(ClassTokens p, int row_numbers) {
  Weights<T> weights(p, shared_memory(), row_numbers);
  float* rows = reinterpret_cast<float*>(shared_memory() + RING_BYTES);
#pragma unroll 1  // one copy of all this is long enough
  for (int phase = VALUES; phase < phases(p); ++phase) {
    if (phase > VALUES) wait_for_blocks();
#pragma unroll 1
    for (int index = 0; index < products(p, phase); ++index) {
      const auto product = describe<T>(p, phase, index);
      const Share share(p, phase, index, product.columns);
      if (share.begin < share.end) run(weights, p, product, share, rows, group_rows(product.k, row_numbers));
    }
  }
}

}  // namespace

int64_t class_tokens_workspace(int64_t clips, int frames, int c) {
  return clips * c * (2 * frames + (frames > 1 ? 2 + EXPANSION : 0));
}

int class_tokens(const ClassTokens& p, void* stream) {
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    // All that a block may have: then there is one for each multiprocessor.
    int limit;
    if (auto error = largest_shared_memory(limit)) return error;
    const size_t longest = sizeof(float) * EXPANSION * p.c;
    const size_t row_bytes = size_t(limit) < RING_BYTES + longest ? longest : limit - RING_BYTES;
    const int useful = (EXPANSION * p.c / COLUMNS + WARPS - 1) / WARPS;
    return launch_together(all_phases<T>, useful, THREADS, RING_BYTES + row_bytes, stream, p,
                           int(row_bytes / sizeof(float)));
  });
}

}  // namespace panda::cuda
