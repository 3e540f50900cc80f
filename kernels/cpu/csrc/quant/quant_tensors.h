// Quantised weights as torch tensors. `layout` is format, outputs, inputs, group, offsets, byte_rows,
// scale type.
#pragma once

#include "quant/quant.h"
#include "ops/tensors.h"

namespace dynamoe_cpu {

inline QuantLayout quant_layout(at::IntArrayRef numbers) {
  TORCH_CHECK_VALUE(numbers.size() == 7, "a quantised layout has 7 numbers, not ", numbers.size());
  size_of(numbers[1], "outputs of a layout");
  size_of(numbers[2], "inputs of a layout");
  const QuantLayout layout{static_cast<Format>(numbers[0]), numbers[1], numbers[2], numbers[3], static_cast<Offsets>(numbers[4]),
                           numbers[5] != 0, static_cast<ScaleType>(numbers[6])};
  TORCH_CHECK_VALUE(0 <= numbers[0] && numbers[0] <= 2 && 0 <= numbers[6] && numbers[6] <= 2 && layout.outputs > 0 && layout.inputs > 0 &&
                        (layout.group == layout.inputs || (layout.group > 0 && layout.group % 8 == 0)) &&
                        (layout.format != Format::int8 || layout.group == layout.inputs || !layout.byte_rows) &&
                        0 <= numbers[4] && numbers[4] <= 2 && (layout.format == Format::int4 || !layout.has_offsets()),
                    "impossible quantised layout ", numbers);
  return layout;
}

inline QuantWeights quant_weights(const Tensor& packed, const OptionalTensor& bias, at::IntArrayRef numbers,
                                  const char* name) {
  const QuantLayout layout = quant_layout(numbers);
  TORCH_CHECK_VALUE(!bias || bias->numel() == layout.blocks() * kBlockOutputs, name,
                    "'s bias must be padded to whole blocks");
  return {layout, reinterpret_cast<const char*>(words(packed, layout.blocks() * layout.block_bytes() / 4, name)),
          floats(bias, "bias")};
}

inline QuantExperts quant_experts_of(const ExpertLayout& layout, const Tensor& gate_up, at::IntArrayRef gate_up_layout,
                                     const Tensor& down, at::IntArrayRef down_layout) {
  const QuantExperts experts{quant_weights(gate_up, {}, gate_up_layout, "gate_up"),
                             quant_weights(down, {}, down_layout, "down")};
  TORCH_CHECK_VALUE(experts.gate_up.layout.inputs == layout.hidden && experts.down.layout.inputs == layout.width &&
                        experts.gate_up.layout.outputs == layout.experts * layout.gate_blocks() * kBlockOutputs &&
                        experts.down.layout.outputs == layout.experts * layout.down_blocks() * kBlockOutputs,
                    "packed weights ", gate_up_layout, " and ", down_layout, " do not fit ", layout.experts,
                    " experts of ", layout.width, " neurons and hidden size ", layout.hidden);
  return experts;
}

}  // namespace dynamoe_cpu
