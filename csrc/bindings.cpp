// The CPU core as torch ops, through the LibTorch stable ABI: one binary for every torch from 2.11 and any Python 3.
// Callers (panda_kernels/backends/cpu) allocate the results. Whatever would have the core read or write outside a
// tensor is refused here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "core/batch_statistics.h"
#include "core/clips.h"
#include "core/drivers.h"
#include "core/images.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "core/product.h"
#include "core/tier.h"
#include "core/tuning.h"
#include "core/weight_gradient.h"
#include "core/window_pool_gradient.h"
#include "tensors.h"

namespace {

int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Byte:
      return 1;
    default:
      STD_TORCH_CHECK(false, "panda_kernels: no results of type ", torch::headeronly::toString(type));
  }
}

// Uninitialised, in memory that earlier results have left.
Tensor result(std::vector<int64_t> sizes, ScalarType type) {
  constexpr int64_t kMost = int64_t(1) << 46;
  const int64_t element = bytes_of(type);
  std::vector<int64_t> strides(sizes.size());
  int64_t bytes = element;
  for (size_t i = sizes.size(); i-- > 0; bytes *= sizes[i]) {
    STD_TORCH_CHECK(sizes[i] > 0 && sizes[i] <= kMost / bytes, "panda_kernels: no result has a side of ", sizes[i]);
    strides[i] = bytes / element;
  }
  return torch::stable::from_blob(panda::take_pages(bytes), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                  [](void* data) { panda::give_pages(data); });
}

void batch_statistics(const Tensor& x, Tensor result) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [rows, c] = sizes<2>(x);
  STD_TORCH_CHECK(rows > 0, "panda_kernels: expected tokens, got none");
  panda::batch_statistics(dtype, in(x, dtype, {rows, c}), rows, c, floats_out(result, {2, c}));
}

void affine(const Tensor& x, const Tensor& scale, const Tensor& shift, Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [rows, c] = sizes<2>(x);
  panda::affine({dtype, in(x, dtype, {rows, c}), c, floats(scale, {c}), floats(shift, {c}), out(y, dtype, {rows, c})},
                rows);
}

void pack(const Tensor& w, int64_t matrices, bool transposed, Tensor to) {
  const panda::Dtype dtype = dtype_of(w);
  const auto [found, rows, columns] = sizes<3>(w);
  const int64_t n = transposed ? columns : rows, k = transposed ? rows : columns;
  STD_TORCH_CHECK(found == matrices, "panda_kernels: expected ", matrices, " weights to pack, got ", found);
  packed(to, dtype, n, k, matrices);
  for (int64_t i = 0; i < matrices; ++i)
    panda::pack(dtype, dtype, static_cast<const char*>(w.const_data_ptr()) + i * w.stride(0) * panda::size_of(dtype),
                w.stride(transposed ? 2 : 1), w.stride(transposed ? 1 : 2), n, k,
                static_cast<char*>(to.mutable_data_ptr()) + i * panda::packed_bytes(dtype, n, k));
}

void depthwise_conv3d(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, int64_t kt, int64_t kh,
                      int64_t kw, Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [b, t, h, w, c] = sizes<5>(x);
  STD_TORCH_CHECK(kt > 0 && kh > 0 && kw > 0, "panda_kernels: expected a kernel, got ", kt, " x ", kh, " x ", kw);
  panda::depthwise_conv3d({dtype, in(x, dtype, {b, t, h, w, c}), floats(taps, {kt * kh * kw, c}),
                           bias ? floats(*bias, {c}) : nullptr, out(y, dtype, {b, t, h, w, c}), b, t, h, w, c, int(kt),
                           int(kh), int(kw)});
}

