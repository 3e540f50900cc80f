// Blocks that keep recurrent states, made of named tensors and numbers.
#include "ops/stack_blocks.h"

namespace dynamoe_cpu {

Convolution StackWeights::convolution(NamedBlock& named, int64_t channels) {
  size_of(channels, "channels of a convolution");
  const Tensor weight = named.tensor("conv_WX");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == channels && 2 <= weight.size(0) &&
                        weight.size(0) <= kMostTaps,
                    "conv_WX must have 2 … ", kMostTaps, " taps of ", channels, " channels, not shape ", weight.sizes());
  return {channels, static_cast<int>(weight.size(0)), numbers(named, "conv_WX", weight.numel()),
          floats(keep(named.optional("conv_bias_X")), channels, "conv_bias_X"), {}};
}

DeltaBlock StackWeights::delta(NamedBlock& named, int64_t hidden) {
  DeltaBlock block{};
  block.groups = size_of(named.integer("num_groups"), "num_groups");
  block.heads = size_of(named.integer("num_heads"), "num_heads");
  block.keys = size_of(named.integer("key_channels"), "key_channels");
  block.values = size_of(named.integer("value_channels"), "value_channels");
  TORCH_CHECK_VALUE(block.heads % block.groups == 0, block.heads, " heads do not divide among ", block.groups, " groups");
  size_of(block.groups * block.keys, "groups times channels");
  size_of(block.heads * block.values, "heads times channels");
  block.by_group = named.integer("by_group") != 0;
  block.convolution = convolution(named, 2 * block.key_width() + block.value_width());
  std::vector<Columns>& columns = block.convolution.columns;
  const int64_t of_group = block.per_group() * block.values, behind = 2 * (block.keys + of_group);
  for (int64_t group = 0; block.by_group && group < block.groups; ++group) {
    add_columns(columns, group * behind, group * block.keys, block.keys);
    add_columns(columns, group * behind + block.keys, block.key_width() + group * block.keys, block.keys);
    add_columns(columns, group * behind + 2 * block.keys, 2 * block.key_width() + group * of_group, of_group);
  }
  if (!block.by_group) add_columns(columns, 0, 0, block.convolution.channels);
  block.qkvz = linear(named, "qkvz", hidden, block.convolution.channels + block.value_width());
  block.ba = linear(named, "ba", hidden, 2 * block.heads);
  block.out = linear(named, "out", block.value_width(), hidden);
  block.decay_rate = numbers(named, "decay_rate_H", block.heads);
  block.decay_bias = numbers(named, "decay_bias_H", block.heads);
  block.norm = plain(named.tensor("norm_V"), block.values, "norm_V");
  block.length_eps = named.number("length_eps");
  return block;
}

SpaceBlock StackWeights::space(NamedBlock& named, int64_t hidden) {
  SpaceBlock block{};
  block.groups = size_of(named.integer("num_groups"), "num_groups");
  block.heads = size_of(named.integer("num_heads"), "num_heads");
  block.channels = size_of(named.integer("head_channels"), "head_channels");
  block.state = size_of(named.integer("state_size"), "state_size");
  TORCH_CHECK_VALUE(block.heads % block.groups == 0, block.heads, " heads do not divide among ", block.groups, " groups");
  size_of(block.heads * block.channels, "heads times channels");
  size_of(block.groups * block.state, "groups times state_size");
  block.convolution = convolution(named, block.width() + 2 * block.matrices());
  add_columns(block.convolution.columns, block.width(), 0, block.convolution.channels);
  block.into = linear(named, "into", hidden, block.width() + block.convolution.channels + block.heads);
  block.out = linear(named, "out", block.width(), hidden);
  block.decay_rate = numbers(named, "decay_rate_H", block.heads);
  block.step_bias = numbers(named, "step_bias_H", block.heads);
  block.skip = numbers(named, "skip_H", block.heads);
  block.norm = numbers(named, "norm_X", block.width());
  return block;
}

ConvolutionBlock StackWeights::short_convolution(NamedBlock& named, int64_t hidden) {
  ConvolutionBlock block{};
  block.convolution = convolution(named, named.integer("channels"));
  const int64_t channels = block.convolution.channels;
  add_columns(block.convolution.columns, 0, 0, channels);
  block.gates = linear(named, "gates", hidden, 3 * channels);
  block.out = linear(named, "out", channels, hidden);
  return block;
}

}  // namespace dynamoe_cpu
