// Layers that keep recurrent states as blocks of a layer.
#include "ops/stack_run.h"

namespace dynamoe_cpu {

namespace {

// What a projection's outputs are mixed to, channel by channel.
ConvolutionCall convolution(const Run& run, const Convolution& convolution, const Rows& x, int64_t layer) {
  ConvolutionCall call{x, &convolution.columns, convolution.channels, convolution.taps, convolution.weights,
                       convolution.bias};
  call.tails = run.caches.states[layer].tails;
  call.runs = run.places.runs;
  return call;
}

// In float32, behind a SiLU.
void mix(const Run& run, const Convolution& part, const Rows& x, int64_t layer) {
  ConvolutionCall call = convolution(run, part, x, layer);
  call.silu = true;
  call.out = run.work.mixed;
  call.out_dtype = Dtype::fp32;
  short_convolution(run.context, call);
}

// What every head reads in its state; `call` says where it finds queries, keys and values.
void remember(const Run& run, RecurrenceCall call, int64_t layer) {
  call.decay = run.work.decays;
  call.step = run.work.steps;
  call.states = run.caches.states[layer].memory;
  call.runs = run.places.runs;
  call.out = run.work.remembered;
  recurrence(run.context, call);
}

// body(row, head), where a head takes so many passes over its `channels` or as much as that.
template <class Body>
void for_heads(const Run& run, int64_t heads, int64_t channels, const Body& body) {
  for_each_light_row(run.context.threads, run.rows() * heads, channels,
                     [&](int64_t place) { body(place / heads, place % heads); });
}

}  // namespace

void attend(Run& run, const DeltaBlock& block, int64_t layer) {
  const Shape& shape = run.shape;
  const Work& work = run.work;
  const Kernels& kernels = *run.context.kernels;
  const Dtype dtype = shape.dtype;
  const int64_t bytes = run.bytes(), heads = block.heads, values = block.values, mixed = block.convolution.channels;
  const Rows x = run.rows_of(work.read, shape.hidden), qkvz = run.rows_of(work.qkv, block.qkvz.outputs),
             ba = run.rows_of(work.gates, block.ba.outputs);
  project(run.context, shape, block.qkvz, x, shape.hidden, run.rows(), work.qkv);
  project(run.context, shape, block.ba, x, shape.hidden, run.rows(), work.gates);
  mix(run, block.convolution, qkvz, layer);
  for_heads(run, heads, 64, [&](int64_t row, int64_t head) {
    const float a = read_number(ba.at(row), dtype, block.decay_at(head));
    work.decays[row * heads + head] = time_step(a, block.decay_bias[head], block.decay_rate[head]).decay;
    work.steps[row * heads + head] = sigmoid(read_number(ba.at(row), dtype, block.step_at(head)));
  });
  const auto part = [&](int64_t first) { return Rows{work.mixed + first, mixed, Dtype::fp32}; };
  RecurrenceCall call{part(0), part(block.key_width()), part(2 * block.key_width()), block.groups, heads, block.keys,
                      values};
  call.delta_rule = true;
  call.eps = block.length_eps;
  remember(run, call, layer);
  for_heads(run, heads, 4 * values, [&](int64_t row, int64_t head) {
    char* out = work.attended + (row * heads + head) * values * bytes;
    const char* gate = static_cast<const char*>(qkvz.at(row)) + block.gate_at(head) * bytes;
    const int n = static_cast<int>(values);
    kernels.rms_norm(work.remembered + (row * heads + head) * values, Dtype::fp32, nullptr, 1.0f, block.norm, dtype,
                     shape.eps, n, nullptr, Dtype::fp32, out);
    kernels.multiply(out, dtype, gate, dtype, true, n, out, dtype);
  });
  project(run.context, shape, block.out, run.rows_of(work.attended, block.value_width()), block.value_width(),
          run.rows(), work.pending);
}

void attend(Run& run, const SpaceBlock& block, int64_t layer) {
  const Shape& shape = run.shape;
  const Work& work = run.work;
  const Kernels& kernels = *run.context.kernels;
  const Dtype dtype = shape.dtype;
  const int64_t bytes = run.bytes(), heads = block.heads, width = block.width(), mixed = block.convolution.channels;
  const Rows into = run.rows_of(work.qkv, block.into.outputs);
  project(run.context, shape, block.into, run.rows_of(work.read, shape.hidden), shape.hidden, run.rows(), work.qkv);
  mix(run, block.convolution, into, layer);
  for_heads(run, heads, 64, [&](int64_t row, int64_t head) {
    const float x = read_number(into.at(row), dtype, width + mixed + head);
    const TimeStep made = time_step(x, block.step_bias[head], block.decay_rate[head]);
    work.decays[row * heads + head] = made.decay;
    work.steps[row * heads + head] = made.step;
  });
  const auto part = [&](int64_t first) { return Rows{work.mixed + first, mixed, Dtype::fp32}; };
  remember(run, {part(width + block.matrices()), part(width), part(0), block.groups, heads, block.state, block.channels},
           layer);
  // A group's heads are normed together.
  const int64_t per_group = heads / block.groups, group_width = width / block.groups;
  for_heads(run, block.groups, 6 * group_width, [&](int64_t row, int64_t group) {
    const int64_t first = group * group_width;
    float* x = work.remembered + row * width + first;
    const float* past = work.mixed + row * mixed + first;
    const int n = static_cast<int>(group_width), channels = static_cast<int>(block.channels);
    for (int64_t head = 0; head < per_group; ++head)
      kernels.add(past + head * channels, Dtype::fp32, block.skip[group * per_group + head], x + head * channels, channels);
    kernels.multiply(x, Dtype::fp32, static_cast<const char*>(into.at(row)) + first * bytes, dtype, true, n, x,
                     Dtype::fp32);
    kernels.rms_norm(x, Dtype::fp32, nullptr, 1.0f, block.norm + first, Dtype::fp32, shape.eps, n, nullptr, Dtype::fp32,
                     x);
    kernels.convert(x, work.attended + (row * width + first) * bytes, n, dtype);
  });
  project(run.context, shape, block.out, run.rows_of(work.attended, width), width, run.rows(), work.pending);
}

void attend(Run& run, const ConvolutionBlock& block, int64_t layer) {
  const Shape& shape = run.shape;
  const Work& work = run.work;
  const int64_t channels = block.convolution.channels;
  project(run.context, shape, block.gates, run.rows_of(work.read, shape.hidden), shape.hidden, run.rows(), work.qkv);
  const auto part = [&](int64_t number) {
    return Rows{work.qkv + number * channels * run.bytes(), 3 * channels, shape.dtype};
  };
  ConvolutionCall call = convolution(run, block.convolution, part(2), layer);
  call.times = part(0);
  call.gate = part(1);
  call.out = work.attended;
  call.out_dtype = shape.dtype;
  short_convolution(run.context, call);
  project(run.context, shape, block.out, run.rows_of(work.attended, channels), channels, run.rows(), work.pending);
}

}  // namespace dynamoe_cpu
