// Any processor: the compiler's generic vectors.
#include "isa_begin.h"

#define TARGET

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 3;
constexpr int kPassVectors = 4;
constexpr bool kPairs = false;
constexpr int kPrefetchWords = 1024;

#include "simd_portable.h"
#include "transpose_portable.h"
#include "row_kernels.h"
#include "tile_kernels.h"
#include "int8_portable.h"

}  // namespace

extern const Kernels kPortableKernels = {
    "portable",
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
