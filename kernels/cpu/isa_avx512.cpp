// AVX-512 without the dot products (Skylake-X, Cascade Lake): bf16 is widened to fp32 on the way.
#include "isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kPassVectors = 2;
constexpr bool kPairs = false;
constexpr int kPrefetchWords = 1024;

#include "simd_avx512.h"
#include "row_kernels.h"
#include "tile_kernels.h"
#include "int8_portable.h"

}  // namespace

extern const Kernels kAvx512Kernels = {
    "avx512",
    {{kTileRows, 1, 4, pack_fp32, run_float<1>}, {kTileRows, 2, 8, pack_bf16, run_float<2>}},
    {kTileRows, 4, 4, pack_int8, run_int8},
    transpose_cells,
    store,
    gated,
    scaled_add,
    weigh_values,
    convert,
    widen,
    rms_norm,
    rope,
    softmax_step,
    softmax_merge,
    quantize,
};

}  // namespace dynamoe_cpu
#endif
