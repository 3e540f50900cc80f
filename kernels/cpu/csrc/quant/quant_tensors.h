// Quantised weights as torch tensors. `layout` is format, outputs, inputs, group, offsets, byte_rows, scale type; of a
// layer of several formats the same for each of its parts.
#pragma once

#include "quant/quant.h"
#include "ops/tensors.h"

namespace dynamoe_cpu {

constexpr size_t kLayoutNumbers = 7;

inline QuantLayout quant_layout(at::IntArrayRef numbers) {
  TORCH_CHECK_VALUE(numbers.size() == kLayoutNumbers, "a quantised layout has 7 numbers, not ", numbers.size());
  size_of(numbers[1], "outputs of a layout");
  size_of(numbers[2], "inputs of a layout");
  const QuantLayout layout{static_cast<Format>(numbers[0]), numbers[1], numbers[2], numbers[3], static_cast<Offsets>(numbers[4]),
                           numbers[5] != 0, static_cast<ScaleType>(numbers[6])};
  const auto fits = [&] {
    const auto within = [&](size_t place, int64_t last) { return 0 <= numbers[place] && numbers[place] <= last; };
    if (!within(0, static_cast<int64_t>(Format::mxfp4)) || !within(4, 2) || !within(6, 3)) return false;
    if (layout.outputs <= 0 || layout.inputs <= 0) return false;
    if (layout.two_level())
      return layout.group == (layout.format == Format::q6_k ? 16 : 32) && !layout.byte_rows &&
             layout.scale_type == ScaleType::fp16 &&
             layout.offsets == (layout.format == Format::q6_k ? Offsets::none : Offsets::values);
    if (layout.format == Format::mxfp4) return layout.group == 32 && !layout.byte_rows && !layout.has_offsets();
    if (layout.scale_type == ScaleType::e8m0) return false;
    return (layout.group == layout.inputs || (layout.group > 0 && layout.group % 8 == 0)) &&
           (layout.format != Format::int8 || layout.group == layout.inputs || !layout.byte_rows) &&
           (layout.format == Format::int4 || !layout.has_offsets());
  };
  TORCH_CHECK_VALUE(fits(), "impossible quantised layout ", numbers);
  return layout;
}

// The parts of a layer, packed one behind the other; the layouts likewise.
inline QuantLayer quant_layer(const Tensor& packed, const OptionalTensor& bias, at::IntArrayRef numbers,
                              const char* name) {
  QuantLayer layer;
  int64_t bytes = 0, blocks = 0;
  for (size_t at = 0; at < numbers.size(); at += kLayoutNumbers) {
    const QuantLayout layout = quant_layout(numbers.slice(at, std::min(kLayoutNumbers, numbers.size() - at)));
    TORCH_CHECK_VALUE(layer.empty() || layout.inputs == layer[0].layout.inputs, name, " has parts with ", layout.inputs,
                      " and with ", layer[0].layout.inputs, " inputs");
    layer.push_back({layout, static_cast<const char*>(packed.data_ptr()) + bytes,
                     bias ? floats(bias, "bias") + blocks * kBlockOutputs : nullptr});
    bytes += layout.blocks() * layout.block_bytes();
    blocks += layout.blocks();
  }
  words(packed, bytes / 4, name);
  TORCH_CHECK_VALUE(!bias || bias->numel() == blocks * kBlockOutputs, name, "'s bias must be padded to whole blocks");
  return layer;
}

inline int64_t outputs_of(const QuantLayer& layer) {
  int64_t outputs = 0;
  for (const QuantWeights& part : layer) outputs += part.layout.outputs;
  return outputs;
}

inline QuantWeights quant_weights(const Tensor& packed, at::IntArrayRef numbers, const char* name) {
  TORCH_CHECK_VALUE(numbers.size() == kLayoutNumbers, name, " must be of one format");
  return quant_layer(packed, {}, numbers, name)[0];
}

// With places, weights lie anywhere in the tensors (see `set_places`).
inline QuantExperts quant_experts_of(const ExpertLayout& layout, const Tensor& gate_up, at::IntArrayRef gate_up_layout,
                                     const Tensor& down, at::IntArrayRef down_layout, bool placed = false) {
  const auto weights = [&](const Tensor& packed, at::IntArrayRef numbers, const char* name) -> QuantWeights {
    if (!placed) return quant_weights(packed, numbers, name);
    words(packed, packed.numel(), name);
    return {quant_layout(numbers), static_cast<const char*>(packed.data_ptr()), nullptr};
  };
  const QuantExperts experts{weights(gate_up, gate_up_layout, "gate_up"), weights(down, down_layout, "down")};
  TORCH_CHECK_VALUE(experts.gate_up.layout.inputs == layout.hidden && experts.down.layout.inputs == layout.width &&
                        experts.gate_up.layout.outputs == layout.experts * layout.gate_blocks() * kBlockOutputs &&
                        experts.down.layout.outputs == layout.experts * layout.down_blocks() * kBlockOutputs,
                    "packed weights ", gate_up_layout, " and ", down_layout, " do not fit ", layout.experts,
                    " experts of ", layout.width, " neurons and hidden size ", layout.hidden);
  return experts;
}

// Where experts begin, in bytes from the front of each tensor, (2, experts): of gate_up, and of down. Those of experts
// that are used are checked.
inline void set_places(QuantExperts& experts, const ExpertsCall& call, const Tensor& places, int64_t gate_up_bytes,
                       int64_t down_bytes) {
  const int64_t count = call.layout.experts;
  experts.gate_up_places = data_of<int64_t>(places, at::kLong, 2 * count, "places");
  experts.down_places = experts.gate_up_places + count;
  const auto check = [&](const QuantWeights& weights, int64_t place, int64_t bytes, int64_t expert) {
    const int64_t size = weights.layout.blocks() / count * weights.layout.block_bytes();
    TORCH_CHECK_VALUE(0 <= place && place <= bytes - size && place % 64 == 0, "expert ", expert, " cannot be at ",
                      place, " of ", bytes, " bytes");
  };
  for (int64_t slot = 0; slot < (call.ids ? call.rows * call.top_k : count); ++slot) {
    if (call.ids && call.counts && slot % call.top_k >= call.counts[slot / call.top_k]) continue;
    const int64_t expert = call.ids ? call.ids[slot] : slot;
    TORCH_CHECK_VALUE(0 <= expert && expert < count, "an expert number is out of range: there are ", count, " experts");
    check(experts.gate_up, experts.gate_up_places[expert], gate_up_bytes, expert);
    check(experts.down, experts.down_places[expert], down_bytes, expert);
  }
}

}  // namespace dynamoe_cpu
