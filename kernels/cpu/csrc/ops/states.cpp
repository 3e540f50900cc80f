// Layers whose memory is a state of fixed size for each sequence. A sequence's rows run one after the other, so that their
// results do not depend on how the sequence was cut into steps.
#include "ops/states.h"

#include <cmath>
#include <cstring>

#include "ops/parallel.h"

namespace dynamoe_cpu {
namespace {

constexpr int64_t kChannelsPerTask = 1024;
constexpr int64_t kColumns = 64;  // of a state that rows go through together, so that these stay in the nearest cache
constexpr int64_t kRowsTogether = 16;

}  // namespace

void short_convolution(const Context& context, const ConvolutionCall& call) {
  const StateRuns& runs = *call.runs;
  const int64_t channels = call.channels, blocks = ceil_div(channels, kChannelsPerTask);
  const int taps = call.taps, before = taps - 1;
  for_each_task(context.threads, runs.sequences() * blocks, [&](int64_t task) {
    const int64_t sequence = task / blocks, from = task % blocks * kChannelsPerTask;
    const int width = static_cast<int>(channels - from < kChannelsPerTask ? channels - from : kChannelsPerTask);
    const auto tail_of = [&](int64_t slot) { return call.tails + slot * before * channels + from; };
    for (int64_t run = runs.firsts[sequence]; run < runs.firsts[sequence + 1]; ++run) {
      float* tail = tail_of(runs.slots[run]);
      if (runs.begins(run))
        for (int i = 0; i < before; ++i) std::memset(tail + i * channels, 0, sizeof(float) * width);
      const int64_t first = runs.first(run), count = runs.end(run) - first;
      // Row i of what was before this run and its rows together.
      const auto row = [&](int64_t i) {
        return i < before ? tail + i * channels : static_cast<const float*>(call.x.at(first + i - before)) + from;
      };
      for (int64_t r = 0; r < count; ++r) {
        const float* rows[kMostTaps];
        for (int tap = 0; tap < taps; ++tap) rows[tap] = row(r + tap);
        context.kernels->convolve(rows, call.weights + from, channels, taps, call.bias ? call.bias + from : nullptr,
                                  call.silu, width, call.out + (first + r) * channels + from);
      }
      for (int i = 0; count && i < before; ++i) std::memcpy(tail + i * channels, row(count + i), sizeof(float) * width);
      if (runs.kept && runs.kept[run] != -1)
        for (int i = 0; i < before; ++i)
          std::memcpy(tail_of(runs.kept[run]) + i * channels, tail + i * channels, sizeof(float) * width);
    }
  });
}

void recurrence(const Context& context, const RecurrenceCall& call) {
  const StateRuns& runs = *call.runs;
  const int64_t heads = call.heads, values = call.value_channels, size = call.key_channels * values;
  const int channels = static_cast<int>(call.key_channels);
  const float scale = 1.0f / std::sqrt(static_cast<float>(channels));
  for_each_task(context.threads, runs.sequences() * heads, [&](int64_t task) {
    const int64_t sequence = task / heads, head = task % heads, group = head / (heads / call.groups);
    const auto state_of = [&](int64_t slot) { return call.states + (slot * heads + head) * size; };
    float* unit = scratch(Buffer::rows).get<float>(2 * kRowsTogether * channels);
    // Of rows first … end: what row r multiplies with. Keys and queries of length one are made once for all columns.
    const auto run_rows = [&](float* state, int64_t first, int64_t end) {
      const float *query[kRowsTogether], *key[kRowsTogether];
      for (int64_t r = 0; r < end - first; ++r) {
        query[r] = static_cast<const float*>(call.queries.at(first + r)) + group * channels;
        key[r] = static_cast<const float*>(call.keys.at(first + r)) + group * channels;
        if (!call.delta_rule) continue;
        float* made = unit + 2 * r * channels;
        context.kernels->unit_length(query[r], channels, call.eps, scale, made);
        context.kernels->unit_length(key[r], channels, call.eps, 1.0f, made + channels);
        query[r] = made, key[r] = made + channels;
      }
      for (int64_t column = 0; column < values; column += kColumns) {
        const int columns = static_cast<int>(values - column < kColumns ? values - column : kColumns);
        for (int64_t r = 0; r < end - first; ++r) {
          const int64_t row = first + r, at = row * heads + head;
          const float* value = static_cast<const float*>(call.values.at(row)) + head * values + column;
          context.kernels->recur(state + column, values, channels, columns, query[r], key[r], value, call.decay[at],
                                 call.step[at], call.delta_rule, call.out + at * values + column);
        }
      }
    };
    for (int64_t run = runs.firsts[sequence]; run < runs.firsts[sequence + 1]; ++run) {
      float* state = state_of(runs.slots[run]);
      if (runs.begins(run)) std::memset(state, 0, sizeof(float) * size);
      const int64_t end = runs.end(run);
      for (int64_t row = runs.first(run); row < end; row += kRowsTogether)
        run_rows(state, row, row + kRowsTogether < end ? row + kRowsTogether : end);
      if (runs.kept && runs.kept[run] != -1) std::memcpy(state_of(runs.kept[run]), state, sizeof(float) * size);
    }
  });
}

}  // namespace dynamoe_cpu
