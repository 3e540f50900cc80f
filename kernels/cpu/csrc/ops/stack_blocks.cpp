// Blocks made of named tensors and numbers.
#include "ops/stack_blocks.h"

namespace dynamoe_cpu {

const void* StackWeights::plain(const Tensor& t, int64_t count, const char* name) {
  check_host(t, name);
  TORCH_CHECK_VALUE(t.is_contiguous() && t.numel() == count && t.scalar_type() == type_, name,
                    " must be contiguous with ", count, " entries of type ", type_, ", not shape ", t.sizes());
  return keep(t).data_ptr();
}

Projection StackWeights::projection(const Tensor& packed, const OptionalTensor& bias, int64_t inputs, int64_t outputs,
                                    const char* name, const std::vector<int64_t>& layout, Dtype dtype) {
  if (!layout.empty()) {
    const QuantLayer layer = quant_layer(keep(packed), keep(bias), layout, name);
    TORCH_CHECK_VALUE(layer[0].layout.inputs == inputs && outputs_of(layer) == outputs, name, " has ",
                      outputs_of(layer), " outputs and ", layer[0].layout.inputs, " inputs, not ", outputs, " and ",
                      inputs);
    return {nullptr, nullptr, outputs, layer};
  }
  const Gemm& gemm = context_of(isa_).kernels->gemm[static_cast<int>(dtype)];
  TORCH_CHECK_VALUE(!bias || bias->numel() >= ceil_div(outputs, kBlockOutputs) * kBlockOutputs, name,
                    "'s bias must be padded to whole blocks");
  return {words(keep(packed), packed_words(gemm, outputs, inputs), name), floats(keep(bias), name), outputs, {}};
}

Block StackWeights::block(NamedBlock& named, int64_t hidden) {
  const auto checked = [&](Block block) {
    named.refuse_unread();
    return block;
  };
  if (named.kind() == "norm") return checked(norm(named, hidden));
  if (named.kind() == "attention") return checked(attention(named, hidden));
  TORCH_CHECK_VALUE(named.kind() == "experts", "a stack knows no block of kind '", named.kind(), "'");
  return checked(experts(named, hidden));
}

NormBlock StackWeights::norm(NamedBlock& named, int64_t hidden) {
  return {plain(named.tensor("weight"), hidden, "a norm")};
}

AttentionBlock StackWeights::attention(NamedBlock& named, int64_t hidden) {
  AttentionBlock block{};
  block.heads = size_of(named.integer("heads"), "heads");
  block.kv_heads = size_of(named.integer("kv_heads"), "kv_heads");
  block.channels = size_of(named.integer("channels"), "channels");
  TORCH_CHECK_VALUE(block.heads % block.kv_heads == 0 && block.channels % 2 == 0, block.heads,
                    " heads must be a multiple of ", block.kv_heads, " kv_heads, and ", block.channels, " channels even");
  size_of(block.heads * block.channels, "heads times channels");
  block.norm_per_head = named.integer("norm_per_head") != 0;
  block.window = size_of(named.integer("window"), "window", 0);
  block.scale = named.number("scale");
  block.qkv = projection(named.tensor("qkv"), named.optional("qkv_bias"), hidden,
                         block.q_width() + 2 * block.kv_width(), "qkv", named.layout("qkv"));
  block.o = projection(named.tensor("o"), named.optional("o_bias"), block.q_width(), hidden, "o", named.layout("o"));
  const auto head_norm = [&](const char* name, int64_t full) -> const void* {
    const OptionalTensor weight = named.optional(name);
    return weight ? plain(*weight, block.norm_per_head ? block.channels : full, name) : nullptr;
  };
  block.q_norm = head_norm("q_norm", block.q_width());
  block.k_norm = head_norm("k_norm", block.kv_width());
  const OptionalTensor sinks = named.optional("sinks");
  TORCH_CHECK_VALUE(!sinks || sinks->numel() == block.heads, "sinks must have one entry for each of ", block.heads,
                    " heads");
  block.sinks = floats(keep(sinks), "sinks");
  return block;
}

Ffn StackWeights::ffn(NamedBlock& named, const std::string& prefix, int64_t count, int64_t hidden,
                      bool down_per_expert) {
  Ffn ffn{};
  ExpertsCall& call = ffn.call;
  call.layout = checked_layout({dtype(), count, hidden, named.integer(prefix + "width"),
                                named.integer(prefix + "dense_down") != 0});
  call.activation = enum_of(named.integer("activation"), Activation::clamped_swiglu, "activation");
  const Tensor gate_up = keep(named.tensor(prefix + "gate_up")), down = keep(named.tensor(prefix + "down"));
  const std::vector<int64_t> gate_up_layout = named.layout(prefix + "gate_up"),
                             down_layout = named.layout(prefix + "down");
  if (gate_up_layout.empty()) {
    call.gate_up = words(gate_up, call.layout.gate_words(), "gate_up");
    call.down = words(down, call.layout.down_words(), "down");
  } else {
    ffn.quant = quant_experts_of(call.layout, gate_up, gate_up_layout, down, down_layout);
  }
  set_biases(call, keep(named.optional(prefix + "gate_up_bias")), keep(named.optional(prefix + "down_bias")),
             down_per_expert || ffn.quant);
  return ffn;
}

ExpertsBlock StackWeights::experts(NamedBlock& named, int64_t hidden) {
  ExpertsBlock block{};
  const int64_t count = named.integer("experts");
  TORCH_CHECK_VALUE(named.integer("hidden") == hidden, "the experts are for another hidden size");
  const OptionalTensor router = named.optional("router"), contribution = named.optional("contribution_scale"),
                       gate = named.optional("shared_gate");
  block.experts = ffn(named, "", count, hidden, router.has_value());
  if (named.integer("shared")) block.shared = ffn(named, "shared_", 1, hidden, false);
  if (gate) block.shared_gate = projection(*gate, {}, hidden, 1, "shared_gate");
  if (!router) return block;
  RouteCall& rule = block.rule;
  rule.experts = count;
  rule.top_k = named.integer("top_k");
  TORCH_CHECK_VALUE(1 <= rule.top_k && rule.top_k <= count, "top_k must be in 1 … ", count);
  rule.score = enum_of(named.integer("score"), Score::constant, "score");
  rule.softmax_after_topk = named.integer("softmax_after_topk") != 0;
  rule.renormalize = named.integer("renormalize") != 0;
  rule.scale = named.number("routing_scale");
  rule.selection_bias = floats(keep(named.optional("selection_bias")), count, "selection_bias");
  rule.expert_scale = floats(keep(named.optional("expert_scale")), count, "expert_scale");
  set_groups(rule, named.integer("groups"), named.integer("top_groups"), named.integer("top2_sum") != 0);
  rule.norm_floor = named.number("norm_floor");
  rule.norm_epsilon = named.number("norm_epsilon");
  block.float32_logits = named.integer("float32_logits") != 0;
  block.router = projection(*router, named.optional("router_bias"), hidden, count, "router", {},
                            block.float32_logits ? Dtype::fp32 : dtype());
  TORCH_CHECK_VALUE(!contribution || contribution->numel() == count, "contribution_scale must have one entry for each of ",
                    count, " experts");
  block.scale = floats(keep(contribution), "contribution_scale");
  return block;
}

}  // namespace dynamoe_cpu
