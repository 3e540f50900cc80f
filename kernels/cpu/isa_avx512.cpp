// AVX-512 without the dot products (Skylake-X): bf16 is widened to fp32 on the way.
#include "isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kPassVectors = 2;
constexpr bool kPairs = false;
constexpr int kCodesAhead = 4096;

#include "simd_avx512.h"
#include "row_kernels.h"
#include "kv_codes.h"
#include "tile_kernels.h"
#include "fp8_avx512.h"
#include "quant_rows.h"
#include "quant_plain.h"

}  // namespace

KERNEL_TABLE(kAvx512Kernels, "avx512", 8, run_float<2>, kPlainQuant, nullptr);

}  // namespace dynamoe_cpu
#endif
