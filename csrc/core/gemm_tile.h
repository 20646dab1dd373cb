// What the matrix products of all tiers share: the epilogue of a tile, and the loops around a register tile for
// instructions that multiply a broadcast 32-bit element of A (a float, or two bfloat16) with a vector of B.
#pragma once
#include "gemm.h"
#include "math.h"
#include "scratch.h"

namespace panda::PANDA_TIER {

constexpr int kVectors = 2;  // columns of a register tile, in vectors
constexpr int kColumns = kVectors * kLanes;
#if defined(__AVX512F__)
constexpr int kRows = 13;  // 13 x 2 accumulators, two vectors of B, one of A: 29 of 32 registers
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6;
#else
constexpr int kRows = 5;  // one register is lost to the product where there is no fused multiply-add
#endif

// One vector of a row: sum + bias, activation, residual, store. `read` and `write` know whether it is whole.
template <class C, class Read, class R>
PANDA_INLINE vf finish_vector(const Gemm& g, vf sum, const R* residual, Read read) {
  constexpr Precision precision = sizeof(C) == 2 ? Precision::half : Precision::full;
  if (g.activation == Activation::gelu_erf) sum = gelu_erf<precision>(sum);
  return residual ? sum + read(residual) : sum;
}

// The epilogue of `rows` rows by one panel: sums [rows][32] into C, of type C, with a residual of type R.
template <class C, class R>
static void finish(const Gemm& g, const float* sums, int64_t row, int rows, int64_t panel) {
  constexpr int kParts = kPanel / kLanes;
  const int64_t column = panel * kPanel;
  const int width = g.n - column < kPanel ? int(g.n - column) : int(kPanel);
  const int whole = width / kLanes, left = width % kLanes;
  vf bias[kParts] = {};
  if (g.bias) {
    for (int i = 0; i < whole; ++i) bias[i] = load(g.bias + column + i * kLanes);
    if (left) bias[whole] = load_n(g.bias + column + whole * kLanes, left);
  }
  C* const columns = static_cast<C*>(g.c) + column;
  const R* residual = g.residual ? static_cast<const R*>(g.residual) + row * g.ldr + column : nullptr;
  for (int r = 0; r < rows; ++r, sums += kPanel) {
    C* c = columns + (g.places ? g.places[row + r] : row + r) * g.ldc;
    const R* added = residual ? residual + r * g.ldr : nullptr;
    const auto part = [&](int i) { return added ? added + i * kLanes : nullptr; };
    const auto read = [](const R* p) { return load(p); };
    if (whole == kParts) {
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i)
        store(c + i * kLanes, finish_vector<C>(g, load(sums + i * kLanes) + bias[i], part(i), read));
      continue;
    }
    for (int i = 0; i < whole; ++i)
      store(c + i * kLanes, finish_vector<C>(g, load(sums + i * kLanes) + bias[i], part(i), read));
    if (left) {
      const auto read_left = [left](const R* p) { return load_n(p, left); };
      const vf v = finish_vector<C>(g, load(sums + whole * kLanes) + bias[whole], part(whole), read_left);
      store_n(c + whole * kLanes, left, v);
    }
  }
}

using Finish = void (*)(const Gemm&, const float* sums, int64_t row, int rows, int64_t panel);

// The epilogue for the types of C and residual: adds bias to sums [rows][32], and so on, into C.
[[maybe_unused]] static Finish finish_for_bfloat16(const Gemm& g) {
  if (g.c_is_float) return g.residual_is_float ? finish<float, float> : finish<float, bfloat16>;
  return g.residual_is_float ? finish<bfloat16, float> : finish<bfloat16, bfloat16>;
}

// What the loops need to know of A and B: addresses in units of 32 bits, `steps` of them to a row of A or column of B.
struct Operands {
  const char* a;
  int64_t row_bytes;
  const uint32_t* b;  // null if the panels are made on the way
  int64_t steps;
};

