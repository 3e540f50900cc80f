// Torch operators: tensors are checked here, and only here, then handed on as pointers.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <sys/mman.h>

#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>

#include "operators.h"
#include "parallel.h"

namespace dynamoe_cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kNames[] = {"avx512bf16", "avx512vnni", "avx512", "avx2", "portable"};
constexpr int64_t kNumNames = std::size(kNames);

int64_t find_isa(std::string name) {
  const Kernels* kernels = find_kernels(name.c_str());
  for (int64_t i = 0; i < kNumNames; ++i)
    if (kernels && name != "auto" && name == kNames[i]) return i;
  for (int64_t i = 0; i < kNumNames; ++i)
    if (kernels && name == "auto" && std::string(kernels->name) == kNames[i]) return i;
  return -1;
}

Context context_of(int64_t isa) {
  static const Kernels* const tables[] = {find_kernels(kNames[0]), find_kernels(kNames[1]), find_kernels(kNames[2]),
                                          find_kernels(kNames[3]), find_kernels(kNames[4])};
  return {tables[isa], at::get_num_threads()};
}

Dtype dtype_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == at::kBFloat16) return Dtype::bf16;
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, name, " must be float32 or bfloat16, not ", t.scalar_type());
  return Dtype::fp32;
}

// A matrix whose rows are contiguous but may lie apart.
Rows rows_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1), name,
                    " must be a matrix with contiguous rows, not of shape ", t.sizes(), " and strides ", t.strides());
  return {t.data_ptr(), t.stride(0), dtype_of(t, name)};
}

// (T, heads, channels): heads and channels contiguous, rows may lie apart.
Rows head_rows_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 3 && t.stride(2) == 1 && (t.stride(1) == t.size(2) || t.size(1) == 1), name,
                    " must have contiguous heads and channels, not shape ", t.sizes(), " and strides ", t.strides());
  return {t.data_ptr(), t.stride(0), dtype_of(t, name)};
}

template <class T>
const T* contiguous_data(const Tensor& t, at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == type && t.is_contiguous(), name, " must be contiguous and of type ", type,
                    ", not ", t.scalar_type(), " with strides ", t.strides());
  return static_cast<const T*>(t.data_ptr());
}

const float* floats(const OptionalTensor& t, const char* name) {
  return t ? contiguous_data<float>(*t, at::kFloat, name) : nullptr;
}

uint32_t* words(const Tensor& t, int64_t count, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kInt && t.is_contiguous() && t.numel() == count, name, " must be ", count,
                    " packed words, not ", t.numel());
  return static_cast<uint32_t*>(t.data_ptr());
}

Cache cache_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.stride(3) == 1, name,
                    " must have four dimensions and contiguous channels, not strides ", t.strides());
  return {t.data_ptr(), dtype_of(t, name), t.stride(0), t.stride(1), t.stride(2)};
}

// Memory for packed weights, on huge pages: walking the tables of small ones costs a quarter of the bandwidth. Weights
// that are smaller than a few huge pages share a slab, which lives as long as any of them.
Tensor allocate(int64_t count) {
  constexpr size_t kHuge = size_t{2} << 20, kSlab = 16 * kHuge;
  static std::mutex mutex;
  static std::weak_ptr<char> current;
  static size_t used = 0;
  const size_t bytes = (static_cast<size_t>(count) * 4 + 63) / 64 * 64;
  const auto map = [&](size_t size) {
    size = std::max<size_t>((size + kHuge - 1) / kHuge, 1) * kHuge;
    char* data = static_cast<char*>(std::aligned_alloc(kHuge, size));
    TORCH_CHECK(data, "no memory for ", size, " bytes of packed weights");
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);
#endif
    return std::shared_ptr<char>(data, [](char* p) { std::free(p); });
  };
  std::shared_ptr<char> slab;
  char* data;
  if (bytes > kSlab / 4) {
    slab = map(bytes);
    data = slab.get();
  } else {
    const std::lock_guard<std::mutex> lock(mutex);
    slab = current.lock();
    if (!slab || used + bytes > kSlab) {
      slab = map(kSlab);
      current = slab;
      used = 0;
    }
    data = slab.get() + used;
    used += bytes;
  }
  return at::from_blob(data, {count}, [slab](void*) mutable { slab.reset(); }, at::TensorOptions().dtype(at::kInt));
}

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
  const uint32_t* packed = words(weights, packed_words(gemm, outputs, x.size(1)), "weights");
  Tensor out = at::empty({x.size(0), outputs}, x.options().dtype(float_out ? at::kFloat : x.scalar_type()));
  linear(context, {rows, x.size(0), x.size(1), outputs, packed, floats(bias, "bias"), out.data_ptr(), outputs,
                   float_out ? Dtype::fp32 : rows.dtype});
  return out;
}

