// The CPU core as torch ops, through the LibTorch stable ABI: one binary for every torch from 2.11 and any Python 3.
// Callers (panda_kernels/backends/cpu) allocate the results and pass contiguous tensors; dtypes and most sizes are
// checked here once more; the rest is the callers' to get right.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "core/drivers.h"
#include "core/parallel.h"
#include "core/tier.h"
#include "core/tower.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

panda::Dtype dtype_of(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                  "panda_kernels: the cpu backend computes in float32 and bfloat16");
  return t.scalar_type() == ScalarType::Float ? panda::Dtype::float32 : panda::Dtype::bfloat16;
}

const void* data(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "panda_kernels: a tensor is not contiguous");
  return t.const_data_ptr();
}

void* out(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "panda_kernels: a result is not contiguous");
  return t.mutable_data_ptr();
}

const float* floats(const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() >= count, "panda_kernels: expected ", count,
                  " float32 elements, got ", t.numel());
  return static_cast<const float*>(data(t));
}

const int64_t* integers(const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() >= count, "panda_kernels: expected ", count,
                  " int64 elements, got ", t.numel());
  return static_cast<const int64_t*>(data(t));
}

const void* packed(const Tensor& t, panda::Dtype dtype, int64_t n, int64_t k, int64_t matrices = 1) {
  STD_TORCH_CHECK(t.numel() >= matrices * panda::packed_bytes(dtype, n, k), "panda_kernels: a packed matrix of ", n,
                  " x ", k, " is too small");
  return data(t);
}

