// What a binding expects of a torch tensor, and the error it gives otherwise. Included by one binding a library.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <size_t dims>
std::array<int64_t, dims> sizes(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == int64_t(dims), "panda_kernels: expected ", dims, " dimensions, got ", t.dim());
  std::array<int64_t, dims> all;
  std::copy_n(t.sizes().begin(), dims, all.begin());
  return all;
}

using Shape = std::initializer_list<int64_t>;

template <class Sizes>
std::string text(ScalarType type, const Sizes& sizes) {
  std::string list;
  for (int64_t size : sizes) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return std::string(torch::headeronly::toString(type)) + " [" + list + "]";
}

void expect(const Tensor& t, ScalarType type, Shape shape) {
  const auto found = t.sizes();
  STD_TORCH_CHECK(t.scalar_type() == type && std::equal(shape.begin(), shape.end(), found.begin(), found.end()),
                  "panda_kernels: expected ", text(type, shape), ", got ", text(t.scalar_type(), found));
  STD_TORCH_CHECK(t.is_contiguous(), "panda_kernels: a tensor ", text(type, shape), " is not contiguous");
}

}  // namespace
