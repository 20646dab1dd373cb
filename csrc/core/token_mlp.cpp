#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "drivers.h"
#include "parallel.h"
#include "product.h"
#include "tuning.h"

namespace panda {

namespace {

// Of a few words spread over a row: rows that differ will hardly agree in all of them, and are compared if they do.
uint64_t sample_hash(const char* row, int64_t bytes) {
  constexpr int64_t kWords = 16, kWord = sizeof(uint64_t);
  const int64_t step = std::max(kWord, bytes / kWords);
  uint64_t hash = 0;
  for (int64_t at = 0; at < bytes; at += step) {
    uint64_t word = 0;
    std::memcpy(&word, row + at, size_t(std::min(kWord, bytes - at)));
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

// The rows that are computed, and those that repeat one of them. A video's split token ends every row of windows.
struct Rows {
  std::vector<int64_t> own;
  struct Copy {
    int64_t of, to;
  };
  std::vector<Copy> copies;

  Rows(const char* x, int64_t count, int64_t bytes) {
    std::unordered_map<uint64_t, int64_t> seen;
    for (int64_t row = 0; row < count; ++row) {
      const auto [found, is_new] = seen.try_emplace(sample_hash(x + row * bytes, bytes), row);
      if (!is_new && std::memcmp(x + found->second * bytes, x + row * bytes, size_t(bytes)) == 0)
        copies.push_back({found->second, row});
      else
        own.push_back(row);
    }
  }
};

}  // namespace

void token_mlp(const TokenMlp& a) {
  const int64_t size = size_of(a.dtype), row_bytes = a.c * size, stride = padded_k(a.dtype, a.hidden);
  const char* x = static_cast<const char*>(a.x);
  const Rows all(x, a.rows, row_bytes);
  const int64_t count = int64_t(all.own.size());
  const int64_t block = std::min(count, tuning().band_tokens * (a.dtype == Dtype::float32 ? 1 : 2));
  ProductRows input(a.dtype, block, a.c);
  Scratch<char> gathered(all.copies.empty() ? 1 : block * row_bytes), hidden(block * stride * size);
  if (stride != a.hidden) std::memset(hidden.data(), 0, block * stride * size);
  for (int64_t i = 0; i < count; i += block) {
    const int64_t rows = std::min(block, count - i);
    const int64_t* places = all.own.data() + i;
    const char* from = x + i * row_bytes;
    if (!all.copies.empty()) {
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(gathered.data() + r * row_bytes, x + places[r] * row_bytes, size_t(row_bytes));
      from = gathered.data();
    }
    Gemm first{input.get(from, a.c, rows), input.stride(a.c), a.w1, a.c, a.hidden, hidden.data(), stride};
    first.bias = a.b1;
    first.activation = Activation::gelu_erf;
    product(a.dtype, first, rows);
    Gemm second{hidden.data(), stride, a.w2, a.hidden, a.n, a.out, a.n};
    second.bias = a.b2;
    second.places = places;
    product(a.dtype, second, rows);
  }
  char* out = static_cast<char*>(a.out);
  parallel_for(int64_t(all.copies.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      std::memcpy(out + all.copies[i].to * a.n * size, out + all.copies[i].of * a.n * size, size_t(a.n * size));
  });
}

}  // namespace panda