void depthwise_gradient(const Tensor& x, const Tensor& grad, int64_t kt, int64_t kh, int64_t kw, Tensor taps,
                        Tensor bias) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [b, t, h, w, c] = sizes<5>(x);
  STD_TORCH_CHECK(kt > 0 && kh > 0 && kw > 0, "panda_kernels: expected a kernel, got ", kt, " x ", kh, " x ", kw);
  panda::depthwise_gradient({dtype, in(x, dtype, {b, t, h, w, c}), in(grad, dtype, {b, t, h, w, c}),
                             floats_out(taps, {kt * kh * kw, c}), floats_out(bias, {c}), b, t, h, w, c, int(kt),
                             int(kh), int(kw)});
}

void patch_embed(const Tensor& pixels, const std::optional<Tensor>& present, const Tensor& normalise, int64_t patch,
                 const Tensor& weight, const std::optional<Tensor>& bias, Tensor y) {
  const panda::Dtype dtype = dtype_of(y);
  const int64_t c = sizes<5>(y)[4];
  panda::Pixels p{};
  const auto [frames, h, w] = pixels_of(pixels, present, normalise, patch, p);
  const int64_t clips = pixels.size(0);
  panda::patch_embed(dtype, p, clips * frames, h, w, packed(weight, dtype, c, 3 * patch * patch),
                     bias ? floats(*bias, {c}) : nullptr, c, out(y, dtype, {clips, frames, h, w, c}));
}

void patch_embed_gradient(const Tensor& grad, const Tensor& pixels, const std::optional<Tensor>& present,
                          const Tensor& normalise, int64_t patch, bool add, Tensor weight, Tensor bias) {
  const panda::Dtype dtype = dtype_of(grad);
  const int64_t c = sizes<5>(grad)[4];
  panda::Pixels p{};
  const auto [frames, h, w] = pixels_of(pixels, present, normalise, patch, p);
  const int64_t clips = pixels.size(0);
  panda::patch_embed_gradient(dtype, p, clips * frames, h, w, in(grad, dtype, {clips, frames, h, w, c}), c, add,
                              floats_out(weight, {c, 3 * patch * patch}), floats_out(bias, {c}));
}

panda::LocalEncodingWeights local_weights(panda::Dtype dtype, int64_t c, int64_t r, const Tensor* w) {
  return {c,
          r,
          floats(w[0], {3, r}),
          floats(w[1], {r}),
          packed(w[2], dtype, c, r),
          floats(w[3], {c}),
          floats(w[4], {27, c}),
          floats(w[5], {c})};
}

// weights: squeeze, its bias, then those of local_weights().
void local_encoding(const Tensor& x, const std::vector<Tensor>& weights, int64_t r, Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [clips, t, h, w, c] = sizes<5>(x);
  const Tensor* all = list(weights, 8);
  STD_TORCH_CHECK(t > 0 && w > 0, "panda_kernels: expected tokens, got ", text(x.scalar_type(), x.sizes()));
  panda::local_encoding(dtype, clips, {t, h, w}, in(x, dtype, {clips, t, h, w, c}), packed(all[0], dtype, r, c),
                        floats(all[1], {r}), local_weights(dtype, c, r, all + 2), out(y, dtype, {clips, t, h, w, c}));
}

// z, or its gradient, is float32 [samples, n, c].
panda::Pooling pooling(const Tensor& x, const Tensor& queries, const Tensor& offsets, double eps, const Tensor& z) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [samples, n, c] = sizes<3>(z);
  const int64_t* bounds = integers(offsets, {samples + 1});
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() > 0 && x.size(x.dim() - 1) == c && c > 0,
                  "panda_kernels: expected contiguous tokens of ", c, " channels");
  STD_TORCH_CHECK(bounds[0] >= 0 && std::is_sorted(bounds, bounds + samples + 1) && bounds[samples] <= x.numel() / c,
                  "panda_kernels: cu_seqlens do not rise from 0 to at most ", x.numel() / c);
  const bool shared = queries.dim() == 2;
  return {dtype,
          x.const_data_ptr(),
          bounds,
          samples,
          shared ? floats(queries, {n, c}) : floats(queries, {samples, n, c}),
          shared ? 0 : n * c,
          n,
          c,
          float(eps),
          nullptr};
}

