// Any processor: the compiler's generic vectors.
#include "isa/isa_begin.h"

#define TARGET

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 3;
constexpr int kPassVectors = 4;

#include "isa/simd_portable.h"
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

const Isa registered("portable", 0, [] { return Fit::automatic; }, common_kernels());

}  // namespace
}  // namespace dynamoe_cpu
