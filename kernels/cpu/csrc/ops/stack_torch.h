// What torch itself computes in the stack, because single operations leave it to torch: with the same bits.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/TensorOperators.h>

#include <limits>

#include "ops/stack.h"

namespace dynamoe_cpu {

inline at::Tensor matrix(const void* data, int64_t rows, int64_t columns, Dtype dtype = Dtype::fp32) {
  const auto type = dtype == Dtype::fp32 ? at::kFloat : at::kBFloat16;
  return at::from_blob(const_cast<void*>(data), {rows, columns}, at::TensorOptions().dtype(type));
}

// Layer norms of rows of fp32.
inline void torch_layer_norm(const Norm& norm, int64_t width, double eps, const float* x, int64_t rows, float* out) {
  const at::Tensor weight = matrix(norm.weight, 1, width)[0];
  const std::optional<at::Tensor> bias = norm.bias ? std::optional(matrix(norm.bias, 1, width)[0]) : std::nullopt;
  matrix(out, rows, width).copy_(at::layer_norm(matrix(x, rows, width), {width}, weight, bias, eps));
}

// Phimoe's rule: each choice is weighed by its softmax over the experts within `jitter` of it, earlier ones taken out.
inline void torch_sparsemixer(const RouteCall& call, double jitter) {
  const at::Tensor logits = matrix(call.logits.data, call.rows, call.experts, call.logits.dtype).to(at::kFloat);
  const float none = -std::numeric_limits<float>::infinity();
  at::Tensor left = logits.clone();
  for (int64_t k = 0; k < call.top_k; ++k) {
    const at::Tensor chosen = std::get<1>(left.sort(/*stable=*/true, -1, /*descending=*/true)).slice(1, 0, 1).contiguous();
    const at::Tensor best = left.gather(-1, chosen);
    const at::Tensor distance = (best - logits) / logits.abs().clamp(best);
    const at::Tensor weights = left.masked_fill(distance > 2 * jitter, none).softmax(-1).gather(-1, chosen).contiguous();
    left = left.scatter(-1, chosen, none);
    const int64_t* const ids = chosen.const_data_ptr<int64_t>();
    const float* const of_ids = weights.const_data_ptr<float>();
    for (int64_t row = 0; row < call.rows; ++row) {
      call.ids[row * call.top_k + k] = static_cast<int32_t>(ids[row]);
      call.weights[row * call.top_k + k] = of_ids[row];
    }
  }
}

}  // namespace dynamoe_cpu
