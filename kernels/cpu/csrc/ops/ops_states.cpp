// Torch operators of layers with recurrent states.
#include "ops/parallel.h"
#include "ops/state_tensors.h"

namespace dynamoe_cpu {
namespace {

Tensor short_convolution_op(int64_t isa, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            Tensor& tails, const Tensor& slots, const OptionalTensor& kept,
                            const Tensor& query_start, const Tensor& context_len, bool silu) {
  const Context context = context_of(isa);
  ConvolutionCall call{rows_of(x, "x")};
  std::vector<Columns> columns;
  TORCH_CHECK_VALUE(call.x.dtype == Dtype::fp32, "x must be float32");
  call.channels = size_of(x.size(1), "columns of x");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == call.channels && 2 <= weight.size(0) &&
                        weight.size(0) <= kMostTaps,
                    "weight must have 2 … ", kMostTaps, " taps of ", call.channels, " channels, not shape ", weight.sizes());
  call.taps = static_cast<int>(weight.size(0));
  call.weights = contiguous_data<float>(weight, at::kFloat, "weight");
  call.bias = floats(bias, call.channels, "bias");
  call.silu = silu;
  TORCH_CHECK_VALUE(tails.dim() == 3 && tails.size(1) == call.taps - 1 && tails.size(2) == call.channels,
                    "tails of shape ", tails.sizes(), " do not fit ", call.taps, " taps of ", call.channels, " channels");
  call.tails = data_of<float>(tails, at::kFloat, tails.numel(), "tails");
  const StateRuns runs = runs_of(x.size(0), tails.size(0), slots, kept, query_start, context_len);
  call.runs = &runs;
  add_columns(columns, 0, 0, call.channels);
  call.columns = &columns;
  Tensor out = at::empty({x.size(0), call.channels}, x.options());
  call.out = out.data_ptr();
  short_convolution(context, call);
  return out;
}

// softplus(x + bias), and what is left of a state then. Rows may lie apart.
std::tuple<Tensor, Tensor> time_steps_op(const Tensor& x, const Tensor& bias, const Tensor& rate) {
  const Rows source = rows_of(x, "x");
  TORCH_CHECK_VALUE(source.dtype == Dtype::fp32, "x must be float32");
  const int64_t heads = x.size(1);
  const float *added = floats(bias, heads, "bias"), *rates = floats(rate, heads, "rate");
  Tensor steps = at::empty({x.size(0), heads}, x.options()), decays = at::empty(steps.sizes(), x.options());
  float *step = static_cast<float*>(steps.data_ptr()), *decay = static_cast<float*>(decays.data_ptr());
  for_each_light_row(at::get_num_threads(), x.size(0), 64 * heads, [&](int64_t row) {
    const float* in = static_cast<const float*>(source.at(row));
    for (int64_t head = 0; head < heads; ++head) {
      const TimeStep made = time_step(in[head], added[head], rates[head]);
      step[row * heads + head] = made.step, decay[row * heads + head] = made.decay;
    }
  });
  return {steps, decays};
}

Tensor silu_gated_op(int64_t isa, const Tensor& x, const Tensor& gate) {
  const Context context = context_of(isa);
  const Rows source = rows_of(x, "x"), gates = rows_of(gate, "gate");
  TORCH_CHECK_VALUE(gate.sizes() == x.sizes(), "a gate of shape ", gate.sizes(), " does not fit x of shape ", x.sizes());
  const int64_t width = size_of(x.size(1), "columns of x", 0);
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  float* results = static_cast<float*>(out.data_ptr());
  for_each_light_row(context.threads, x.size(0), width + 1, [&](int64_t row) {
    context.kernels->multiply(source.at(row), source.dtype, gates.at(row), gates.dtype, true, static_cast<int>(width),
                              results + row * width, Dtype::fp32);
  });
  return out;
}

Tensor recurrence_op(int64_t isa, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay,
                     const Tensor& step, Tensor& states, const Tensor& slots, const OptionalTensor& kept,
                     const Tensor& query_start, const Tensor& context_len, bool delta_rule, double eps) {
  const Context context = context_of(isa);
  RecurrenceCall call{head_rows_of(q, "q"), head_rows_of(k, "k"), head_rows_of(v, "v")};
  TORCH_CHECK_VALUE(call.queries.dtype == Dtype::fp32 && call.keys.dtype == Dtype::fp32 &&
                        call.values.dtype == Dtype::fp32,
                    "q, k and v must be float32");
  const int64_t rows = q.size(0);
  call.groups = size_of(q.size(1), "groups");
  call.heads = size_of(v.size(1), "heads");
  call.key_channels = size_of(q.size(2), "channels of q");
  call.value_channels = size_of(v.size(2), "channels of v");
  TORCH_CHECK_VALUE(k.sizes() == q.sizes() && v.size(0) == rows && call.heads % call.groups == 0, "k of shape ",
                    k.sizes(), " and v of shape ", v.sizes(), " do not fit q of shape ", q.sizes());
  call.by_channel = decay.dim() == 3;
  call.decay = data_of<float>(decay, at::kFloat, rows * call.heads * (call.by_channel ? call.key_channels : 1), "decay");
  call.step = data_of<float>(step, at::kFloat, rows * call.heads, "step");
  call.delta_rule = delta_rule;
  call.eps = static_cast<float>(eps);
  TORCH_CHECK_VALUE(states.dim() == 4 && states.size(1) == call.heads && states.size(2) == call.key_channels &&
                        states.size(3) == call.value_channels,
                    "states of shape ", states.sizes(), " do not fit ", call.heads, " heads of ", call.key_channels,
                    " and ", call.value_channels, " channels");
  call.states = data_of<float>(states, at::kFloat, states.numel(), "states");
  const StateRuns runs = runs_of(rows, states.size(0), slots, kept, query_start, context_len);
  call.runs = &runs;
  Tensor out = at::empty({rows, call.heads, call.value_channels}, v.options());
  call.out = static_cast<float*>(out.data_ptr());
  recurrence(context, call);
  return out;
}

Tensor selective_scan_op(int64_t isa, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& step,
                         const Tensor& rate, Tensor& states, const Tensor& slots, const OptionalTensor& kept,
                         const Tensor& query_start, const Tensor& context_len) {
  const Context context = context_of(isa);
  ScanCall call{rows_of(q, "q"), rows_of(k, "k"), rows_of(v, "v"), rows_of(step, "step")};
  for (const Rows& rows : {call.queries, call.keys, call.values, call.steps})
    TORCH_CHECK_VALUE(rows.dtype == Dtype::fp32, "q, k, v and step must be float32");
  call.key_channels = size_of(q.size(1), "channels of q");
  call.channels = size_of(v.size(1), "channels of v");
  TORCH_CHECK_VALUE(k.sizes() == q.sizes() && v.size(0) == q.size(0) && step.sizes() == v.sizes(), "k of shape ",
                    k.sizes(), ", v of shape ", v.sizes(), " and step of shape ", step.sizes(),
                    " do not fit q of shape ", q.sizes());
  const auto fits = [&](const Tensor& tensor, int64_t first) {
    return tensor.dim() == first + 2 && tensor.size(first) == call.key_channels && tensor.size(first + 1) == call.channels;
  };
  TORCH_CHECK_VALUE(fits(rate, 0) && fits(states, 1), "rate of shape ", rate.sizes(), " and states of shape ",
                    states.sizes(), " do not fit ", call.key_channels, " and ", call.channels, " channels");
  call.rates = contiguous_data<float>(rate, at::kFloat, "rate");
  call.states = data_of<float>(states, at::kFloat, states.numel(), "states");
  const StateRuns runs = runs_of(q.size(0), states.size(0), slots, kept, query_start, context_len);
  call.runs = &runs;
  Tensor out = at::empty({q.size(0), call.channels}, v.options());
  call.out = static_cast<float*>(out.data_ptr());
  selective_scan(context, call);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def(
      "short_convolution(int isa, Tensor x, Tensor weight, Tensor? bias, Tensor(a!) tails, Tensor slots, "
      "Tensor? kept, Tensor query_start, Tensor context_len, bool silu) -> Tensor",
      &short_convolution_op);
  m.def("time_steps(Tensor x, Tensor bias, Tensor rate) -> (Tensor, Tensor)", &time_steps_op);
  m.def("silu_gated(int isa, Tensor x, Tensor gate) -> Tensor", &silu_gated_op);
  m.def(
      "recurrence(int isa, Tensor q, Tensor k, Tensor v, Tensor decay, Tensor step, Tensor(a!) states, Tensor slots, "
      "Tensor? kept, Tensor query_start, Tensor context_len, bool delta_rule, float eps) -> Tensor",
      &recurrence_op);
  m.def(
      "selective_scan(int isa, Tensor q, Tensor k, Tensor v, Tensor step, Tensor rate, Tensor(a!) states, Tensor slots, "
      "Tensor? kept, Tensor query_start, Tensor context_len) -> Tensor",
      &selective_scan_op);
}

}  // namespace dynamoe_cpu
