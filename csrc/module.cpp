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
#include <thread>
#include <vector>

#include "core/gemm.h"
#include "core/tier.h"

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

}  // namespace

PYBIND11_MODULE(panda_core, m) {
  using namespace py::literals;
  m.def("tier_name", &tier_name);
  m.def("set_tier", &set_tier, "name"_a);
  m.def("requested_isa",
        []() -> py::object { return requested_isa() ? py::object(py::str(requested_isa())) : py::object(py::none()); });

  m.attr("PANEL") = kPanel;
  m.def("pack", &pack_weight, "w"_a, "to_bfloat16"_a);
  m.def("gemm", &run_gemm, "a"_a, "packed"_a, "k"_a, "c"_a, "bias"_a, "gelu"_a, "residual"_a, "row0"_a, "row1"_a,
        "panel0"_a, "panel1"_a);
  m.def("time_gemm", &time_gemm, "a"_a, "packed"_a, "k"_a, "c"_a, "bias"_a, "gelu"_a, "residual"_a, "threads"_a,
        "repeats"_a);
}
