#include "kernels.h"

#include "tier.h"

#define PANDA_KERNEL(name, ...) void name(__VA_ARGS__);
namespace panda::portable {
#include "kernels.inc"
}
#if defined(__x86_64__)
namespace panda::avx2 {
#include "kernels.inc"
}
namespace panda::avx512 {
#include "kernels.inc"
}
namespace panda::avx512_bf16 {
void gemm_bfloat16(const Gemm&, int64_t, int64_t, int64_t, int64_t);
}
namespace panda::amx {
void gemm_bfloat16(const Gemm&, int64_t, int64_t, int64_t, int64_t);
}
#endif
#undef PANDA_KERNEL

namespace panda {

namespace {

constexpr Kernels kPortable = {
#define PANDA_KERNEL(name, ...) portable::name,
#include "kernels.inc"
#undef PANDA_KERNEL
};

#if defined(__x86_64__)
constexpr Kernels kAvx2 = {
#define PANDA_KERNEL(name, ...) avx2::name,
#include "kernels.inc"
#undef PANDA_KERNEL
};

constexpr Kernels kAvx512 = {
#define PANDA_KERNEL(name, ...) avx512::name,
#include "kernels.inc"
#undef PANDA_KERNEL
};

// The two tiers above avx512 only multiply bfloat16 matrices differently.
constexpr Kernels with_gemm_bfloat16(Kernels table, decltype(Kernels::gemm_bfloat16) product) {
  table.gemm_bfloat16 = product;
  return table;
}

constexpr Kernels kTables[] = {kPortable, kAvx2, kAvx512, with_gemm_bfloat16(kAvx512, avx512_bf16::gemm_bfloat16),
                               with_gemm_bfloat16(kAvx512, amx::gemm_bfloat16)};
#else
constexpr Kernels kTables[] = {kPortable};
#endif

}  // namespace

const Kernels& kernels() { return kTables[static_cast<int>(tier())]; }

}  // namespace panda
