// A run of layers, block by block.
#include "ops/stack.h"

#include <algorithm>
#include <cmath>

#include "ops/parallel.h"

namespace dynamoe_cpu {

void project(const Context& context, const Shape& shape, const Projection& projection, const void* x, int64_t inputs,
             int64_t rows, void* out) {
  if (!projection.quant.empty()) {
    quant_linear(context, {{x, inputs, shape.dtype}, rows, &projection.quant, out, projection.outputs, shape.dtype});
    return;
  }
  linear(context, {{x, inputs, shape.dtype}, rows, inputs, projection.outputs, projection.weights, projection.bias, out,
                   projection.outputs, shape.dtype});
}

void add_pending(const Context& context, const Shape& shape, const void* pending, float scale, float* x, int64_t rows) {
  const int64_t hidden = shape.hidden;
  for_each_light_row(context.threads, rows, hidden, [&](int64_t row) {
    context.kernels->add(static_cast<const char*>(pending) + row * hidden * element_bytes(shape.dtype), shape.dtype, scale,
                         x + row * hidden, static_cast<int>(hidden));
  });
}

namespace {

// What lies between the operators of a layer.
struct Work {
  char *normed, *qkv, *q, *attended, *pending, *logits, *shared, *gates;
  float* wide;  // normed rows in float32
  int32_t *ids, *counts;
  float* weights;

  Work(Arena& arena, const Stack& stack, int64_t rows) {
    const Shape& shape = stack.shape;
    const int64_t bytes = rows * element_bytes(shape.dtype);
    normed = arena.take(bytes * shape.hidden);
    qkv = arena.take(bytes * stack.most_qkv);
    q = arena.take(bytes * stack.most_queries);
    attended = arena.take(bytes * stack.most_queries);
    pending = arena.take(bytes * shape.hidden);
    logits = arena.take((stack.float32_logits ? rows * 4 : bytes) * stack.most_experts);
    shared = arena.take(stack.shared ? bytes * shape.hidden : 0);
    gates = arena.take(stack.shared ? bytes : 0);
    wide = arena.take<float>(stack.float32_logits && shape.dtype != Dtype::fp32 ? rows * shape.hidden : 0);
    ids = arena.take<int32_t>(rows * stack.most_top_k);
    counts = arena.take<int32_t>(rows);
    weights = arena.take<float>(rows * stack.most_top_k);
  }
};

// The norm of the residual stream after `pending`, if given, has been added to it.
void norm(const Context& context, const Shape& shape, const void* pending, float* x, const void* weight, int64_t rows,
          void* out) {
  NormCall call{};
  const Rows stream{x, shape.hidden, Dtype::fp32};
  call.x = pending ? Rows{pending, shape.hidden, shape.dtype} : stream;
  if (pending) call.residual = stream;
  call.scale = pending ? shape.residual_scale : 1.0f;
  call.weight = weight;
  call.weight_dtype = shape.dtype;
  call.eps = shape.eps;
  call.rows = rows;
  call.hidden = shape.hidden;
  call.sum = x;
  call.sum_stride = shape.hidden;
  call.out = out;
  rms_norm(context, call);
}

// Norms of some heads of every row, in place.
void norm_heads(const Context& context, const Shape& shape, const AttentionBlock& block, char* first, int64_t heads,
                const void* weight, int64_t rows) {
  const int64_t pieces = block.norm_per_head ? heads : 1, width = heads * block.channels / pieces;
  const int64_t stride = block.qkv.outputs;
  const int64_t bytes = element_bytes(shape.dtype);
  for_each_row(context.threads, rows, [&](int64_t row) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      char* data = first + (row * stride + piece * width) * bytes;
      context.kernels->rms_norm(data, shape.dtype, nullptr, 1.0f, weight, shape.dtype, shape.eps,
                                static_cast<int>(width), nullptr, shape.dtype, data);
    }
  });
}

