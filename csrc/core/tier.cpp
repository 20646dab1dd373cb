#include "tier.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace panda {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// AMX state is large, so Linux wants to be asked before a process touches it.
bool amx_granted() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kTileState = 3u << 17;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Tier best_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2")))
    return Tier::portable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return Tier::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Tier::avx512;
  return amx_granted() ? Tier::amx : Tier::avx512_bf16;
#else
  return Tier::portable;
#endif
}

// The number of the tier called so; -1 if none is.
int find(const char* name) {
  for (int i = 0; i <= static_cast<int>(Tier::amx); ++i)
    if (!std::strcmp(name, kNames[i])) return i;
  return -1;
}

struct Choice {
  int best = static_cast<int>(best_supported());
  bool asked = false;
  std::string request;
  std::atomic<int> current;

  Choice() {
    current = best;
    if (const char* name = std::getenv("PANDA_KERNELS_ISA")) {
      asked = true;
      request = name;
      set(name);
    }
  }

  bool set(const char* name) {
    const int i = find(name);
    if (i < 0 || i > best) return false;
    current = i;
    return true;
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

}  // namespace

Tier tier() { return static_cast<Tier>(choice().current.load(std::memory_order_relaxed)); }
const char* tier_name() { return kNames[static_cast<int>(tier())]; }
bool set_tier(const char* name) { return choice().set(name); }
const char* requested_isa() { return choice().asked ? choice().request.c_str() : nullptr; }

}  // namespace panda
