// Router scores to experts and weights, row by row.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/operators.h"
#include "ops/parallel.h"

namespace dynamoe_cpu {

namespace {

// Order of choice: strict, so that ties stay with the lower number; NaN, as in torch's sort, ranks above every number.
bool above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

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

// Takes the experts outside the best groups out of the choice. `worth` has room for a number of each group.
void choose_groups(const RouteCall& call, float* choice, float* worth) {
  const int64_t size = call.experts / call.groups;
  for (int64_t group = 0; group < call.groups; ++group) {
    const float* own = choice + group * size;
    float best = own[0], second = -std::numeric_limits<float>::infinity();
    for (int64_t e = 1; e < size; ++e) {
      if (above(own[e], best)) {
        second = best;
        best = own[e];
      } else if (e == 1 || above(own[e], second)) {
        second = own[e];
      }
    }
    worth[group] = call.top2_sum ? best + second : best;
  }
  for (int64_t group = 0; group < call.groups; ++group) {
    int64_t better = 0;
    for (int64_t other = 0; other < call.groups; ++other)
      better += above(worth[other], worth[group]) || (other < group && !above(worth[group], worth[other]));
    if (better >= call.top_groups)
      std::fill_n(choice + group * size, size, -std::numeric_limits<float>::infinity());
  }
}

// What experts are chosen by: their scores, or in `room` what a rule makes of them.
const float* choices(const RouteCall& call, const float* values, float* room) {
  const bool grouped = call.top_groups < call.groups;
  if (!call.selection_bias && !grouped) return values;
  for (int64_t e = 0; e < call.experts; ++e)
    room[e] = call.selection_bias ? values[e] + call.selection_bias[e] : values[e];
  if (grouped) choose_groups(call, room, room + call.experts);
  return room;
}

}  // namespace

void route(const Context& context, const RouteCall& call) {
  for_each_task(context.threads, ceil_div(call.rows, 32), [&](int64_t task) {
    float* values = scratch(Buffer::scores).get<float>(2 * call.experts + call.groups);
    for (int64_t row = 32 * task; row < std::min(call.rows, 32 * (task + 1)); ++row) {
      for (int64_t e = 0; e < call.experts; ++e) values[e] = read_number(call.logits.at(row), call.logits.dtype, e);
      score(call, values);
      int32_t* ids = call.ids + row * call.top_k;
      float* weights = call.weights + row * call.top_k;
      const float* choice = choices(call, values, values + call.experts);
      // An insertion sort that keeps the best K.
      int64_t kept = 0;
      for (int64_t e = 0; e < call.experts; ++e) {
        if (kept == call.top_k && !above(choice[e], weights[kept - 1])) continue;
        int64_t place = kept < call.top_k ? kept++ : kept - 1;
        for (; place > 0 && above(choice[e], weights[place - 1]); --place) {
          weights[place] = weights[place - 1];
          ids[place] = ids[place - 1];
        }
        weights[place] = choice[e];
        ids[place] = static_cast<int32_t>(e);
      }
      if (choice != values)
        for (int64_t k = 0; k < call.top_k; ++k) weights[k] = values[ids[k]];
      if (call.softmax_after_topk) softmax(weights, call.top_k);
      if (call.score == Score::constant) std::fill(weights, weights + call.top_k, 1.0f);
      float total = 0.0f;
      for (int64_t k = 0; k < call.top_k; ++k) total += weights[k];
      if (call.norm_floor > 0.0f) total = std::max(total, call.norm_floor);
      if (call.norm_epsilon > 0.0f) total += call.norm_epsilon;
      for (int64_t k = 0; k < call.top_k; ++k) {
        weights[k] = (call.renormalize ? weights[k] / total : weights[k]) * call.scale;
        if (call.expert_scale) weights[k] *= call.expert_scale[ids[k]];
      }
    }
  });
}

}  // namespace dynamoe_cpu
