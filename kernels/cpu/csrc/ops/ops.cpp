// Torch operators other than the experts': tensors are checked here, and only here, then handed on as pointers.
#include <string>
#include <tuple>
#include <vector>

#include "ops/paged.h"

namespace dynamoe_cpu {
namespace {

std::vector<std::string> isas_op() {
  std::vector<std::string> names;
  for (const Isa* isa : isas()) names.emplace_back(isa->name);
  return names;
}

int64_t find_isa_op(std::string name) { return find_isa(name.c_str()); }

Tensor pack_linear_op(int64_t isa, const Tensor& weight) {
  const Context context = context_of(isa);
  const Rows rows = rows_of(weight, "weight");
  Tensor packed =
      allocate(packed_words(context.kernels->gemm[static_cast<int>(rows.dtype)], weight.size(0), weight.size(1)));
  pack_linear(context, rows, weight.size(0), weight.size(1), static_cast<uint32_t*>(packed.data_ptr()));
  return packed;
}

Tensor linear_op(int64_t isa, const Tensor& x, const Tensor& weights, const OptionalTensor& bias, int64_t outputs,
                 bool float_out) {
  const Context context = context_of(isa);
  const Rows rows = rows_of(x, "x");
  const Gemm& gemm = context.kernels->gemm[static_cast<int>(rows.dtype)];
  const int64_t inputs = size_of(x.size(1), "columns of x");
  const uint32_t* packed = words(weights, packed_words(gemm, size_of(outputs, "outputs", 0), inputs), "weights");
  Tensor out = at::empty({x.size(0), outputs}, x.options().dtype(float_out ? at::kFloat : x.scalar_type()));
  linear(context, {rows, x.size(0), inputs, outputs, packed, bias_of(bias, outputs, "bias"), out.data_ptr(), outputs,
                   float_out ? Dtype::fp32 : rows.dtype});
  return out;
}

NormCall norm_call(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  NormCall call{};
  call.x = rows_of(x, "x");
  TORCH_CHECK_VALUE(weight.is_contiguous() && weight.numel() == x.size(1), "the norm's weight must be contiguous with ",
                    x.size(1), " entries");
  call.scale = 1.0f;
  call.weight = weight.data_ptr();
  call.weight_dtype = dtype_of(weight, "weight");
  call.eps = static_cast<float>(eps);
  call.rows = x.size(0);
  call.hidden = x.size(1);
  call.out = out.data_ptr();
  return call;
}

Tensor rms_norm_op(int64_t isa, const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = at::empty(x.sizes(), weight.options());
  rms_norm(context_of(isa), norm_call(x, weight, eps, out));
  return out;
}

// Writes the sum into `residual`.
Tensor add_rms_norm_op(int64_t isa, const Tensor& x, Tensor& residual, const Tensor& weight, double eps, double scale) {
  Tensor out = at::empty(x.sizes(), weight.options());
  NormCall call = norm_call(x, weight, eps, out);
  TORCH_CHECK_VALUE(residual.sizes() == x.sizes(), "residual ", residual.sizes(), " does not fit x ", x.sizes());
  call.residual = rows_of(residual, "residual");
  call.scale = static_cast<float>(scale);
  call.sum = residual.data_ptr();
  call.sum_stride = residual.stride(0);
  rms_norm(context_of(isa), call);
  return out;
}

Tensor rope_and_write_op(int64_t isa, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                         const Tensor& positions, const Tensor& slots, Tensor& keys, Tensor& values) {
  Tensor out = at::empty(q.sizes(), q.options());
  RopeCall call{
      head_rows_of(q, "q"), head_rows_of(k, "k"), head_rows_of(v, "v"), q.size(0), q.size(1), k.size(1), q.size(2)};
  TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "q, k and v must have one dtype");
  check_caches(keys, values);
  const RowPlaces places = row_places(q.size(0), positions, slots, cos_sin, keys);
  TORCH_CHECK_VALUE(cos_sin.size(1) == q.size(2), "rotary table of shape ", cos_sin.sizes(), " does not fit heads of ",
                    q.size(2));
  TORCH_CHECK_VALUE(k.sizes() == at::IntArrayRef({q.size(0), keys.size(1), q.size(2)}) && v.sizes() == k.sizes(),
                    "k of shape ", k.sizes(), " and v of shape ", v.sizes(), " do not fit ", q.size(0), " rows and the ",
                    keys.size(1), " heads of keys");
  call.cos_sin = contiguous_data<float>(cos_sin, at::kFloat, "cos_sin");
  call.positions = places.positions;
  call.slots = places.slots;
  call.keys = cache_of(keys, q.size(2), "keys");
  call.values = cache_of(values, q.size(2), "values");
  call.page_size = keys.size(2);
  call.q_out = out.data_ptr();
  rope_and_write(context_of(isa), call);
  return out;
}

Tensor attention_op(int64_t isa, const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& query_start,
                    const Tensor& context_len, const Tensor& block_table, double scale, int64_t window,
                    const OptionalTensor& sinks, const OptionalTensor& lse, double softcap) {
  Tensor out = at::empty(q.sizes(), q.options());
  check_caches(keys, values);
  AttentionCall call{head_rows_of(q, "q"),       q.size(1),   keys.size(1), q.size(2), cache_of(keys, q.size(2), "keys"),
                     cache_of(values, q.size(2), "values"), keys.size(2)};
  size_of(q.size(2), "channels of q");
  TORCH_CHECK_VALUE(keys.size(1) > 0 && q.size(1) > 0 && q.size(1) % keys.size(1) == 0, q.size(1),
                    " query heads do not divide among ", keys.size(1), " key heads");
  call.window = size_of(window, "window", 0);
  const SequencePlaces places = sequence_places(q.size(0), query_start, context_len, block_table, keys, window);
  call.query_start = places.query_start;
  call.context_len = places.context_len;
  call.block_table = places.block_table;
  call.block_table_stride = places.table_stride;
  call.sequences = places.sequences;
  call.scale = static_cast<float>(scale);
  call.out = out.data_ptr();
  TORCH_CHECK_VALUE(!sinks || sinks->numel() == call.heads, "sinks must have one entry for each of ", call.heads,
                    " heads, not shape ", sinks->sizes());
  TORCH_CHECK_VALUE(!lse || lse->numel() == q.size(0) * call.heads, "lse must have one entry for each of ", q.size(0),
                    " rows and ", call.heads, " heads, not shape ", lse->sizes());
  call.sinks = floats(sinks, "sinks");
  call.lse = const_cast<float*>(floats(lse, "lse"));
  TORCH_CHECK_VALUE(softcap >= 0, "softcap must be at least 0, not ", softcap);
  call.softcap = static_cast<float>(softcap);
  attention(context_of(isa), call);
  return out;
}

std::tuple<Tensor, Tensor> route_op(int64_t isa, const Tensor& logits, int64_t top_k, int64_t score,
                                    bool softmax_after_topk, bool renormalize, double scale,
                                    const OptionalTensor& selection_bias, const OptionalTensor& expert_scale,
                                    int64_t groups, int64_t top_groups, bool top2_sum, double norm_floor,
                                    double norm_epsilon) {
  RouteCall call{rows_of(logits, "logits"), logits.size(0), logits.size(1), top_k};
  TORCH_CHECK_VALUE(1 <= top_k && top_k <= logits.size(1), "top_k ", top_k, " is not in 1 … ", logits.size(1));
  Tensor ids = at::empty({logits.size(0), top_k}, logits.options().dtype(at::kInt));
  Tensor weights = at::empty({logits.size(0), top_k}, logits.options().dtype(at::kFloat));
  call.score = enum_of(score, Score::constant, "score");
  call.softmax_after_topk = softmax_after_topk;
  call.renormalize = renormalize;
  call.scale = static_cast<float>(scale);
  call.ids = static_cast<int32_t*>(ids.data_ptr());
  call.weights = static_cast<float*>(weights.data_ptr());
  call.selection_bias = floats(selection_bias, logits.size(1), "selection_bias");
  call.expert_scale = floats(expert_scale, logits.size(1), "expert_scale");
  set_groups(call, groups, top_groups, top2_sum);
  call.norm_floor = static_cast<float>(norm_floor);
  call.norm_epsilon = static_cast<float>(norm_epsilon);
  route(context_of(isa), call);
  return {ids, weights};
}

}  // namespace