void attention_pool(const Tensor& x, const Tensor& queries, const Tensor& offsets, double eps, Tensor z) {
  panda::Pooling a = pooling(x, queries, offsets, eps, z);
  a.z = floats_out(z, {a.samples, a.n, a.c});
  panda::attention_pool(a);
}

void attention_pool_gradient(const Tensor& grad, const Tensor& x, const Tensor& queries, const Tensor& offsets,
                             double eps, Tensor grad_x, Tensor grad_queries) {
  const panda::Pooling a = pooling(x, queries, offsets, eps, grad);
  const int64_t tokens = x.numel() / a.c;
  float* to = a.query_stride ? floats_out(grad_queries, {a.samples, a.n, a.c}) : floats_out(grad_queries, {a.n, a.c});
  panda::attention_pool_gradient(a, floats(grad, {a.samples, a.n, a.c}), tokens, out(grad_x, a.dtype, {tokens, a.c}),
                                 to);
}

void check_heads(int64_t c, int64_t heads) {
  STD_TORCH_CHECK(heads > 0 && c % heads == 0, "panda_kernels: ", heads, " heads do not divide ", c, " channels");
}

panda::WindowPoolWeights window_weights(panda::Dtype dtype, int64_t c, int64_t k, int64_t heads, int64_t window,
                                        double eps, const Tensor* w) {
  check_heads(c, heads);
  return {c,
          k,
          heads,
          window * window,
          float(eps),
          packed(w[0], dtype, c, k),
          floats(w[1], {c}),
          packed(w[2], dtype, k, c / heads, heads),
          packed(w[3], dtype, c / heads, k, heads),
          packed(w[4], dtype, c, c),
          floats(w[5], {c})};
}

struct Counts {
  int64_t windows, tokens;
};

// What the rectangles hold, once each is known to fit the grid and a window.
Counts count(const int64_t* corners, int64_t frames, int64_t h, int64_t w, int64_t window) {
  STD_TORCH_CHECK(window > 0, "panda_kernels: expected a window, got ", window);
  const auto fit = [window](int64_t first, int64_t end, int64_t side) {
    return 0 <= first && first <= end && end <= side && end - first >= window;
  };
  Counts counts{0, frames};
  for (int64_t i = 0; i < frames; ++i) {
    const int64_t* c = corners + i * 4;
    STD_TORCH_CHECK(fit(c[0], c[1], h) && fit(c[2], c[3], w), "panda_kernels: the rectangle of frame ", i,
                    " does not fit the grid or a window");
    const int64_t rows = (c[1] - c[0]) / window, cols = (c[3] - c[2]) / window;
    counts.windows += rows * cols;
    counts.tokens += rows * (cols + 1);
  }
  return counts;
}

// kept: nothing, or as in KeptWindows.
panda::KeptWindows kept_windows(panda::Dtype dtype, int64_t windows, int64_t c, const std::vector<Tensor>& kept) {
  if (kept.empty()) return {};
  const Tensor* k = list(kept, 2);
  const Shape shape = {windows, panda::padded_k(dtype, c)};
  return {static_cast<char*>(out(k[0], dtype, shape)), static_cast<char*>(out(k[1], dtype, shape))};
}

panda::Windows windows_of(const Tensor& x, const std::optional<Tensor>& added, const Tensor& corners, int64_t window) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [frames, h, w, c] = sizes<4>(x);
  const Shape shape = {frames, h, w, c};
  return {in(x, dtype, shape),
          added ? in(*added, dtype, shape) : nullptr,
          integers(corners, {frames, 4}),
          frames,
          h,
          w,
          window};
}

int64_t count(const panda::Windows& a) { return count(a.corners, a.frames, a.h, a.w, a.window).windows; }

