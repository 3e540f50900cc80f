// Where the sequences of a step have their states, from tensors.
#pragma once

#include "ops/states.h"
#include "ops/tensors.h"

namespace dynamoe_cpu {

inline StateRuns runs_of(int64_t rows, int64_t num_slots, const Tensor& slots, const OptionalTensor& kept,
                         const Tensor& query_start, const Tensor& context_len) {
  const int64_t count = slots.numel();
  StateRuns runs{contiguous_data<int64_t>(slots, at::kLong, "slots"),
                 kept ? data_of<int64_t>(*kept, at::kLong, count, "kept slots") : nullptr,
                 data_of<int32_t>(query_start, at::kInt, count + 1, "query_start"),
                 data_of<int32_t>(context_len, at::kInt, count, "context_len"),
                 {}};
  TORCH_CHECK_VALUE(runs.starts[0] == 0 && runs.starts[count] == rows, "query_start must go from 0 to ", rows, ", not ",
                    runs.starts[0], " to ", runs.starts[count]);
  std::vector<bool> taken(num_slots);
  const auto take = [&](int64_t slot) {
    TORCH_CHECK_INDEX(0 <= slot && slot < num_slots, "slot ", slot, " is not in 0 … ", num_slots - 1);
    TORCH_CHECK_VALUE(!taken[slot], "slot ", slot, " is written for two sequences");
    taken[slot] = true;
  };
  for (int64_t run = 0; run < count; ++run) {
    if (run == 0 || runs.slots[run] != runs.slots[run - 1]) {
      take(runs.slots[run]);
      runs.firsts.push_back(run);
    }
    if (runs.kept && runs.kept[run] != -1) take(runs.kept[run]);
    TORCH_CHECK_VALUE(runs.first(run) <= runs.end(run) && runs.end(run) - runs.first(run) <= runs.lengths[run],
                      "sequence ", run, " has rows ", runs.first(run), " … ", runs.end(run), " and ", runs.lengths[run],
                      " tokens");
  }
  runs.firsts.push_back(count);
  return runs;
}

}  // namespace dynamoe_cpu
