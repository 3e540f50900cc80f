// Torch operators of multi-head latent attention.
#include "ops/paged.h"

namespace dynamoe_cpu {
namespace {

// x[:, h] times the transposed weight of every head. Rows and heads of x may lie apart.
Tensor head_linear_op(int64_t isa, const Tensor& x, const Tensor& weights, int64_t outputs) {
  const Context context = context_of(isa);
  TORCH_CHECK_VALUE(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) == 1), "x must have rows, heads and contiguous channels,"
                    " not shape ", x.sizes(), " and strides ", x.strides());
  const Dtype dtype = dtype_of(x, "x");
  const int64_t heads = size_of(x.size(1), "heads of x"), inputs = size_of(x.size(2), "channels of x");
  const Gemm& gemm = context.kernels->gemm[static_cast<int>(dtype)];
  const int64_t blocks = ceil_div(size_of(outputs, "outputs"), kBlockOutputs);
  size_of(heads * blocks, "heads times outputs");
  const uint32_t* packed = words(weights, heads * packed_words(gemm, outputs, inputs), "weights");
  Tensor out = at::empty({x.size(0), heads, outputs}, x.options());
  LinearCall call{{x.data_ptr(), x.stride(0), dtype}, x.size(0), inputs, outputs, packed, nullptr, out.data_ptr(),
                  heads * outputs, dtype, heads, x.stride(1), outputs};
  linear(context, call);
  return out;
}

Tensor latent_attention_op(int64_t isa, const Tensor& q, const Tensor& entries, const Tensor& query_start,
                           const Tensor& context_len, const Tensor& block_table, double scale, int64_t window,
                           int64_t latent) {
  const Context context = context_of(isa);
  check_caches(entries, entries);
  AttentionCall call{};
  call.q = head_rows_of(q, "q");
  call.heads = size_of(q.size(1), "heads of q");
  call.kv_heads = 1;
  call.channels = size_of(q.size(2), "channels of q");
  call.latent = size_of(latent, "latent");
  TORCH_CHECK_VALUE(latent <= call.channels, "a latent of ", latent, " does not fit queries of ", call.channels, " channels");
  call.keys = call.values = entries_of(entries, latent, call.channels - latent);
  call.page_size = entries.size(2);
  call.window = size_of(window, "window", 0);
  const SequencePlaces places = sequence_places(q.size(0), query_start, context_len, block_table, entries, window);
  call.query_start = places.query_start;
  call.context_len = places.context_len;
  call.block_table = places.block_table;
  call.block_table_stride = places.table_stride;
  call.sequences = places.sequences;
  call.scale = static_cast<float>(scale);
  Tensor out = at::empty({q.size(0), call.heads, latent}, q.options());
  call.out = out.data_ptr();
  attention(context, call);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def("head_linear(int isa, Tensor x, Tensor weights, int outputs) -> Tensor", &head_linear_op);
  m.def(
      "latent_attention(int isa, Tensor q, Tensor entries, Tensor query_start, Tensor context_len, Tensor block_table, "
      "float scale, int window, int latent) -> Tensor",
      &latent_attention_op);
}

}  // namespace dynamoe_cpu
