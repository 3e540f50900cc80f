// A group of processes that share memory, as a torch class.
#pragma once

#include <torch/custom_class.h>

#include <string>
#include <vector>

#include "shared/shared.h"
#include "ops/tensors.h"

namespace dynamoe_cpu {

class SharedGroup : public torch::CustomClassHolder {
 public:
  // As many processes as a place can hold the sizes and some bytes of the parts of.
  static constexpr int64_t kMostRanks = 1024;
  static int64_t file_bytes(int64_t size) { return SharedMemory::file_bytes(checked(size)); }

  SharedGroup(int64_t isa, const std::string& path, int64_t rank, int64_t size, double timeout)
      : kernels_(*context_of(isa).kernels), memory_(path, rank_of(rank, checked(size)), size, timeout) {}

  void add_up(const void* in, void* out, int64_t count, Dtype dtype) { memory_.sum(kernels_, in, out, count, dtype); }

  Tensor sum(const Tensor& x) {
    const Dtype dtype = dtype_of(x, "x");
    bytes_of(x, "x");
    Tensor out = at::empty(x.sizes(), x.options());
    add_up(x.data_ptr(), out.data_ptr(), x.numel(), dtype);
    return out;
  }
  void broadcast(const Tensor& x, int64_t root, double timeout) {
    memory_.broadcast(rank_of(root, memory_.size()), bytes_of(x, "x"), x.nbytes(), timeout);
  }
  void gather(const Tensor& x, const Tensor& out, int64_t root) {
    rank_of(root, memory_.size());
    TORCH_CHECK_VALUE(memory_.rank() != root || out.nbytes() == memory_.size() * x.nbytes(), "out of shape ", out.sizes(),
                      " does not take ", memory_.size(), " times ", x.sizes());
    memory_.gather(root, bytes_of(x, "x"), bytes_of(out, "out"), x.nbytes());
  }
  // Sizes are rows, which are those of `rows`; `out` takes what comes.
  void begin_swap(const Tensor& rows, std::vector<int64_t> sent) {
    const char* data = bytes_of(rows, "rows");
    TORCH_CHECK_VALUE(!rows_.defined(), "a swap has begun before");
    memory_.begin_swap(data, bytes_by_rank(rows, std::move(sent), "rows"));
    rows_ = rows;
  }
  void finish_swap(const Tensor& out, std::vector<int64_t> coming) {
    char* data = bytes_of(out, "out");
    TORCH_CHECK_VALUE(rows_.defined(), "no swap has begun");
    memory_.finish_swap(data, bytes_by_rank(out, std::move(coming), "out"));
    rows_ = Tensor();
  }

 private:
  static int64_t checked(int64_t size) {
    TORCH_CHECK_VALUE(1 <= size && size <= kMostRanks, "size must be in 1 … ", kMostRanks, ", not ", size);
    return size;
  }
  static int64_t rank_of(int64_t rank, int64_t size) {
    TORCH_CHECK_VALUE(0 <= rank && rank < size, "rank ", rank, " is not in a group of ", size);
    return rank;
  }
  static char* bytes_of(const Tensor& t, const char* name) {
    TORCH_CHECK_VALUE(t.is_contiguous() && t.is_cpu(), name, " must be contiguous, not with strides ", t.strides());
    return static_cast<char*>(t.data_ptr());
  }
  std::vector<int64_t> bytes_by_rank(const Tensor& t, std::vector<int64_t> counts, const char* name) const {
    TORCH_CHECK_VALUE(t.dim() > 0 && std::all_of(counts.begin(), counts.end(), [](int64_t n) { return n >= 0; }), name,
                      " must have rows, of which ", counts, " do not fall");
    int64_t total = 0, row = t.element_size();
    for (int64_t d = 1; d < t.dim(); ++d) row *= t.size(d);
    for (int64_t& count : counts) total += count, count *= row;
    TORCH_CHECK_VALUE(static_cast<int64_t>(counts.size()) == memory_.size() && total == t.size(0), name, " has ", t.size(0),
                      " rows, which ", counts, " bytes by rank do not fit");
    return counts;
  }

  const Kernels& kernels_;
  SharedMemory memory_;
  Tensor rows_;  // lives until the swap that has begun is finished
};

}  // namespace dynamoe_cpu
