// A block of a layer as Python names it, and the weights of a stack: tensors are checked here, and kept alive.
#pragma once

#include <torch/custom_class.h>

#include <set>
#include <string>
#include <vector>

#include "ops/stack.h"
#include "quant/quant_tensors.h"

namespace dynamoe_cpu {

// Tensors and numbers by name. What a kind of block does not read it does not know, and refuses.
class NamedBlock : public torch::CustomClassHolder {
 public:
  NamedBlock(std::string kind, c10::Dict<std::string, Tensor> tensors, c10::Dict<std::string, int64_t> integers,
             c10::Dict<std::string, double> floats, c10::Dict<std::string, c10::List<int64_t>> layouts)
      : kind_(std::move(kind)), tensors_(tensors), integers_(integers), floats_(floats), layouts_(layouts) {}

  const std::string& kind() const { return kind_; }
  Tensor tensor(const std::string& name) { return required(tensors_, name); }
  OptionalTensor optional(const std::string& name) {
    return has(tensors_, name) ? OptionalTensor(tensors_.at(name)) : OptionalTensor();
  }
  int64_t integer(const std::string& name) { return required(integers_, name); }
  int64_t integer(const std::string& name, int64_t otherwise) {
    return has(integers_, name) ? integers_.at(name) : otherwise;
  }
  float number(const std::string& name) { return static_cast<float>(required(floats_, name)); }
  double number(const std::string& name, double otherwise) { return has(floats_, name) ? floats_.at(name) : otherwise; }
  // Of a quantised weight; empty where it is not.
  std::vector<int64_t> layout(const std::string& name) {
    if (!has(layouts_, name)) return {};
    return layouts_.at(name).vec();
  }

  void refuse_unread() const {
    refuse_unread(tensors_);
    refuse_unread(integers_);
    refuse_unread(floats_);
    refuse_unread(layouts_);
  }

 private:
  template <class T>
  bool has(const c10::Dict<std::string, T>& from, const std::string& name) {
    read_.insert(name);
    return from.contains(name);
  }
  template <class T>
  T required(const c10::Dict<std::string, T>& from, const std::string& name) {
    TORCH_CHECK_VALUE(has(from, name), "a block of kind '", kind_, "' lacks '", name, "'");
    return from.at(name);
  }
  template <class T>
  void refuse_unread(const c10::Dict<std::string, T>& from) const {
    for (const auto& entry : from)
      TORCH_CHECK_VALUE(read_.count(entry.key()), "a block of kind '", kind_, "' knows no '", entry.key(), "'");
  }

  std::string kind_;
  c10::Dict<std::string, Tensor> tensors_;
  c10::Dict<std::string, int64_t> integers_;
  c10::Dict<std::string, double> floats_;
  c10::Dict<std::string, c10::List<int64_t>> layouts_;
  std::set<std::string> read_;
};

// Checks the tensors of a stack and keeps them.
class StackWeights {
 public:
  StackWeights(int64_t isa, at::ScalarType type) : isa_(isa), type_(type) {}

  Dtype dtype() const { return dtype_of(type_, "dtype"); }
  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(t); }
  const OptionalTensor& keep(const OptionalTensor& t) {
    if (t) kept_.push_back(*t);
    return t;
  }
  const void* plain(const Tensor& t, int64_t count, const char* name);
  Projection projection(const Tensor& packed, const OptionalTensor& bias, int64_t inputs, int64_t outputs,
                        const char* name, const std::vector<int64_t>& layout = {}) {
    return projection(packed, bias, inputs, outputs, name, layout, dtype());
  }
  Projection projection(const Tensor& packed, const OptionalTensor& bias, int64_t inputs, int64_t outputs,
                        const char* name, const std::vector<int64_t>& layout, Dtype dtype);
  // What a block says; `hidden` is the width of the residual stream.
  Block block(NamedBlock& named, int64_t hidden);

 private:
  Block block_of(NamedBlock& named, int64_t hidden);
  // A weight in the model's dtype, or float32.
  std::pair<const void*, Dtype> norm_weight(const Tensor& t, int64_t count, const std::string& name);
  // Of the tensors whose names begin like this; `stream`: it may be a layer norm.
  Norm norm(NamedBlock& named, int64_t hidden, const std::string& prefix, bool stream);
  AttentionBlock attention(NamedBlock& named, int64_t hidden);
  LatentBlock latents(NamedBlock& named, int64_t hidden);
  void attention_parts(NamedBlock& named, int64_t hidden, AttentionBlock& block);
  DeltaBlock delta(NamedBlock& named, int64_t hidden);
  SpaceBlock space(NamedBlock& named, int64_t hidden);
  ConvolutionBlock short_convolution(NamedBlock& named, int64_t hidden);
  // `conv_WX` and `conv_bias_X`; the columns are not said yet.
  Convolution convolution(NamedBlock& named, int64_t channels);
  Projection linear(NamedBlock& named, const std::string& name, int64_t inputs, int64_t outputs) {
    return projection(named.tensor(name), named.optional(name + "_bias"), inputs, outputs, name.c_str(),
                      named.layout(name));
  }
  const float* numbers(NamedBlock& named, const char* name, int64_t count) {
    return data_of<float>(keep(named.tensor(name)), at::kFloat, count, name);
  }
  // So many experts whose names begin like this; `down_per_expert`: their biases stay apart.
  Ffn ffn(NamedBlock& named, const std::string& prefix, int64_t count, int64_t hidden, bool down_per_expert);
  ExpertsBlock experts(NamedBlock& named, int64_t hidden);
  void route(NamedBlock& named, int64_t hidden, ExpertsBlock& block);

  int64_t isa_;
  at::ScalarType type_;
  std::vector<Tensor> kept_;
};

}  // namespace dynamoe_cpu
