// The kernels of csrc/cuda as torch ops, through the LibTorch stable ABI and without any header of CUDA's: the stream
// is looked up in the libtorch_cuda that torch has loaded, so that this builds and loads beside a torch for CPUs too.
// Callers (panda_kernels/backends/cuda) allocate the results.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "cuda/class_tokens.h"
#include "cuda/depthwise_conv3d.h"
#include "cuda/window_attention_pool.h"
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
    case ScalarType::Float:
      return cuda::Dtype::float32;
    case ScalarType::BFloat16:
      return cuda::Dtype::bfloat16;
    case ScalarType::Half:
      return cuda::Dtype::float16;
    default:
      break;
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

void* out(const std::optional<Tensor>& t, ScalarType type, Shape shape) { return t ? out(*t, type, shape) : nullptr; }

void succeed(int error) { STD_TORCH_CHECK(error == 0, "panda_kernels: a launch failed with CUDA's error ", error); }

void expect_vectors(const Tensor& x, int64_t c) {
  STD_TORCH_CHECK(c % (16 / x.element_size()) == 0, "panda_kernels: expected channels in vectors of 16 bytes, got ", c);
}

// y is the convolution with taps[27, C], plus x if `residual`; sum is y + add, whose rows may be those of a wider
// matrix.
void stencil(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
             bool mirrored, bool residual, Tensor y, std::optional<Tensor> sum) {
  const auto [b, t, h, w, c] = sizes<5>(x);
  const ScalarType type = x.scalar_type();
  expect_vectors(x, c);
  STD_TORCH_CHECK(add.has_value() == sum.has_value(), "panda_kernels: expected both of add and sum, or none");
  STD_TORCH_CHECK(h * w * c < int64_t(1) << 31, "panda_kernels: frames of ", h * w * c, " numbers");
  if (!x.numel()) return;
  if (add) {
    const auto [rows, columns] = sizes<2>(*add);
    STD_TORCH_CHECK(add->scalar_type() == type && rows == b * t * h * w && columns == c && add->stride(1) == 1 &&
                        add->stride(0) * add->element_size() % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(add->const_data_ptr()) % 16 == 0,
                    "panda_kernels: expected rows to add of ", c, " numbers, aligned to 16 bytes");
  }
  const Device device(x);
  succeed(cuda::stencil(
      {dtype_of(x), in(x, type, {b, t, h, w, c}), in(taps, type, {27, c}), in(bias, type, {c}),
       add ? add->const_data_ptr() : nullptr, out(y, type, {b, t, h, w, c}), out(sum, type, {b, t, h, w, c}), b, int(t),
       int(h), int(w), int(c), add ? add->stride(0) : 0, mirrored, residual},
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
  succeed(cuda::stencil_gradient({dtype_of(x), in(x, type, {b, t, h, w, c}), in(grad, type, {b, t, h, w, c}),
                                  static_cast<float*>(out(partial, ScalarType::Float, {segments, 28, c})), b, int(t),
                                  int(h), int(w), int(c), int(segments)},
                                 device.stream));
}

// out[W, C]: the heads' outputs for the windows whose first tokens are `places`, of all tokens x[frames, h, w, C].
void attend(const Tensor& x, const Tensor& places, const Tensor& norms, const Tensor& q, const Tensor& norm_weight,
            const Tensor& norm_bias, const Tensor& wkv, int64_t heads, double scale, Tensor result) {
  const auto [frames, h, w, c] = sizes<4>(x);
  const int64_t windows = sizes<2>(q)[0];
  const ScalarType type = x.scalar_type();
  expect_vectors(x, c);
  if (!windows) return;
  const Device device(x);
  succeed(
      cuda::attend({dtype_of(x), in(x, type, {frames, h, w, c}),
                    static_cast<const int64_t*>(in(places, ScalarType::Long, {windows})),
                    static_cast<const float*>(in(norms, ScalarType::Float, {2, 4, windows})), in(q, type, {windows, c}),
                    in(norm_weight, type, {c}), in(norm_bias, type, {c}), in(wkv, type, {2 * c, c}),
                    out(result, type, {windows, c}), windows, int(w), int(c), int(heads), float(scale)},
                   device.stream));
}

// Query, norm, values' and outputs' weight and bias.
cuda::ValueWeights value_weights(const Tensor* w, ScalarType type, int64_t c, int64_t heads) {
  return {in(w[0], type, {c}), in(w[1], type, {c}),    in(w[2], type, {c}), in(w[3], type, {c, c}),
          in(w[4], type, {c}), in(w[5], type, {c, c}), in(w[6], type, {c}), int(heads)};
}

int64_t class_tokens_workspace(int64_t clips, int64_t frames, int64_t c) {
  return cuda::class_tokens_workspace(clips, int(frames), int(c));
}

// weights: of the frames' attention (7), and for clips of several frames of the clips' (7), the MLP's (6) and the
// fusion's (5). y[clips * T, C].
void class_tokens(const std::optional<Tensor>& clip_pooled, const Tensor& frame_pooled,
                  const std::vector<Tensor>& weights, int64_t frames, double eps, Tensor y, Tensor workspace) {
  const auto [rows, frame_heads, c] = sizes<3>(frame_pooled);
  const ScalarType type = frame_pooled.scalar_type();
  expect_vectors(frame_pooled, c);
  STD_TORCH_CHECK(frames > 0 && rows % frames == 0, "panda_kernels: ", rows, " rows are no clips of ", frames);
  STD_TORCH_CHECK(weights.size() == (frames > 1 ? 25 : 7), "panda_kernels: got ", weights.size(), " weights");
  const Tensor* w = weights.data();
  cuda::ClassTokens p{};
  p.dtype = dtype_of(frame_pooled);
  p.frame_pooled = in(frame_pooled, type, {rows, frame_heads, c});
  p.frame = value_weights(w, type, c, frame_heads);
  p.clips = rows / frames;
  if (frames > 1) {
    STD_TORCH_CHECK(clip_pooled.has_value(), "panda_kernels: clips of ", frames, " frames without their pooled tokens");
    const int64_t clip_heads = sizes<3>(*clip_pooled)[1];
    p.clip_pooled = in(clip_pooled, type, {p.clips, clip_heads, c});
    p.clip = value_weights(w + 7, type, c, clip_heads);
    p.mlp = {in(w[14], type, {c}),     in(w[15], type, {c}),        in(w[16], type, {4 * c, c}),
             in(w[17], type, {4 * c}), in(w[18], type, {c, 4 * c}), in(w[19], type, {c})};
    p.fusion = {in(w[20], type, {c}), in(w[21], type, {c}), in(w[22], type, {c}), in(w[23], type, {c, c}),
                in(w[24], type, {c})};
  }
  p.y = out(y, type, {rows, c});
  p.workspace = static_cast<float*>(
      out(workspace, ScalarType::Float, {cuda::class_tokens_workspace(p.clips, int(frames), int(c))}));
  p.frames = int(frames);
  p.c = int(c);
  p.eps = float(eps);
  const Device device(frame_pooled);
  succeed(cuda::class_tokens(p, device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY(panda_kernels_cuda, m) {
  m.def(
      "stencil(Tensor x, Tensor taps, Tensor? bias, Tensor? add, bool mirrored, bool residual, Tensor(a!) y, "
      "Tensor(b!)? sum) -> ()");
  m.def("stencil_gradient(Tensor x, Tensor grad, Tensor(a!) partial) -> ()");
  m.def(
      "attend(Tensor x, Tensor places, Tensor norms, Tensor q, Tensor norm_weight, Tensor norm_bias, Tensor wkv, "
      "int heads, float scale, Tensor(a!) result) -> ()");
  m.def("class_tokens_workspace(int clips, int frames, int c) -> int");
  m.def(
      "class_tokens(Tensor? clip_pooled, Tensor frame_pooled, Tensor[] weights, int frames, float eps, Tensor(a!) y, "
      "Tensor(b!) workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(panda_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("class_tokens_workspace", TORCH_BOX(&class_tokens_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(panda_kernels_cuda, PANDA_DEVICE, m) {
  m.impl("stencil", TORCH_BOX(&stencil));
  m.impl("stencil_gradient", TORCH_BOX(&stencil_gradient));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("class_tokens", TORCH_BOX(&class_tokens));
}
