// The core on NumPy arrays, tier by tier: for tests, sanitizers and micro-benchmarks. Not part of the wheel.
// Arrays may be views; what a kernel may touch is passed explicitly, so that tests can put poison around it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/drivers.h"
#include "core/tier.h"
#include "core/tuning.h"
#include "core/weight_gradient.h"
#include "core/window_pool_gradient.h"

namespace py = pybind11;
using namespace panda;

namespace {

// bfloat16 arrays are uint16 in NumPy.
Dtype dtype_of(const py::array& x) {
  if (py::isinstance<py::array_t<float>>(x)) return Dtype::float32;
  if (py::isinstance<py::array_t<uint16_t>>(x)) return Dtype::bfloat16;
  throw std::invalid_argument("expected a float32 or uint16 (bfloat16) array");
}

int64_t row_stride(const py::array& x) {
  if (x.ndim() != 2 || (x.shape(1) > 1 && x.strides(1) != x.itemsize()))
    throw std::invalid_argument("expected a matrix with contiguous rows");
  return x.strides(0) / x.itemsize();
}

// A byte array whose data are 64-byte aligned.
py::array_t<uint8_t> aligned_bytes(int64_t bytes) {
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(64, size_t(round_up(bytes ? bytes : 1, 64))));
  if (!data) throw std::bad_alloc();
  return py::array_t<uint8_t>(bytes, data, py::capsule(data, [](void* p) { std::free(p); }));
}

py::array_t<uint8_t> pack_weight(const py::array& w, bool to_bfloat16) {
  if (w.ndim() != 2) throw std::invalid_argument("expected a matrix");
  const Dtype from = dtype_of(w), to = to_bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  if (to == Dtype::float32 && from != to) throw std::invalid_argument("bfloat16 packs to bfloat16 only");
  const int64_t n = w.shape(0), k = w.shape(1);
  auto packed = aligned_bytes(packed_bytes(to, n, k));
  pack(to, from, w.data(), w.strides(0) / w.itemsize(), w.strides(1) / w.itemsize(), n, k, packed.mutable_data());
  return packed;
}

Gemm describe(const py::array& a, const py::array& packed, int64_t k, const py::array& c, const py::object& bias,
              bool gelu, const py::object& residual) {
  Gemm g{};
  g.a = a.data(), g.lda = row_stride(a);
  g.b = packed.data(), g.k = k, g.n = c.shape(1);
  if (int64_t(packed.nbytes()) != packed_bytes(dtype_of(a), g.n, k)) throw std::invalid_argument("packed: wrong size");
  g.c = const_cast<void*>(c.data()), g.ldc = row_stride(c), g.c_is_float = dtype_of(c) == Dtype::float32;
  if (!bias.is_none()) g.bias = static_cast<const float*>(bias.cast<py::array>().data());
  if (gelu) g.activation = Activation::gelu_erf;
  if (!residual.is_none()) {
    const auto r = residual.cast<py::array>();
    g.residual = r.data(), g.ldr = row_stride(r), g.residual_is_float = dtype_of(r) == Dtype::float32;
  }
  return g;
}

void run_gemm(const py::array& a, const py::array& packed, int64_t k, const py::array& c, const py::object& bias,
              bool gelu, const py::object& residual, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
  gemm(dtype_of(a), describe(a, packed, k, c, bias, gelu, residual), row0, row1, panel0, panel1);
}

// The shortest of `repeats` times in seconds, the rows divided among threads that are pinned to a processor each.
double time_gemm(const py::array& a, const py::array& packed, int64_t k, const py::array& c, const py::object& bias,
                 bool gelu, const py::object& residual, int threads, int repeats) {
  const Gemm g = describe(a, packed, k, c, bias, gelu, residual);
  const Dtype dtype = dtype_of(a);
  const int64_t rows = c.shape(0), columns = panels(g.n);
  std::vector<double> times(size_t(repeats), 0.0);
  std::atomic<int> arrived{0};
  const auto work = [&](int thread) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(thread, &one);
    sched_setaffinity(0, sizeof one, &one);
    const auto meet = [&](int count) {
      for (++arrived; arrived < count * threads;) continue;
    };
    for (int i = 0; i < repeats; ++i) {
      meet(2 * i + 1);
      const auto start = std::chrono::steady_clock::now();
      gemm(dtype, g, rows * thread / threads, rows * (thread + 1) / threads, 0, columns);
      meet(2 * i + 2);
      if (thread == 0)
        times[size_t(i)] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  };
  const py::gil_scoped_release release;
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) team.emplace_back(work, t);
  for (auto& member : team) member.join();
  return *std::min_element(times.begin(), times.end());
}