void window_attention_pool(const Tensor& x, const std::optional<Tensor>& added, const Tensor& corners,
                           const std::vector<Tensor>& weights, int64_t heads, int64_t window, double eps, Tensor y,
                           std::vector<Tensor> kept) {
  const panda::Dtype dtype = dtype_of(x);
  const panda::Windows windows = windows_of(x, added, corners, window);
  const int64_t c = x.size(3), held = count(windows);
  void* to = out(y, dtype, {held, c});
  panda::window_attention_pool(dtype, windows, window_weights(dtype, c, c, heads, window, eps, list(weights, 6)), to,
                               kept_windows(dtype, held, c, kept));
}

// weights: keys, those of WindowPoolReturn and, where nothing is kept, query, its bias and values; sums as in
// WindowPoolSums.
void window_attention_pool_gradient(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& added,
                                    const Tensor& corners, const std::vector<Tensor>& weights, int64_t heads,
                                    int64_t window, double eps, const std::vector<Tensor>& kept, Tensor grad_x,
                                    std::vector<Tensor> sums) {
  const panda::Dtype dtype = dtype_of(x);
  const panda::Windows windows = windows_of(x, added, corners, window);
  const int64_t c = x.size(3), held = count(windows);
  const void* from = in(grad, dtype, {held, c});
  check_heads(c, heads);
  const Tensor* all = list(weights, kept.empty() ? 8 : 5);
  panda::WindowPoolWeights forward{c, c, heads, window * window, float(eps)};
  forward.keys = packed(all[0], dtype, c, c / heads, heads);
  if (kept.empty()) {
    forward.query = packed(all[5], dtype, c, c);
    forward.query_bias = floats(all[6], {c});
    forward.values = packed(all[7], dtype, c / heads, c, heads);
  }
  const panda::WindowPoolReturn back{packed(all[1], dtype, c, c), packed(all[2], dtype, c / heads, c, heads),
                                     packed(all[3], dtype, c, c / heads, heads), packed(all[4], dtype, c, c)};
  const Tensor* s = list(sums, 7);
  const panda::WindowPoolSums to{floats_out(s[0], {c, c}), floats_out(s[1], {c}), floats_out(s[2], {c, c}),
                                 floats_out(s[3], {c, c}), floats_out(s[4], {c}), floats_out(s[5], {c, c}),
                                 floats_out(s[6], {c})};
  panda::window_attention_pool_gradient(dtype, from, windows, forward, back,
                                        out(grad_x, dtype, {windows.frames, windows.h, windows.w, c}), to,
                                        kept_windows(dtype, held, c, kept));
}

constexpr int64_t kLargestSide = 1 << 20;  // where the grid is not known; beyond, the counts could overflow

void assemble_tokens(const Tensor& y, const Tensor& f, const Tensor& split, const Tensor& corners, int64_t window,
                     Tensor tokens) {
  const panda::Dtype dtype = dtype_of(y);
  const auto [frames, c] = sizes<2>(f);
  const int64_t* rectangles = integers(corners, {frames, 4});
  const Counts counts = count(rectangles, frames, kLargestSide, kLargestSide, window);
  panda::assemble_tokens(dtype, in(y, dtype, {counts.windows, c}), in(f, dtype, {frames, c}), in(split, dtype, {c}),
                         rectangles, frames, window, c, out(tokens, dtype, {counts.tokens, c}));
}

void assemble_tokens_gradient(const Tensor& grad, const Tensor& corners, int64_t window, Tensor y, Tensor f,
                              Tensor split) {
  const panda::Dtype dtype = dtype_of(grad);
  const auto [frames, c] = sizes<2>(f);
  const int64_t* rectangles = integers(corners, {frames, 4});
  const Counts counts = count(rectangles, frames, kLargestSide, kLargestSide, window);
  panda::assemble_tokens_gradient(dtype, in(grad, dtype, {counts.tokens, c}), rectangles, frames, window, c,
                                  out(y, dtype, {counts.windows, c}), out(f, dtype, {frames, c}),
                                  floats_out(split, {c}));
}

