// What a binding takes a torch tensor for: a pointer of a dtype and a shape, or an error. Included by bindings.cpp
// alone.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "core/drivers.h"
#include "expect.h"

namespace {

panda::Dtype dtype_of(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                  "panda_kernels: the cpu backend computes in float32 and bfloat16");
  return t.scalar_type() == ScalarType::Float ? panda::Dtype::float32 : panda::Dtype::bfloat16;
}

ScalarType type_of(panda::Dtype dtype) {
  return dtype == panda::Dtype::float32 ? ScalarType::Float : ScalarType::BFloat16;
}

const void* in(const Tensor& t, panda::Dtype dtype, Shape shape) {
  expect(t, type_of(dtype), shape);
  return t.const_data_ptr();
}

void* out(const Tensor& t, panda::Dtype dtype, Shape shape) {
  expect(t, type_of(dtype), shape);
  return t.mutable_data_ptr();
}

const float* floats(const Tensor& t, Shape shape) {
  return static_cast<const float*>(in(t, panda::Dtype::float32, shape));
}

float* floats_out(const Tensor& t, Shape shape) { return static_cast<float*>(out(t, panda::Dtype::float32, shape)); }

const int64_t* integers(const Tensor& t, Shape shape) {
  expect(t, ScalarType::Long, shape);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

const void* packed(const Tensor& t, panda::Dtype dtype, int64_t n, int64_t k, int64_t matrices = 1) {
  expect(t, ScalarType::Byte, {matrices * panda::packed_bytes(dtype, n, k)});
  return t.const_data_ptr();
}

const Tensor* list(const std::vector<Tensor>& weights, size_t count) {
  STD_TORCH_CHECK(weights.size() == count, "panda_kernels: expected ", count, " weights, got ", weights.size());
  return weights.data();
}

panda::PixelType pixel_type(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Byte) return panda::PixelType::uint8;
  return dtype_of(x) == panda::Dtype::float32 ? panda::PixelType::float32 : panda::PixelType::bfloat16;
}

// Pixels [B, T, 3 or more, H, W] of any strides and the grid of their patches.
panda::Grid pixels_of(const Tensor& x, const std::optional<Tensor>& present, const Tensor& normalise, int64_t patch,
                      panda::Pixels& p) {
  const auto [clips, frames, planes, height, width] = sizes<5>(x);
  STD_TORCH_CHECK(planes >= 3 && frames > 0 && patch > 0 && patch <= height && patch <= width,
                  "panda_kernels: expected frames of at least 3 planes and one patch of ", patch);
  p.type = pixel_type(x);
  p.data = x.const_data_ptr();
  p.batch_stride = x.stride(0);
  p.frame_stride = x.stride(1);
  p.channel_stride = x.stride(2);
  p.row_stride = x.stride(3);
  p.column_stride = x.stride(4);
  p.frames = frames;
  p.patch = int(patch);
  if (present) {
    expect(*present, ScalarType::Bool, {clips, frames});
    p.present = static_cast<const bool*>(present->const_data_ptr());
  }
  const float* scale_shift = floats(normalise, {6});
  std::copy_n(scale_shift, 3, p.scale);
  std::copy_n(scale_shift + 3, 3, p.shift);
  return {frames, height / patch, width / patch};
}

}  // namespace