template <class Dot, int rows>
static void register_tile(const char* a, int64_t row_bytes, const uint32_t* b, int64_t steps, float* sums, bool first) {
  vf acc[rows][kVectors] = {};
#pragma GCC unroll 2  // five of its twenty-five instructions are the loop's
  for (int64_t s = 0; s < steps; ++s, a += 4, b += kPanel) {
    vf y[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) y[v] = load(reinterpret_cast<const float*>(b) + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      float element;
      std::memcpy(&element, a + r * row_bytes, sizeof element);
      const vf x = splat(element);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Dot::add(x, y[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* sum = sums + r * kPanel + v * kLanes;
      store(sum, first ? acc[r][v] : load(sum) + acc[r][v]);
    }
}

using RegisterTile = void (*)(const char*, int64_t, const uint32_t*, int64_t, float*, bool);

template <class Dot, int most = kRows>
static RegisterTile register_tile_for(int rows) {
  if constexpr (most > 1)
    if (rows < most) return register_tile_for<Dot, most - 1>(rows);
  return register_tile<Dot, most>;
}

// Rows of A that make a block: as many as stay in the second-level cache while the panels of B pass by, but enough
// that a panel is worth fetching. A multiple of `tile`.
PANDA_INLINE int64_t block_rows(int64_t row_bytes, int64_t tile) {
  constexpr int64_t kBytes = 1 << 19, kFewest = 256;
  const int64_t rows = kBytes / row_bytes;
  return round_up(rows < kFewest ? kFewest : rows, tile);
}

// Longer sums are cut, so that a block of rows of A does fit; the sums of all panels then wait for their next part.
constexpr int64_t kDeep = 4 * kFlush;

PANDA_INLINE int64_t waiting_panels(int64_t steps, int64_t panel0, int64_t panel1) {
  return steps > kDeep ? panel1 - panel0 : 1;
}

// Spreads over the tiles of a part of B the fetching of the next, which lies behind it and is as long.
PANDA_INLINE void fetch_share(const uint32_t* next, int64_t steps, int64_t tile, int64_t tiles) {
  constexpr int64_t kFewestTiles = 8;  // for fewer it would be a burst that holds up the loads it is to speed up
  constexpr int64_t kLine = 64 / sizeof(uint32_t);
  if (tiles < kFewestTiles) return;
  const int64_t share = steps * kPanel / kLine / tiles;
  for (int64_t i = tile * share; i < (tile + 1) * share; ++i) __builtin_prefetch(next + i * kLine, 0, 2);
}

// Rows whose distance is a multiple of a page's size fall into the same set of the first-level cache, which has fewer
// ways than a tile has rows. Such a block is copied once, its rows a line further apart.
struct Aside {
  static constexpr int64_t kPage = 4096, kLine = 64;

  static bool needed(int64_t row_bytes) { return row_bytes % kPage == 0; }

  Aside(const Operands& o, int64_t rows)
      : stride(4 * smaller(o.steps, kDeep) + kLine), copy(needed(o.row_bytes) ? rows * stride : 0) {}

  const char* take(const char* a, int64_t row_bytes, int64_t rows, int64_t bytes) const {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(copy.data() + r * stride, a + r * row_bytes, size_t(bytes));
    return copy.data();
  }

  const int64_t stride;
  const Scratch<char> copy;
};

// Rows [0, rows) of o.a, which are rows row0... of C, by panels [panel0, panel1); part(panel, step, steps) tells where
// those steps of a panel are. Every kFlush steps of k all rows' sums go to the second-level sums [waiting panels][rows]
// [32], so that the panel's kFlush steps stay in the first-level cache while the rows pass by.
template <class Dot, class Part>
static void multiply_block(const Gemm& g, const Operands& o, Part part, Finish done, float* all_sums, int64_t row0,
                           int64_t rows, int64_t panel0, int64_t panel1) {
  const int64_t tiles = (rows + kRows - 1) / kRows;  // which share the rows evenly: no thin last one
  const int64_t waiting = o.steps > kDeep ? rows * kPanel : 0;
  const Aside aside(o, rows);
  const bool copied = Aside::needed(o.row_bytes);
  const int64_t row_bytes = copied ? aside.stride : o.row_bytes;
  for (int64_t deep = 0; deep < o.steps; deep += kDeep) {
    const int64_t end = smaller(deep + kDeep, o.steps);
    const char* a = o.a + 4 * deep;
    if (copied) a = aside.take(a, o.row_bytes, rows, 4 * (end - deep));
    for (int64_t panel = panel0; panel < panel1; ++panel)
      for (int64_t s = deep; s < end; s += kFlush) {
        const int64_t steps = smaller(end - s, kFlush);
        const uint32_t* b = part(panel, s, steps);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t start = t * rows / tiles;
          const int height = int((t + 1) * rows / tiles - start);
          float* sums = all_sums + (panel - panel0) * waiting + start * kPanel;
          const RegisterTile tile = register_tile_for<Dot>(height);
          if (o.b) fetch_share(b + steps * kPanel, steps, t, tiles);
          for (int j = 0; j < kPanel; j += kColumns)
            tile(a + start * row_bytes + 4 * (s - deep), row_bytes, b + j, steps, sums + j, s == 0);
          if (s + steps == o.steps) done(g, sums, row0 + start, height, panel);
        }
      }
  }
}

// The product of operands that the register tile can read as they are.
template <class Dot>
static void multiply_in_place(const Gemm& g, int64_t row_bytes, int64_t steps, Finish done, int64_t row0, int64_t row1,
                              int64_t panel0, int64_t panel1) {
  const int64_t block = smaller(block_rows(4 * smaller(steps, kDeep), kRows), row1 - row0);
  const int64_t waiting = waiting_panels(steps, panel0, panel1);
  const Scratch<float> sums(kPanel * block * waiting);
  const uint32_t* b = static_cast<const uint32_t*>(g.b);
  const auto part = [=](int64_t panel, int64_t s, int64_t) { return b + (panel * steps + s) * kPanel; };
  for (int64_t row = row0; row < row1; row += block) {
    const Operands o{static_cast<const char*>(g.a) + row * row_bytes, row_bytes, b, steps};
    multiply_block<Dot>(g, o, part, done, sums.data(), row, smaller(row1 - row, block), panel0, panel1);
  }
}

}  // namespace panda::PANDA_TIER
