// Which instructions the kernels use on this machine.
#pragma once

namespace panda {

enum class Tier { portable, avx2, avx512, avx512_bf16, amx };

// The tier in use: the best this processor and its operating system support, or a lower one if the environment variable
// PANDA_KERNELS_ISA, read once, names it. A name that is unknown or above the machine's changes nothing.
Tier tier();
const char* tier_name();

// Changes the tier in use for the whole process; false, and no change, if the name is unknown or unsupported here.
bool set_tier(const char* name);

// What PANDA_KERNELS_ISA was when the tier was chosen; null if it was not set.
const char* requested_isa();

}  // namespace panda
