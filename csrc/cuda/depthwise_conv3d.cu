// Both kernels walk down the rows of the image. A block has 16 neighbouring columns of 8 vectors of 16 bytes, so that a
// row it needs comes into the multiprocessor's cache once (18 columns for 16), whoever else reads it.
//
// Stencil: a thread owns a column in up to four frames, with the sums of three rows of them in registers: a token it
// loads serves all 27 taps at once. For four results it loads 12 tokens and the 27 taps, out of the cache; in registers
// those would take 216. Some 280 instructions a vector of results: 10 us of them on an H100 for 8 frames of 32 x 32
// patches of 1024 channels in 16 bits, against 11 us for the bytes, 17 with `add`.
//
// Gradient: 9 sums a channel, of one offset in time, and the nine tokens around in registers, three of them new a row.
#include "depthwise_conv3d.h"

#include "device.h"

namespace panda::cuda {
namespace {

constexpr int FRAMES = 4, TAPS = 27, LANES = 8, COLUMNS = 16, THREADS = LANES * COLUMNS;

// A thread's column and channel, and where the tokens of the channel lie. `across` is for the columns of a frame.
struct Place {
  int column, channel;
  int stride_w, stride_h, stride_t;  // in numbers

  __device__ Place(int tile, int vector_size, int h, int w, int c)
      : column(tile * COLUMNS + int(threadIdx.x) / LANES),
        channel((int(blockIdx.y) * LANES + int(threadIdx.x) % LANES) * vector_size),
        stride_w(c),
        stride_h(w * c),
        stride_t(h * w * c) {}

  __device__ int64_t at(int64_t frame, int row, int column) const {
    return frame * stride_t + int64_t(row) * stride_h + int64_t(column) * stride_w + channel;
  }
};

template <class T>
__device__ __forceinline__ void add_product(float (&sums)[Vector<T>::size], const Vector<T>& a, const Vector<T>& b) {
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) sums[i] += widen(a.numbers[i]) * widen(b.numbers[i]);
}

template <class T>
using Sums = float[FRAMES][Vector<T>::size];

// Adds what one row of tokens gives to the results of the row below it, its own and the one above: sums[0..2].
template <class T>
__device__ __forceinline__ void add_row(Sums<T> (&sums)[3], const Stencil& p, const Place& place, int64_t clip,
                                        int first, int row) {
  const T* x = static_cast<const T*>(p.x);
  // In reverse order tap (dt, dh, dw) is (2 - dt, 2 - dh, 2 - dw): 26 less its number.
  const T* taps = static_cast<const T*>(p.taps) + place.channel + (p.mirrored ? int64_t(TAPS - 1) * p.c : 0);
  const int step = p.mirrored ? -p.c : p.c;
#pragma unroll 1  // the loads of all three columns at once would not fit beside the sums
  for (int dw = 0; dw < 3; ++dw) {
    const int column = place.column + dw - 1;
    if (column < 0 || column >= p.w) continue;
    const T* token = x + place.at(clip * p.frames + first - 1, row, column);
    Vector<T> tokens[FRAMES + 2];
#pragma unroll
    for (int i = 0; i < FRAMES + 2; ++i, token += place.stride_t)
      tokens[i] = first + i > 0 && first + i <= p.frames ? load_vector(token) : Vector<T>{};
#pragma unroll
    for (int dh = 0; dh < 3; ++dh)
#pragma unroll
      for (int dt = 0; dt < 3; ++dt) {
        const auto tap = load_vector(taps + (dt * 9 + dh * 3 + dw) * step);
#pragma unroll
        for (int o = 0; o < FRAMES; ++o) add_product<T>(sums[2 - dh][o], tap, tokens[o + dt]);
      }
  }
}

template <class T>
__device__ __forceinline__ void store_row(const Sums<T>& sums, const Stencil& p, const Place& place, int64_t clip,
                                          int first, int row) {
  constexpr int N = Vector<T>::size;
  Vector<T> bias{};
  if (p.bias) bias = load_vector(static_cast<const T*>(p.bias) + place.channel);
#pragma unroll
  for (int o = 0; o < FRAMES; ++o) {
    if (first + o >= p.frames) break;
    const int64_t here = place.at(clip * p.frames + first + o, row, place.column);
    float result[N];
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] = sums[o][i] + widen(bias.numbers[i]);
    if (p.residual) {
      const auto x = load_vector(static_cast<const T*>(p.x) + here);
#pragma unroll
      for (int i = 0; i < N; ++i) result[i] += widen(x.numbers[i]);
    }
    store_vector(static_cast<T*>(p.y) + here, result);
    if (!p.add) continue;
    const int64_t token = ((clip * p.frames + first + o) * p.h + row) * p.w + place.column;
    const auto add = load_vector(static_cast<const T*>(p.add) + token * p.add_stride + place.channel);
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] += widen(add.numbers[i]);
    store_vector(static_cast<T*>(p.sum) + here, result);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) convolve(Stencil p, int rows) {
  const int tiles = (p.w + COLUMNS - 1) / COLUMNS, bands = (p.h + rows - 1) / rows;
  const int groups = (p.frames + FRAMES - 1) / FRAMES;
  const unsigned band = blockIdx.x / tiles, group = band / bands;
  const Place place(int(blockIdx.x % tiles), Vector<T>::size, p.h, p.w, p.c);
  if (place.channel >= p.c || place.column >= p.w) return;
  const int64_t clip = group / groups;
  const int first = int(group % groups) * FRAMES, begin = int(band % bands) * rows;
  const int end = begin + rows < p.h ? begin + rows : p.h;
  Sums<T> sums[3] = {};
  for (int row = begin - 1; row <= end; ++row) {
    if (row >= 0 && row < p.h) add_row<T>(sums, p, place, clip, first, row);
    if (row > begin) store_row<T>(sums[0], p, place, clip, first, row - 1);
#pragma unroll
    for (int o = 0; o < FRAMES; ++o)
#pragma unroll
      for (int i = 0; i < Vector<T>::size; ++i) {
        sums[0][o][i] = sums[1][o][i];
        sums[1][o][i] = sums[2][o][i];
        sums[2][o][i] = 0;
      }
  }
}

