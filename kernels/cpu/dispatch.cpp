// Which instruction set this process uses.
#include <cstring>

#include "kernels.h"

namespace dynamoe_cpu {

#if defined(__x86_64__)
extern const Kernels kAvx512Bf16Kernels, kAvx512Kernels, kAvx2Kernels;
#endif
extern const Kernels kPortableKernels;

const Kernels* find_kernels(const char* name) {
  const bool any = std::strcmp(name, "auto") == 0;
  const auto wanted = [&](const Kernels& kernels) { return any || std::strcmp(name, kernels.name) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool dots = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (dots && wanted(kAvx512Bf16Kernels)) return &kAvx512Bf16Kernels;
  if (avx512 && wanted(kAvx512Kernels)) return &kAvx512Kernels;
  if (avx2 && wanted(kAvx2Kernels)) return &kAvx2Kernels;
#endif
  return wanted(kPortableKernels) ? &kPortableKernels : nullptr;
}

}  // namespace dynamoe_cpu
