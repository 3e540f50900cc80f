// Layers whose memory is a state of fixed size for each sequence, on plain pointers: a short convolution, linear attention,
// and a state space. Shapes as in kernels/reference/states.py: X channels of either, W taps of a convolution, N slots, H
// heads that have states, G groups of them that share queries and keys, C channels of a key, V channels of a value.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/operators.h"

namespace dynamoe_cpu {

constexpr int64_t kMostTaps = 64;

// Where the sequences of a step are. Runs of rows that follow each other and have one slot are one sequence.
struct StateRuns {
  const int64_t *slots, *kept;       // of each run; `kept`: where its states are kept behind its rows, -1: nowhere; or null
  const int32_t *starts, *lengths;   // first row of each run, and their number; tokens of its sequence, with its rows
  std::vector<int64_t> firsts;       // runs of each sequence, and their number

  int64_t sequences() const { return static_cast<int64_t>(firsts.size()) - 1; }
  int64_t first(int64_t run) const { return starts[run]; }
  int64_t end(int64_t run) const { return starts[run + 1]; }
  // Whether the sequence begins with this run, so that nothing is in its slot yet.
  bool begins(int64_t run) const { return lengths[run] == end(run) - first(run); }
};

// Channels `to` … of a convolution, which are columns `from` … of the rows it reads.
struct Columns {
  int64_t from, to, width;
};
// Adds some columns, in stretches that are each a thread's work.
void add_columns(std::vector<Columns>& columns, int64_t from, int64_t to, int64_t width);

// Causal convolution of every channel with its own few taps.
struct ConvolutionCall {
  Rows x;  // (T, …), fp32 or bf16
  const std::vector<Columns>* columns;  // where in x the channels are
  int64_t channels;
  int taps;              // 2 … kMostTaps
  const float* weights;  // (W, X)
  const float* bias;     // (X), or null
  bool silu;             // of the sum
  float* tails;          // (N, W - 1, X)
  const StateRuns* runs;
  void* out;             // (T, X)
  Dtype out_dtype;
  Rows times, gate;      // what x is multiplied by, in the same columns, and the sum, channel by channel; data may be null
};
void short_convolution(const Context& context, const ConvolutionCall& call);

// How far a head's time goes on with a row, and what is left of its state then; the bits of single numbers.
struct TimeStep {
  float step, decay;
};
inline TimeStep time_step(float x, float bias, float rate) {
  x += bias;
  const float step = std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x)));
  return {step, std::exp(rate * step)};
}

// Linear attention, row after row.
struct RecurrenceCall {
  Rows queries, keys, values;  // (T, G C), (T, G C) and (T, H V), fp32
  int64_t groups, heads, key_channels, value_channels;
  const float *decay, *step;  // (T, H); or of `decay` one for each channel of a key, (T, H, C)
  bool delta_rule;
  float eps;      // of the lengths of queries and keys, which the delta rule makes one
  float* states;  // (N, H, C, V)
  const StateRuns* runs;
  float* out;     // (T, H, V)
  bool by_channel = false;  // of `decay`
};
void recurrence(const Context& context, const RecurrenceCall& call);

// The recurrence of a state space, whose channels share queries and keys.
struct ScanCall {
  Rows queries, keys, values, steps;  // (T, C), (T, C), (T, X) and (T, X), fp32
  int64_t key_channels, channels;
  const float* rates;  // (C, X)
  float* states;       // (N, C, X)
  const StateRuns* runs;
  float* out;          // (T, X)
};
void selective_scan(const Context& context, const ScanCall& call);

}  // namespace dynamoe_cpu
