// Layers whose memory is a state of fixed size for each sequence. A sequence's rows run one after the other, so that their
// results do not depend on how the sequence was cut into steps.
#include "ops/states.h"

#include <cstring>

#include "ops/parallel.h"

namespace dynamoe_cpu {
namespace {

constexpr int64_t kChannelsPerTask = 1024;
constexpr int64_t kColumns = 64;  // of a state that rows go through together, so that these stay in the nearest cache
constexpr int64_t kRowsTogether = 16;
constexpr int64_t kScanned = 256;  // channels of a state space per task

}  // namespace

void add_columns(std::vector<Columns>& columns, int64_t from, int64_t to, int64_t width) {
  for (int64_t done = 0; done < width; done += kChannelsPerTask)
    columns.push_back({from + done, to + done, std::min(kChannelsPerTask, width - done)});
}

void short_convolution(const Context& context, const ConvolutionCall& call) {
  const Kernels& kernels = *context.kernels;
  const StateRuns& runs = *call.runs;
  const int64_t channels = call.channels, pieces = static_cast<int64_t>(call.columns->size());
  const int taps = call.taps, before = taps - 1;
  const auto at = [](const Rows& rows, int64_t row, int64_t column) {
    return static_cast<const char*>(rows.at(row)) + column * element_bytes(rows.dtype);
  };
  for_each_task(context.threads, runs.sequences() * pieces, [&](int64_t task) {
    const int64_t sequence = task / pieces;
    const auto [from, to, wide] = (*call.columns)[task % pieces];
    const int width = static_cast<int>(wide);
    // The rows that a run goes on from, and some of its own.
    float* window = scratch(Buffer::rows).get<float>((before + kRowsTogether + 1) * wide);
    float* sum = window + (before + kRowsTogether) * wide;
    const auto tail_of = [&](int64_t slot) { return call.tails + slot * before * channels + to; };
    const auto load = [&](int64_t row, float* in) {
      const char* x = at(call.x, row, from);
      if (call.times.data)
        kernels.multiply(x, call.x.dtype, at(call.times, row, from), call.times.dtype, false, width, in, Dtype::fp32);
      else if (call.x.dtype == Dtype::bf16)
        kernels.widen(reinterpret_cast<const uint16_t*>(x), in, width);
      else
        std::memcpy(in, x, sizeof(float) * width);
    };
    const auto run_rows = [&](int64_t first, int64_t count) {
      for (int64_t r = 0; r < count; ++r) load(first + r, window + (before + r) * wide);
      for (int64_t r = 0; r < count; ++r) {
        const float* rows[kMostTaps];
        for (int tap = 0; tap < taps; ++tap) rows[tap] = window + (r + tap) * wide;
        char* out = static_cast<char*>(call.out) + ((first + r) * channels + to) * element_bytes(call.out_dtype);
        const bool direct = !call.gate.data && call.out_dtype == Dtype::fp32;
        float* made = direct ? reinterpret_cast<float*>(out) : sum;
        kernels.convolve(rows, call.weights + to, channels, taps, call.bias ? call.bias + to : nullptr, call.silu, width,
                         made);
        if (call.gate.data)
          kernels.multiply(at(call.gate, first + r, to), call.gate.dtype, made, Dtype::fp32, false, width, out,
                           call.out_dtype);
        else if (!direct)
          kernels.convert(made, out, width, call.out_dtype);
      }
      std::memmove(window, window + count * wide, sizeof(float) * before * wide);
    };
    for (int64_t run = runs.firsts[sequence]; run < runs.firsts[sequence + 1]; ++run) {
      float* tail = tail_of(runs.slots[run]);
      for (int i = 0; i < before; ++i) {
        if (runs.begins(run)) std::fill_n(window + i * wide, wide, 0.0f);
        else std::copy_n(tail + i * channels, wide, window + i * wide);
      }
      const int64_t end = runs.end(run);
      for (int64_t row = runs.first(run); row < end; row += kRowsTogether)
        run_rows(row, std::min(kRowsTogether, end - row));
      for (int i = 0; i < before; ++i) {
        std::copy_n(window + i * wide, wide, tail + i * channels);
        if (runs.kept && runs.kept[run] != -1)
          std::copy_n(window + i * wide, wide, tail_of(runs.kept[run]) + i * channels);
      }
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
        const int columns = static_cast<int>(std::min(kColumns, values - column));
        for (int64_t r = 0; r < end - first; ++r) {
          const int64_t row = first + r, at = row * heads + head;
          const float* value = static_cast<const float*>(call.values.at(row)) + head * values + column;
          const float* decay = call.decay + (call.by_channel ? at * channels : at);
          context.kernels->recur(state + column, values, channels, columns, query[r], key[r], value, decay,
                                 call.by_channel, call.step[at], call.delta_rule, call.out + at * values + column);
        }
      }
    };
    for (int64_t run = runs.firsts[sequence]; run < runs.firsts[sequence + 1]; ++run) {
      float* state = state_of(runs.slots[run]);
      if (runs.begins(run)) std::memset(state, 0, sizeof(float) * size);
      const int64_t end = runs.end(run);
      for (int64_t row = runs.first(run); row < end; row += kRowsTogether)
        run_rows(state, row, std::min(row + kRowsTogether, end));
      if (runs.kept && runs.kept[run] != -1) std::memcpy(state_of(runs.kept[run]), state, sizeof(float) * size);
    }
  });
}

void selective_scan(const Context& context, const ScanCall& call) {
  const StateRuns& runs = *call.runs;
  const int64_t channels = call.channels, blocks = ceil_div(channels, kScanned);
  const int keys = static_cast<int>(call.key_channels);
  const auto row_of = [](const Rows& rows, int64_t row) { return static_cast<const float*>(rows.at(row)); };
  for_each_task(context.threads, runs.sequences() * blocks, [&](int64_t task) {
    const int64_t sequence = task / blocks, from = task % blocks * kScanned;
    const int width = static_cast<int>(channels - from < kScanned ? channels - from : kScanned);
    const auto state_of = [&](int64_t slot) { return call.states + slot * keys * channels + from; };
    for (int64_t run = runs.firsts[sequence]; run < runs.firsts[sequence + 1]; ++run) {
      float* state = state_of(runs.slots[run]);
      if (runs.begins(run))
        for (int c = 0; c < keys; ++c) std::memset(state + c * channels, 0, sizeof(float) * width);
      for (int64_t row = runs.first(run); row < runs.end(run); ++row)
        context.kernels->scan(state, call.rates + from, channels, keys, width, row_of(call.queries, row),
                              row_of(call.keys, row), row_of(call.values, row) + from, row_of(call.steps, row) + from,
                              call.out + row * channels + from);
      if (runs.kept && runs.kept[run] != -1)
        for (int c = 0; c < keys; ++c)
          std::memcpy(state_of(runs.kept[run]) + c * channels, state + c * channels, sizeof(float) * width);
    }
  });
}

}  // namespace dynamoe_cpu
