// Multi-head latent attention as a block of a layer.
#include <cstring>

#include "ops/stack_run.h"

namespace dynamoe_cpu {

namespace {

// A product that every head has for itself; strides from row to row and from head to head.
void project_heads(const Context& context, Dtype dtype, const LatentBlock& block, const uint32_t* weights, int64_t rows,
                   const void* x, int64_t x_stride, int64_t inputs, void* out, int64_t out_stride, int64_t outputs) {
  linear(context, {{x, block.heads * x_stride, dtype}, rows, inputs, outputs, weights, nullptr, out,
                   block.heads * out_stride, dtype, block.heads, x_stride, out_stride});
}

}  // namespace

void attend(Run& run, const LatentBlock& block, int64_t layer) {
  const Context& context = run.context;
  const Shape& shape = run.shape;
  const Places& places = run.of(layer);
  const Caches& caches = run.caches;
  const float* table = caches.tables[block.table];
  const Rows x = run.rows_of(run.work.read, shape.hidden);
  char *queries = run.work.qkv, *absorbed = run.work.q, *attended = run.work.attended;
  const Dtype dtype = shape.dtype;
  const int64_t rows = places.rows, bytes = element_bytes(dtype), channels = block.entry_channels();
  const int64_t query = block.plain + block.rotated;
  // What queries are made of, and latents, lie where the sums of latents will.
  char *rank = attended, *latents = attended + rows * block.q_a.outputs * bytes;
  if (block.q_a.exists()) {
    const int64_t width = block.q_a.outputs;
    project(context, shape, block.q_a, x, shape.hidden, rows, rank);
    if (block.q_norm)
      for_each_row(context.threads, rows, [&](int64_t row) {
        char* data = rank + row * width * bytes;
        context.kernels->rms_norm(data, dtype, nullptr, 1.0f, block.q_norm, dtype, block.eps, static_cast<int>(width),
                                  nullptr, dtype, data);
      });
    project(context, shape, block.q, run.rows_of(rank, width), width, rows, queries);
  } else {
    project(context, shape, block.q, x, shape.hidden, rows, queries);
  }
  project(context, shape, block.kv_a, x, shape.hidden, rows, latents);
  LatentCall entries{{latents, channels, dtype}, rows, block.latent, block.rotated, block.kv_norm, block.eps};
  entries.cos_sin = table;
  entries.interleaved = block.interleaved;
  entries.positions = places.positions;
  entries.slots = places.slots;
  entries.entries = caches.keys[layer];
  entries.page_size = caches.page_size;
  write_latents(context, entries);
  project_heads(context, dtype, block, block.key_up, rows, queries, query, block.plain, absorbed, channels, block.latent);
  for_each_row(context.threads, rows, [&](int64_t row) {
    const float* cos_sin = table + places.positions[row] * block.rotated;
    for (int64_t head = row * block.heads; head < (row + 1) * block.heads; ++head)
      rotate_head(queries + (head * query + block.plain) * bytes, cos_sin, block.rotated, block.interleaved,
                  absorbed + (head * channels + block.latent) * bytes, dtype);
  });
  AttentionCall call{{absorbed, block.heads * channels, dtype}, block.heads, 1, channels, caches.keys[layer],
                     caches.keys[layer], caches.page_size};
  call.query_start = places.query_start;
  call.context_len = places.context_len;
  call.block_table = places.block_table;
  call.block_table_stride = places.block_table_stride;
  call.sequences = places.sequences;
  call.scale = block.scale;
  call.window = block.window;
  call.latent = block.latent;
  call.out = attended;
  attention(context, call);
  project_heads(context, dtype, block, block.value_up, rows, attended, block.latent, block.latent, queries, block.values,
                block.values);
  project(context, shape, block.o, run.rows_of(queries, block.heads * block.values), block.heads * block.values, rows,
          run.work.pending);
}

}  // namespace dynamoe_cpu
