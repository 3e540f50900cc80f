// Mixtures in the stack: routers, budgets, the experts in use and the shared one.
#include <algorithm>
#include <cmath>

#include "ops/stack_run.h"

namespace dynamoe_cpu {

namespace {

// Takes experts from rows that are on a budget.
void limit(const Run& run, const ExpertsBlock& block, int64_t layer) {
  const Work& work = run.work;
  const Budget& budget = run.places.budget;
  const int64_t top_k = block.rule.top_k;
  std::fill_n(work.counts, run.rows(), static_cast<int32_t>(top_k));
  LimitCall call{run.rows(), top_k, work.chosen_ids, work.chosen_weights, work.counts, block.scale};
  call.keep = budget.keep + layer;
  call.cap = budget.cap + layer;
  call.stride = budget.layers;
  call.numbers = budget.numbers;
  limit_experts(run.context, call);
  for (int64_t row = 0; row < run.rows(); ++row)
    budget.skipped[budget.numbers ? budget.numbers[row] : row] += top_k - work.counts[row];
}

// Puts the experts that every row uses in front of those that it chose.
void put_in_front(const Run& run, const ExpertsBlock& block) {
  const Work& work = run.work;
  const int64_t chosen = block.rule.top_k, slots = block.slots();
  for (int64_t row = 0; row < run.rows(); ++row) {
    for (int64_t k = 0; k < slots; ++k) {
      const int64_t from = row * chosen + k - block.always_on, to = row * slots + k;
      const bool always = k < block.always_on;
      work.ids[to] = static_cast<int32_t>(always ? k : work.chosen_ids[from] + block.always_on);
      work.weights[to] = always ? 1.0f : work.chosen_weights[from];
    }
    if (run.places.budget.keep) work.counts[row] += static_cast<int32_t>(block.always_on);
  }
}

void run_experts(const Context& context, const ExpertsCall& call, const std::optional<QuantExperts>& quant) {
  if (quant)
    quant_experts(context, call, *quant);
  else if (call.ids)
    experts(context, call);
  else
    all_experts(context, call);
}

// What the shared expert makes of the rows that are read.
void run_shared(const Run& run, const ExpertsBlock& block) {
  const Work& work = run.work;
  const Dtype dtype = run.shape.dtype;
  const int64_t hidden = run.shape.hidden;
  ExpertsCall call = block.shared->call;
  call.x = run.rows_of(work.read, hidden);
  call.rows = run.rows();
  call.out = work.shared;
  run_experts(run.context, call, block.shared->quant);
  const bool gated = block.shared_gate.exists();
  if (gated) project(run.context, run.shape, block.shared_gate, call.x, hidden, run.rows(), work.shared_gates);
  if (!gated && block.shared_scale == 1.0f) return;
  for_each_light_row(run.context.threads, run.rows(), hidden, [&](int64_t row) {
    char* shared = work.shared + row * hidden * run.bytes();
    const auto multiply = [&](float factor) {  // rounded where the single operators round
      for (int64_t i = 0; i < hidden; ++i) write_number(shared, dtype, i, factor * read_number(shared, dtype, i));
    };
    if (block.shared_scale != 1.0f) multiply(block.shared_scale);
    if (!gated) return;
    write_number(work.shared_gates, dtype, row, sigmoid(read_number(work.shared_gates, dtype, row)));
    multiply(read_number(work.shared_gates, dtype, row));
  });
}

void add_shared(const Run& run) {
  const Dtype dtype = run.shape.dtype;
  const int64_t hidden = run.shape.hidden;
  for_each_light_row(run.context.threads, run.rows(), hidden, [&](int64_t row) {
    const int64_t first = row * hidden * run.bytes();
    char *out = run.work.pending + first, *shared = run.work.shared + first;
    for (int64_t i = 0; i < hidden; ++i)
      write_number(out, dtype, i, read_number(out, dtype, i) + read_number(shared, dtype, i));
  });
}

// The residual stream, normed for a router or a mixture that reads it.
void norm_stream(const Run& run, const void* weight, Dtype dtype, float eps, char* out) {
  for_each_row(run.context.threads, run.rows(), [&](int64_t row) {
    const int64_t hidden = run.shape.hidden;
    char* normed = out + row * hidden * run.bytes();
    float* wide = dtype == run.shape.dtype ? nullptr : scratch(Buffer::rows).get<float>(hidden);
    run.context.kernels->rms_norm(run.x + row * hidden, Dtype::fp32, nullptr, 1.0f, weight, dtype, eps,
                                  static_cast<int>(hidden), nullptr, Dtype::fp32, wide ? static_cast<void*>(wide) : normed);
    if (wide) run.context.kernels->convert(wide, normed, static_cast<int>(hidden), run.shape.dtype);
  });
}

// The router's logits of rows.
Rows router_logits(const Run& run, const ExpertsBlock& block, const char* read) {
  const Projection& router = block.router;
  const Work& work = run.work;
  const Dtype dtype = run.shape.dtype;
  const int64_t hidden = run.shape.hidden;
  if (!block.float32_logits || dtype == Dtype::fp32) {
    project(run.context, run.shape, router, run.rows_of(read, hidden), hidden, run.rows(), work.logits);
    return {work.logits, router.outputs, dtype};
  }
  for_each_light_row(run.context.threads, run.rows(), hidden, [&](int64_t row) {
    run.context.kernels->widen(reinterpret_cast<const uint16_t*>(read) + row * hidden, work.wide + row * hidden,
                               static_cast<int>(hidden));
  });
  linear(run.context, {{work.wide, hidden, Dtype::fp32}, run.rows(), hidden, router.outputs, router.weights,
                       router.bias, work.logits, router.outputs, Dtype::fp32});
  return {work.logits, router.outputs, Dtype::fp32};
}

// Chooses experts of the rows.
void choose(const Run& run, const ExpertsBlock& block, int64_t layer, float* entropy, float share) {
  const Work& work = run.work;
  RouteCall rule = block.rule;
  const char* read = work.read;
  if (block.apart) {
    norm_stream(run, block.apart->router, run.shape.dtype, block.apart->router_eps, work.other);
    read = work.other;
  }
  rule.logits = router_logits(run, block, read);
  rule.rows = run.rows();
  rule.ids = work.chosen_ids;
  rule.weights = work.chosen_weights;
  if (entropy) router_entropy(run.context, rule.logits, run.rows(), rule.experts, share, entropy);
  if (block.jitter)
    run.stack.sparsemixer(rule, *block.jitter);
  else
    route(run.context, rule);
  if (run.places.budget.keep) limit(run, block, layer);
  if (block.always_on) put_in_front(run, block);
}

// The rows times the weight of the one expert that each chose, which is used with weight 1 then.
void weigh_input(const Run& run) {
  const Work& work = run.work;
  const Dtype dtype = run.shape.dtype;
  const int64_t hidden = run.shape.hidden;
  for_each_light_row(run.context.threads, run.rows(), hidden, [&](int64_t row) {
    const char* read = work.read + row * hidden * run.bytes();
    char* scaled = work.other + row * hidden * run.bytes();
    for (int64_t i = 0; i < hidden; ++i)
      write_number(scaled, dtype, i, read_number(read, dtype, i) * work.chosen_weights[row]);
    work.chosen_weights[row] = 1.0f;
  });
}

}  // namespace

void feed_forward(Run& run, const ExpertsBlock& block, int64_t layer, float* entropy, float share) {
  const Work& work = run.work;
  const int64_t hidden = run.shape.hidden;
  ExpertsCall call = block.experts.call;
  call.x = run.rows_of(work.read, hidden);
  call.rows = run.rows();
  call.out = work.pending;
  if (block.router.exists()) {
    choose(run, block, layer, entropy, share);
    call.ids = block.always_on ? work.ids : work.chosen_ids;
    call.weights = block.always_on ? work.weights : work.chosen_weights;
    call.top_k = block.slots();
    if (run.places.budget.keep) call.counts = work.counts;
    if (block.apart) norm_stream(run, block.apart->in.weight, block.apart->in.dtype, run.shape.eps, work.other);
    if (block.weight_on_input) weigh_input(run);
    if (block.apart || block.weight_on_input) call.x.data = work.other;
  }
  run_experts(run.context, call, block.experts.quant);
  if (!block.shared) return;
  run_shared(run, block);
  if (block.apart) {
    if (run.stack.add_up)  // what several processes have together is added up before it is normed
      for (char* part : {work.pending, work.shared}) run.stack.add_up(part, run.rows() * hidden);
    norm_rows(run, block.apart->out, work.pending);
    norm_rows(run, block.apart->shared_out, work.shared);
  }
  add_shared(run);
}

}  // namespace dynamoe_cpu
