#include "gemm.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

namespace panda {

namespace {

uint16_t rounded(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return x == x ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t((u | 0x400000u) >> 16);
}

uint16_t read_bits(const float* w, int64_t i) { return rounded(w[i]); }
uint16_t read_bits(const bfloat16* w, int64_t i) { return w[i].bits; }

void pack_float(const float* w, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k, float* packed) {
  for (int64_t first = 0; first < n; first += kPanel)
    for (int64_t j = 0; j < k; ++j)
      for (int64_t i = first; i < first + kPanel; ++i) *packed++ = i < n ? w[i * row_stride + j * column_stride] : 0.0f;
}

template <class T>
void pack_pairs(const T* w, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k, uint16_t* packed) {
  for (int64_t first = 0; first < n; first += kPanel)
    for (int64_t pair = 0; pair < round_up(k, 32); pair += 2)
      for (int64_t i = first; i < first + kPanel; ++i)
        for (int64_t j = pair; j < pair + 2; ++j)
          *packed++ = i < n && j < k ? read_bits(w, i * row_stride + j * column_stride) : 0;
}

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void pack(Dtype to, Dtype from, const void* w, int64_t row_stride, int64_t column_stride, int64_t n, int64_t k,
          void* packed) {
  if (to == Dtype::float32)
    pack_float(static_cast<const float*>(w), row_stride, column_stride, n, k, static_cast<float*>(packed));
  else if (from == Dtype::float32)
    pack_pairs(static_cast<const float*>(w), row_stride, column_stride, n, k, static_cast<uint16_t*>(packed));
  else
    pack_pairs(static_cast<const bfloat16*>(w), row_stride, column_stride, n, k, static_cast<uint16_t*>(packed));
}

void* scratch(size_t bytes) {
  thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = size_t(round_up(int64_t(bytes), 4096));
    buffer.data = std::aligned_alloc(64, buffer.bytes);
    if (!buffer.data) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

void gemm(Dtype dtype, const Gemm& g, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
  if (dtype == Dtype::float32)
    kernels().gemm_float32(g, row0, row1, panel0, panel1);
  else
    kernels().gemm_bfloat16(g, row0, row1, panel0, panel1);
}

}  // namespace panda
