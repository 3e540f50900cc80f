// Layers whose memory is a state of fixed size for each sequence: a short convolution, and linear attention. Shapes as in
// kernels/reference/states.py. A sequence's rows run one after the other, so that their results do not depend on how the
// sequence was cut into steps.
#include <cstring>
#include <vector>

#include "ops/parallel.h"
#include "ops/tensors.h"

namespace dynamoe_cpu {
namespace {

constexpr int64_t kMostTaps = 64;
constexpr int64_t kChannelsPerTask = 1024;
constexpr int64_t kColumns = 64;      // of a state that rows go through together, so that these stay in the nearest cache
constexpr int64_t kRowsTogether = 16;

// Where the sequences of a step are. Runs of rows that follow each other and have one slot are one sequence.
struct Runs {
  const int64_t *slots, *kept;
  const int32_t *starts, *lengths;
  std::vector<int64_t> firsts;  // runs of each sequence, and their number
  int64_t sequences() const { return static_cast<int64_t>(firsts.size()) - 1; }
  int64_t first(int64_t run) const { return starts[run]; }
  int64_t end(int64_t run) const { return starts[run + 1]; }
  bool begins(int64_t run) const { return lengths[run] == end(run) - first(run); }
};

Runs runs_of(int64_t rows, int64_t num_slots, const Tensor& slots, const OptionalTensor& kept, const Tensor& query_start,
             const Tensor& context_len) {
  const int64_t count = slots.numel();
  Runs runs{contiguous_data<int64_t>(slots, at::kLong, "slots"),
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

Tensor short_convolution_op(int64_t isa, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            Tensor& tails, const Tensor& slots, const OptionalTensor& kept,
                            const Tensor& query_start, const Tensor& context_len, bool silu) {
  const Context context = context_of(isa);
  const Rows source = rows_of(x, "x");
  TORCH_CHECK_VALUE(source.dtype == Dtype::fp32, "x must be float32");
  const int64_t channels = size_of(x.size(1), "columns of x");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == channels && 2 <= weight.size(0) &&
                        weight.size(0) <= kMostTaps,
                    "weight must have 2 … ", kMostTaps, " taps of ", channels, " channels, not shape ", weight.sizes());
  const int taps = static_cast<int>(weight.size(0)), before = taps - 1;
  const float* weights = contiguous_data<float>(weight, at::kFloat, "weight");
  const float* added = floats(bias, channels, "bias");
  TORCH_CHECK_VALUE(tails.dim() == 3 && tails.size(1) == before && tails.size(2) == channels, "tails of shape ",
                    tails.sizes(), " do not fit ", taps, " taps of ", channels, " channels");
  float* memory = data_of<float>(tails, at::kFloat, tails.numel(), "tails");
  const Runs runs = runs_of(x.size(0), tails.size(0), slots, kept, query_start, context_len);
  Tensor out = at::empty({x.size(0), channels}, x.options());
  float* results = static_cast<float*>(out.data_ptr());
  const int64_t blocks = ceil_div(channels, kChannelsPerTask);
  for_each_task(context.threads, runs.sequences() * blocks, [&](int64_t task) {
    const int64_t sequence = task / blocks, from = task % blocks * kChannelsPerTask;
    const int width = static_cast<int>(channels - from < kChannelsPerTask ? channels - from : kChannelsPerTask);
    const auto tail_of = [&](int64_t slot) { return memory + slot * before * channels + from; };
    for (int64_t run = runs.firsts[sequence]; run < runs.firsts[sequence + 1]; ++run) {
      float* tail = tail_of(runs.slots[run]);
      if (runs.begins(run))
        for (int i = 0; i < before; ++i) std::memset(tail + i * channels, 0, sizeof(float) * width);
      const int64_t first = runs.first(run), count = runs.end(run) - first;
      // Row i of what was before this run and its rows together.
      const auto row = [&](int64_t i) {
        return i < before ? tail + i * channels : static_cast<const float*>(source.at(first + i - before)) + from;
      };
      for (int64_t r = 0; r < count; ++r) {
        const float* rows[kMostTaps];
        for (int tap = 0; tap < taps; ++tap) rows[tap] = row(r + tap);
        context.kernels->convolve(rows, weights + from, channels, taps, added ? added + from : nullptr, silu, width,
                                  results + (first + r) * channels + from);
      }
      for (int i = 0; count && i < before; ++i) std::memcpy(tail + i * channels, row(count + i), sizeof(float) * width);
      if (runs.kept && runs.kept[run] != -1)
        for (int i = 0; i < before; ++i)
          std::memcpy(tail_of(runs.kept[run]) + i * channels, tail + i * channels, sizeof(float) * width);
    }
  });
  return out;
}

Tensor recurrence_op(int64_t isa, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay,
                     const Tensor& step, Tensor& states, const Tensor& slots, const OptionalTensor& kept,
                     const Tensor& query_start, const Tensor& context_len, bool delta_rule, double eps) {
  const Context context = context_of(isa);
  const Rows queries = head_rows_of(q, "q"), keys = head_rows_of(k, "k"), values = head_rows_of(v, "v");
  TORCH_CHECK_VALUE(queries.dtype == Dtype::fp32 && keys.dtype == Dtype::fp32 && values.dtype == Dtype::fp32,
                    "q, k and v must be float32");
  const int64_t rows = q.size(0), groups = size_of(q.size(1), "groups"), heads = size_of(v.size(1), "heads");
  const int64_t key_channels = size_of(q.size(2), "channels of q"), value_channels = size_of(v.size(2), "channels of v");
  TORCH_CHECK_VALUE(k.sizes() == q.sizes() && v.size(0) == rows && heads % groups == 0, "k of shape ", k.sizes(),
                    " and v of shape ", v.sizes(), " do not fit q of shape ", q.sizes());
  const float* decays = data_of<float>(decay, at::kFloat, rows * heads, "decay");
  const float* steps = data_of<float>(step, at::kFloat, rows * heads, "step");
  TORCH_CHECK_VALUE(states.dim() == 4 && states.size(1) == heads && states.size(2) == key_channels &&
                        states.size(3) == value_channels,
                    "states of shape ", states.sizes(), " do not fit ", heads, " heads of ", key_channels, " and ",
                    value_channels, " channels");
  float* memory = data_of<float>(states, at::kFloat, states.numel(), "states");
  const Runs runs = runs_of(rows, states.size(0), slots, kept, query_start, context_len);
  Tensor out = at::empty({rows, heads, value_channels}, v.options());
  float* results = static_cast<float*>(out.data_ptr());
  const int channels = static_cast<int>(key_channels);
  const float scale = 1.0f / std::sqrt(static_cast<float>(key_channels));
  const int64_t size = key_channels * value_channels;
  for_each_task(context.threads, runs.sequences() * heads, [&](int64_t task) {
    const int64_t sequence = task / heads, head = task % heads, group = head / (heads / groups);
    const auto state_of = [&](int64_t slot) { return memory + (slot * heads + head) * size; };
    float* unit = scratch(Buffer::rows).get<float>(2 * kRowsTogether * key_channels);
    // Of rows first … end: what row r multiplies with. Keys and queries of length one are made once for all columns.
    const auto run_rows = [&](float* state, int64_t first, int64_t end) {
      const float *query[kRowsTogether], *key[kRowsTogether];
      for (int64_t r = 0; r < end - first; ++r) {
        query[r] = static_cast<const float*>(queries.at(first + r)) + group * key_channels;
        key[r] = static_cast<const float*>(keys.at(first + r)) + group * key_channels;
        if (!delta_rule) continue;
        float* made = unit + 2 * r * key_channels;
        context.kernels->unit_length(query[r], channels, static_cast<float>(eps), scale, made);
        context.kernels->unit_length(key[r], channels, static_cast<float>(eps), 1.0f, made + key_channels);
        query[r] = made, key[r] = made + key_channels;
      }
      for (int64_t column = 0; column < value_channels; column += kColumns) {
        const int columns = static_cast<int>(value_channels - column < kColumns ? value_channels - column : kColumns);
        for (int64_t r = 0; r < end - first; ++r) {
          const int64_t row = first + r, at = row * heads + head;
          const float* value = static_cast<const float*>(values.at(row)) + head * value_channels + column;
          context.kernels->recur(state + column, value_channels, channels, columns, query[r], key[r], value, decays[at],
                                 steps[at], delta_rule, results + at * value_channels + column);
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
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def(
      "short_convolution(int isa, Tensor x, Tensor weight, Tensor? bias, Tensor(a!) tails, Tensor slots, "
      "Tensor? kept, Tensor query_start, Tensor context_len, bool silu) -> Tensor",
      &short_convolution_op);
  m.def(
      "recurrence(int isa, Tensor q, Tensor k, Tensor v, Tensor decay, Tensor step, Tensor(a!) states, Tensor slots, "
      "Tensor? kept, Tensor query_start, Tensor context_len, bool delta_rule, float eps) -> Tensor",
      &recurrence_op);
}

}  // namespace dynamoe_cpu
