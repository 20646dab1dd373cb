// The kernels of csrc/cuda as torch ops, through the LibTorch stable ABI and without any header of CUDA's: the stream is
// looked up in the libtorch_cuda that torch has loaded, so that this builds and loads beside a torch for CPUs too.
// Callers (panda_kernels/backends/cuda) allocate the results.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/depthwise_conv3d.h"
#include "expect.h"

// In the tests the kernels are emulated, on tensors of the CPU.
#ifdef PANDA_KERNELS_EMULATED
#define PANDA_DEVICE CPU
#else
#define PANDA_DEVICE CUDA
#endif

namespace {

namespace cuda = panda::cuda;

#ifdef PANDA_KERNELS_EMULATED
struct Device {
  explicit Device(const Tensor&) {}
  void* stream = nullptr;
};
#else
// A tensor's device is the current one while this lives; `stream` is torch's current stream on it.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Device(const Tensor& t) : guard(t.get_device_index()) {
    using CurrentStream = int32_t (*)(int32_t, void**);
    static const auto current_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(current_stream && current_stream(t.get_device_index(), &stream) == 0,
                    "panda_kernels: this torch has no CUDA stream");
  }
};
#endif

cuda::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cuda::Dtype::float32;
    case ScalarType::BFloat16: return cuda::Dtype::bfloat16;
    case ScalarType::Half: return cuda::Dtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "panda_kernels: the cuda backend computes in float32, bfloat16 and float16");
}

// A pointer to a tensor of 16-byte vectors.
const void* in(const Tensor& t, ScalarType type, Shape shape) {
  expect(t, type, shape);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, "panda_kernels: a tensor is not aligned");
  return t.const_data_ptr();
}

const void* in(const std::optional<Tensor>& t, ScalarType type, Shape shape) {
  return t ? in(*t, type, shape) : nullptr;
}

void* out(const Tensor& t, ScalarType type, Shape shape) { return const_cast<void*>(in(t, type, shape)); }

void* out(const std::optional<Tensor>& t, ScalarType type, Shape shape) {
  return t ? out(*t, type, shape) : nullptr;
}

void succeed(int error) { STD_TORCH_CHECK(error == 0, "panda_kernels: a launch failed with CUDA's error ", error); }

void expect_vectors(const Tensor& x, int64_t c) {
  STD_TORCH_CHECK(c % (16 / x.element_size()) == 0, "panda_kernels: expected channels in vectors of 16 bytes, got ", c);
}

// y is the convolution with taps[27, C], plus x if `residual`; sum is y + add.
void stencil(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
             bool mirrored, bool residual, Tensor y, std::optional<Tensor> sum) {
  const auto [b, t, h, w, c] = sizes<5>(x);
  const ScalarType type = x.scalar_type();
  expect_vectors(x, c);
  STD_TORCH_CHECK(add.has_value() == sum.has_value(), "panda_kernels: expected both of add and sum, or none");
  STD_TORCH_CHECK(h * w * c < int64_t(1) << 31, "panda_kernels: frames of ", h * w * c, " numbers");
  if (!x.numel()) return;
  const Device device(x);
  succeed(cuda::stencil({dtype_of(x), in(x, type, {b, t, h, w, c}), in(taps, type, {27, c}), in(bias, type, {c}),
                         in(add, type, {b, t, h, w, c}), out(y, type, {b, t, h, w, c}), out(sum, type, {b, t, h, w, c}),
                         b, int(t), int(h), int(w), int(c), mirrored, residual},
                        device.stream));
}

// partial[segments, 28, C]: of a share of the tokens each, the taps' gradients and the bias's.
void stencil_gradient(const Tensor& x, const Tensor& grad, Tensor partial) {
  const auto [b, t, h, w, c] = sizes<5>(x);
  const ScalarType type = x.scalar_type();
  const int64_t segments = sizes<3>(partial)[0];
  expect_vectors(x, c);
  STD_TORCH_CHECK(h * w * c < int64_t(1) << 31, "panda_kernels: frames of ", h * w * c, " numbers");
  const Device device(x);
  succeed(cuda::stencil_gradient(
      {dtype_of(x), in(x, type, {b, t, h, w, c}), in(grad, type, {b, t, h, w, c}),
       static_cast<float*>(out(partial, ScalarType::Float, {segments, 28, c})), b, int(t), int(h), int(w), int(c),
       int(segments)},
      device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY(panda_kernels_cuda, m) {
  m.def(
      "stencil(Tensor x, Tensor taps, Tensor? bias, Tensor? add, bool mirrored, bool residual, Tensor(a!) y, "
      "Tensor(b!)? sum) -> ()");
  m.def("stencil_gradient(Tensor x, Tensor grad, Tensor(a!) partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(panda_kernels_cuda, PANDA_DEVICE, m) {
  m.impl("stencil", TORCH_BOX(&stencil));
  m.impl("stencil_gradient", TORCH_BOX(&stencil_gradient));
}
