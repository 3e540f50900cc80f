// Torch operators of experts: tensors are checked here, and only here, then handed on as pointers.
#include <ATen/ops/full.h>

#include <tuple>

#include "ops/tensors.h"

namespace dynamoe_cpu {
namespace {

ExpertLayout layout_of(Dtype dtype, int64_t num_experts, int64_t hidden, int64_t width, bool dense_down) {
  return checked_layout({dtype, num_experts, hidden, width, dense_down});
}

std::tuple<Tensor, Tensor> pack_experts_op(int64_t isa, const Tensor& gate, const Tensor& up, const Tensor& down,
                                           bool dense_down) {
  const auto strided = [](const Tensor& t, const char* name) -> Strided3 {
    TORCH_CHECK_VALUE(t.dim() == 3 && (t.stride(2) == 1 || t.size(2) == 1), name,
                      " must have three dimensions, the last contiguous, not strides ", t.strides());
    check_host(t, name);
    return {t.data_ptr(), t.stride(0), t.stride(1)};
  };
  const ExpertLayout layout = layout_of(dtype_of(gate, "gate"), gate.size(0), gate.size(2), gate.size(1), dense_down);
  TORCH_CHECK_VALUE(
      up.sizes() == gate.sizes() && down.sizes() == at::IntArrayRef({gate.size(0), gate.size(2), gate.size(1)}),
      "shapes of gate ", gate.sizes(), ", up ", up.sizes(), " and down ", down.sizes(), " do not fit together");
  TORCH_CHECK_VALUE(up.scalar_type() == gate.scalar_type() && down.scalar_type() == gate.scalar_type(),
                    "gate, up and down must have one dtype");
  Tensor gate_up = allocate(layout.gate_words()), packed_down = allocate(layout.down_words());
  pack_experts(context_of(isa), layout, strided(gate, "gate"), strided(up, "up"), strided(down, "down"),
               static_cast<uint32_t*>(gate_up.data_ptr()), static_cast<uint32_t*>(packed_down.data_ptr()));
  return {gate_up, packed_down};
}

ExpertsCall experts_call(const Tensor& x, const Tensor& gate_up, const Tensor& down, const OptionalTensor& gate_up_bias,
                         const OptionalTensor& down_bias, bool routed, at::IntArrayRef shape, Tensor& out) {
  TORCH_CHECK_VALUE(shape.size() == 5, "shape must be experts, hidden size, width, dense down and activation");
  ExpertsCall call{};
  call.x = rows_of(x, "x");
  call.rows = x.size(0);
  call.layout = layout_of(call.x.dtype, shape[0], shape[1], shape[2], shape[3] != 0);
  TORCH_CHECK_VALUE(x.size(1) == shape[1], "x has ", x.size(1), " columns, the experts take ", shape[1]);
  call.activation = enum_of(shape[4], Activation::clamped_swiglu, "activation");
  call.gate_up = words(gate_up, call.layout.gate_words(), "gate_up");
  call.down = words(down, call.layout.down_words(), "down");
  set_biases(call, gate_up_bias, down_bias, routed);
  out = at::empty({x.size(0), x.size(1)}, x.options());
  call.out = out.data_ptr();
  return call;
}

void set_routing(ExpertsCall& call, const Tensor& ids, const Tensor& weights, const OptionalTensor& counts) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == call.rows && weights.sizes() == ids.sizes(), "routing of shape ",
                    ids.sizes(), " does not fit ", call.rows, " rows");
  TORCH_CHECK_VALUE(!counts || counts->numel() == call.rows, "counts must have one entry per row");
  call.ids = contiguous_data<int32_t>(ids, at::kInt, "expert ids");
  call.weights = contiguous_data<float>(weights, at::kFloat, "expert weights");
  call.counts = counts ? contiguous_data<int32_t>(*counts, at::kInt, "counts") : nullptr;
  call.top_k = ids.size(1);
}

