// Any processor: the compiler's generic vectors.
#include "isa/isa_begin.h"

#define TARGET

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 3;
constexpr int kPassVectors = 4;
constexpr bool kPairs = false;

#include "isa/simd_portable.h"
#include "isa/transpose_portable.h"
#include "isa/row_kernels.h"
#include "ops/kv_codes.h"
#include "isa/tile_kernels.h"
#include "isa/fp8_plain.h"
#include "quant/quant_rows.h"
#include "quant/quant_plain.h"

}  // namespace

KERNEL_TABLE(kPortableKernels, "portable", 8, run_float<2>, kPlainQuant, nullptr);

}  // namespace dynamoe_cpu