void linear(const Tensor& x, const Tensor& w, const Tensor& bias, bool quick_gelu, Tensor y) {
  const panda::Dtype dtype = dtype_of(w);
  const int64_t rows = sizes<3>(x)[0];
  const auto [matrices, n, k] = sizes<3>(w);
  panda::linear({dtype, floats(x, {rows, matrices, k}), rows, matrices, k, n, in(w, dtype, {matrices, n, k}),
                 floats(bias, {matrices * n}), quick_gelu, floats_out(y, {rows, matrices, n})});
}

// y = x w^T + bias + residual.
void product(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
             Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [rows, k] = sizes<2>(x);
  const int64_t n = sizes<2>(y)[1];
  const panda::ProductRows input(dtype, rows, k);
  panda::Gemm g{input.get(in(x, dtype, {rows, k}), k, rows),
                input.stride(k),
                packed(w, dtype, n, k),
                k,
                n,
                out(y, dtype, {rows, n}),
                n};
  if (bias) g.bias = floats(*bias, {n});
  if (residual) g.residual = in(*residual, dtype, {rows, n});
  g.ldr = n;
  panda::product(dtype, g, rows);
}

void weight_gradient(const Tensor& grad, const Tensor& x, bool add, Tensor w, Tensor b) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [rows, k] = sizes<2>(x);
  const int64_t n = sizes<2>(grad)[1];
  panda::weight_gradient({dtype, in(grad, dtype, {rows, n}), n, n, in(x, dtype, {rows, k}), k, k, floats_out(w, {n, k}),
                          floats_out(b, {n}), add},
                         rows);
}

void token_mlp(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const auto [rows, c] = sizes<2>(x);
  const int64_t hidden = b1.numel(), n = b2.numel();
  panda::token_mlp({dtype, in(x, dtype, {rows, c}), rows, c, hidden, n, packed(w1, dtype, hidden, c),
                    floats(b1, {hidden}), packed(w2, dtype, n, hidden), floats(b2, {n}), out(y, dtype, {rows, n})});
}

panda::Frames frames_of(const Tensor& pixels, const std::optional<Tensor>& present, const Tensor& normalise,
                        const Tensor& corners, int64_t patch, int64_t window, Tensor& tokens) {
  panda::Frames a{};
  a.dtype = dtype_of(tokens);
  a.grid = pixels_of(pixels, present, normalise, patch, a.pixels);
  a.clips = pixels.size(0);
  const int64_t frames = a.clips * a.grid.frames, c = sizes<2>(tokens)[1];
  a.corners = integers(corners, {frames, 4});
  a.tokens = out(tokens, a.dtype, {count(a.corners, frames, a.grid.h, a.grid.w, window).tokens, c});
  return a;
}

// weights: the six of window_weights(), FSRA's queries, the split token.
panda::FrameWeights frame_weights(panda::Frames& a, int64_t c, int64_t k, int64_t heads, int64_t window, double eps,
                                  const Tensor* w, Tensor& frame_pooled) {
  const int64_t frame_heads = sizes<3>(frame_pooled)[1];
  a.frame_pooled = floats_out(frame_pooled, {a.clips * a.grid.frames, frame_heads, c});
  return {window_weights(a.dtype, c, k, heads, window, eps, w),
          window,
          floats(w[6], {frame_heads, c}),
          frame_heads,
          in(w[7], a.dtype, {c}),
          float(eps)};
}

// weights: those of frame_weights(), the embedding, squeeze and its bias, the six of local_weights(), GSTRA's queries.
void stab_clips(const Tensor& pixels, const std::optional<Tensor>& present, const Tensor& normalise,
                const Tensor& corners, const std::vector<Tensor>& all, int64_t patch, int64_t r, int64_t heads,
                int64_t window, double eps, Tensor tokens, Tensor clip_pooled, Tensor frame_pooled) {
  const Tensor* w = list(all, 18);
  panda::Frames a = frames_of(pixels, present, normalise, corners, patch, window, tokens);
  const int64_t c = tokens.size(1), k = 3 * patch * patch, clip_heads = sizes<3>(clip_pooled)[1];
  const panda::ClipWeights weights{
      packed(w[8], a.dtype, c, k),          packed(w[9], a.dtype, r, k),    floats(w[10], {r}),
      local_weights(a.dtype, c, r, w + 11), floats(w[17], {clip_heads, c}), clip_heads};
  panda::run_clips(a, frame_weights(a, c, c, heads, window, eps, w, frame_pooled), weights,
                   floats_out(clip_pooled, {a.clips, clip_heads, c}));
}

