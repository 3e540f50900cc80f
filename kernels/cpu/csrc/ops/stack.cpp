// A run of layers, block by block.
#include "ops/stack.h"

#include <algorithm>

#include "ops/stack_run.h"

namespace dynamoe_cpu {

void project(const Context& context, const Shape& shape, const Projection& projection, const Rows& x, int64_t inputs,
             int64_t rows, void* out) {
  if (!projection.quant.empty()) {
    quant_linear(context, {x, rows, &projection.quant, out, projection.outputs, shape.dtype});
    return;
  }
  linear(context, {x, rows, inputs, projection.outputs, projection.weights, projection.bias, out, projection.outputs,
                   shape.dtype});
}

void add_pending(const Context& context, const Shape& shape, const void* pending, float scale, float* x, int64_t rows) {
  const int64_t hidden = shape.hidden;
  for_each_light_row(context.threads, rows, hidden, [&](int64_t row) {
    context.kernels->add(static_cast<const char*>(pending) + row * hidden * element_bytes(shape.dtype), shape.dtype, scale,
                         x + row * hidden, static_cast<int>(hidden));
  });
}

void Most::count(const Block& block) {
  if (const auto* attention = std::get_if<AttentionBlock>(&block)) {
    qkv = std::max(qkv, attention->qkv.outputs);
    queries = std::max(queries, attention->q_width());
    if (attention->makes_values()) keys = std::max(keys, attention->kv_width());
    if (attention->gate.exists() || attention->gated_queries) gates = std::max(gates, attention->out_width());
    if (attention->norm_after_rotation) channels = std::max(channels, attention->channels);
  } else if (const auto* latents = std::get_if<LatentBlock>(&block)) {
    const int64_t entry = latents->entry_channels();
    qkv = std::max({qkv, latents->query_width(), latents->heads * latents->values});
    queries = std::max({queries, latents->heads * entry, latents->q_a.outputs + entry});  // also what q_a and kv_a make
  } else if (const auto* delta = std::get_if<DeltaBlock>(&block)) {
    qkv = std::max(qkv, delta->qkvz.outputs);
    gates = std::max(gates, delta->ba.outputs);
    queries = std::max(queries, delta->value_width());
    mixed = std::max(mixed, delta->convolution.channels);
    state_heads = std::max(state_heads, delta->heads);
    remembered = std::max(remembered, delta->value_width());
  } else if (const auto* space = std::get_if<SpaceBlock>(&block)) {
    qkv = std::max(qkv, space->into.outputs);
    queries = std::max(queries, space->width());
    mixed = std::max(mixed, space->convolution.channels);
    state_heads = std::max(state_heads, space->heads);
    remembered = std::max(remembered, space->width());
  } else if (const auto* convolution = std::get_if<ConvolutionBlock>(&block)) {
    qkv = std::max(qkv, convolution->gates.outputs);
    queries = std::max(queries, convolution->convolution.channels);
  } else if (const auto* mixture = std::get_if<ExpertsBlock>(&block)) {
    experts = std::max(experts, mixture->router.outputs);
    slots = std::max(slots, mixture->slots());
    float32_logits |= mixture->float32_logits;
    shared |= mixture->shared.has_value();
    always_on |= mixture->always_on > 0;
    other_input |= mixture->apart.has_value() || mixture->weight_on_input;
  } else if (const auto* norm = std::get_if<NormBlock>(&block)) {
    layer_norm |= norm->norm.centred;
  }
  states |= keeps_states(block);
}

Work::Work(Arena& arena, const Stack& stack, int64_t rows) {
  const Shape& shape = stack.shape;
  const Most& most = stack.most;
  const int64_t bytes = rows * element_bytes(shape.dtype);
  read = arena.take(bytes * shape.hidden);
  pending = arena.take(bytes * shape.hidden);
  qkv = arena.take(bytes * most.qkv);
  q = arena.take(bytes * most.queries);
  attended = arena.take(bytes * most.queries);
  values = arena.take(bytes * most.keys);
  gates = arena.take(bytes * most.gates);
  logits = arena.take((most.float32_logits ? rows * 4 : bytes) * most.experts);
  shared = arena.take(most.shared ? bytes * shape.hidden : 0);
  shared_gates = arena.take(most.shared ? bytes : 0);
  other = arena.take(most.other_input ? bytes * shape.hidden : 0);
  mixed = arena.take<float>(rows * most.mixed);
  decays = arena.take<float>(rows * most.state_heads);
  steps = arena.take<float>(rows * most.state_heads);
  remembered = arena.take<float>(rows * most.remembered);
  const bool widened = most.layer_norm || (most.float32_logits && shape.dtype != Dtype::fp32);
  wide = arena.take<float>(widened ? rows * shape.hidden : 0);
  chosen_ids = arena.take<int32_t>(rows * most.slots);
  chosen_weights = arena.take<float>(rows * most.slots);
  ids = arena.take<int32_t>(most.always_on ? rows * most.slots : 0);
  weights = arena.take<float>(most.always_on ? rows * most.slots : 0);
  counts = arena.take<int32_t>(rows);
  origin = arena.take<int64_t>(most.channels ? rows : 0);
  upright = arena.take<float>(most.channels);
}

void norm_row(const Run& run, const void* weight, Dtype weight_dtype, const void* row, int64_t width, void* out) {
  const Kernels& kernels = *run.context.kernels;
  const int n = static_cast<int>(width);
  const Dtype dtype = run.shape.dtype;
  if (weight_dtype == dtype) {
    kernels.rms_norm(row, dtype, nullptr, 1.0f, weight, dtype, run.shape.eps, n, nullptr, dtype, out);
    return;
  }
  float* wide = scratch(Buffer::rows).get<float>(width);
  kernels.widen(static_cast<const uint16_t*>(row), wide, n);
  kernels.rms_norm(wide, Dtype::fp32, nullptr, 1.0f, weight, Dtype::fp32, run.shape.eps, n, nullptr, Dtype::fp32, wide);
  kernels.convert(wide, out, n, dtype);
}

void norm_rows(const Run& run, const Norm& norm, char* rows) {
  for_each_row(run.context.threads, run.rows(), [&](int64_t row) {
    char* data = rows + row * run.shape.hidden * run.bytes();
    norm_row(run, norm.weight, norm.dtype, data, run.shape.hidden, data);
  });
}

namespace {

// What is read, from rows of float32.
void round_rows(const Run& run, const float* rows) {
  const int64_t hidden = run.shape.hidden;
  for_each_light_row(run.context.threads, run.rows(), hidden, [&](int64_t row) {
    run.context.kernels->convert(rows + row * hidden, run.work.read + row * hidden * run.bytes(),
                                 static_cast<int>(hidden), run.shape.dtype);
  });
}

void add(const Run& run, const void* pending) {
  if (pending) add_pending(run.context, run.shape, pending, run.shape.residual_scale, run.x, run.rows());
}

// The norm of the residual stream after `pending`, if given, has been added to it.
void norm(const Run& run, const void* pending, const Norm& norm) {
  const Shape& shape = run.shape;
  if (norm.centred) {
    add(run, pending);
    run.stack.layer_norm(norm, run.x, run.rows(), run.work.wide);
    round_rows(run, run.work.wide);
    return;
  }
  const Rows stream{run.x, shape.hidden, Dtype::fp32};
  const float scale = pending ? shape.residual_scale : 1.0f;
  if (norm.dtype == shape.dtype) {
    NormCall call{};
    call.x = pending ? run.rows_of(pending, shape.hidden) : stream;
    if (pending) call.residual = stream;
    call.scale = scale;
    call.weight = norm.weight;
    call.weight_dtype = shape.dtype;
    call.eps = shape.eps;
    call.rows = run.rows();
    call.hidden = shape.hidden;
    call.sum = run.x;
    call.sum_stride = shape.hidden;
    call.out = run.work.read;
    rms_norm(run.context, call);
    return;
  }
  const Rows added = run.rows_of(pending, shape.hidden);
  for_each_row(run.context.threads, run.rows(), [&](int64_t row) {
    float *own = run.x + row * shape.hidden, *wide = scratch(Buffer::rows).get<float>(shape.hidden);
    run.context.kernels->rms_norm(pending ? added.at(row) : own, pending ? shape.dtype : Dtype::fp32,
                                  pending ? own : nullptr, scale, norm.weight, norm.dtype, shape.eps,
                                  static_cast<int>(shape.hidden), own, Dtype::fp32, wide);
    run.context.kernels->convert(wide, run.work.read + row * shape.hidden * run.bytes(),
                                 static_cast<int>(shape.hidden), shape.dtype);
  });
}

void multiply(const Run& run, float factor) {
  const int64_t hidden = run.shape.hidden;
  for_each_light_row(run.context.threads, run.rows(), hidden, [&](int64_t row) {
    for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) run.x[i] *= factor;
  });
}

// What each routed block contributes to the mean entropy of the routers in layers [first, last).
float entropy_share(const Stack& stack, int64_t first, int64_t last) {
  int64_t routed = 0;
  for (int64_t layer = first; layer < last; ++layer)
    for (const Block& block : stack.layers[layer].blocks) {
      const auto* experts = std::get_if<ExpertsBlock>(&block);
      routed += experts && experts->router.exists();
    }
  return routed ? 1.0f / static_cast<float>(routed) : 0.0f;
}

}  // namespace

