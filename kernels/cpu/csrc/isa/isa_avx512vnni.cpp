// AVX-512 with the VNNI dot product; bf16 is widened to fp32 on the way (Cascade Lake and later, and Intel's processors
// with BF16 too: theirs take two cycles for each BF16 dot product, in which they finish four multiply-adds of fp32).
#include "isa/isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kPassVectors = 2;
constexpr int kCodesAhead = 4096;
constexpr int kByteStride = 1;

#include "isa/simd_avx512.h"
#include "isa/row_kernels.h"
#include "isa/state_kernels.h"
#include "isa/packed_words.h"
#include "ops/kv_codes.h"
#include "isa/tile_kernels.h"
#include "isa/fp8_avx512.h"
#include "quant/quant_rows.h"
#include "quant/quant_vnni.h"
#include "isa/table.h"

const Isa registered("avx512vnni", 30, [] { return has_avx512vnni() ? Fit::automatic : Fit::none; }, common_kernels());

}  // namespace
}  // namespace dynamoe_cpu
#endif
