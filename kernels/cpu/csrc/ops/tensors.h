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
  TORCH_CHECK_INDEX(0 <= isa && isa < static_cast<int64_t>(isas().size()), "there is no instruction set ", isa);
  return {&isas()[isa]->kernels, at::get_num_threads()};
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  if (t.scalar_type() == at::kBFloat16) return Dtype::bf16;
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, name, " must be float32 or bfloat16, not ", t.scalar_type());
  return Dtype::fp32;
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
  TORCH_CHECK_VALUE(t.scalar_type() == type && t.is_contiguous(), name, " must be contiguous and of type ", type,
                    ", not ", t.scalar_type(), " with strides ", t.strides());
  return static_cast<const T*>(t.data_ptr());
}

inline const float* floats(const OptionalTensor& t, const char* name) {
  return t ? contiguous_data<float>(*t, at::kFloat, name) : nullptr;
}

inline uint32_t* words(const Tensor& t, int64_t count, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kInt && t.is_contiguous() && t.numel() == count, name, " must be ", count,
                    " packed words, not ", t.numel());
  return static_cast<uint32_t*>(t.data_ptr());
}

// Keys or values of heads of `channels`: floating, or int8 codes with their scale behind them.
inline Cache cache_of(const Tensor& t, int64_t channels, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.stride(3) == 1, name,
                    " must have four dimensions and contiguous channels, not strides ", t.strides());
  const Dtype dtype = t.scalar_type() == at::kChar ? Dtype::int8 : dtype_of(t, name);
  TORCH_CHECK_VALUE(t.size(3) == channels + (dtype == Dtype::int8 ? kScaleBytes : 0), name, " of shape ", t.sizes(),
                    " and type ", t.scalar_type(), " do not hold heads of ", channels, " channels");
  return {t.data_ptr(), dtype, t.stride(0), t.stride(1), t.stride(2)};
}

// Uninitialised packed weights of `count` words.
Tensor allocate(int64_t count);

}  // namespace dynamoe_cpu