// The sums of a block's columns, in a fixed order, are added up in its first ones.
template <int N>
__device__ void add_columns(float (&sums)[N]) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = int(threadIdx.x) % LANES, column = int(threadIdx.x) / LANES;
#pragma unroll
  for (int i = 0; i < N; ++i) shared[(column * N + i) * LANES + lane] = sums[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float sum = 0;
    for (int k = 0; k < COLUMNS; ++k) sum += shared[(k * N + i) * LANES + lane];
    sums[i] = sum;
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void add_frame(float (&sums)[9][Vector<T>::size], float (&total)[Vector<T>::size],
                                          const StencilGradient& p, const Place& place, int64_t frame, int dt) {
  const int t = int(frame % p.frames) + dt - 1;
  const bool outside = t < 0 || t >= p.frames;
  const T* x = static_cast<const T*>(p.x);
  const T* grad = static_cast<const T*>(p.grad);
  Vector<T> near[3][3] = {};
  for (int row = -1; row < p.h; ++row) {
#pragma unroll
    for (int dw = 0; dw < 3; ++dw) {
      const int column = place.column + dw - 1;
      const bool inside = !outside && row + 1 < p.h && column >= 0 && column < p.w;
      near[0][dw] = near[1][dw];
      near[1][dw] = near[2][dw];
      near[2][dw] = inside ? load_vector(x + place.at(frame + dt - 1, row + 1, column)) : Vector<T>{};
    }
    if (row < 0) continue;
    const auto outer = load_vector(grad + place.at(frame, row, place.column));
#pragma unroll
    for (int i = 0; i < Vector<T>::size; ++i) total[i] += widen(outer.numbers[i]);
#pragma unroll
    for (int k = 0; k < 9; ++k) add_product<T>(sums[k], outer, near[k / 3][k % 3]);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) gradient(StencilGradient p) {
  constexpr int N = Vector<T>::size;
  const int dt = int(blockIdx.x % 3), segment = int(blockIdx.x / 3), tiles = (p.w + COLUMNS - 1) / COLUMNS;
  const int64_t units = p.clips * p.frames * tiles;
  float sums[9][N] = {}, total[N] = {};
  const int channel = Place(0, N, p.h, p.w, p.c).channel;
  for (int64_t unit = units * segment / p.segments; unit < units * (segment + 1) / p.segments; ++unit) {
    const Place place(int(unit % tiles), N, p.h, p.w, p.c);
    if (place.channel < p.c && place.column < p.w) add_frame<T>(sums, total, p, place, unit / tiles, dt);
  }
  const bool writes = threadIdx.x < LANES && channel < p.c;
  float* partial = p.partial + (int64_t(segment) * (TAPS + 1) + dt * 9) * p.c + channel;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    add_columns(sums[k]);
    if (writes)
#pragma unroll
      for (int i = 0; i < N; ++i) partial[int64_t(k) * p.c + i] = sums[k][i];
  }
  add_columns(total);
  if (writes && dt == 2)
#pragma unroll
    for (int i = 0; i < N; ++i) partial[int64_t(9) * p.c + i] = total[i];
}

unsigned channel_blocks(int c, int vector_size) { return unsigned((c / vector_size + LANES - 1) / LANES); }

}  // namespace

int stencil(const Stencil& p, void* stream) {
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const unsigned channels = channel_blocks(p.c, Vector<T>::size);
    const int64_t columns = p.clips * ((p.frames + FRAMES - 1) / FRAMES) * ((p.w + COLUMNS - 1) / COLUMNS);
    // Fewer rows a block read more rows twice, but two blocks for each multiprocessor should be there.
    int rows = 16;
    while (rows > 4 && columns * channels * ((p.h + rows - 1) / rows) < 2 * 132) rows /= 2;
    return launch(convolve<T>, dim3(unsigned(columns * ((p.h + rows - 1) / rows)), channels), THREADS, 0, stream, p,
                  rows);
  });
}

int stencil_gradient(const StencilGradient& p, void* stream) {
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const size_t shared = sizeof(float) * THREADS * Vector<T>::size;
    return launch(gradient<T>, dim3(unsigned(p.segments) * 3, channel_blocks(p.c, Vector<T>::size)), THREADS, shared,
                  stream, p);
  });
}

}  // namespace panda::cuda
