// AVX2 with FMA (Haswell and later, every Zen).
#include "isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 3;
constexpr int kPassVectors = 4;
constexpr bool kPairs = false;

#include "simd_avx2.h"
#include "transpose_portable.h"
#include "row_kernels.h"
#include "kv_codes.h"
#include "tile_kernels.h"
#include "fp8_plain.h"
#include "quant_rows.h"
#include "quant_plain.h"

}  // namespace

KERNEL_TABLE(kAvx2Kernels, "avx2", 8, run_float<2>, kPlainQuant, nullptr);

}  // namespace dynamoe_cpu
#endif
