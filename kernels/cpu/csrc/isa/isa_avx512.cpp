// AVX-512 without the dot products (Skylake-X): bf16 is widened to fp32 on the way.
#include "isa/isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kPassVectors = 2;
constexpr int kCodesAhead = 4096;

#include "isa/simd_avx512.h"
#include "isa/row_kernels.h"
#include "isa/state_kernels.h"
#include "isa/packed_words.h"
#include "ops/kv_codes.h"
#include "isa/tile_kernels.h"
#include "isa/fp8_avx512.h"
#include "quant/quant_rows.h"
#include "quant/quant_plain.h"
#include "isa/table.h"

const Isa registered("avx512", 20, [] { return has_avx512() ? Fit::automatic : Fit::none; }, common_kernels());

}  // namespace
}  // namespace dynamoe_cpu
#endif
