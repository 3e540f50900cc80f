// What happens at an exit, on plain pointers. Shapes as in operators.h; J inner width of a probe, X its inputs.
//
// All of it is plain code in one fixed order per row: a row's result depends on that row alone, on every processor.
#pragma once

#include <optional>

#include "ops/operators.h"
#include "quant/quant.h"

namespace dynamoe_cpu {

struct ProbeCall {
  const float* x;
  const float* previous;  // or null
  const float* entropy;   // (T), or null
  int64_t rows, hidden, inner;
  const float* weight;  // (J, X)
  const float* bias;    // (J)
  const float* out;     // (J), or null for a linear probe
  float out_bias;
  float* logits;  // (T)
};
void probe(const Context& context, const ProbeCall& call);

// Rows that continue, then rows that exit, both rising; returns how many continue.
int64_t partition(const float* logits, const float* thresholds, int64_t rows, int64_t* order);

// Adds `share` times the entropy of each row to `out`.
void router_entropy(const Context& context, const Rows& logits, int64_t rows, int64_t experts, float share, float* out);

// One layer of a projection: a residual stream's keys and values, written to the cache. Layers run beside each other,
// each on one thread.
struct ProjectCall {
  Rows x;
  int64_t rows, hidden, kv_heads, channels;
  const void* norm;
  Dtype dtype;  // of the weights, and so of keys and values before they are stored
  float eps;
  const uint32_t* kv;    // keys, then values
  const float* kv_bias;  // or null
  QuantLayer quant;      // where not empty it takes the place of kv and its bias
  const void* k_norm;    // or null
  int64_t k_norm_width;  // channels, or kv_heads * channels
  float clip;            // 0: none
  const float* cos_sin;
  const int64_t* positions;
  const int64_t* slots;
  Cache keys, values;
  int64_t page_size;
  void* scratch;  // rows * (hidden + 3 * kv_heads * channels) elements of dtype
};
void project_kv(const Context& context, const ProjectCall& call);

}  // namespace dynamoe_cpu
