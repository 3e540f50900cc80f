// Torch operators of exits: tensors are checked here, and only here, then handed on as pointers.
#include <ATen/ops/zeros.h>

#include <tuple>
#include <vector>

#include "ops/exits.h"
#include "ops/paged.h"
#include "ops/parallel.h"

namespace dynamoe_cpu {
namespace {

std::tuple<Tensor, Tensor, int64_t> exit_decide_op(int64_t isa, const Tensor& x, const OptionalTensor& previous,
                                                   const OptionalTensor& entropy, const Tensor& weight,
                                                   const Tensor& bias, const OptionalTensor& out,
                                                   const OptionalTensor& out_bias, const Tensor& thresholds) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2, "x and weight must be matrices");
  const int64_t rows = x.size(0), hidden = x.size(1), inner = weight.size(0);
  TORCH_CHECK_VALUE(out || inner == 1, "a linear probe has one row of weights, not ", inner);
  Tensor logits = at::empty({rows}, x.options());
  Tensor order = at::empty({rows}, x.options().dtype(at::kLong));
  ProbeCall call{};
  call.x = data_of<float>(x, at::kFloat, rows * hidden, "x");
  call.previous = floats(previous, rows * hidden, "previous");
  call.entropy = floats(entropy, rows, "entropy");
  call.rows = rows;
  call.hidden = hidden;
  call.inner = inner;
  const int64_t inputs = hidden * (previous ? 2 : 1) + (entropy ? 1 : 0);
  call.weight = data_of<float>(weight, at::kFloat, inner * inputs, "weight");
  call.bias = data_of<float>(bias, at::kFloat, inner, "bias");
  call.out = floats(out, inner, "out");
  TORCH_CHECK_VALUE(!out || out_bias, "out needs an out_bias");
  call.out_bias = out ? *floats(out_bias, 1, "out_bias") : 0.0f;
  call.logits = static_cast<float*>(logits.data_ptr());
  probe(context_of(isa), call);
  const int64_t continuing = partition(call.logits, data_of<float>(thresholds, at::kFloat, rows, "thresholds"), rows,
                                    static_cast<int64_t*>(order.data_ptr()));
  return {logits, order, continuing};
}

// Mean over layers.
Tensor router_entropy_op(int64_t isa, at::TensorList logits) {
  TORCH_CHECK_VALUE(!logits.empty() && logits[0].dim() == 2, "logits must be matrices, at least one");
  const int64_t rows = logits[0].size(0);
  Tensor out = at::zeros({rows}, logits[0].options().dtype(at::kFloat));
  for (const Tensor& layer : logits) {
    TORCH_CHECK_VALUE(layer.dim() == 2 && layer.is_contiguous() && layer.size(0) == rows,
                      "logits must be contiguous matrices of ", rows, " rows");
    const int64_t experts = size_of(layer.size(1), "columns of logits");
    router_entropy(context_of(isa), {layer.data_ptr(), experts, dtype_of(layer, "logits")}, rows, experts,
                   1.0f / static_cast<float>(logits.size()), static_cast<float*>(out.data_ptr()));
  }
  return out;
}

