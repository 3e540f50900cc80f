// Norms and rotary embedding.
#include <cstring>

#include "ops/operators.h"
#include "ops/parallel.h"

namespace dynamoe_cpu {

void rms_norm(const Context& context, const NormCall& call) {
  const Dtype stream_dtype = call.residual.data ? call.residual.dtype : call.x.dtype;
  for_each_row(context.threads, call.rows, [&](int64_t row) {
    context.kernels->rms_norm(call.x.at(row), call.x.dtype, call.residual.data ? call.residual.at(row) : nullptr,
                              call.scale, call.weight, call.weight_dtype, call.eps, static_cast<int>(call.hidden),
                              static_cast<char*>(call.sum) + row * call.sum_stride * element_bytes(stream_dtype),
                              stream_dtype,
                              static_cast<char*>(call.out) + row * call.hidden * element_bytes(call.weight_dtype));
  });
}

void rope_and_write(const Context& context, const RopeCall& call) {
  const Kernels& kernels = *context.kernels;
  const int channels = static_cast<int>(call.channels);
  const int64_t head_bytes = call.channels * element_bytes(call.q.dtype);
  // The cache may be wider than the activations, or narrower.
  const auto write = [&](const void* from, void* to, Dtype to_dtype) {
    if (to_dtype == call.q.dtype) {
      std::memcpy(to, from, head_bytes);
    } else if (to_dtype == Dtype::int8) {
      const float* wide = static_cast<const float*>(from);
      if (call.q.dtype == Dtype::bf16) {
        float* widened = scratch(Buffer::hidden).get<float>(channels);
        kernels.widen(static_cast<const uint16_t*>(from), widened, channels);
        wide = widened;
      }
      kernels.encode_head(wide, to, channels);
    } else if (to_dtype == Dtype::fp32) {
      kernels.widen(static_cast<const uint16_t*>(from), static_cast<float*>(to), channels);
    } else {
      kernels.convert(static_cast<const float*>(from), to, channels, to_dtype);
    }
  };
  for_each_row(context.threads, call.rows, [&](int64_t row) {
    const float* cos_sin = call.cos_sin + call.positions[row] * call.channels;
    const char* q = static_cast<const char*>(call.q.at(row));
    char* q_out = static_cast<char*>(call.q_out) + row * call.heads * head_bytes;
    for (int64_t h = 0; h < call.heads; ++h)
      kernels.rope(q + h * head_bytes, cos_sin, channels, q_out + h * head_bytes, call.q.dtype);
    const int64_t page = call.slots[row] / call.page_size, offset = call.slots[row] % call.page_size;
    float* rotated = scratch(Buffer::rows).get<float>(call.channels);
    for (int64_t g = 0; g < call.kv_heads; ++g) {
      kernels.rope(static_cast<const char*>(call.k.at(row)) + g * head_bytes, cos_sin, channels, rotated, call.k.dtype);
      write(rotated, call.keys.at(page, g, offset), call.keys.dtype);
      write(static_cast<const char*>(call.v.at(row)) + g * head_bytes, call.values.at(page, g, offset),
            call.values.dtype);
    }
  });
}

}  // namespace dynamoe_cpu
