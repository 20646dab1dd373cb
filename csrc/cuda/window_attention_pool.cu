// A block has 64 windows and two heads, and walks over the channels twice, 32 at a time. First it multiplies a chunk of
// the folded query q_h Wk_h and meets it, in registers, with the four tokens of each window: the logits. After the
// softmax it pools a chunk of the tokens and multiplies that by Wv_h into the output, so that no [windows, heads, C]
// leaves the multiprocessor.
//
// The second walk goes backwards: the chunks of tokens that the first one ended with are still in shared memory, as
// many as fit. Means need no subtraction a token: sum_s P_s rstd_s (x_s - mean_s) = sum_s P_s rstd_s x_s - const, and
// likewise for the logits, with the sum of the folded query.
//
// An H100, 8 frames (2048 windows), C = 1024, 8 heads, computed and not measured; 128 blocks for 132 multiprocessors:
//   from L2                1.8 MB a block: 1 of weights, 0.5 of tokens, 0.34 of them again (22 chunks of 32);
//                          all 247 MB: 45 us at 5.5 TB/s, 18 us at 64 bytes a clock into each multiprocessor
//   shared memory          6.6 MB a block written and read: 31 us at 128 bytes a clock
//   instructions           677 a warp for a chunk, both walks: 25 us
//   16 x 8 x 16 products   16 384 a block, 8.6 GFLOP in all: 14 us at the 600 TFLOPS of mma.sync
//
// Triton's kernel reads all tokens twice, 268 MB, 49 us. Both are bound by L2, so this is 8 % better on paper, and what
// the overlap of copies and products gives. Of all tiles that fill the device 64 windows x 2 heads read least; less
// takes blocks that share tokens, a cluster.
#include "window_attention_pool.h"

#include "device.h"

namespace panda::cuda {
namespace {

constexpr int WINDOWS = 64, HEADS = 2, S = 4, CHUNK = 32, VECTORS = CHUNK / 8, THREADS = 256;
constexpr int ROW_BYTES = CHUNK * 2;

// Tiles in shared memory are rows of one chunk of channels. Vectors of eight numbers are permuted within a row so that
// neither eight rows at one vector nor two whole rows meet in a bank; eight rows further they lie as before.
__device__ __forceinline__ int place_of(int row, int vector) {
  return row * CHUNK + (vector ^ (row / 2 % VECTORS)) * 8;
}

// Chunks of tokens in shared memory: n % count without a division, for n below 2^16.
struct Slots {
  int count;
  uint32_t reciprocal;

