// Quantised weights into the blocks of quant.h.
#pragma once

#include "ops/operators.h"
#include "quant/scales.h"

namespace dynamoe_cpu {

// Codes as they were stored, row after row: a byte each, or fewer bits from the lowest bit of a byte up.
struct CodeRows {
  const uint8_t* codes[2];  // [expert][row][byte]; in gated blocks the second's rows follow the first's, else it is null
  int64_t experts, rows, row_bytes;
  bool with_sign;  // the bytes are numbers, to which 128 is added

  int64_t block_rows() const { return codes[1] ? kGatedOutputs : kBlockOutputs; }  // of each of the codes
  int64_t blocks() const { return ceil_div(rows, block_rows()); }                  // of an expert
  // The codes of an output, as all experts' blocks count them; null where a block is not full.
  const uint8_t* row(int64_t output) const {
    const int64_t block = output / kBlockOutputs, o = output % kBlockOutputs, expert = block / blocks();
    const int64_t row = block % blocks() * block_rows() + o % block_rows();
    return row < rows ? codes[o / block_rows()] + (expert * rows + row) * row_bytes : nullptr;
  }
};

// Of every output and group: scales, and offsets or zero points if there are any; with two levels their codes, and fp16
// of every output and section.
struct GroupValues {
  const float *scales, *offsets;
  const uint8_t *scale_codes, *offset_codes;
  const uint16_t *outer_scales, *outer_offsets;
};

void pack_quant(const Context& context, const QuantLayout& layout, const CodeRows& codes, const GroupValues& values,
                char* packed);

// Codes of 4 bits in the order of `CodeRows`, from rows of bytes of which each run of `run` has all its low halves in
// front of its high ones: [row][byte] to [row][byte]. Pieces of a row, of `piece` bytes, are `piece_stride` apart.
struct HalvesCall {
  const uint8_t* bytes;
  int64_t rows, row_stride, pieces, piece_stride, piece, run;
  uint8_t* out;
};
void pack_halves(int threads, const HalvesCall& call);

}  // namespace dynamoe_cpu
