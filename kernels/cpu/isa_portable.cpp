// Any processor: the compiler's generic vectors.
#include "isa_begin.h"

#define TARGET

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 3;
constexpr int kPassVectors = 4;
constexpr bool kPairs = false;

#include "simd_portable.h"
#include "transpose_portable.h"
#include "row_kernels.h"
#include "kv_codes.h"
#include "tile_kernels.h"
#include "fp8_plain.h"
#include "quant_rows.h"
#include "quant_plain.h"

}  // namespace

KERNEL_TABLE(kPortableKernels, "portable", 8, run_float<2>, kPlainQuant, nullptr);

}  // namespace dynamoe_cpu
