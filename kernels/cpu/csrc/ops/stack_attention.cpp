// Attention in the stack: from the rows that are read, over the cache, to what is added to the residual stream.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/stack_run.h"

namespace dynamoe_cpu {

Chunks::Chunks(const Places& whole, int64_t size, int64_t page_size) : whole(&whole), size(size), places(whole) {
  struct Chunk {
    int64_t sequence, first_page;
  };
  std::vector<Chunk> found;
  query_start.push_back(0);
  int64_t most_pages = 1;
  for (int64_t s = 0; s < whole.sequences; ++s) {
    const int64_t length = whole.context_len[s];
    for (int64_t position = length - (whole.query_start[s + 1] - whole.query_start[s]); position < length;) {
      const int64_t begin = position / size * size, end = std::min(begin + size, length);
      found.push_back({s, begin / page_size});
      query_start.push_back(query_start.back() + static_cast<int32_t>(end - position));
      context_len.push_back(static_cast<int32_t>(end - begin));
      most_pages = std::max(most_pages, ceil_div(end - begin, page_size));
      position = end;
    }
  }
  tables.resize(found.size() * most_pages);
  for (size_t chunk = 0; chunk < found.size(); ++chunk)
    std::copy_n(whole.block_table + found[chunk].sequence * whole.block_table_stride + found[chunk].first_page,
                ceil_div(context_len[chunk], page_size), tables.data() + chunk * most_pages);
  places.query_start = query_start.data();
  places.context_len = context_len.data();
  places.block_table = tables.data();
  places.block_table_stride = most_pages;
  places.sequences = static_cast<int64_t>(found.size());
}

namespace {

// Queries, keys and values of the rows, in one projection's outputs or beside it.
struct Heads {
  const Run& run;
  const AttentionBlock& block;
  char *q, *keys, *values;
  int64_t stride, values_stride;

  Heads(const Run& run, const AttentionBlock& block)
      : run(run),
        block(block),
        q(run.work.qkv),
        keys(q + block.projected_width() * run.bytes()),
        values(keys + block.kv_width() * run.bytes()),
        stride(block.qkv.outputs),
        values_stride(stride) {}

  char* at(char* first, int64_t row) const { return first + row * stride * run.bytes(); }
  char* value_at(int64_t row) const { return values + row * values_stride * run.bytes(); }

  template <class Body>
  void for_rows(int64_t width, const Body& body) const {
    for_each_light_row(run.context.threads, run.rows(), width, body);
  }

  // Gates from behind each head's queries go out; the queries move together.
  void split_gates() const {
    const int64_t width = block.channels * run.bytes();
    for_rows(block.projected_width(), [&](int64_t row) {
      char *own = at(q, row), *gates = run.work.gates + row * block.heads * width;
      for (int64_t head = 0; head < block.heads; ++head) {
        std::memcpy(gates + head * width, own + (2 * head + 1) * width, width);
        if (head) std::memcpy(own + head * width, own + 2 * head * width, width);
      }
    });
  }

  // Values as wide as keys: zeros behind them add nothing.
  void make_values() {
    const int64_t bytes = run.bytes(), width = block.values * bytes;
    const Dtype dtype = run.shape.dtype;
    char *from = block.values_are_keys ? keys : values, *to = run.work.values;
    values_stride = block.kv_width();
    for_rows(block.kv_width(), [&](int64_t row) {
      for (int64_t head = 0; head < block.kv_heads; ++head) {
        const char* in = at(from, row) + head * width;
        char* out = to + (row * block.kv_heads + head) * block.channels * bytes;
        std::memcpy(out, in, width);
        std::memset(out + width, 0, block.channels * bytes - width);
        if (block.value_scale == 1.0f) continue;
        for (int64_t i = 0; i < block.values; ++i)
          write_number(out, dtype, i, read_number(out, dtype, i) * block.value_scale);
      }
    });
    values = to;
  }

  // As a single operation outside the kernels does it, which does not fuse products and sums.
  void rotate() const {
    const Dtype dtype = run.shape.dtype;
    const int64_t half = block.channels / 2, heads = block.heads + block.kv_heads;
    const float* table = run.caches.tables[block.table];
    for_rows(heads * block.channels, [&](int64_t row) {
      const float* cos = table + run.places.positions[row] * block.channels;
      for (int64_t head = 0; head < heads; ++head) {
        char* data = at(q, row) + head * block.channels * run.bytes();
        for (int64_t i = 0; i < half; ++i) {
          const float a = read_number(data, dtype, i), b = read_number(data, dtype, i + half);
          write_number(data, dtype, i, a * cos[i] - b * cos[i + half]);
          write_number(data, dtype, i + half, b * cos[i] + a * cos[i + half]);
        }
      }
    });
  }

  void norm(char* first, int64_t heads, const void* weight) const {
    if (!weight) return;
    const int64_t pieces = block.norm_per_head ? heads : 1, width = heads * block.channels / pieces;
    for_each_row(run.context.threads, run.rows(), [&](int64_t row) {
      for (int64_t piece = 0; piece < pieces; ++piece) {
        char* data = at(first, row) + piece * width * run.bytes();
        norm_row(run, weight, block.norm_dtype, data, width, data);
      }
    });
  }
  void norm() const {
    norm(q, block.heads, block.q_norm);
    norm(keys, block.kv_heads, block.k_norm);
  }

  void norm_values() const {
    for_each_row(run.context.threads, run.rows(), [&](int64_t row) {
      for (int64_t head = 0; head < block.kv_heads; ++head) {
        char* data = value_at(row) + head * block.channels * run.bytes();
        norm_row(run, block.value_norm, Dtype::fp32, data, block.channels, data);
      }
    });
  }

