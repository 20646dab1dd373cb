// bfloat16 product with AMX tiles: 32 rows by one panel as 2 x 2 tiles of 16 x 16 sums.
#define PANDA_TIER amx
#include "gemm_tile.h"

namespace panda::amx {

namespace {

constexpr int kTileRows = 16, kStep = 32;  // a step multiplies 32 of k
constexpr int kPair = 2 * kTileRows;       // rows of a pair of tiles
constexpr int64_t kSteps = 16;             // most steps at once: a panel's 32 KiB stay in the first-level cache
constexpr int64_t kPartsDeep = 4;  // longer sums are cut, so that a block of rows of A stays in the second level

// Tiles 0..3 hold sums (upper left, upper right, lower left, lower right), 4 and 5 rows of A, 6 and 7 columns of B.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfig(int a_rows) {
    const int upper = a_rows < kTileRows ? a_rows : kTileRows, lower = a_rows - upper;
    const int heights[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    for (int i = 0; i < 8; ++i) {
      rows[i] = uint8_t(heights[i] ? heights[i] : 1);
      row_bytes[i] = 64;
    }
  }
};

// The barrier: GCC's own intrinsic tells the compiler of the first eight bytes only.
void configure(const TileConfig& config) {
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// oneDNN multiplies with AMX in the same threads and configures tiles as it likes.
class TileState {
 public:
  TileState() { _tile_storeconfig(saved_); }
  ~TileState() {
    if (saved_[0])
      _tile_loadconfig(saved_);
    else
      _tile_release();
  }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

 private:
  alignas(64) uint8_t saved_[64];
};

template <bool two>
void sum_pair(const char* a, int64_t row_bytes, const char* b, int64_t steps, float* sums, bool first) {
  constexpr int kRowBytes = 4 * kPanel;
  float* lower = sums + kTileRows * kPanel;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(1, sums + 16, kRowBytes);
    if constexpr (two) {
      _tile_loadd(2, lower, kRowBytes);
      _tile_loadd(3, lower + 16, kRowBytes);
    }
  }
  for (int64_t s = 0; s < steps; ++s, a += 2 * kStep, b += kTileRows * kRowBytes) {
    _tile_loadd(6, b, kRowBytes);
    _tile_loadd(4, a, row_bytes);
    _tile_loadd(7, b + 64, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (two) {
      _tile_loadd(5, a + kTileRows * row_bytes, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + 16, kRowBytes);
  if constexpr (two) {
    _tile_stored(2, lower, kRowBytes);
    _tile_stored(3, lower + 16, kRowBytes);
  }
}

// `count` steps from step s on, of rows [row, row + rows) by one panel: added to sums [rows][32]; the last ones finish.
void multiply_part(const Gemm& g, Finish done, float* sums, int64_t row, int64_t rows, int64_t panel, int64_t s,
                   int64_t count) {
  const int64_t steps = padded_k(Dtype::bfloat16, g.k) / kStep, row_bytes = 2 * g.lda;
  const char* a = static_cast<const char*>(g.a) + row * row_bytes + s * 2 * kStep;
  const char* b = static_cast<const char*>(g.b) + (panel * steps + s) * kTileRows * kPanel * 4;
  for (int64_t r = 0; r < rows; r += kPair, sums += kPair * kPanel) {
    const int left = int(smaller(rows - r, kPair));
    if (left < kPair) configure(TileConfig(left));
    (left > kTileRows ? sum_pair<true> : sum_pair<false>)(a + r * row_bytes, row_bytes, b, count, sums, s == 0);
    if (left < kPair) configure(TileConfig(kPair));
    if (s + count == steps) done(g, sums, row + r, left, panel);
  }
}

}  // namespace

void gemm_bfloat16(const Gemm& g, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
  const int64_t steps = padded_k(Dtype::bfloat16, g.k) / kStep;
  const int64_t parts = (steps + kSteps - 1) / kSteps, part = (steps + parts - 1) / parts;
  const int64_t deep = kPartsDeep * part;
  const int64_t block = smaller(block_rows(64 * smaller(steps, deep), kPair), round_up(row1 - row0, kPair));
  const int64_t waiting = steps > deep ? block * kPanel : 0;
  const Scratch<float> sums(waiting ? waiting * (panel1 - panel0) : block * kPanel);
  const Finish done = finish_for_bfloat16(g);
  const TileState restored_at_the_end;
  configure(TileConfig(kPair));
  for (int64_t row = row0; row < row1; row += block)
    for (int64_t start = 0; start < steps; start += deep)
      for (int64_t panel = panel0; panel < panel1; ++panel)
        for (int64_t s = start; s < smaller(start + deep, steps); s += part)
          multiply_part(g, done, sums.data() + (panel - panel0) * waiting, row, smaller(row1 - row, block), panel, s,
                        smaller(steps - s, part));
}

}  // namespace panda::amx
