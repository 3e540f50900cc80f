// Torch tensors checked and turned into what the operators take. Only files that define torch operators include this.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "isa/registry.h"
#include "ops/operators.h"

namespace dynamoe_cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `isa` is a place in `isas()`, as `find_isa` gives it.
inline Context context_of(int64_t isa) {
  TORCH_CHECK_VALUE(0 <= isa && isa < static_cast<int64_t>(isas().size()) && isas()[isa]->usable, "isa ", isa,
                    " is no instruction set of this processor");
  return {&isas()[isa]->kernels, at::get_num_threads()};
}

// A number of things. The limit keeps products of two in 64 bits, and bytes of a row in 32.
inline int64_t size_of(int64_t number, const char* name, int64_t least = 1) {
  constexpr int64_t kMost = int64_t{1} << 28;
  TORCH_CHECK_VALUE(least <= number && number <= kMost, name, " must be in ", least, " … ", kMost, ", not ", number);
  return number;
}

// The enumerator of a number, of those up to `last`.
template <class Enum>
Enum enum_of(int64_t number, Enum last, const char* name) {
  TORCH_CHECK_VALUE(0 <= number && number <= static_cast<int64_t>(last), name, " must be in 0 … ",
                    static_cast<int64_t>(last), ", not ", number);
  return static_cast<Enum>(number);
}

inline Dtype dtype_of(at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16, name, " must be float32 or bfloat16, not ", type);
  return type == at::kFloat ? Dtype::fp32 : Dtype::bf16;
}

inline void check_host(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_cpu(), name, " must be on the CPU, not on ", t.device());
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  check_host(t, name);
  return dtype_of(t.scalar_type(), name);
}

// A matrix whose rows are contiguous but may lie apart.
inline Rows rows_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1), name,
                    " must be a matrix with contiguous rows, not of shape ", t.sizes(), " and strides ", t.strides());
  return {t.data_ptr(), t.stride(0), dtype_of(t, name)};
}

// (T, heads, channels): heads and channels contiguous, rows may lie apart.
inline Rows head_rows_of(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 3 && t.stride(2) == 1 && (t.stride(1) == t.size(2) || t.size(1) == 1), name,
                    " must have contiguous heads and channels, not shape ", t.sizes(), " and strides ", t.strides());
  return {t.data_ptr(), t.stride(0), dtype_of(t, name)};
}

template <class T>
const T* contiguous_data(const Tensor& t, at::ScalarType type, const char* name) {
  check_host(t, name);
  TORCH_CHECK_VALUE(t.scalar_type() == type && t.is_contiguous(), name, " must be contiguous and of type ", type,
                    ", not ", t.scalar_type(), " with strides ", t.strides());
  return static_cast<const T*>(t.data_ptr());
}

inline const float* floats(const OptionalTensor& t, const char* name) {
  return t ? contiguous_data<float>(*t, at::kFloat, name) : nullptr;
}

// The same of so many elements.
template <class T>
T* data_of(const Tensor& t, at::ScalarType type, int64_t count, const char* name) {
  const T* data = contiguous_data<T>(t, type, name);
  TORCH_CHECK_VALUE(t.numel() == count, name, " must hold ", count, " elements, not shape ", t.sizes());
  return const_cast<T*>(data);
}

inline float* floats(const OptionalTensor& t, int64_t count, const char* name) {
  return t ? data_of<float>(*t, at::kFloat, count, name) : nullptr;
}

// What is added to `outputs` outputs in whole blocks.
inline const float* bias_of(const OptionalTensor& t, int64_t outputs, const char* name) {
  return floats(t, ceil_div(outputs, kBlockOutputs) * kBlockOutputs, name);
}

inline uint32_t* words(const Tensor& t, int64_t count, const char* name) {
  check_host(t, name);
  TORCH_CHECK_VALUE(t.scalar_type() == at::kInt && t.is_contiguous() && t.numel() == count, name, " must be ", count,
                    " packed words, not ", t.numel());
  return static_cast<uint32_t*>(t.data_ptr());
}

// Keys or values of heads of `channels`: floating, or int8 codes with their scale behind them.
inline Cache cache_of(const Tensor& t, int64_t channels, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.stride(3) == 1, name,
                    " must have four dimensions and contiguous channels, not strides ", t.strides());
  check_host(t, name);
  const Dtype dtype = t.scalar_type() == at::kChar ? Dtype::int8 : dtype_of(t, name);
  TORCH_CHECK_VALUE(t.size(3) == channels + (dtype == Dtype::int8 ? kScaleBytes : 0), name, " of shape ", t.sizes(),
                    " and type ", t.scalar_type(), " do not hold heads of ", channels, " channels");
  return {t.data_ptr(), dtype, t.stride(0), t.stride(1), t.stride(2)};
}

// Latents with the keys that heads share: floating, or codes, their scale and a key of 16 bits.
inline Cache entries_of(const Tensor& t, int64_t latent, int64_t rotated) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.size(1) == 1 && t.stride(3) == 1, "entries must be of one head with contiguous "
                    "channels, not of shape ", t.sizes(), " and strides ", t.strides());
  const bool coded = t.scalar_type() == at::kChar;
  return cache_of(t, coded ? latent + 2 * rotated : latent + rotated, "entries");
}

inline const ExpertLayout& checked_layout(const ExpertLayout& layout) {
  size_of(layout.experts, "experts");
  size_of(layout.hidden, "hidden size");
  size_of(layout.width, "width");
  // With blocks of 32 outputs a product of all three must not overflow.
  size_of(layout.experts * layout.gate_blocks(), "experts times width");
  size_of(layout.experts * layout.down_blocks(), "experts times hidden size");
  return layout;
}

// Biases of all experts, in blocks; without routing those of the down projections are summed up.
inline void set_biases(ExpertsCall& call, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
                       bool down_per_expert) {
  const ExpertLayout& layout = call.layout;
  const int64_t down_blocks = layout.down_blocks() * (down_per_expert ? layout.experts : 1);
  call.gate_up_bias = floats(gate_up_bias, layout.experts * layout.gate_blocks() * kBlockOutputs, "gate_up_bias");
  call.down_bias = floats(down_bias, down_blocks * kBlockOutputs, "down_bias");
}

inline void set_groups(RouteCall& call, int64_t groups, int64_t top_groups, bool top2_sum) {
  const int64_t experts = call.experts;
  TORCH_CHECK_VALUE(1 <= groups && groups <= experts && experts % groups == 0, groups, " groups do not share ", experts,
                    " experts");
  const int64_t size = experts / groups;
  TORCH_CHECK_VALUE(1 <= top_groups && top_groups <= groups && call.top_k <= top_groups * size, top_groups, " of ",
                    groups, " groups have too few experts for ", call.top_k);
  TORCH_CHECK_VALUE(!top2_sum || size > 1 || top_groups == groups, "groups of one expert have no two best");
  call.groups = groups;
  call.top_groups = top_groups;
  call.top2_sum = top2_sum;
}

// Uninitialised packed weights of `count` words.
Tensor allocate(int64_t count);

}  // namespace dynamoe_cpu