// The drivers. Sizes come from the shapes of x and of the result; weights are as in drivers.h, None where it has null.

const void* in(const py::object& x) {
  if (x.is_none()) return nullptr;
  const auto array = x.cast<py::array>();
  if (!(array.flags() & py::array::c_style)) throw std::invalid_argument("expected a contiguous array");
  return array.data();
}

void* out(const py::array& x) { return const_cast<void*>(in(x)); }
const float* floats(const py::object& x) { return static_cast<const float*>(in(x)); }
const int64_t* integers(const py::object& x) { return static_cast<const int64_t*>(in(x)); }

Grid grid_of(const py::array& x) { return {x.shape(1), x.shape(2), x.shape(3)}; }

void run_depthwise_conv3d(const py::array& x, const py::array& taps, const py::object& bias, int kt, int kh, int kw,
                          const py::array& y) {
  const auto [t, h, w] = grid_of(x);
  depthwise_conv3d(
      {dtype_of(x), in(x), floats(taps), floats(bias), out(y), x.shape(0), t, h, w, x.shape(4), kt, kh, kw});
}

void run_depthwise_gradient(const py::array& x, const py::array& grad, int kt, int kh, int kw, const py::array& taps,
                            const py::array& bias) {
  const auto [t, h, w] = grid_of(x);
  depthwise_gradient({dtype_of(x), in(x), in(grad), static_cast<float*>(out(taps)), static_cast<float*>(out(bias)),
                      x.shape(0), t, h, w, x.shape(4), kt, kh, kw});
}

// pixels [B, T, planes, H, W] of any strides.
Pixels pixels_of(const py::array& x, const py::object& present, const py::array& normalise, int patch) {
  const PixelType type = py::isinstance<py::array_t<uint8_t>>(x) ? PixelType::uint8
                         : py::isinstance<py::array_t<float>>(x) ? PixelType::float32
                                                                 : PixelType::bfloat16;
  const auto stride = [&x](int i) { return x.strides(i) / x.itemsize(); };
  Pixels p{type, x.data(), stride(0), stride(1), stride(2), stride(3), stride(4), x.shape(1), nullptr, patch, {}, {}};
  p.present = static_cast<const bool*>(in(present));
  std::copy_n(floats(normalise), 3, p.scale);
  std::copy_n(floats(normalise) + 3, 3, p.shift);
  return p;
}

void run_patch_embed(const py::array& pixels, const py::object& present, const py::array& normalise, int patch,
                     const py::array& packed, const py::object& bias, const py::array& y) {
  const auto [t, h, w] = grid_of(y);
  patch_embed(dtype_of(y), pixels_of(pixels, present, normalise, patch), y.shape(0) * t, h, w, in(packed), floats(bias),
              y.shape(4), out(y));
}

void run_patch_embed_gradient(const py::array& grad, const py::array& pixels, const py::object& present,
                              const py::array& normalise, int patch, bool add, const py::array& weight,
                              const py::array& bias) {
  const auto [t, h, w] = grid_of(grad);
  patch_embed_gradient(dtype_of(grad), pixels_of(pixels, present, normalise, patch), grad.shape(0) * t, h, w, in(grad),
                       grad.shape(4), add, static_cast<float*>(out(weight)), static_cast<float*>(out(bias)));
}

// weights: packed squeeze and its bias, then as in LocalEncodingWeights.
void run_local_encoding(const py::array& x, const py::list& w, int64_t r, const py::array& y) {
  const LocalEncodingWeights weights{x.shape(4),   r,           floats(w[2]), floats(w[3]), in(w[4]), floats(w[5]),
                                     floats(w[6]), floats(w[7])};
  local_encoding(dtype_of(x), x.shape(0), grid_of(x), in(x), in(w[0]), floats(w[1]), weights, out(y));
}

