// What the team of threads has done, as a torch operator.
#include <torch/library.h>

#include <vector>

#include "team/counters.h"

namespace dynamoe_cpu {
namespace {

std::vector<int64_t> team_counters_op() {
  const auto values = team_counters();
  return {values.begin(), values.end()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) { m.def("team_counters() -> int[]", &team_counters_op); }

}  // namespace dynamoe_cpu