Tensor unpack_rows_op(int64_t isa, const Tensor& weights, const Tensor& ids, int64_t outputs, int64_t inputs,
                      at::ScalarType type) {
  const Context context = context_of(isa);
  const Dtype dtype = type == at::kBFloat16 ? Dtype::bf16 : Dtype::fp32;
  const uint32_t* packed =
      words(weights, packed_words(context.kernels->gemm[static_cast<int>(dtype)], outputs, inputs), "weights");
  const int64_t* rows = contiguous_data<int64_t>(ids, at::kLong, "ids");
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(0 <= rows[i] && rows[i] < outputs, "row ", rows[i], " is not in 0 … ", outputs - 1);
  Tensor out = at::empty({ids.numel(), inputs}, at::TensorOptions().dtype(type));
  unpack_rows(context, packed, dtype, inputs, rows, ids.numel(), out.data_ptr());
  return out;
}

ExpertLayout layout_of(Dtype dtype, int64_t num_experts, int64_t hidden, int64_t width, bool dense_down) {
  return {dtype, num_experts, hidden, width, dense_down};
}

std::tuple<Tensor, Tensor> pack_experts_op(int64_t isa, const Tensor& gate, const Tensor& up, const Tensor& down,
                                           bool dense_down) {
  const auto strided = [](const Tensor& t, const char* name) -> Strided3 {
    TORCH_CHECK_VALUE(t.dim() == 3 && (t.stride(2) == 1 || t.size(2) == 1), name,
                      " must have three dimensions, the last contiguous, not strides ", t.strides());
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
                         const OptionalTensor& down_bias, at::IntArrayRef shape, Tensor& out) {
  ExpertsCall call{};
  call.x = rows_of(x, "x");
  call.rows = x.size(0);
  call.layout = layout_of(call.x.dtype, shape[0], shape[1], shape[2], shape[3] != 0);
  TORCH_CHECK_VALUE(x.size(1) == shape[1], "x has ", x.size(1), " columns, the experts take ", shape[1]);
  call.activation = static_cast<Activation>(shape[4]);
  call.gate_up = words(gate_up, call.layout.gate_words(), "gate_up");
  call.down = words(down, call.layout.down_words(), "down");
  call.gate_up_bias = floats(gate_up_bias, "gate_up_bias");
  call.down_bias = floats(down_bias, "down_bias");
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
  ExpertsCall call = experts_call(x, gate_up, down, gate_up_bias, down_bias, shape, out);
  set_routing(call, ids, weights, counts);
  const int64_t bad = experts(context_of(isa), call);
  TORCH_CHECK_VALUE(bad < 0, "an expert number is out of range: there are ", call.layout.experts, " experts");
  return out;
}

Tensor all_experts_op(int64_t isa, const Tensor& x, const Tensor& gate_up, const Tensor& down,
                      const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, at::IntArrayRef shape) {
  Tensor out;
  all_experts(context_of(isa), experts_call(x, gate_up, down, gate_up_bias, down_bias, shape, out));
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
  TORCH_CHECK_VALUE(q.size(2) % 2 == 0 && cos_sin.size(1) == q.size(2), "rotary table of shape ", cos_sin.sizes(),
                    " does not fit heads of ", q.size(2));
  TORCH_CHECK_VALUE(positions.numel() == q.size(0) && slots.numel() == q.size(0),
                    "positions and slots must have one entry per row");
  call.cos_sin = contiguous_data<float>(cos_sin, at::kFloat, "cos_sin");
  call.positions = contiguous_data<int64_t>(positions, at::kLong, "positions");
  call.slots = contiguous_data<int64_t>(slots, at::kLong, "slots");
  call.keys = cache_of(keys, "keys");
  call.values = cache_of(values, "values");
  call.page_size = keys.size(2);
  for (int64_t t = 0; t < q.size(0); ++t) {
    TORCH_CHECK_INDEX(0 <= call.positions[t] && call.positions[t] < cos_sin.size(0), "position ", call.positions[t],
                      " is not in the rotary table of ", cos_sin.size(0));
    TORCH_CHECK_INDEX(0 <= call.slots[t] && call.slots[t] < keys.size(0) * keys.size(2), "slot ", call.slots[t],
                      " is not in the cache");
  }
  call.q_out = out.data_ptr();
  rope_and_write(context_of(isa), call);
  return out;
}

Tensor attention_op(int64_t isa, const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& positions,
                    const Tensor& query_start, const Tensor& context_len, const Tensor& block_table, double scale,
                    int64_t window) {
  Tensor out = at::empty(q.sizes(), q.options());
  AttentionCall call{head_rows_of(q, "q"),       q.size(1),   keys.size(1), q.size(2), cache_of(keys, "keys"),
                     cache_of(values, "values"), keys.size(2)};
  TORCH_CHECK_VALUE(keys.size(1) > 0 && q.size(1) % keys.size(1) == 0, q.size(1), " query heads do not divide among ",
                    keys.size(1), " key heads");
  call.positions = contiguous_data<int64_t>(positions, at::kLong, "positions");
  call.query_start = contiguous_data<int32_t>(query_start, at::kInt, "query_start");
  call.context_len = contiguous_data<int32_t>(context_len, at::kInt, "context_len");
  TORCH_CHECK_VALUE(block_table.scalar_type() == at::kInt && block_table.dim() == 2 &&
                        (block_table.stride(1) == 1 || block_table.size(1) == 1),
                    "block_table must be an int32 matrix with contiguous rows");
  call.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  call.block_table_stride = block_table.stride(0);
  call.sequences = context_len.numel();
  TORCH_CHECK_VALUE(query_start.numel() == call.sequences + 1 && call.query_start[call.sequences] <= q.size(0),
                    "query_start does not fit the rows");
  call.scale = static_cast<float>(scale);
  call.window = window;
  call.out = out.data_ptr();
  attention(context_of(isa), call);
  return out;
}

std::tuple<Tensor, Tensor> route_op(int64_t isa, const Tensor& logits, int64_t top_k, int64_t score,
                                    bool softmax_after_topk, bool renormalize, double scale) {
  RouteCall call{rows_of(logits, "logits"), logits.size(0), logits.size(1), top_k};
  TORCH_CHECK_VALUE(1 <= top_k && top_k <= logits.size(1), "top_k ", top_k, " is not in 1 … ", logits.size(1));
  Tensor ids = at::empty({logits.size(0), top_k}, logits.options().dtype(at::kInt));
  Tensor weights = at::empty({logits.size(0), top_k}, logits.options().dtype(at::kFloat));
  call.score = static_cast<Score>(score);
  call.softmax_after_topk = softmax_after_topk;
  call.renormalize = renormalize;
  call.scale = static_cast<float>(scale);
  call.ids = static_cast<int32_t*>(ids.data_ptr());
  call.weights = static_cast<float*>(weights.data_ptr());
  route(context_of(isa), call);
  return {ids, weights};
}

std::tuple<Tensor, Tensor> pack_int8_op(int64_t isa, const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int8_t* source = contiguous_data<int8_t>(weight, at::kChar, "weight");
  Tensor packed = allocate(packed_words(context_of(isa).kernels->gemm_int8, outputs, inputs));
  Tensor sums = at::empty({ceil_div(outputs, kBlockOutputs) * kBlockOutputs}, at::TensorOptions().dtype(at::kInt));
  pack_int8(context_of(isa), source, outputs, inputs, static_cast<uint32_t*>(packed.data_ptr()),
            static_cast<int32_t*>(sums.data_ptr()));
  return {packed, sums};
}

Tensor linear_int8_op(int64_t isa, const Tensor& x, const Tensor& weights, const Tensor& scales, const Tensor& row_sums,
                      const OptionalTensor& bias, int64_t outputs) {
  const Context context = context_of(isa);
  const Rows rows = rows_of(x, "x");
  const int64_t padded = ceil_div(outputs, kBlockOutputs) * kBlockOutputs;
  TORCH_CHECK_VALUE(scales.numel() == padded && row_sums.numel() == padded, "scales and sums must be padded to ",
                    padded, " entries");
  Tensor out = at::empty({x.size(0), outputs}, x.options());
  linear_int8(context, {rows, x.size(0), x.size(1), outputs,
                        words(weights, packed_words(context.kernels->gemm_int8, outputs, x.size(1)), "weights"),
                        floats(scales, "scales"), contiguous_data<int32_t>(row_sums, at::kInt, "row_sums"),
                        floats(bias, "bias"), out.data_ptr(), outputs, rows.dtype});
  return out;
}

// Reads every word once, as a packed weight is read, and does next to nothing with it: the limit for the other
// operators.
int64_t read_words_op(const Tensor& source) {
  TORCH_CHECK_VALUE(source.scalar_type() == at::kInt && source.is_contiguous(), "source must be contiguous int32");
  const uint32_t* data = static_cast<const uint32_t*>(source.data_ptr());
  constexpr int64_t kWords = 64 * 1024, kLanes = 64, kAhead = 1024;
  std::atomic<uint32_t> total{0};
  for_each_task(at::get_num_threads(), source.numel() / kWords, [&](int64_t task) {
    const uint32_t* p = data + task * kWords;
    uint32_t lane[kLanes] = {};
    for (int64_t i = 0; i < kWords; i += kLanes) {
      for (int64_t line = 0; line < kLanes; line += 16) __builtin_prefetch(p + i + kAhead + line);
      for (int64_t j = 0; j < kLanes; ++j) lane[j] += p[i + j];
    }
    uint32_t sum = 0;
    for (uint32_t value : lane) sum += value;
    total.fetch_add(sum);
  });
  return total.load();
}

// Weights as pack_int8 leaves them, of (E * gate blocks * 32, D) and (E * down blocks * 32, gate blocks * 16) matrices.
Tensor experts_int8_op(int64_t isa, const Tensor& x, const Tensor& gate_up, const Tensor& gate_up_scales,
                       const Tensor& gate_up_sums, const Tensor& down, const Tensor& down_scales,
                       const Tensor& down_sums, at::IntArrayRef shape, const Tensor& ids, const Tensor& weights,
                       const OptionalTensor& counts) {
  Int8ExpertsCall call{};
  ExpertsCall& base = call.base;
  base.x = rows_of(x, "x");
  base.rows = x.size(0);
  const ExpertLayout& layout = base.layout = layout_of(base.x.dtype, shape[0], shape[1], shape[2], false);
  const int64_t gate_outputs = layout.experts * layout.gate_blocks() * kBlockOutputs,
                down_outputs = layout.experts * layout.down_blocks() * kBlockOutputs;
  TORCH_CHECK_VALUE(x.size(1) == layout.hidden, "x has ", x.size(1), " columns, the experts take ", layout.hidden);
  TORCH_CHECK_VALUE(gate_up_scales.numel() == gate_outputs && gate_up_sums.numel() == gate_outputs &&
                        down_scales.numel() == down_outputs && down_sums.numel() == down_outputs,
                    "scales and sums must have one entry per packed output");
  base.activation = static_cast<Activation>(shape[3]);
  base.gate_up = words(gate_up, gate_outputs * ceil_div(layout.hidden, 4), "gate_up");
  base.down = words(down, down_outputs * layout.gate_blocks() * kGatedOutputs / 4, "down");
  call.gate_up_scales = contiguous_data<float>(gate_up_scales, at::kFloat, "gate_up_scales");
  call.gate_up_sums = contiguous_data<int32_t>(gate_up_sums, at::kInt, "gate_up_sums");
  call.down_scales = contiguous_data<float>(down_scales, at::kFloat, "down_scales");
  call.down_sums = contiguous_data<int32_t>(down_sums, at::kInt, "down_sums");
  set_routing(base, ids, weights, counts);
  Tensor out = at::empty({x.size(0), x.size(1)}, x.options());
  base.out = out.data_ptr();
  TORCH_CHECK_VALUE(experts_int8(context_of(isa), call) < 0, "an expert number is out of range: there are ",
                    layout.experts, " experts");
  return out;
}

}  // namespace