// queries [n, c], shared, or [samples, n, c].
void run_attention_pool(const py::array& x, const py::array& queries, const py::array& offsets, float eps,
                        const py::array& z) {
  const int64_t samples = z.shape(0), n = z.shape(1), c = z.shape(2);
  attention_pool({dtype_of(x), in(x), integers(offsets), samples, floats(queries), queries.ndim() == 2 ? 0 : n * c, n,
                  c, eps, static_cast<float*>(out(z))});
}

void run_attention_pool_gradient(const py::array& grad, const py::array& x, const py::array& queries,
                                 const py::array& offsets, float eps, const py::array& grad_x,
                                 const py::array& grad_queries) {
  const int64_t samples = grad.shape(0), n = grad.shape(1), c = grad.shape(2);
  attention_pool_gradient({dtype_of(x), in(x), integers(offsets), samples, floats(queries),
                           queries.ndim() == 2 ? 0 : n * c, n, c, eps, nullptr},
                          floats(grad), x.shape(0), out(grad_x), static_cast<float*>(out(grad_queries)));
}

// weights: as in WindowPoolWeights.
Windows windows_of(const py::array& x, const py::object& added, const py::array& corners, int64_t window) {
  return {in(x), in(added), integers(corners), x.shape(0), x.shape(1), x.shape(2), window};
}

void run_window_attention_pool(const py::array& x, const py::object& added, const py::array& corners, const py::list& w,
                               int64_t heads, int64_t window, float eps, const py::array& y) {
  const WindowPoolWeights weights{x.shape(3),   x.shape(3), heads,    window * window, eps,         in(w[0]),
                                  floats(w[1]), in(w[2]),   in(w[3]), in(w[4]),        floats(w[5])};
  window_attention_pool(dtype_of(x), windows_of(x, added, corners, window), weights, out(y));
}

// weights: as in WindowPoolWeights, then as in WindowPoolReturn; sums: as in WindowPoolSums.
void run_window_attention_pool_gradient(const py::array& grad, const py::array& x, const py::object& added,
                                        const py::array& corners, const py::list& w, int64_t heads, int64_t window,
                                        float eps, const py::array& grad_x, const py::list& sums) {
  const WindowPoolWeights weights{x.shape(3),   x.shape(3), heads,    window * window, eps,         in(w[0]),
                                  floats(w[1]), in(w[2]),   in(w[3]), in(w[4]),        floats(w[5])};
  const WindowPoolReturn back{in(w[6]), in(w[7]), in(w[8]), in(w[9])};
  const auto sum = [&sums](int i) { return static_cast<float*>(out(sums[i])); };
  window_attention_pool_gradient(dtype_of(x), in(grad), windows_of(x, added, corners, window), weights, back,
                                 out(grad_x), {sum(0), sum(1), sum(2), sum(3), sum(4), sum(5), sum(6)});
}

void run_assemble_tokens(const py::array& y, const py::array& f, const py::array& split, const py::array& corners,
                         int64_t window, const py::array& tokens) {
  assemble_tokens(dtype_of(y), in(y), in(f), in(split), integers(corners), f.shape(0), window, f.shape(1), out(tokens));
}

void run_linear(const py::array& x, const py::array& w, const py::array& bias, bool quick_gelu, const py::array& y) {
  linear({dtype_of(w), floats(x), x.shape(0), w.shape(0), w.shape(2), w.shape(1), in(w), floats(bias), quick_gelu,
          static_cast<float*>(out(y))});
}

void run_weight_gradient(const py::array& grad, const py::array& x, const py::array& w, const py::array& b, bool add) {
  weight_gradient({dtype_of(x), grad.data(), row_stride(grad), grad.shape(1), x.data(), row_stride(x), x.shape(1),
                   static_cast<float*>(out(w)), static_cast<float*>(out(b)), add},
                  x.shape(0));
}