Tensor experts_op(int64_t isa, const Tensor& x, const Tensor& gate_up, const Tensor& down,
                  const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, at::IntArrayRef shape,
                  const Tensor& ids, const Tensor& weights, const OptionalTensor& counts) {
  Tensor out;
  ExpertsCall call = experts_call(x, gate_up, down, gate_up_bias, down_bias, true, shape, out);
  set_routing(call, ids, weights, counts);
  const int64_t bad = experts(context_of(isa), call);
  TORCH_CHECK_VALUE(bad < 0, "an expert number is out of range: there are ", call.layout.experts, " experts");
  return out;
}

Tensor all_experts_op(int64_t isa, const Tensor& x, const Tensor& gate_up, const Tensor& down,
                      const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, at::IntArrayRef shape) {
  Tensor out;
  all_experts(context_of(isa), experts_call(x, gate_up, down, gate_up_bias, down_bias, false, shape, out));
  return out;
}

// Returns expert numbers, weights and counts; the arguments stay as they are.
std::tuple<Tensor, Tensor, Tensor> limit_experts_op(int64_t isa, const Tensor& ids, const Tensor& weights,
                                                    const OptionalTensor& counts, const OptionalTensor& scale,
                                                    const Tensor& keep, const Tensor& cap) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && weights.sizes() == ids.sizes(), "expert ids of shape ", ids.sizes(),
                    " and weights of shape ", weights.sizes(), " do not fit together");
  LimitCall call{ids.size(0), ids.size(1)};
  TORCH_CHECK_VALUE((!counts || counts->numel() == call.rows) && keep.numel() == call.rows && cap.numel() == call.rows,
                    "counts, keep and cap must have one entry per row");
  contiguous_data<int32_t>(ids, at::kInt, "expert ids");
  contiguous_data<float>(weights, at::kFloat, "expert weights");
  if (counts) contiguous_data<int32_t>(*counts, at::kInt, "counts");
  Tensor kept_ids = ids.clone(), kept_weights = weights.clone(),
         kept_counts = counts ? counts->clone() : at::full({call.rows}, call.top_k, ids.options());
  call.ids = static_cast<int32_t*>(kept_ids.data_ptr());
  call.weights = static_cast<float*>(kept_weights.data_ptr());
  call.counts = static_cast<int32_t*>(kept_counts.data_ptr());
  call.scale = floats(scale, "scale");
  call.keep = contiguous_data<float>(keep, at::kFloat, "keep");
  call.cap = contiguous_data<int32_t>(cap, at::kInt, "cap");
  call.stride = 1;
  for (int64_t row = 0; row < call.rows; ++row) {
    TORCH_CHECK_VALUE(0 <= call.counts[row] && call.counts[row] <= call.top_k, "count ", call.counts[row],
                      " is not in 0 … ", call.top_k);
    for (int64_t k = 0; scale && k < call.counts[row]; ++k)
      TORCH_CHECK_VALUE(0 <= call.ids[row * call.top_k + k] && call.ids[row * call.top_k + k] < scale->numel(),
                        "an expert number is out of range: there are ", scale->numel(), " experts");
  }
  limit_experts(context_of(isa), call);
  return {kept_ids, kept_weights, kept_counts};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def("pack_experts(int isa, Tensor gate, Tensor up, Tensor down, bool dense_down) -> (Tensor, Tensor)",
        &pack_experts_op);
  m.def(
      "limit_experts(int isa, Tensor ids, Tensor weights, Tensor? counts, Tensor? scale, Tensor keep, Tensor cap) -> "
      "(Tensor, Tensor, Tensor)",
      &limit_experts_op);
  m.def(
      "experts(int isa, Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, int[] shape, "
      "Tensor ids, Tensor weights, "
      "Tensor? counts) -> Tensor",
      &experts_op);
  m.def(
      "all_experts(int isa, Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, int[] "
      "shape) -> Tensor",
      &all_experts_op);
}

}  // namespace dynamoe_cpu