bool run_layers(const Context& context, const Stack& stack, int64_t first, int64_t last, float* x, const Places& places,
                const Caches& caches, float* entropy, Boundary boundary) {
  const int64_t rows = places.rows;
  if (entropy) std::fill_n(entropy, rows, 0.0f);
  if (!rows || first == last) return false;
  Arena sizes(nullptr);
  Work(sizes, stack, rows);
  Arena arena(scratch(Buffer::stack).get<char>(sizes.used()));
  const Work work(arena, stack, rows);
  Run run(context, stack, places, caches, work, x);
  const float share = entropy ? entropy_share(stack, first, last) : 0.0f;
  const void* pending = nullptr;  // what the last block adds to the residual stream
  for (int64_t layer = first; layer < last; ++layer) {
    for (const Block& block : stack.layers[layer].blocks) {
      if (const auto* before = std::get_if<NormBlock>(&block)) {
        if (!boundary.normed) norm(run, pending, before->norm);
      } else if (const auto* behind = std::get_if<OutNormBlock>(&block)) {
        norm_rows(run, behind->norm, work.pending);
        continue;
      } else if (attends(block)) {
        std::visit([&](const auto& one) { if constexpr (requires { attend(run, one, layer); }) attend(run, one, layer); },
                   block);
      } else if (const auto* mixture = std::get_if<ExpertsBlock>(&block)) {
        feed_forward(run, *mixture, layer, entropy, share);
      } else {
        add(run, pending);
        if (std::holds_alternative<ReadBlock>(block)) round_rows(run, x);
        if (const auto* scale = std::get_if<ScaleBlock>(&block)) multiply(run, *scale->factor);
      }
      boundary.normed = false;
      const auto* mixture = std::get_if<ExpertsBlock>(&block);
      const bool added = mixture && mixture->apart;  // by itself
      if (leaves(block) && !added && stack.add_up) stack.add_up(work.pending, rows * stack.shape.hidden);
      pending = leaves(block) ? work.pending : nullptr;
    }
  }
  const Norm* next = boundary.norm_next ? stack.layers[last].first_norm() : nullptr;
  if (next)
    norm(run, pending, *next);
  else
    add(run, pending);
  return next;
}

}  // namespace dynamoe_cpu