panda::Pixels pixels_of(const Tensor& x, const std::optional<Tensor>& present, int64_t patch, const Tensor& normalise) {
  panda::Pixels p{};
  p.type = x.scalar_type() == ScalarType::Byte    ? panda::PixelType::uint8
           : x.scalar_type() == ScalarType::Float ? panda::PixelType::float32
                                                  : panda::PixelType::bfloat16;
  STD_TORCH_CHECK(p.type != panda::PixelType::bfloat16 || x.scalar_type() == ScalarType::BFloat16,
                  "panda_kernels: pixels must be uint8, float32 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 5 && x.size(2) >= 3, "panda_kernels: pixels must be [B, T, 3 or more, H, W]");
  p.data = x.const_data_ptr();
  p.batch_stride = x.stride(0);
  p.frame_stride = x.stride(1);
  p.channel_stride = x.stride(2);
  p.row_stride = x.stride(3);
  p.column_stride = x.stride(4);
  p.frames = x.size(1);
  p.patch = int(patch);
  if (present) {
    STD_TORCH_CHECK(present->scalar_type() == ScalarType::Bool && present->numel() == x.size(0) * x.size(1),
                    "panda_kernels: present must be bool [B, T]");
    p.present = static_cast<const bool*>(data(*present));
  }
  const float* scale_shift = floats(normalise, 6);
  for (int i = 0; i < 3; ++i) {
    p.scale[i] = scale_shift[i];
    p.shift[i] = scale_shift[3 + i];
  }
  return p;
}

void pack(const Tensor& w, int64_t matrices, bool transposed, Tensor to) {
  const panda::Dtype dtype = dtype_of(w);
  const int64_t n = w.size(transposed ? 2 : 1), k = w.size(transposed ? 1 : 2);
  STD_TORCH_CHECK(w.dim() == 3 && w.size(0) == matrices, "panda_kernels: weights to pack must be [matrices, n, k]");
  packed(to, dtype, n, k, matrices);
  for (int64_t i = 0; i < matrices; ++i)
    panda::pack(dtype, dtype, static_cast<const char*>(w.const_data_ptr()) + i * w.stride(0) * panda::size_of(dtype),
                w.stride(transposed ? 2 : 1), w.stride(transposed ? 1 : 2), n, k,
                static_cast<char*>(out(to)) + i * panda::packed_bytes(dtype, n, k));
}

void depthwise_conv3d(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, int64_t kt, int64_t kh,
                      int64_t kw, Tensor y) {
  const int64_t c = x.size(4);
  panda::depthwise_conv3d({dtype_of(x), data(x), floats(taps, kt * kh * kw * c), bias ? floats(*bias, c) : nullptr,
                           out(y), x.size(0), x.size(1), x.size(2), x.size(3), c, int(kt), int(kh), int(kw)});
}

void patch_embed(const Tensor& pixels, const std::optional<Tensor>& present, const Tensor& normalise, int64_t patch,
                 const Tensor& weight, Tensor y) {
  const panda::Dtype dtype = dtype_of(y);
  const int64_t c = y.size(4);
  panda::patch_embed(dtype, pixels_of(pixels, present, patch, normalise), y.size(0) * y.size(1), y.size(2), y.size(3),
                     packed(weight, dtype, c, 3 * patch * patch), c, out(y));
}

panda::LocalEncodingWeights local_weights(panda::Dtype dtype, int64_t c, int64_t r, const Tensor* w) {
  return {c,
          r,
          floats(w[0], 3 * r),
          floats(w[1], r),
          packed(w[2], dtype, c, r),
          floats(w[3], c),
          floats(w[4], 27 * c),
          floats(w[5], c)};
}

// weights: squeeze, its bias, then those of local_weights().
void local_encoding(const Tensor& x, const std::vector<Tensor>& weights, int64_t r, Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const int64_t c = x.size(4);
  STD_TORCH_CHECK(weights.size() == 8, "panda_kernels: local_encoding takes 8 weights");
  panda::local_encoding(dtype, x.size(0), {x.size(1), x.size(2), x.size(3)}, data(x), packed(weights[0], dtype, r, c),
                        floats(weights[1], r), local_weights(dtype, c, r, weights.data() + 2), out(y));
}

void attention_pool(const Tensor& x, const Tensor& queries, const Tensor& offsets, double eps, Tensor z) {
  const int64_t samples = offsets.numel() - 1, n = z.size(1), c = z.size(2);
  const bool shared = queries.dim() == 2;
  const int64_t* bounds = integers(offsets, 1);
  STD_TORCH_CHECK(bounds[0] >= 0 && bounds[samples] * c <= x.numel(), "panda_kernels: cu_seqlens reach beyond x");
  floats(z, samples * n * c);
  panda::attention_pool({dtype_of(x), data(x), bounds, samples, floats(queries, (shared ? 1 : samples) * n * c),
                         shared ? 0 : n * c, n, c, float(eps), static_cast<float*>(out(z))});
}

panda::WindowPoolWeights window_weights(panda::Dtype dtype, int64_t c, int64_t heads, int64_t size, double eps,
                                        const Tensor* w) {
  return {c,
          heads,
          size,
          float(eps),
          packed(w[0], dtype, c, c),
          floats(w[1], c),
          packed(w[2], dtype, c, c / heads, heads),
          packed(w[3], dtype, c / heads, c, heads),
          packed(w[4], dtype, c, c),
          floats(w[5], c)};
}

struct Counts {
  int64_t windows, tokens;
};

// What the rectangles hold, once each is known to fit the grid and a window.
Counts count(const int64_t* corners, int64_t frames, int64_t h, int64_t w, int64_t window) {
  Counts counts{0, frames};
  for (int64_t i = 0; i < frames; ++i) {
    const int64_t* c = corners + i * 4;
    STD_TORCH_CHECK(0 <= c[0] && c[0] + window <= c[1] && c[1] <= h && 0 <= c[2] && c[2] + window <= c[3] && c[3] <= w,
                    "panda_kernels: the rectangle of frame ", i, " does not fit the grid or a window");
    const int64_t rows = (c[1] - c[0]) / window, cols = (c[3] - c[2]) / window;
    counts.windows += rows * cols;
    counts.tokens += rows * (cols + 1);
  }
  return counts;
}

void expect(const char* what, int64_t found, int64_t expected) {
  STD_TORCH_CHECK(found == expected, "panda_kernels: the rectangles hold ", found, " ", what, ", expected ", expected);
}

void window_attention_pool(const Tensor& x, const Tensor& corners, const std::vector<Tensor>& weights, int64_t heads,
                           int64_t window, double eps, Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const int64_t frames = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  STD_TORCH_CHECK(weights.size() == 6, "panda_kernels: window_attention_pool takes 6 weights");
  expect("windows", count(integers(corners, 4 * frames), frames, h, w, window).windows, y.size(0));
  panda::window_attention_pool(dtype, data(x), integers(corners, 4 * frames), frames, h, w, window,
                               window_weights(dtype, c, heads, window * window, eps, weights.data()), out(y));
}

void assemble_tokens(const Tensor& y, const Tensor& f, const Tensor& split, const Tensor& corners, int64_t window,
                     Tensor tokens) {
  const int64_t frames = f.size(0), c = f.size(1), *r = integers(corners, 4 * frames);
  const Counts counts = count(r, frames, INT64_MAX, INT64_MAX, window);
  expect("windows", counts.windows, y.size(0));
  expect("tokens", counts.tokens, tokens.size(0));
  panda::assemble_tokens(dtype_of(y), data(y), data(f), data(split), r, frames, window, c, out(tokens));
}

void linear(const Tensor& x, const Tensor& w, const Tensor& bias, bool quick_gelu, const std::optional<Tensor>& residual,
            Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const int64_t rows = x.size(0), matrices = x.size(1), k = x.size(2), n = y.size(2);
  panda::linear({dtype, data(x), rows, matrices, k, n, packed(w, dtype, n, k, matrices), floats(bias, matrices * n),
                 quick_gelu ? panda::Activation::quick_gelu : panda::Activation::none,
                 residual ? data(*residual) : nullptr, out(y)});
}

void token_mlp(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, Tensor y) {
  const panda::Dtype dtype = dtype_of(x);
  const int64_t c = x.size(1), hidden = b1.numel(), n = b2.numel();
  panda::token_mlp({dtype, data(x), x.size(0), c, hidden, n, packed(w1, dtype, hidden, c), floats(b1, hidden),
                    packed(w2, dtype, n, hidden), floats(b2, n), out(y)});
}

// weights: embedding; squeeze and its bias, the six of local_weights() and GSTRA's queries (any for images); the six of
// window_weights(); FSRA's queries; the split token.
void stab_tower(const Tensor& pixels, const std::optional<Tensor>& present, const Tensor& normalise,
                const Tensor& corners, const std::vector<Tensor>& w, int64_t patch, int64_t r, int64_t heads,
                int64_t window, double eps, Tensor tokens, Tensor clip_pooled, Tensor frame_pooled) {
  STD_TORCH_CHECK(w.size() == 18, "panda_kernels: stab_tower takes 18 weights");
  const panda::Dtype dtype = dtype_of(tokens);
  const int64_t c = tokens.size(1), k = 3 * patch * patch, frames = pixels.size(1);
  panda::Tower tower{};
  tower.dtype = dtype;
  tower.pixels = pixels_of(pixels, present, patch, normalise);
  tower.clips = pixels.size(0);
  tower.grid = {frames, pixels.size(3) / patch, pixels.size(4) / patch};
  tower.corners = integers(corners, 4 * tower.clips * frames);
  expect("tokens", count(tower.corners, tower.clips * frames, tower.grid.h, tower.grid.w, window).tokens,
         tokens.size(0));
  panda::TowerWeights weights{};
  weights.embed = packed(w[0], dtype, c, k);
  if (frames > 1) {
    weights.squeeze = packed(w[1], dtype, r, k);
    weights.squeeze_bias = floats(w[2], r);
    weights.local = local_weights(dtype, c, r, w.data() + 3);
    weights.clip_heads = clip_pooled.size(1);
    weights.clip_queries = floats(w[9], weights.clip_heads * c);
    floats(clip_pooled, tower.clips * weights.clip_heads * c);
    tower.clip_pooled = static_cast<float*>(out(clip_pooled));
  }
  weights.windows = window_weights(dtype, c, heads, window * window, eps, w.data() + 10);
  weights.window = window;
  weights.frame_heads = frame_pooled.size(1);
  weights.frame_queries = floats(w[16], weights.frame_heads * c);
  floats(frame_pooled, tower.clips * frames * weights.frame_heads * c);
  tower.frame_pooled = static_cast<float*>(out(frame_pooled));
  weights.split = data(w[17]);
  weights.eps = float(eps);
  tower.tokens = out(tokens);
  panda::run_tower(tower, weights);
}

std::string isa() { return panda::tier_name(); }
bool set_isa(std::string name) { return panda::set_tier(name.c_str()); }
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
  m.def("packed_bytes(bool bfloat16, int n, int k) -> int");
  m.def("pack(Tensor w, int matrices, bool transposed, Tensor(a!) to) -> ()");
  m.def("depthwise_conv3d(Tensor x, Tensor taps, Tensor? bias, int kt, int kh, int kw, Tensor(a!) y) -> ()");
  m.def("patch_embed(Tensor pixels, Tensor? present, Tensor normalise, int patch, Tensor weight, Tensor(a!) y) -> ()");
  m.def("local_encoding(Tensor x, Tensor[] weights, int r, Tensor(a!) y) -> ()");
  m.def("attention_pool(Tensor x, Tensor queries, Tensor offsets, float eps, Tensor(a!) z) -> ()");
  m.def(
      "window_attention_pool(Tensor x, Tensor corners, Tensor[] weights, int heads, int window, float eps, "
      "Tensor(a!) y) -> ()");
  m.def("assemble_tokens(Tensor y, Tensor f, Tensor split, Tensor corners, int window, Tensor(a!) tokens) -> ()");
  m.def("linear(Tensor x, Tensor w, Tensor bias, bool quick_gelu, Tensor? residual, Tensor(a!) y) -> ()");
  m.def("token_mlp(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor(a!) y) -> ()");
  m.def(
      "stab_tower(Tensor pixels, Tensor? present, Tensor normalise, Tensor corners, Tensor[] weights, int patch, "
      "int r, int heads, int window, float eps, Tensor(a!) tokens, Tensor(b!) clip_pooled, Tensor(c!) frame_pooled) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(panda_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(panda_kernels_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("depthwise_conv3d", TORCH_BOX(&depthwise_conv3d));
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
  m.impl("local_encoding", TORCH_BOX(&local_encoding));
  m.impl("attention_pool", TORCH_BOX(&attention_pool));
  m.impl("window_attention_pool", TORCH_BOX(&window_attention_pool));
  m.impl("assemble_tokens", TORCH_BOX(&assemble_tokens));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("token_mlp", TORCH_BOX(&token_mlp));
  m.impl("stab_tower", TORCH_BOX(&stab_tower));
}
