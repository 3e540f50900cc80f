// Weights rounded to nearest as they are read, in whatever floating type they were stored. The numbers are those of
// kernels/api/rounding.py, bit by bit.
#pragma once

#include <cstdint>

#include "isa/kernels.h"

namespace dynamoe_cpu {

enum class Source : int { fp32 = 0, bf16 = 1, fp16 = 2 };

struct RoundCall {
  const void* weight;  // [expert][output][input], inputs contiguous
  Source source;
  int64_t experts, outputs, inputs;
  int64_t expert_stride, output_stride;  // in elements
  Format format;          // int8, int4 or fp8
  int64_t group;          // inputs that share a scale; 0: all
  int64_t block_outputs;  // outputs that share a scale: 1, or with fp8 as many as `group`
  bool symmetric;         // int4: a code of 8 stands for zero; else there are zero points
  uint8_t* codes;         // a byte each; of int4 two to a byte, the even input in the low bits, every row from a new byte
  float* scales;          // [expert][block of outputs][group]
  uint8_t* zeros;         // likewise, or null

  int64_t groups() const { return group ? ceil_div(inputs, group) : 1; }
  int64_t blocks() const { return ceil_div(outputs, block_outputs); }
  int64_t row_bytes() const { return format == Format::int4 ? ceil_div(inputs, 2) : inputs; }
};

// False when a weight is not finite: what was written is then worth nothing.
bool round_weight(int threads, const RoundCall& call);

}  // namespace dynamoe_cpu
