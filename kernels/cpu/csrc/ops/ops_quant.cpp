// Torch operators on quantised weights: tensors are checked here, and only here, then handed on as pointers.
#include "quant/quant_tensors.h"

namespace dynamoe_cpu {
namespace {

Tensor quant_linear_op(int64_t isa, const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                       at::IntArrayRef numbers, bool float_out) {
  const QuantLayer layer = quant_layer(packed, bias, numbers, "weights");
  const Rows rows = rows_of(x, "x");
  TORCH_CHECK_VALUE(!layer.empty() && x.size(1) == layer[0].layout.inputs, "x has ", x.size(1),
                    " columns, which the weights do not take");
  const int64_t outputs = outputs_of(layer);
  Tensor out = at::empty({x.size(0), outputs}, x.options().dtype(float_out ? at::kFloat : x.scalar_type()));
  const Dtype out_dtype = float_out ? Dtype::fp32 : rows.dtype;
  quant_linear(context_of(isa), {rows, x.size(0), &layer, out.data_ptr(), outputs, out_dtype});
  return out;
}

// `shape` is experts, hidden, width, activation. Without ids every row uses every expert with weight 1. With places the
// experts in use lie anywhere in `gate_up` and `down`, see `set_places`.
Tensor quant_experts_op(int64_t isa, const Tensor& x, const Tensor& gate_up, at::IntArrayRef gate_up_layout,
                        const Tensor& down, at::IntArrayRef down_layout, const OptionalTensor& gate_up_bias,
                        const OptionalTensor& down_bias, at::IntArrayRef shape, const OptionalTensor& ids,
                        const OptionalTensor& weights, const OptionalTensor& counts, const OptionalTensor& places) {
  TORCH_CHECK_VALUE(shape.size() == 4, "a shape is experts, hidden size, width, activation");
  ExpertsCall call{};
  call.x = rows_of(x, "x");
  call.rows = x.size(0);
  call.layout = checked_layout({call.x.dtype, shape[0], shape[1], shape[2], false});
  const ExpertLayout& layout = call.layout;
  TORCH_CHECK_VALUE(x.size(1) == layout.hidden, "x has ", x.size(1), " columns, the experts take ", layout.hidden);
  QuantExperts experts = quant_experts_of(layout, gate_up, gate_up_layout, down, down_layout, places.has_value());
  call.activation = enum_of(shape[3], Activation::clamped_swiglu, "activation");
  set_biases(call, gate_up_bias, down_bias, true);
  if (ids) {
    TORCH_CHECK_VALUE(weights && ids->dim() == 2 && ids->size(0) == call.rows && weights->sizes() == ids->sizes() &&
                          (!counts || counts->numel() == call.rows),
                      "routing of shape ", ids->sizes(), " does not fit ", call.rows, " rows");
    call.ids = contiguous_data<int32_t>(*ids, at::kInt, "expert ids");
    call.weights = contiguous_data<float>(*weights, at::kFloat, "expert weights");
    call.counts = counts ? contiguous_data<int32_t>(*counts, at::kInt, "counts") : nullptr;
    call.top_k = ids->size(1);
  }
  if (places) set_places(experts, call, *places, gate_up.nbytes(), down.nbytes());
  Tensor out = at::empty({x.size(0), x.size(1)}, x.options());
  call.out = out.data_ptr();
  TORCH_CHECK_VALUE(quant_experts(context_of(isa), call, experts) < 0, "an expert number is out of range: there are ",
                    layout.experts, " experts");
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def("quant_linear(int isa, Tensor x, Tensor packed, Tensor? bias, int[] layout, bool float_out) -> Tensor",
        &quant_linear_op);
  m.def(
      "quant_experts(int isa, Tensor x, Tensor gate_up, int[] gate_up_layout, Tensor down, int[] down_layout, Tensor? "
      "gate_up_bias, Tensor? down_bias, int[] shape, Tensor? ids, Tensor? weights, Tensor? counts, Tensor? "
      "places=None) -> Tensor",
      &quant_experts_op);
}

}  // namespace dynamoe_cpu
