// AVX2 with FMA (Haswell and later, every Zen).
#include "isa/isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 3;
constexpr int kPassVectors = 4;
constexpr bool kPairs = false;

#include "isa/simd_avx2.h"
#include "isa/transpose_portable.h"
#include "isa/row_kernels.h"
#include "ops/kv_codes.h"
#include "isa/tile_kernels.h"
#include "isa/fp8_plain.h"
#include "quant/quant_rows.h"
#include "quant/quant_plain.h"

}  // namespace

KERNEL_TABLE(kAvx2Kernels, "avx2", 8, run_float<2>, kPlainQuant, nullptr);

}  // namespace dynamoe_cpu
#endif