// From the normed rows to what attention adds to the residual stream.
void attend(const Context& context, const Shape& shape, const AttentionBlock& block, const Work& work, const Places& places,
            const Caches& caches, int64_t layer) {
  const int64_t rows = places.rows, stride = block.qkv.outputs, bytes = element_bytes(shape.dtype);
  project(context, shape, block.qkv, work.normed, shape.hidden, rows, work.qkv);
  char *keys = work.qkv + block.q_width() * bytes, *values = keys + block.kv_width() * bytes;
  if (block.q_norm) norm_heads(context, shape, block, work.qkv, block.heads, block.q_norm, rows);
  if (block.k_norm) norm_heads(context, shape, block, keys, block.kv_heads, block.k_norm, rows);
  RopeCall rope{{work.qkv, stride, shape.dtype}, {keys, stride, shape.dtype}, {values, stride, shape.dtype}, rows,
                block.heads, block.kv_heads, block.channels};
  rope.cos_sin = caches.cos_sin;
  rope.positions = places.positions;
  rope.slots = places.slots;
  rope.keys = caches.keys[layer];
  rope.values = caches.values[layer];
  rope.page_size = caches.page_size;
  rope.q_out = work.q;
  rope_and_write(context, rope);
  AttentionCall call{{work.q, block.q_width(), shape.dtype}, block.heads, block.kv_heads, block.channels,
                     caches.keys[layer], caches.values[layer], caches.page_size};
  call.query_start = places.query_start;
  call.context_len = places.context_len;
  call.block_table = places.block_table;
  call.block_table_stride = places.block_table_stride;
  call.sequences = places.sequences;
  call.scale = block.scale;
  call.window = block.window;
  call.sinks = block.sinks;
  call.out = work.attended;
  attention(context, call);
  project(context, shape, block.o, work.attended, block.q_width(), rows, work.pending);
}

// Takes experts from rows that are on a budget.
void limit(const Context& context, const ExpertsBlock& block, const Work& work, int64_t rows, const Budget& budget,
           int64_t layer) {
  const int64_t top_k = block.rule.top_k;
  std::fill_n(work.counts, rows, static_cast<int32_t>(top_k));
  LimitCall call{rows, top_k, work.ids, work.weights, work.counts, block.scale};
  call.keep = budget.keep + layer;
  call.cap = budget.cap + layer;
  call.stride = budget.layers;
  call.numbers = budget.numbers;
  limit_experts(context, call);
  for (int64_t row = 0; row < rows; ++row)
    budget.skipped[budget.numbers ? budget.numbers[row] : row] += top_k - work.counts[row];
}

void run_experts(const Context& context, const ExpertsCall& call, const std::optional<QuantExperts>& quant) {
  if (quant)
    quant_experts(context, call, *quant);
  else if (call.ids)
    experts(context, call);
  else
    all_experts(context, call);
}

// Adds what the shared expert makes of the normed rows.
void add_shared(const Context& context, const Shape& shape, const ExpertsBlock& block, const Work& work, int64_t rows) {
  ExpertsCall call = block.shared->call;
  call.x = {work.normed, shape.hidden, shape.dtype};
  call.rows = rows;
  call.out = work.shared;
  run_experts(context, call, block.shared->quant);
  if (block.shared_gate.exists()) project(context, shape, block.shared_gate, work.normed, shape.hidden, rows, work.gates);
  const Dtype dtype = shape.dtype;
  for_each_light_row(context.threads, rows, shape.hidden, [&](int64_t row) {
    const int64_t first = row * shape.hidden * element_bytes(dtype);
    char *out = work.pending + first, *shared = work.shared + first;
    if (block.shared_gate.exists()) {  // rounded where the single operators round
      write_number(work.gates, dtype, row, 1.0f / (1.0f + std::exp(-read_number(work.gates, dtype, row))));
      const float gate = read_number(work.gates, dtype, row);
      for (int64_t i = 0; i < shape.hidden; ++i) write_number(shared, dtype, i, gate * read_number(shared, dtype, i));
    }
    for (int64_t i = 0; i < shape.hidden; ++i)
      write_number(out, dtype, i, read_number(out, dtype, i) + read_number(shared, dtype, i));
  });
}

