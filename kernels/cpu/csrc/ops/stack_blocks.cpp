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
  Block block = block_of(named, hidden);
  named.refuse_unread();
  return block;
}

Block StackWeights::block_of(NamedBlock& named, int64_t hidden) {
  const std::string& kind = named.kind();
  if (kind == "norm") return NormBlock{norm(named, hidden, "", true)};
  if (kind == "out_norm") return OutNormBlock{norm(named, hidden, "", false)};
  if (kind == "read") return ReadBlock{};
  if (kind == "add") return AddBlock{};
  if (kind == "scale") return ScaleBlock{floats(keep(named.tensor("factor")), 1, "factor")};
  if (kind == "attention") return attention(named, hidden);
  if (kind == "latents") return latents(named, hidden);
  if (kind == "GatedDelta") return delta(named, hidden);
  if (kind == "Mamba2") return space(named, hidden);
  if (kind == "ShortConv") return short_convolution(named, hidden);
  TORCH_CHECK_VALUE(kind == "experts", "a stack knows no block of kind '", kind, "'");
  return experts(named, hidden);
}

std::pair<const void*, Dtype> StackWeights::norm_weight(const Tensor& t, int64_t count, const std::string& name) {
  if (t.scalar_type() != at::kFloat) return {plain(t, count, name.c_str()), dtype()};
  return {data_of<float>(keep(t), at::kFloat, count, name.c_str()), Dtype::fp32};
}

Norm StackWeights::norm(NamedBlock& named, int64_t hidden, const std::string& prefix, bool stream) {
  const std::string name = prefix.empty() ? "a norm" : prefix + "weight";
  const auto [weight, type] = norm_weight(named.tensor(prefix + "weight"), hidden, name);
  Norm norm{weight, type, nullptr, named.integer(prefix + "centred", 0) != 0};
  norm.bias = floats(keep(named.optional(prefix + "bias")), hidden, (prefix + "bias").c_str());
  TORCH_CHECK_VALUE(!norm.centred || (stream && type == Dtype::fp32),
                    "a layer norm has a float32 weight, and norms the residual stream");
  TORCH_CHECK_VALUE(norm.centred || !norm.bias, "only a layer norm has a bias");
  return norm;
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
  attention_parts(named, hidden, block);
  const int64_t value_width = block.values_are_keys ? 0 : block.kv_heads * block.values;
  block.qkv = projection(named.tensor("qkv"), named.optional("qkv_bias"), hidden,
                         block.projected_width() + block.kv_width() + value_width, "qkv", named.layout("qkv"));
  block.o = projection(named.tensor("o"), named.optional("o_bias"), block.out_width(), hidden, "o", named.layout("o"));
  block.norm_dtype = dtype();
  const auto head_norm = [&](const char* name, int64_t full) -> const void* {
    const OptionalTensor weight = named.optional(name);
    if (!weight) return nullptr;
    const auto [data, type] = norm_weight(*weight, block.norm_per_head ? block.channels : full, name);
    block.norm_dtype = type;
    return data;
  };
  block.q_norm = head_norm("q_norm", block.q_width());
  const Dtype of_queries = block.norm_dtype;
  block.k_norm = head_norm("k_norm", block.kv_width());
  TORCH_CHECK_VALUE(!block.q_norm || !block.k_norm || block.norm_dtype == of_queries,
                    "q_norm and k_norm must be of one type");
  const OptionalTensor sinks = named.optional("sinks");
  TORCH_CHECK_VALUE(!sinks || sinks->numel() == block.heads, "sinks must have one entry for each of ", block.heads,
                    " heads");
  block.sinks = floats(keep(sinks), "sinks");
  return block;
}

// What only some models have.
void StackWeights::attention_parts(NamedBlock& named, int64_t hidden, AttentionBlock& block) {
  block.table = size_of(named.integer("table", 0), "table", 0);
  block.chunk = size_of(named.integer("chunk", 0), "chunk", 0);
  block.norm_after_rotation = named.integer("norm_after_rotation", 0) != 0;
  block.values_are_keys = named.integer("values_are_keys", 0) != 0;
  block.values = size_of(named.integer("values", block.channels), "values");
  TORCH_CHECK_VALUE(block.values <= block.channels && (!block.values_are_keys || block.values == block.channels),
                    "values must be in 1 … ", block.channels, ", the channels of keys, not ", block.values);
  block.value_scale = static_cast<float>(named.number("value_scale", 1.0));
  block.value_norm = floats(keep(named.optional("value_norm")), block.channels, "value_norm");
  TORCH_CHECK_VALUE(!block.value_norm || block.values == block.channels, "value_norm needs values as wide as keys");
  block.softcap = static_cast<float>(named.number("softcap", 0.0));
  block.clip = static_cast<float>(named.number("clip", 0.0));
  TORCH_CHECK_VALUE(block.softcap >= 0 && block.clip >= 0, "softcap and clip must be at least 0, not ", block.softcap,
                    " and ", block.clip);
  if (const OptionalTensor gate = named.optional("gate"))
    block.gate = projection(*gate, named.optional("gate_bias"), hidden, block.out_width(), "gate", named.layout("gate"));
  block.gated_queries = named.integer("gated_queries", 0) != 0;
  TORCH_CHECK_VALUE(!block.gated_queries || (!block.gate.exists() && !block.norm_after_rotation &&
                                             block.values == block.channels),
                    "gated_queries need values as wide as keys, norms in front of the rotation, and no other gate");
  if (const int64_t period = named.integer("growth_period", 0))
    block.growth = Growth{named.number("growth_rate", 0.0), size_of(period, "growth_period"),
                          size_of(named.integer("growth_offset", 0), "growth_offset", 0)};
}