  void clip() const {
    const Dtype dtype = run.shape.dtype;
    const auto clip_some = [&](char* data, int64_t count) {
      for (int64_t i = 0; i < count; ++i)
        write_number(data, dtype, i, std::min(std::max(read_number(data, dtype, i), -block.clip), block.clip));
    };
    for_rows(stride, [&](int64_t row) {
      clip_some(at(q, row), block.q_width());
      clip_some(at(keys, row), block.kv_width());
      clip_some(value_at(row), block.kv_width());
    });
  }

  void grow() const {
    const Dtype dtype = run.shape.dtype;
    for_rows(block.q_width(), [&](int64_t row) {
      const float factor = block.growth->factor(run.places.positions[row]);
      char* data = at(q, row);
      for (int64_t i = 0; i < block.q_width(); ++i)
        write_number(data, dtype, i, read_number(data, dtype, i) * factor);
    });
  }

  // Rotated queries, unless that is done, go out; keys and values to the cache.
  void write(int64_t layer) const {
    const Caches& caches = run.caches;
    RopeCall rope{run.rows_of(q, stride), run.rows_of(keys, stride), run.rows_of(values, values_stride), run.rows(),
                  block.heads, block.kv_heads, block.channels};
    rope.cos_sin = block.norm_after_rotation ? run.work.upright : caches.tables[block.table];
    rope.positions = block.norm_after_rotation ? run.work.origin : run.places.positions;
    rope.slots = run.of(layer).slots;
    rope.keys = caches.keys[layer];
    rope.values = caches.values[layer];
    rope.page_size = caches.page_size;
    rope.q_out = run.work.q;
    if (block.norm_after_rotation) {
      std::fill_n(run.work.origin, run.rows(), 0);
      for (int64_t i = 0; i < block.channels; ++i) run.work.upright[i] = i < block.channels / 2 ? 1.0f : 0.0f;
    }
    rope_and_write(run.context, rope);
  }
};

// The heads' outputs without the zeros behind narrower values, row by row where they were, times the gate.
void gate_outputs(const Run& run, const AttentionBlock& block) {
  const Dtype dtype = run.shape.dtype;
  const int64_t bytes = run.bytes(), width = block.out_width();
  if (block.gate.exists())
    project(run.context, run.shape, block.gate, run.rows_of(run.work.read, run.shape.hidden), run.shape.hidden,
            run.rows(), run.work.gates);
  for_each_light_row(run.context.threads, run.rows(), width, [&](int64_t row) {
    char* out = run.work.attended + row * block.q_width() * bytes;
    if (block.values < block.channels)
      for (int64_t head = 1; head < block.heads; ++head)
        std::memmove(out + head * block.values * bytes, out + head * block.channels * bytes, block.values * bytes);
    if (!block.gate.exists()) return;
    char* gate = run.work.gates + row * width * bytes;
    for (int64_t i = 0; i < width; ++i) {  // rounded where the single operators round
      write_number(gate, dtype, i, sigmoid(read_number(gate, dtype, i)));
      write_number(out, dtype, i, read_number(out, dtype, i) * read_number(gate, dtype, i));
    }
  });
}

// What each head leaves times the sigmoid of the gate beside its queries, rounded once.
void gate_heads(const Run& run, const AttentionBlock& block) {
  const Dtype dtype = run.shape.dtype;
  const int64_t width = block.channels * run.bytes();
  for_each_light_row(run.context.threads, run.rows() * block.heads, 4 * block.channels, [&](int64_t place) {
    char *out = run.work.attended + place * width, *gate = run.work.gates + place * width;
    for (int64_t i = 0; i < block.channels; ++i)
      write_number(out, dtype, i, read_number(out, dtype, i) * sigmoid(read_number(gate, dtype, i)));
  });
}

}  // namespace

void attend(Run& run, const AttentionBlock& block, int64_t layer) {
  const Shape& shape = run.shape;
  const Work& work = run.work;
  project(run.context, shape, block.qkv, run.rows_of(work.read, shape.hidden), shape.hidden, run.rows(), work.qkv);
  Heads heads(run, block);
  if (block.gated_queries) heads.split_gates();
  if (block.makes_values()) heads.make_values();
  if (block.norm_after_rotation) heads.rotate();
  if (!block.norm_per_head) heads.norm();
  if (block.clip > 0.0f) heads.clip();
  if (block.norm_per_head) heads.norm();
  if (block.value_norm) heads.norm_values();
  if (block.growth) heads.grow();
  heads.write(layer);
  const Places& places = block.chunk ? run.chunks(run.of(layer), block.chunk) : run.of(layer);
  AttentionCall call{run.rows_of(work.q, block.q_width()), block.heads, block.kv_heads, block.channels,
                     run.caches.keys[layer], run.caches.values[layer], run.caches.page_size};
  call.query_start = places.query_start;
  call.context_len = places.context_len;
  call.block_table = places.block_table;
  call.block_table_stride = places.block_table_stride;
  call.sequences = places.sequences;
  call.scale = block.scale;
  call.window = block.window;
  call.sinks = block.sinks;
  call.softcap = block.softcap;
  call.out = work.attended;
  attention(run.context, call);
  if (block.gate.exists() || block.values < block.channels) gate_outputs(run, block);
  if (block.gated_queries) gate_heads(run, block);
  project(run.context, shape, block.o, run.rows_of(work.attended, block.q_width()), block.out_width(), run.rows(),
          work.pending);
}

}  // namespace dynamoe_cpu