// The router's logits of the normed rows.
Rows router_logits(const Context& context, const Shape& shape, const ExpertsBlock& block, const Work& work,
                   int64_t rows) {
  const Projection& router = block.router;
  if (!block.float32_logits || shape.dtype == Dtype::fp32) {
    project(context, shape, router, work.normed, shape.hidden, rows, work.logits);
    return {work.logits, router.outputs, shape.dtype};
  }
  for_each_light_row(context.threads, rows, shape.hidden, [&](int64_t row) {
    for (int64_t i = row * shape.hidden; i < (row + 1) * shape.hidden; ++i)
      work.wide[i] = read_number(work.normed, shape.dtype, i);
  });
  linear(context, {{work.wide, shape.hidden, Dtype::fp32}, rows, shape.hidden, router.outputs, router.weights,
                   router.bias, work.logits, router.outputs, Dtype::fp32});
  return {work.logits, router.outputs, Dtype::fp32};
}

// From the normed rows to what the experts add to the residual stream.
void feed_forward(const Context& context, const Shape& shape, const ExpertsBlock& block, const Work& work,
                  int64_t rows, const Budget& budget, int64_t layer, float* entropy, float share) {
  ExpertsCall call = block.experts.call;
  call.x = {work.normed, shape.hidden, shape.dtype};
  call.rows = rows;
  call.out = work.pending;
  if (block.router.exists()) {
    RouteCall rule = block.rule;
    rule.logits = router_logits(context, shape, block, work, rows);
    rule.rows = rows;
    rule.ids = work.ids;
    rule.weights = work.weights;
    if (entropy) router_entropy(context, rule.logits, rows, rule.experts, share, entropy);
    route(context, rule);
    call.ids = work.ids;
    call.weights = work.weights;
    call.top_k = rule.top_k;
    if (budget.keep) {
      limit(context, block, work, rows, budget, layer);
      call.counts = work.counts;
    }
  }
  run_experts(context, call, block.experts.quant);
  if (block.shared) add_shared(context, shape, block, work, rows);
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

void run_layers(const Context& context, const Stack& stack, int64_t first, int64_t last, float* x, const Places& places,
                const Caches& caches, float* entropy, Boundary boundary) {
  const Shape& shape = stack.shape;
  const int64_t rows = places.rows;
  if (!rows || first == last) {
    if (entropy) std::fill_n(entropy, rows, 0.0f);
    return;
  }
  Arena sizes(nullptr);
  Work(sizes, stack, rows);
  Arena arena(scratch(Buffer::stack).get<char>(sizes.used()));
  const Work work(arena, stack, rows);
  const float share = entropy ? entropy_share(stack, first, last) : 0.0f;
  if (entropy) std::fill_n(entropy, rows, 0.0f);
  const void* pending = nullptr;  // what the last block adds to the residual stream
  for (int64_t layer = first; layer < last; ++layer) {
    for (const Block& block : stack.layers[layer].blocks) {
      if (const auto* before = std::get_if<NormBlock>(&block)) {
        if (!boundary.normed) norm(context, shape, pending, x, before->weight, rows, work.normed);
        boundary.normed = false;
        continue;
      }
      if (const auto* attention = std::get_if<AttentionBlock>(&block))
        attend(context, shape, *attention, work, places, caches, layer);
      else
        feed_forward(context, shape, std::get<ExpertsBlock>(block), work, rows, places.budget, layer, entropy, share);
      if (stack.add_up) stack.add_up(work.pending, rows * shape.hidden);
      pending = work.pending;
    }
  }
  if (boundary.norm_next)
    norm(context, shape, pending, x, stack.layers[last].first_norm().weight, rows, work.normed);
  else
    add_pending(context, shape, pending, shape.residual_scale, x, rows);
}

}  // namespace dynamoe_cpu