LatentBlock StackWeights::latents(NamedBlock& named, int64_t hidden) {
  LatentBlock block{};
  block.heads = size_of(named.integer("heads"), "heads");
  block.latent = size_of(named.integer("latent"), "latent");
  block.plain = size_of(named.integer("plain"), "plain");
  block.rotated = size_of(named.integer("rotated"), "rotated");
  block.values = size_of(named.integer("values"), "values");
  TORCH_CHECK_VALUE(block.rotated % 2 == 0, "rotated must be even, not ", block.rotated);
  size_of(block.heads * (block.entry_channels() + block.plain + block.values), "heads times channels");
  block.eps = named.number("eps");
  block.scale = named.number("scale");
  block.interleaved = named.integer("interleaved") != 0;
  block.window = size_of(named.integer("window"), "window", 0);
  block.table = size_of(named.integer("table", 0), "table", 0);
  int64_t made_of = hidden;  // channels that queries are made of
  if (const OptionalTensor q_a = named.optional("q_a")) {
    made_of = size_of(named.integer("rank"), "rank");
    block.q_a = projection(*q_a, named.optional("q_a_bias"), hidden, made_of, "q_a", named.layout("q_a"));
  }
  if (const OptionalTensor norm = named.optional("q_norm")) block.q_norm = plain(*norm, made_of, "q_norm");
  block.q = projection(named.tensor("q"), named.optional("q_bias"), made_of, block.query_width(), "q", named.layout("q"));
  block.kv_a = projection(named.tensor("kv_a"), named.optional("kv_a_bias"), hidden, block.entry_channels(), "kv_a",
                          named.layout("kv_a"));
  block.kv_norm = plain(named.tensor("kv_norm"), block.latent, "kv_norm");
  block.o = projection(named.tensor("o"), named.optional("o_bias"), block.heads * block.values, hidden, "o",
                       named.layout("o"));
  const Gemm& gemm = context_of(isa_).kernels->gemm[static_cast<int>(dtype())];
  const auto up = [&](const char* name, int64_t outputs, int64_t inputs) {
    return words(keep(named.tensor(name)), block.heads * packed_words(gemm, outputs, inputs), name);
  };
  block.key_up = up("key_up", block.latent, block.plain);
  block.value_up = up("value_up", block.values, block.latent);
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
  const OptionalTensor router = named.optional("router"), gate = named.optional("shared_gate");
  block.experts = ffn(named, "", count, hidden, router.has_value());
  if (named.integer("shared")) block.shared = ffn(named, "shared_", 1, hidden, false);
  if (gate) block.shared_gate = projection(*gate, {}, hidden, 1, "shared_gate");
  block.shared_scale = static_cast<float>(named.number("shared_scale", 1.0));
  block.always_on = size_of(named.integer("always_on", 0), "always_on", 0);
  TORCH_CHECK_VALUE(block.always_on < count, "always_on must be less than the ", count, " experts");
  const OptionalTensor contribution = named.optional("contribution_scale");
  if (router) route(named, hidden, block);
  TORCH_CHECK_VALUE(!contribution || !router || contribution->numel() == block.rule.experts,
                    "contribution_scale must have one entry for each of ", block.rule.experts, " experts");
  block.scale = floats(keep(contribution), "contribution_scale");
  return block;
}

void StackWeights::route(NamedBlock& named, int64_t hidden, ExpertsBlock& block) {
  RouteCall& rule = block.rule;
  rule.experts = block.experts.call.layout.experts - block.always_on;
  const int64_t count = rule.experts;
  rule.top_k = named.integer("top_k");
  TORCH_CHECK_VALUE(1 <= rule.top_k && rule.top_k <= count, "top_k must be in 1 … ", count);
  rule.score = enum_of(named.integer("score"), Score::constant, "score");
  if (named.integer("sparsemixer", 0)) block.jitter = named.number("jitter", 0.0);
  rule.softmax_after_topk = named.integer("softmax_after_topk") != 0;
  rule.renormalize = named.integer("renormalize") != 0;
  rule.scale = named.number("routing_scale");
  rule.selection_bias = floats(keep(named.optional("selection_bias")), count, "selection_bias");
  rule.expert_scale = floats(keep(named.optional("expert_scale")), count, "expert_scale");
  set_groups(rule, named.integer("groups"), named.integer("top_groups"), named.integer("top2_sum") != 0);
  rule.norm_floor = named.number("norm_floor");
  rule.norm_epsilon = named.number("norm_epsilon");
  block.float32_logits = named.integer("float32_logits") != 0;
  block.router = projection(named.tensor("router"), named.optional("router_bias"), hidden, count, "router", {},
                            block.float32_logits ? Dtype::fp32 : dtype());
  block.weight_on_input = named.integer("weight_on_input", 0) != 0;
  TORCH_CHECK_VALUE(!block.weight_on_input || block.slots() == 1, "weight_on_input needs rows that use one expert, not ",
                    block.slots());
  if (const OptionalTensor norm_of_router = named.optional("router_norm")) {
    TORCH_CHECK_VALUE(block.shared && !block.weight_on_input, "router_norm needs a shared expert and weights on outputs");
    block.apart = Apart{plain(*norm_of_router, hidden, "router_norm"), named.number("router_eps"),
                        norm(named, hidden, "in_norm_", false), norm(named, hidden, "out_norm_", false),
                        norm(named, hidden, "shared_out_norm_", false)};
  }
}

}  // namespace dynamoe_cpu