void run_token_mlp(const py::array& x, const py::array& w1, const py::array& b1, const py::array& w2,
                   const py::array& b2, const py::array& y) {
  token_mlp({dtype_of(x), in(x), x.shape(0), x.shape(1), b1.shape(0), y.shape(1), in(w1), floats(b1), in(w2),
             floats(b2), out(y)});
}

}  // namespace

PYBIND11_MODULE(panda_core, m) {
  using namespace py::literals;
  m.def("tier_name", &tier_name);
  m.def("set_tier", &set_tier, "name"_a);
  m.def("requested_isa",
        []() -> py::object { return requested_isa() ? py::object(py::str(requested_isa())) : py::object(py::none()); });

  m.def(
      "set_tuning",
      [](int64_t band, int64_t rows, int64_t windows, int64_t stencil, int64_t staged) {
        const Tuning was = set_tuning({band, rows, windows, stencil, staged});
        return py::make_tuple(was.band_tokens, was.product_rows, was.block_windows, was.stencil_rows,
                              was.staged_channels);
      },
      "band_tokens"_a, "product_rows"_a, "block_windows"_a, "stencil_rows"_a, "staged_channels"_a);

  m.attr("PANEL") = kPanel;
  m.def("pack", &pack_weight, "w"_a, "to_bfloat16"_a);
  m.def("gemm", &run_gemm, "a"_a, "packed"_a, "k"_a, "c"_a, "bias"_a, "gelu"_a, "residual"_a, "row0"_a, "row1"_a,
        "panel0"_a, "panel1"_a);
  m.def("time_gemm", &time_gemm, "a"_a, "packed"_a, "k"_a, "c"_a, "bias"_a, "gelu"_a, "residual"_a, "threads"_a,
        "repeats"_a);

  m.def("aligned_bytes", &aligned_bytes, "bytes"_a);
  m.def("depthwise_conv3d", &run_depthwise_conv3d, "x"_a, "taps"_a, "bias"_a, "kt"_a, "kh"_a, "kw"_a, "y"_a);
  m.def("depthwise_gradient", &run_depthwise_gradient, "x"_a, "grad"_a, "kt"_a, "kh"_a, "kw"_a, "taps"_a, "bias"_a);
  m.def("patch_embed", &run_patch_embed, "pixels"_a, "present"_a, "normalise"_a, "patch"_a, "packed"_a, "bias"_a,
        "y"_a);
  m.def("patch_embed_gradient", &run_patch_embed_gradient, "grad"_a, "pixels"_a, "present"_a, "normalise"_a, "patch"_a,
        "add"_a, "weight"_a, "bias"_a);
  m.def("local_encoding", &run_local_encoding, "x"_a, "weights"_a, "r"_a, "y"_a);
  m.def("attention_pool", &run_attention_pool, "x"_a, "queries"_a, "offsets"_a, "eps"_a, "z"_a);
  m.def("attention_pool_gradient", &run_attention_pool_gradient, "grad"_a, "x"_a, "queries"_a, "offsets"_a, "eps"_a,
        "grad_x"_a, "grad_queries"_a);
  m.def("window_attention_pool", &run_window_attention_pool, "x"_a, "added"_a, "corners"_a, "weights"_a, "heads"_a,
        "window"_a, "eps"_a, "y"_a);
  m.def("window_attention_pool_gradient", &run_window_attention_pool_gradient, "grad"_a, "x"_a, "added"_a, "corners"_a,
        "weights"_a, "heads"_a, "window"_a, "eps"_a, "grad_x"_a, "sums"_a);
  m.def("assemble_tokens", &run_assemble_tokens, "y"_a, "f"_a, "split"_a, "corners"_a, "window"_a, "tokens"_a);
  m.def("linear", &run_linear, "x"_a, "w"_a, "bias"_a, "quick_gelu"_a, "y"_a);
  m.def("weight_gradient", &run_weight_gradient, "grad"_a, "x"_a, "w"_a, "b"_a, "add"_a);
  m.def("token_mlp", &run_token_mlp, "x"_a, "w1"_a, "b1"_a, "w2"_a, "b2"_a, "y"_a);
}