  explicit Slots(int count) : count(count), reciprocal(uint32_t((uint64_t(1) << 32) / count + 1)) {}
  __device__ int of(int n) const { return n - count * int(uint64_t(uint32_t(n)) * reciprocal >> 32); }
};

template <class T>
__device__ __forceinline__ void widen_pair(uint32_t pair, float (&to)[2]) {
  to[0] = widen(T{uint16_t(pair)});
  to[1] = widen(T{uint16_t(pair >> 16)});
}

template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float first, float second) {
  T low, high;
  narrow(first, low);
  narrow(second, high);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

// STEPS: a head's width in 16s, rounded up. STAGES: chunks of weights in shared memory.
template <class T, int STEPS, int STAGES>
struct Attention {
  static constexpr int ROWS = STEPS * 16;
  static constexpr int WEIGHTS = HEADS * ROWS, POOLED = HEADS * WINDOWS, TOKENS = S * WINDOWS;  // rows of a tile

  // A window's P_s rstd_s, and less the sum of their products with the means.
  struct Weights {
    float factors[HEADS][S], shift[HEADS];
  };

  const WindowAttention& p;
  const Slots slots;
  const int chunks = p.c / CHUNK, width = p.c / p.heads, head = int(blockIdx.x) * HEADS;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t first = int64_t(blockIdx.y) * WINDOWS;
  // The window and vector a thread copies and pools.
  const int window = int(threadIdx.x) / VECTORS, vector = int(threadIdx.x) % VECTORS, own = place_of(window, vector);
  const bool inside = first + window < p.windows;
  const T* const x = static_cast<const T*>(p.x) + (inside ? p.places[first + window] : 0) * p.c + vector * 8;
  const T* const wkv = static_cast<const T*>(p.wkv) + int64_t(head * width) * p.c + vector * 8;
  T* const weights = reinterpret_cast<T*>(shared_memory());
  T* const pooled = weights + STAGES * WEIGHTS * CHUNK;  // two
  T* const tokens = pooled + 2 * POOLED * CHUNK;

  static constexpr size_t shared_bytes(int slots) {
    return size_t(STAGES * WEIGHTS + 2 * POOLED + slots * TOKENS) * ROW_BYTES;
  }

  // Step `chunks + i` of the 2 * chunks has chunk `chunks - 1 - i` again.
  __device__ int chunk_of(int step) const { return step < chunks ? step : 2 * chunks - 1 - step; }
  __device__ T* weights_of(int step) const { return weights + step % STAGES * WEIGHTS * CHUNK; }
  __device__ T* pooled_of(int step) const { return pooled + step % 2 * POOLED * CHUNK; }
  __device__ T* tokens_of(int step) const { return tokens + slots.of(chunk_of(step)) * TOKENS * CHUNK; }

  // Rows beyond a head's width have its last one: they meet zeros of q, or give columns that are not stored.
  __device__ __forceinline__ void fetch_weights(int step) const {
    const T* from = wkv + (step < chunks ? 0 : int64_t(p.c) * p.c) + chunk_of(step) * CHUNK;
    T* to = weights_of(step) + own;
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
      for (int d = 0; d < ROWS; d += WINDOWS) {
        const int row = d + window < width ? d + window : width - 1;
        if (d + WINDOWS <= ROWS || d + window < ROWS)
          copy_async(to + (h * ROWS + d) * CHUNK, from + (h * width + row) * p.c, true);
      }
  }

  __device__ __forceinline__ void fetch_tokens(int step) const {
    const T* from = x + chunk_of(step) * CHUNK;
    T* to = tokens_of(step) + own;
#pragma unroll
    for (int s = 0; s < S; ++s)
      copy_async(to + s * WINDOWS * CHUNK, from + (inside ? (s / 2 * p.w + s % 2) * p.c : 0), inside);
  }

  // Starts the copies for a step. On the way back tokens are pooled a step before the product wants them.
  __device__ __forceinline__ void fetch(int step) const {
    const int wanted = step < chunks ? step : step + 1;
    if (step < 2 * chunks) fetch_weights(step);
    if (wanted < chunks || (wanted >= chunks + slots.count && wanted < 2 * chunks)) fetch_tokens(wanted);
    commit_copies();
  }

  // What a step needs has come, for all threads, and the step before is done with.
  __device__ __forceinline__ void next(int step) const {
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    fetch(step + STAGES - 1);
  }

  // On the first walk a warp has 16 windows and 16 channels of every chunk, and both heads.
  __device__ int folding_rows() const { return warp % 4 * 16; }
  __device__ int folding_half() const { return warp / 4; }

  __device__ __forceinline__ void load_queries(uint32_t (&queries)[HEADS][STEPS][4]) const {
    const T* q = static_cast<const T*>(p.q) + head * width;
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = first + folding_rows() + lane / 4 + i % 2 * 8;
          const int d = k * 16 + lane % 4 * 2 + i / 2 * 8;
          const bool within = row < p.windows && d < width;
          queries[h][k][i] = within ? *reinterpret_cast<const uint32_t*>(q + row * p.c + h * width + d) : 0;
        }
  }

  // A chunk of gamma * q_h Wk_h, as fragments of two 16 x 8 products.
  __device__ __forceinline__ void fold(int step, const uint32_t (&queries)[HEADS][STEPS][4],
                                       float (&folded)[HEADS][2][4]) const {
    const T* keys = weights_of(step) + place_of(lane % 16, folding_half() * 2 + lane / 16);
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        uint32_t key[4];
        load_matrices<true>(key, keys + (h * ROWS + k * 16) * CHUNK);
#pragma unroll
        for (int n = 0; n < 2; ++n) multiply_add(folded[h][n], queries[h][k], key[n * 2], key[n * 2 + 1], T{});
      }
    const T* gamma = static_cast<const T*>(p.norm_weight) + (step * CHUNK + folding_half() * 16 + lane % 4 * 2);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float factors[2];
      widen_pair<T>(*reinterpret_cast<const uint32_t*>(gamma + n * 8), factors);
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) folded[h][n][i] *= factors[i % 2];
    }
  }

  // Adds the products of the folded queries with the tokens, and last with one, for two windows a thread.
  __device__ __forceinline__ void meet(int step, const float (&folded)[HEADS][2][4],
                                       float (&products)[HEADS][S + 1][2]) const {
    const T* from = tokens_of(step) + place_of(folding_rows() + lane % 16, folding_half() * 2 + lane / 16);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      uint32_t pairs[4];
      load_matrices(pairs, from + s * WINDOWS * CHUNK);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float token[2];
        widen_pair<T>(pairs[m], token);
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
          for (int i = 0; i < 2; ++i) products[h][s][m % 2] += folded[h][m / 2][m % 2 * 2 + i] * token[i];
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
      for (int i = 0; i < 8; ++i) products[h][S][i % 4 / 2] += folded[h][i / 4][i % 4];
  }

  // The products of a window by its number in the block: the sums of both halves of the chunks.
  __device__ void exchange(float (&products)[HEADS][S + 1][2], float (&sums)[HEADS][S + 1]) const {
    constexpr int N = HEADS * (S + 1);
    float* shared = reinterpret_cast<float*>(pooled_of(chunks + 1));  // the first pooled chunk goes to the other
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = products[n / (S + 1)][n % (S + 1)][r];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) shared[(folding_half() * WINDOWS + folding_rows() + r * 8 + lane / 4) * N + n] = sum;
      }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n)
      sums[n / (S + 1)][n % (S + 1)] = shared[window * N + n] + shared[(WINDOWS + window) * N + n];
  }

  __device__ void softmax(const float (&sums)[HEADS][S + 1], Weights& of) const {
    float means[S] = {}, rstds[S] = {};
#pragma unroll
    for (int s = 0; s < S; ++s)
      if (inside) {
        means[s] = p.norms[s * p.windows + first + window];
        rstds[s] = p.norms[(S + s) * p.windows + first + window];
      }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float logits[S], total = 0;
#pragma unroll
      for (int s = 0; s < S; ++s) logits[s] = (sums[h][s] - means[s] * sums[h][S]) * rstds[s] * p.scale;
      const float top = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
#pragma unroll
      for (int s = 0; s < S; ++s) total += logits[s] = __expf(logits[s] - top);
      of.shift[h] = 0;
#pragma unroll
      for (int s = 0; s < S; ++s) {
        of.factors[h][s] = logits[s] / total * rstds[s];
        of.shift[h] -= of.factors[h][s] * means[s];
      }
    }
  }

  // gamma * sum_s P_s xhat_s + beta, a vector of a window for each head.
  __device__ __forceinline__ void pool(int step, const Weights& of) const {
    const T* from = tokens_of(step) + own;
    const int channel = chunk_of(step) * CHUNK + vector * 8;
    const auto gamma = load_vector(static_cast<const T*>(p.norm_weight) + channel);
    const auto beta = load_vector(static_cast<const T*>(p.norm_bias) + channel);
    float sums[HEADS][8];
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] = of.shift[h];
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const auto token = load_vector(from + s * WINDOWS * CHUNK);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int h = 0; h < HEADS; ++h) sums[h][i] += of.factors[h][s] * widen(token.numbers[i]);
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] = sums[h][i] * widen(gamma.numbers[i]) + widen(beta.numbers[i]);
      store_vector(pooled_of(step) + own + h * WINDOWS * CHUNK, sums[h]);
    }
  }

  // On the way back a warp has a head, 32 windows and half of the head's columns.
  __device__ int output_head() const { return warp / 4; }
  __device__ int output_rows() const { return warp % 4 / 2 * 32; }
  __device__ int output_columns() const { return warp % 2 * STEPS * 8; }

  __device__ __forceinline__ void project(int step, float (&sums)[2][STEPS][4]) const {
    const T* rows = pooled_of(step) + (output_head() * WINDOWS + output_rows()) * CHUNK;
    const T* values = weights_of(step) + (output_head() * ROWS + output_columns()) * CHUNK;
    uint32_t left[2][2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        load_matrices(left[m][k], rows + place_of(lane % 16, k * 2 + lane / 16) + m * 16 * CHUNK);
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
      uint32_t value[4];
      load_matrices(value, values + place_of(lane % 8, lane / 8) + n * 8 * CHUNK);
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add(sums[m][n], left[m][k], value[k * 2], value[k * 2 + 1], T{});
    }
  }

  __device__ __forceinline__ void store(const float (&sums)[2][STEPS][4]) const {
    T* out = static_cast<T*>(p.out) + (head + output_head()) * width;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < STEPS; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int64_t row = first + output_rows() + m * 16 + r * 8 + lane / 4;
          const int d = output_columns() + n * 8 + lane % 4 * 2;
          if (row < p.windows && d < width)
            *reinterpret_cast<uint32_t*>(out + row * p.c + d) =
                narrow_pair<T>(sums[m][n][r * 2], sums[m][n][r * 2 + 1]);
        }
  }
};