// One entry per layer in every list; `biases` and `k_norms` may be empty.
void project_kv_op(int64_t isa, const Tensor& x, at::TensorList norms, at::TensorList weights, at::TensorList biases,
                   at::TensorList k_norms, at::TensorList keys, at::TensorList values, const Tensor& cos_sin,
                   const Tensor& positions, const Tensor& slots, double eps, double clip) {
  const Context context = context_of(isa);
  const int64_t rows = x.size(0), hidden = x.size(1);
  const size_t layers = norms.size();
  TORCH_CHECK_VALUE(weights.size() == layers && keys.size() == layers && values.size() == layers &&
                        (biases.empty() || biases.size() == layers) && (k_norms.empty() || k_norms.size() == layers),
                    "the lists must have one entry for each of ", layers, " layers");
  if (layers == 0 || rows == 0) return;
  ProjectCall call{};
  call.x = {data_of<float>(x, at::kFloat, rows * hidden, "x"), hidden, Dtype::fp32};
  call.rows = rows;
  call.hidden = hidden;
  check_caches(keys[0], values[0]);
  call.kv_heads = keys[0].size(1);
  call.channels = cos_sin.size(-1);
  call.page_size = keys[0].size(2);
  call.dtype = dtype_of(norms[0], "a norm");
  call.eps = static_cast<float>(eps);
  call.clip = static_cast<float>(clip);
  const RowPlaces places = row_places(rows, positions, slots, cos_sin, keys[0]);
  call.cos_sin = contiguous_data<float>(cos_sin, at::kFloat, "cos_sin");
  call.positions = places.positions;
  call.slots = places.slots;
  const int64_t width = call.kv_heads * call.channels, outputs = 2 * width;
  const int64_t words = packed_words(context.kernels->gemm[static_cast<int>(call.dtype)], outputs, hidden);
  const int64_t padded = ceil_div(outputs, kBlockOutputs) * kBlockOutputs;
  const int64_t elements = rows * (hidden + 3 * width);
  Tensor scratch = at::empty({static_cast<int64_t>(layers) * elements}, norms[0].options());
  std::vector<ProjectCall> calls;
  for (size_t layer = 0; layer < layers; ++layer) {
    call.norm = norms[layer].data_ptr();
    TORCH_CHECK_VALUE(norms[layer].numel() == hidden && norms[layer].scalar_type() == norms[0].scalar_type() &&
                          norms[layer].is_contiguous() && norms[layer].is_cpu(),
                      "a norm must be contiguous with ", hidden, " entries");
    call.kv = reinterpret_cast<uint32_t*>(data_of<int32_t>(weights[layer], at::kInt, words, "weights"));
    call.kv_bias = biases.empty() ? nullptr : data_of<float>(biases[layer], at::kFloat, padded, "a bias");
    call.k_norm = k_norms.empty() ? nullptr : k_norms[layer].data_ptr();
    call.k_norm_width = k_norms.empty() ? 0 : k_norms[layer].numel();
    TORCH_CHECK_VALUE(k_norms.empty() || ((call.k_norm_width == call.channels || call.k_norm_width == width) &&
                                          k_norms[layer].scalar_type() == norms[0].scalar_type() &&
                                          k_norms[layer].is_contiguous() && k_norms[layer].is_cpu()),
                      "a key norm must be contiguous and have ", call.channels, " or ", width, " entries, not ", call.k_norm_width);
    check_caches(keys[layer], values[layer]);
    TORCH_CHECK_VALUE(keys[layer].sizes() == keys[0].sizes(), "the caches must have one shape");
    call.keys = cache_of(keys[layer], call.channels, "keys");
    call.values = cache_of(values[layer], call.channels, "values");
    call.scratch = static_cast<char*>(scratch.data_ptr()) + layer * elements * element_bytes(call.dtype);
    calls.push_back(call);
  }
  for_each_task(context.threads, static_cast<int64_t>(layers),
                [&](int64_t layer) { project_kv({context.kernels, 1}, calls[layer]); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def(
      "exit_decide(int isa, Tensor x, Tensor? previous, Tensor? entropy, Tensor weight, Tensor bias, Tensor? out, "
      "Tensor? out_bias, Tensor thresholds) -> (Tensor, Tensor, int)",
      &exit_decide_op);
  m.def("router_entropy(int isa, Tensor[] logits) -> Tensor", &router_entropy_op);
  m.def(
      "project_kv(int isa, Tensor x, Tensor[] norms, Tensor[] weights, Tensor[] biases, Tensor[] k_norms, Tensor[] "
      "keys, Tensor[] values, Tensor cos_sin, Tensor positions, Tensor slots, float eps, float clip) -> ()",
      &project_kv_op);
}

}  // namespace dynamoe_cpu
