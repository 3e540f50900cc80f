// Router scores to experts and weights, row by row.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/operators.h"
#include "ops/parallel.h"

namespace dynamoe_cpu {

namespace {

float read(const void* row, Dtype dtype, int64_t i) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(row)[i];
  union {
    uint32_t bits;
    float value;
  } word{static_cast<uint32_t>(static_cast<const uint16_t*>(row)[i]) << 16};
  return word.value;
}

void softmax(float* values, int64_t n) {
  const float top = *std::max_element(values, values + n);
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) total += values[i] = std::exp(values[i] - top);
  for (int64_t i = 0; i < n; ++i) values[i] /= total;
}

void score(const RouteCall& call, float* values) {
  if (call.score == Score::softmax && !call.softmax_after_topk) softmax(values, call.experts);
  for (int64_t e = 0; e < call.experts; ++e) {
    if (call.score == Score::sigmoid) values[e] = 1.0f / (1.0f + std::exp(-values[e]));
    // log(1 + e^x) without overflow
    if (call.score == Score::sqrt_softplus)
      values[e] = std::sqrt(std::max(values[e], 0.0f) + std::log1p(std::exp(-std::fabs(values[e]))));
  }
}

}  // namespace

void route(const Context& context, const RouteCall& call) {
  for_each_task(context.threads, ceil_div(call.rows, 32), [&](int64_t task) {
    float* values = scratch(Buffer::scores).get<float>(call.experts);
    for (int64_t row = 32 * task; row < std::min(call.rows, 32 * (task + 1)); ++row) {
      for (int64_t e = 0; e < call.experts; ++e) values[e] = read(call.logits.at(row), call.logits.dtype, e);
      score(call, values);
      int32_t* ids = call.ids + row * call.top_k;
      float* weights = call.weights + row * call.top_k;
      // An insertion sort that keeps the best K: strict comparison leaves ties to the lower expert number, and NaN,
      // as in torch's sort, ranks above every number.
      const auto above = [](float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
      int64_t kept = 0;
      for (int64_t e = 0; e < call.experts; ++e) {
        if (kept == call.top_k && !above(values[e], weights[kept - 1])) continue;
        int64_t place = kept < call.top_k ? kept++ : kept - 1;
        for (; place > 0 && above(values[e], weights[place - 1]); --place) {
          weights[place] = weights[place - 1];
          ids[place] = ids[place - 1];
        }
        weights[place] = values[e];
        ids[place] = static_cast<int32_t>(e);
      }
      if (call.softmax_after_topk) softmax(weights, call.top_k);
      if (call.score == Score::constant) std::fill(weights, weights + call.top_k, 1.0f);
      float total = 0.0f;
      for (int64_t k = 0; k < call.top_k; ++k) total += weights[k];
      for (int64_t k = 0; k < call.top_k; ++k)
        weights[k] = (call.renormalize ? weights[k] / total : weights[k]) * call.scale;
    }
  });
}

}  // namespace dynamoe_cpu
