#include "higgs/isa.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "higgs/error.h"
#include "kernels.h"

#ifdef HIGGS_X86
#include <cpuid.h>
#endif

namespace higgs {
namespace {

#ifdef HIGGS_X86
// Some compilers do not know "f16c" in __builtin_cpu_supports.
bool has_f16c() noexcept {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

std::atomic<int>& current() noexcept {
  static std::atomic<int> isa{static_cast<int>(supported_isas().back())};
  return isa;
}

}  // namespace

const char* name_of(Isa isa) noexcept {
  return isa == Isa::portable ? "portable" : isa == Isa::avx2 ? "avx2" : "avx512";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> list{Isa::portable};
#ifdef HIGGS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2) list.push_back(Isa::avx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi")) {
    list.push_back(Isa::avx512);
  }
#endif
  return list;
}

Isa current_isa() noexcept { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void set_isa(Isa isa) {
  const std::vector<Isa> legal = supported_isas();
  if (std::ranges::find(legal, isa) == legal.end()) {
    std::string names;
    for (Isa i : legal) names += (names.empty() ? "" : ", ") + std::string(name_of(i));
    throw Error(ErrorCode::unsupported, "set_isa: this CPU has no " + std::string(name_of(isa)) + "; it has " + names);
  }
  current().store(static_cast<int>(isa), std::memory_order_relaxed);
}

namespace detail {

const Kernels& kernels() noexcept {
  switch (current_isa()) {
#ifdef HIGGS_X86
    case Isa::avx2: return kAvx2Kernels;
    case Isa::avx512: return kAvx512Kernels;
#endif
    default: return kPortableKernels;
  }
}

}  // namespace detail
}  // namespace higgs