// weights: those of frame_weights(), composed with the embedding; the embedding; its triangle.
void stab_images(const Tensor& pixels, const std::optional<Tensor>& present, const Tensor& normalise,
                 const Tensor& corners, const std::vector<Tensor>& all, int64_t patch, int64_t heads, int64_t window,
                 double eps, Tensor tokens, Tensor frame_pooled) {
  panda::Frames a = frames_of(pixels, present, normalise, corners, patch, window, tokens);
  const int64_t c = tokens.size(1), k = 3 * patch * patch, rank = std::min(c, k), step = panda::kTriangleRows;
  const Tensor* w = list(all, 9 + (rank + step - 1) / step);
  panda::ImageWeights weights{packed(w[8], a.dtype, c, k), {}};
  for (int64_t row = 0; row < rank; row += step)
    weights.triangle.push_back(packed(w[9 + row / step], a.dtype, std::min(step, rank - row), k - row));
  panda::run_images(a, frame_weights(a, c, k, heads, window, eps, w, frame_pooled), weights);
}

std::string isa() { return panda::tier_name(); }
bool set_isa(std::string name) { return panda::set_tier(name.c_str()); }

// The parameters in the order of panda_kernels/backends/cpu/_tuning.py.
std::vector<int64_t> set_tuning(std::vector<int64_t> v) {
  STD_TORCH_CHECK(v.size() == 5, "panda_kernels: tuning: expected 5 parameters, got ", v.size());
  try {
    const panda::Tuning was = panda::set_tuning({v[0], v[1], v[2], v[3], v[4]});
    return {was.band_tokens, was.product_rows, was.block_windows, was.stencil_rows, was.staged_channels};
  } catch (const std::invalid_argument& error) {
    STD_TORCH_CHECK(false, "panda_kernels: ", error.what());
  }
}

int64_t packed_bytes(bool bfloat16, int64_t n, int64_t k) {
  return panda::packed_bytes(bfloat16 ? panda::Dtype::bfloat16 : panda::Dtype::float32, n, k);
}

