// AVX2 with FMA (Haswell and later, every Zen).
#include "isa/isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 3;
constexpr int kPassVectors = 4;

#include "isa/simd_avx2.h"
#include "isa/transpose_portable.h"
#include "isa/row_kernels.h"
#include "isa/state_kernels.h"
#include "isa/packed_words.h"
#include "ops/kv_codes.h"
#include "isa/tile_kernels.h"
#include "isa/fp8_plain.h"
#include "quant/quant_rows.h"
#include "quant/quant_plain.h"
#include "isa/table.h"

const Isa registered("avx2", 10, [] { return has_avx2() ? Fit::automatic : Fit::none; }, common_kernels());

}  // namespace
}  // namespace dynamoe_cpu
#endif