template <class T, int STEPS, int STAGES>
__global__ void __launch_bounds__(THREADS, 1) attend_windows(WindowAttention p, Slots slots) {
  using Here = Attention<T, STEPS, STAGES>;
  const Here here{p, slots};
  const int chunks = here.chunks;
  for (int step = 0; step < STAGES - 1; ++step) here.fetch(step);
  float sums[HEADS][S + 1];
  {
    uint32_t queries[HEADS][STEPS][4];
    here.load_queries(queries);
    float products[HEADS][S + 1][2] = {};
    for (int step = 0; step < chunks; ++step) {
      here.next(step);
      float folded[HEADS][2][4] = {};
      here.fold(step, queries, folded);
      here.meet(step, folded, products);
    }
    here.exchange(products, sums);
  }
  typename Here::Weights weights;
  here.softmax(sums, weights);
  here.pool(chunks, weights);
  float outputs[2][STEPS][4] = {};
  for (int step = chunks; step < 2 * chunks; ++step) {
    here.next(step);
    if (step + 1 < 2 * chunks) here.pool(step + 1, weights);
    here.project(step, outputs);
  }
  here.store(outputs);
}

template <class T, int STEPS, int STAGES>
int attend_in(const WindowAttention& p, int bytes, void* stream) {
  using Here = Attention<T, STEPS, STAGES>;
  int slots = p.c / CHUNK > STAGES ? p.c / CHUNK : STAGES;
  while (slots > STAGES && Here::shared_bytes(slots) > size_t(bytes)) --slots;
  const dim3 grid(unsigned(p.heads / HEADS), unsigned((p.windows + WINDOWS - 1) / WINDOWS));
  return launch(attend_windows<T, STEPS, STAGES>, grid, THREADS, Here::shared_bytes(slots), stream, p, Slots(slots));
}

template <class T, int STEPS>
int attend_as(const WindowAttention& p, void* stream) {
  int bytes;
  if (const int error = largest_shared_memory(bytes)) return error;
  if (Attention<T, STEPS, 3>::shared_bytes(3) <= size_t(bytes)) return attend_in<T, STEPS, 3>(p, bytes, stream);
  return attend_in<T, STEPS, 2>(p, bytes, stream);  // 92 KB at the most
}

bool is_served(const WindowAttention& p) {
  return p.dtype != Dtype::float32 && p.windows <= int64_t(65535) * WINDOWS && p.c % CHUNK == 0 && p.heads > 0 &&
         p.heads % HEADS == 0 && p.c % (p.heads * 16) == 0 && p.c / p.heads <= 176;
}

}  // namespace

int attend(const WindowAttention& p, void* stream) {
  if (!is_served(p)) return 1;
  if (p.windows == 0) return 0;
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      // 128 and 176 columns, the widths of C = 1024 and 1408; more instances would take minutes to build.
      return p.c / p.heads <= 128 ? attend_as<T, 8>(p, stream) : attend_as<T, 11>(p, stream);
    }
    return 1;
  });
}

}  // namespace panda::cuda
