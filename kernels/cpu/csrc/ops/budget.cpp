// The expert budget: which of its chosen experts a row really uses, row by row. Oracle: budget_reference.py.
#include <cmath>

#include "ops/operators.h"
#include "ops/parallel.h"

namespace dynamoe_cpu {

namespace {

// Numbers of a row's `count` slots by falling worth; ties keep their order, NaN ranks first as in torch's sort.
void rank(const float* worth, int64_t count, int32_t* order) {
  const auto above = [](float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
  for (int64_t k = 0; k < count; ++k) {
    int64_t place = k;
    for (; place > 0 && above(worth[k], worth[order[place - 1]]); --place) order[place] = order[place - 1];
    order[place] = static_cast<int32_t>(k);
  }
}

}  // namespace

void limit_experts(const Context& context, const LimitCall& call) {
  for_each_row(context.threads, call.rows, [&](int64_t row) {
    const int64_t number = call.numbers ? call.numbers[row] : row, count = call.counts[row];
    const float keep = call.keep[number * call.stride];
    const int32_t cap = call.cap[number * call.stride];
    if (!(keep < 1.0f) && cap >= count) return;
    int32_t* ids = call.ids + row * call.top_k;
    float* weights = call.weights + row * call.top_k;
    float* worth = scratch(Buffer::scores).get<float>(3 * call.top_k);
    int32_t* order = reinterpret_cast<int32_t*>(worth + call.top_k);
    int32_t* keeps = order + call.top_k;
    for (int64_t k = 0; k < count; ++k) {
      worth[k] = call.scale ? std::fabs(weights[k]) * call.scale[ids[k]] : std::fabs(weights[k]);
      keeps[k] = 0;
    }
    rank(worth, count, order);
    float total = 0.0f, before = 0.0f;
    for (int64_t place = 0; place < count; ++place) total += worth[order[place]];
    int64_t kept = 0;
    for (; kept < count; ++kept) {
      if (kept > 0 && (kept >= cap || (keep < 1.0f && before >= keep * total))) break;
      keeps[order[kept]] = 1;
      before += worth[order[kept]];
    }
    if (kept == count) return;
    int64_t place = 0;
    for (int64_t k = 0; k < count; ++k)
      if (keeps[k]) {
        ids[place] = ids[k];
        weights[place++] = weights[k];
      }
    for (; place < call.top_k; ++place) {
      ids[place] = 0;
      weights[place] = 0.0f;
    }
    call.counts[row] = static_cast<int32_t>(kept);
  });
}

}  // namespace dynamoe_cpu
