// The two ends of a model as torch operators, each in one call: between large reads the caches have forgotten everything
// else, and every further operator costs tens of microseconds.
#include <algorithm>

#include "quant/quant_tensors.h"

namespace dynamoe_cpu {
namespace {

// Rows of a packed weight, of which `layout` is empty unless it is quantised, in `dtype`, widened and scaled.
Tensor embed_op(int64_t isa, const Tensor& packed, at::IntArrayRef layout, const Tensor& ids, int64_t outputs,
                int64_t inputs, at::ScalarType type, double scale) {
  const Context context = context_of(isa);
  const Kernels& kernels = *context.kernels;
  const Dtype dtype = dtype_of(type, "dtype");
  size_of(outputs, "outputs", 0);
  size_of(inputs, "inputs");
  const int64_t* numbers = contiguous_data<int64_t>(ids, at::kLong, "ids");
  const int64_t rows = ids.numel();
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK_INDEX(0 <= numbers[i] && numbers[i] < outputs, "row ", numbers[i], " is not in 0 … ", outputs - 1);
  Tensor out = at::empty({rows, inputs}, at::TensorOptions().dtype(at::kFloat));
  float* wide = static_cast<float*>(out.data_ptr());
  const bool narrow = dtype == Dtype::bf16, quantised = !layout.empty();
  uint16_t* halves = scratch(Buffer::stack).get<uint16_t>(narrow ? rows * inputs : 0);
  if (quantised) {
    const QuantLayer layer = quant_layer(packed, {}, layout, "weights");
    TORCH_CHECK_VALUE(outputs_of(layer) == outputs && layer[0].layout.inputs == inputs, "the weights are not of ",
                      outputs, " outputs and ", inputs, " inputs");
    quant_rows(context, layer, numbers, rows, wide);
  } else {
    const int64_t count = packed_words(kernels.gemm[static_cast<int>(dtype)], outputs, inputs);
    unpack_rows(context, words(packed, count, "weights"), dtype, inputs, numbers, rows,
                narrow ? static_cast<void*>(halves) : wide);
  }
  const int width = static_cast<int>(inputs);
  const float factor = static_cast<float>(scale);
  for_each_light_row(context.threads, rows, inputs, [&](int64_t row) {
    float* x = wide + row * inputs;
    uint16_t* half = halves + row * inputs;
    if (narrow && quantised) kernels.convert(x, half, width, dtype);
    if (narrow) kernels.widen(half, x, width);
    for (int i = 0; factor != 1.0f && i < width; ++i) x[i] *= factor;
  });
  return out;
}

// Final norm, LM head, and the division of the logits.
Tensor logits_op(int64_t isa, const Tensor& x, const Tensor& norm, double eps, const Tensor& packed,
                 const OptionalTensor& bias, at::IntArrayRef layout, int64_t outputs, double divisor) {
  const Context context = context_of(isa);
  const Rows source = rows_of(x, "x");
  const int64_t rows = x.size(0), hidden = size_of(x.size(1), "columns of x");
  size_of(outputs, "outputs", 0);
  const Dtype dtype = dtype_of(norm, "norm");
  TORCH_CHECK_VALUE(norm.is_contiguous() && norm.numel() == hidden, "the norm's weight must be contiguous with ",
                    hidden, " entries");
  char* normed = scratch(Buffer::stack).get<char>(rows * hidden * element_bytes(dtype));
  NormCall call{};
  call.x = source;
  call.scale = 1.0f;
  call.weight = norm.data_ptr();
  call.weight_dtype = dtype;
  call.eps = static_cast<float>(eps);
  call.rows = rows;
  call.hidden = hidden;
  call.out = normed;
  rms_norm(context, call);
  Tensor out = at::empty({rows, outputs}, at::TensorOptions().dtype(at::kFloat));
  float* logits = static_cast<float*>(out.data_ptr());
  const Rows input{normed, hidden, dtype};
  if (!layout.empty()) {
    const QuantLayer layer = quant_layer(packed, bias, layout, "weights");
    TORCH_CHECK_VALUE(layer[0].layout.inputs == hidden && outputs_of(layer) == outputs, "the LM head is not of ",
                      outputs, " outputs and ", hidden, " inputs");
    quant_linear(context, {input, rows, &layer, logits, outputs, Dtype::fp32});
  } else {
    const Gemm& gemm = context.kernels->gemm[static_cast<int>(dtype)];
    linear(context, {input, rows, hidden, outputs, words(packed, packed_words(gemm, outputs, hidden), "weights"),
                     bias_of(bias, outputs, "bias"), logits, outputs, Dtype::fp32});
  }
  const float by = static_cast<float>(divisor);
  constexpr int64_t kPart = 8192;
  if (by != 1.0f)
    for_each_task(context.threads, ceil_div(rows * outputs, kPart), [&](int64_t part) {
      const int64_t end = std::min(rows * outputs, (part + 1) * kPart);
      for (int64_t i = part * kPart; i < end; ++i) logits[i] /= by;
    });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def(
      "embed(int isa, Tensor packed, int[] layout, Tensor ids, int outputs, int inputs, ScalarType dtype, float scale) "
      "-> Tensor",
      &embed_op);
  m.def(
      "logits(int isa, Tensor x, Tensor norm, float eps, Tensor packed, Tensor? bias, int[] layout, int outputs, float "
      "divisor) -> Tensor",
      &logits_op);
}

}  // namespace dynamoe_cpu