void torch_parallel_for(int64_t count, panda::ParallelBody body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { body(context, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY(panda_kernels_cpu, m) {
  panda::set_parallel_for(torch_parallel_for);
  m.def("isa() -> str");
  m.def("set_isa(str name) -> bool");
  m.def("set_tuning(int[] parameters) -> int[]");
  m.def("packed_bytes(bool bfloat16, int n, int k) -> int");
  m.def("batch_statistics(Tensor x, Tensor(a!) result) -> ()");
  m.def("affine(Tensor x, Tensor scale, Tensor shift, Tensor(a!) y) -> ()");
  m.def("result(int[] sizes, ScalarType dtype) -> Tensor");
  m.def("pack(Tensor w, int matrices, bool transposed, Tensor(a!) to) -> ()");
  m.def("depthwise_conv3d(Tensor x, Tensor taps, Tensor? bias, int kt, int kh, int kw, Tensor(a!) y) -> ()");
  m.def("depthwise_gradient(Tensor x, Tensor grad, int kt, int kh, int kw, Tensor(a!) taps, Tensor(b!) bias) -> ()");
  m.def(
      "patch_embed(Tensor pixels, Tensor? present, Tensor normalise, int patch, Tensor weight, Tensor? bias, "
      "Tensor(a!) y) -> ()");
  m.def(
      "patch_embed_gradient(Tensor grad, Tensor pixels, Tensor? present, Tensor normalise, int patch, bool add, "
      "Tensor(a!) weight, Tensor(b!) bias) -> ()");
  m.def("local_encoding(Tensor x, Tensor[] weights, int r, Tensor(a!) y) -> ()");
  m.def("attention_pool(Tensor x, Tensor queries, Tensor offsets, float eps, Tensor(a!) z) -> ()");
  m.def(
      "attention_pool_gradient(Tensor grad, Tensor x, Tensor queries, Tensor offsets, float eps, Tensor(a!) grad_x, "
      "Tensor(b!) grad_queries) -> ()");
  m.def(
      "window_attention_pool(Tensor x, Tensor? added, Tensor corners, Tensor[] weights, int heads, int window, "
      "float eps, Tensor(a!) y, Tensor(b!)[] kept) -> ()");
  m.def(
      "window_attention_pool_gradient(Tensor grad, Tensor x, Tensor? added, Tensor corners, Tensor[] weights, "
      "int heads, int window, float eps, Tensor[] kept, Tensor(a!) grad_x, Tensor(b!)[] sums) -> ()");
  m.def("assemble_tokens(Tensor y, Tensor f, Tensor split, Tensor corners, int window, Tensor(a!) tokens) -> ()");
  m.def(
      "assemble_tokens_gradient(Tensor grad, Tensor corners, int window, Tensor(a!) y, Tensor(b!) f, "
      "Tensor(c!) split) -> ()");
  m.def("linear(Tensor x, Tensor w, Tensor bias, bool quick_gelu, Tensor(a!) y) -> ()");
  m.def("product(Tensor x, Tensor w, Tensor? bias, Tensor? residual, Tensor(a!) y) -> ()");
  m.def("weight_gradient(Tensor grad, Tensor x, bool add, Tensor(a!) w, Tensor(b!) b) -> ()");
  m.def("token_mlp(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor(a!) y) -> ()");
  m.def(
      "stab_clips(Tensor pixels, Tensor? present, Tensor normalise, Tensor corners, Tensor[] weights, int patch, "
      "int r, int heads, int window, float eps, Tensor(a!) tokens, Tensor(b!) clip_pooled, Tensor(c!) frame_pooled) "
      "-> ()");
  m.def(
      "stab_images(Tensor pixels, Tensor? present, Tensor normalise, Tensor corners, Tensor[] weights, int patch, "
      "int heads, int window, float eps, Tensor(a!) tokens, Tensor(b!) frame_pooled) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(panda_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("set_tuning", TORCH_BOX(&set_tuning));
  m.impl("result", TORCH_BOX(&result));
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(panda_kernels_cpu, CPU, m) {
  m.impl("batch_statistics", TORCH_BOX(&batch_statistics));
  m.impl("affine", TORCH_BOX(&affine));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("depthwise_conv3d", TORCH_BOX(&depthwise_conv3d));
  m.impl("depthwise_gradient", TORCH_BOX(&depthwise_gradient));
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
  m.impl("patch_embed_gradient", TORCH_BOX(&patch_embed_gradient));
  m.impl("local_encoding", TORCH_BOX(&local_encoding));
  m.impl("attention_pool", TORCH_BOX(&attention_pool));
  m.impl("attention_pool_gradient", TORCH_BOX(&attention_pool_gradient));
  m.impl("window_attention_pool", TORCH_BOX(&window_attention_pool));
  m.impl("window_attention_pool_gradient", TORCH_BOX(&window_attention_pool_gradient));
  m.impl("assemble_tokens", TORCH_BOX(&assemble_tokens));
  m.impl("assemble_tokens_gradient", TORCH_BOX(&assemble_tokens_gradient));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("product", TORCH_BOX(&product));
  m.impl("weight_gradient", TORCH_BOX(&weight_gradient));
  m.impl("token_mlp", TORCH_BOX(&token_mlp));
  m.impl("stab_clips", TORCH_BOX(&stab_clips));
  m.impl("stab_images", TORCH_BOX(&stab_images));
}