TORCH_LIBRARY(dynamoe_cpu, m) {
  m.def("find_isa(str name) -> int", &find_isa);
  m.def("pack_linear(int isa, Tensor weight) -> Tensor", &pack_linear_op);
  m.def("linear(int isa, Tensor x, Tensor weights, Tensor? bias, int outputs, bool float_out) -> Tensor", &linear_op);
  m.def("unpack_rows(int isa, Tensor weights, Tensor ids, int outputs, int inputs, ScalarType dtype) -> Tensor",
        &unpack_rows_op);
  m.def("pack_experts(int isa, Tensor gate, Tensor up, Tensor down, bool dense_down) -> (Tensor, Tensor)",
        &pack_experts_op);
  m.def(
      "experts(int isa, Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, int[] shape, "
      "Tensor ids, Tensor weights, "
      "Tensor? counts) -> Tensor",
      &experts_op);
  m.def(
      "all_experts(int isa, Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, int[] "
      "shape) -> Tensor",
      &all_experts_op);
  m.def("rms_norm(int isa, Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm_op);
  m.def("add_rms_norm(int isa, Tensor x, Tensor(a!) residual, Tensor weight, float eps, float scale) -> Tensor",
        &add_rms_norm_op);
  m.def(
      "rope_and_write(int isa, Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slots, "
      "Tensor(a!) keys, Tensor(b!) values) -> Tensor",
      &rope_and_write_op);
  m.def(
      "attention(int isa, Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor query_start, Tensor "
      "context_len, Tensor block_table, float scale, "
      "int window) -> Tensor",
      &attention_op);
  m.def(
      "route(int isa, Tensor logits, int top_k, int score, bool softmax_after_topk, bool renormalize, float scale) -> "
      "(Tensor, Tensor)",
      &route_op);
  m.def("allocate(int words) -> Tensor", &allocate);
  m.def("read_words(Tensor source) -> int", &read_words_op);
  m.def("pack_int8(int isa, Tensor weight) -> (Tensor, Tensor)", &pack_int8_op);
  m.def(
      "linear_int8(int isa, Tensor x, Tensor weights, Tensor scales, Tensor row_sums, Tensor? bias, int outputs) -> "
      "Tensor",
      &linear_int8_op);
  m.def(
      "experts_int8(int isa, Tensor x, Tensor gate_up, Tensor gate_up_scales, Tensor gate_up_sums, Tensor down, Tensor "
      "down_scales, Tensor down_sums, "
      "int[] shape, Tensor ids, Tensor weights, Tensor? counts) -> Tensor",
      &experts_int8_op);
}

}  // namespace dynamoe_cpu
