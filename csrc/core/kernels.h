// The kernels of the tier in use: kernels().name(...).
#pragma once
#include <cstdint>

#include "batch_statistics.h"
#include "depthwise.h"
#include "gemm.h"
#include "linear.h"
#include "patches.h"
#include "pooling.h"
#include "temporal.h"
#include "weight_gradient.h"
#include "windows.h"

namespace panda {

struct Kernels {
#define PANDA_KERNEL(name, ...) void (*name)(__VA_ARGS__);
#include "kernels.inc"
#undef PANDA_KERNEL
};

const Kernels& kernels();

}  // namespace panda
