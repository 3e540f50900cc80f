// AVX-512 with the VNNI dot product; bf16 is widened to fp32 on the way (Cascade Lake and later, and Intel's processors
// with BF16 too: theirs take two cycles for each BF16 dot product, in which they finish four multiply-adds of fp32).
#include "isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kPassVectors = 2;
constexpr bool kPairs = false;
constexpr int kCodesAhead = 4096;
constexpr int kByteStride = 1;

#include "simd_avx512.h"
#include "row_kernels.h"
#include "kv_codes.h"
#include "tile_kernels.h"
#include "fp8_avx512.h"
#include "quant_rows.h"
#include "quant_vnni.h"

}  // namespace

KERNEL_TABLE(kAvx512VnniKernels, "avx512vnni", 8, run_float<2>, kVnniQuant, nullptr);

}  // namespace dynamoe_cpu
#endif