TORCH_LIBRARY(dynamoe_cpu, m) {
  m.def("isas() -> str[]", &isas_op);
  m.def("find_isa(str name) -> int", &find_isa_op);
  m.def("pack_linear(int isa, Tensor weight) -> Tensor", &pack_linear_op);
  m.def("linear(int isa, Tensor x, Tensor weights, Tensor? bias, int outputs, bool float_out) -> Tensor", &linear_op);
  m.def("rms_norm(int isa, Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm_op);
  m.def("add_rms_norm(int isa, Tensor x, Tensor(a!) residual, Tensor weight, float eps, float scale) -> Tensor",
        &add_rms_norm_op);
  m.def(
      "rope_and_write(int isa, Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, "
      "Tensor(a!) keys, Tensor(b!) values) -> Tensor",
      &rope_and_write_op);
  m.def(
      "attention(int isa, Tensor q, Tensor keys, Tensor values, Tensor query_start, Tensor context_len, "
      "Tensor block_table, float scale, int window, Tensor? sinks, Tensor(a!)? lse, float softcap) -> Tensor",
      &attention_op);
  m.def(
      "route(int isa, Tensor logits, int top_k, int score, bool softmax_after_topk, bool renormalize, float scale, "
      "Tensor? selection_bias, Tensor? expert_scale, int groups, int top_groups, bool top2_sum, float norm_floor, "
      "float norm_epsilon) -> (Tensor, Tensor)",
      &route_op);
}

}  // namespace dynamoe_cpu
