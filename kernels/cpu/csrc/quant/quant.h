// Quantised weights in memory, and their products with rows.
//
// A block of 32 outputs lies together, to be read front to back: for each group of inputs that share scales
//     scale[32], then offset[32] or zero point[32] if there are any, then the codes of the group.
// With two levels of scales, for each 256 inputs:
//     outer scale[32], outer offset[32] if there are any, scale[group][32], offset[group][32],
//     then the codes, group by group.
// Those of groups are integers of 8 bits, outer ones fp16. Where a row's inputs end, codes and scales are zero.
//
// mxfp4 is twice the code's value, so that all are whole numbers, times half its scale.
//
// Codes of 8-bit integers: [4 inputs][32 outputs][4], as code + 128. Codes of 4 bits: [8 inputs][32 outputs][4], of
// which a byte holds input i in its low and input i + 4 in its high nibble. 8-bit floats: [input][32 outputs].
// Of codes of 5 and 6 bits the lower 4 lie like those of 4 bits, and behind those of the group the upper ones:
// [32 outputs][4], of which byte i holds those of inputs i, i + 4, i + 8 …, from its lowest bit up.
//
// A product runs in one of two ways, chosen by format, dtype and processor only, so that a row's result never depends on
// the rows beside it:
// - limbs: rows become integers of one or two int8 limbs, one scale per group of inputs; sums of a group are exact;
// - wide: a stretch of a block is widened to fp32 in the first-level cache, where all rows meet it.
#pragma once

#include <vector>

#include "ops/operators.h"
#include "ops/packed.h"
#include "quant/scales.h"

namespace dynamoe_cpu {

struct QuantWeights {
  QuantLayout layout;
  const char* data;
  const float* bias;  // padded to whole blocks, or null

  const char* block(int64_t number) const { return data + number * layout.block_bytes(); }
};

// A layer whose outputs may differ in format: parts one after the other.
using QuantLayer = std::vector<QuantWeights>;

// Whether rows of this dtype meet the weights as integers.
bool uses_limbs(const Kernels& kernels, const QuantLayout& layout, Dtype dtype);

// One product on this processor: rows are packed, and packed rows multiplied with blocks.
class QuantProduct {
 public:
  QuantProduct(const Kernels& kernels, const QuantLayout& layout, Dtype dtype);
  int64_t most_rows() const { return most_packed_rows(tile_rows_, packed_bytes(tile_rows_)); }
  PackedTiles tiles(int64_t rows) const {
    return {rows, tile_rows_, [this](int size) { return packed_bytes(size); }};
  }
  // One tile. `dtype` of the rows may be another than that of the model.
  void pack(char* packed, const void* const* rows, int num_rows, Dtype dtype) const;
  // Where rows become limbs, they may be made once to be packed several times: `limb_bytes()` each, else 0.
  int64_t limb_bytes() const { return limbs_ ? shape_.row_bytes : 0; }
  void make_limbs(char* limbs, const void* row, Dtype dtype) const;
  void pack_limbs(char* packed, const void* const* limbs, int num_rows) const;
  // out[row][32] = row · block for the rows of all tiles. The block is one of a stretch that is read in order and begins
  // with block `first`; `after` is what will be read when it ends, or null.
  void multiply(const char* packed, const PackedTiles& tiles, const char* block, bool first, const char* after,
                float* out) const;

 private:
  int64_t packed_bytes(int num_rows) const;
  CodesAhead ahead(const char* block, bool first, const char* after, int64_t tile, int64_t tiles) const;

  const Kernels& kernels_;
  const QuantLayout layout_;
  const bool limbs_;
  LimbShape shape_;
  int tile_rows_;
};

struct QuantLinearCall {
  Rows x;
  int64_t rows;
  const QuantLayer* layer;
  void* out;
  int64_t out_stride;
  Dtype out_dtype;
};
void quant_linear(const Context& context, const QuantLinearCall& call);

// Rows of a layer, dequantised.
void quant_rows(const Context& context, const QuantLayer& layer, const int64_t* ids, int64_t count, float* out);

// Experts: gate and up interleaved in gated blocks, [expert][gate block], and down, [expert][block].
struct QuantExperts {
  QuantWeights gate_up, down;  // layouts of all experts' blocks; outputs are multiples of whole blocks per expert
  // Where the blocks of each expert that is used begin, in bytes from the data; null: one expert behind the other.
  const int64_t *gate_up_places = nullptr, *down_places = nullptr;
};
// As `experts`; call.gate_up and call.down are not looked at. Without ids every row uses every expert with weight 1.
int64_t quant_experts(const Context& context, const ExpertsCall& call, const QuantExperts& weights);

}  // namespace dynamoe_cpu
