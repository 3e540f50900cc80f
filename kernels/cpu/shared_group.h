// A group of processes that share memory, as a torch class.
#pragma once

#include <torch/custom_class.h>

#include <string>

#include "shared.h"
#include "tensors.h"

namespace dynamoe_cpu {

class SharedGroup : public torch::CustomClassHolder {
 public:
  SharedGroup(int64_t isa, const std::string& path, int64_t rank, int64_t size, double timeout)
      : kernels_(*context_of(isa).kernels), memory_(path, rank, size, timeout) {}

  Tensor sum(const Tensor& x) {
    const Dtype dtype = dtype_of(x, "x");
    TORCH_CHECK_VALUE(x.is_contiguous(), "x must be contiguous, not with strides ", x.strides());
    Tensor out = at::empty(x.sizes(), x.options());
    add_up(x.data_ptr(), out.data_ptr(), x.numel(), dtype);
    return out;
  }
  void add_up(const void* in, void* out, int64_t count, Dtype dtype) { memory_.sum(kernels_, in, out, count, dtype); }

 private:
  const Kernels& kernels_;
  SharedMemory memory_;
};

}  // namespace dynamoe_cpu
