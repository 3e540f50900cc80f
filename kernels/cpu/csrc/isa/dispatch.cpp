// Which instruction set this process uses.
#include <cstring>

#include "isa/kernels.h"

namespace dynamoe_cpu {

#if defined(__x86_64__)
extern const Kernels kAvx512Bf16Kernels, kAvx512VnniKernels, kAvx512Kernels, kAvx2Kernels;
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
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  // Intel's BF16 dot product runs at half the rate of fp32 multiply-adds; by name it can still be had.
  const bool slow_bf16 = any && __builtin_cpu_is("intel");
  if (bf16 && !slow_bf16 && wanted(kAvx512Bf16Kernels)) return &kAvx512Bf16Kernels;
  if (vnni && wanted(kAvx512VnniKernels)) return &kAvx512VnniKernels;
  if (avx512 && wanted(kAvx512Kernels)) return &kAvx512Kernels;
  if (avx2 && wanted(kAvx2Kernels)) return &kAvx2Kernels;
#endif
  return wanted(kPortableKernels) ? &kPortableKernels : nullptr;
}

}  // namespace dynamoe_cpu
