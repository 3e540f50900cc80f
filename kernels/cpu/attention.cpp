// Causal grouped-query attention over a paged cache, for decoding and prefill alike.
//
// A task takes some rows of a sequence with the query heads that share one key/value head. Keys come in blocks of 64 at
// absolute positions, blocks in stretches of 256; a row goes through an online softmax within a stretch, and stretches
// are joined in rising order. Both orders are fixed by the row's position alone, so one row at a time, chunks of a
// prompt, and a long context shared out among threads all give the same bits. See Dao et al. 2022 and 2023.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "operators.h"
#include "parallel.h"

namespace dynamoe_cpu {

namespace {

constexpr int64_t kStretch = 4 * kKeyBlock;
constexpr int64_t kQueryRows = 48;  // rows × query heads of a task

struct Task {
  int64_t sequence, kv_head, first_row, rows;
};

// Sizes and addresses that all tasks share.
struct Plan {
  const Kernels& kernels;
  const AttentionCall& call;
  Dtype dtype;  // of the score product: fp32 unless queries and keys are both bf16
  const Gemm& score_gemm;
  const Gemm& value_gemm;
  int64_t group, cells, pieces;  // query heads per key head; cells and 32-channel pieces of a head

  Plan(const Kernels& kernels, const AttentionCall& call, Dtype dtype)
      : kernels(kernels), call(call), dtype(dtype), score_gemm(kernels.gemm[static_cast<int>(dtype)]), value_gemm(kernels.gemm[0]),
        group(call.heads / call.kv_heads), cells(ceil_div(call.channels, score_gemm.inputs_per_cell)),
        pieces(ceil_div(call.channels, kBlockOutputs)) {}

  int64_t first_visible(int64_t position) const { return call.window ? std::max<int64_t>(0, position - call.window + 1) : 0; }
  int64_t state_floats(int64_t queries) const { return queries * (2 + pieces * kBlockOutputs); }
};

// What a task has gathered of some stretch: per tile of queries, the states (max, sum), then the accumulators
// [piece][query][32].
struct Partial {
  float* data;
  int64_t pieces;
  float* state(int64_t query) const { return data + query * 2; }
  float* accumulator(int64_t queries, const Tiles& tiles, int64_t tile) const {
    return data + queries * 2 + tiles.start(tile) * pieces * kBlockOutputs;
  }
};

void clear(const Partial& partial, int64_t queries) {
  std::memset(partial.data, 0, queries * (2 + partial.pieces * kBlockOutputs) * sizeof(float));
  for (int64_t q = 0; q < queries; ++q) partial.state(q)[0] = -std::numeric_limits<float>::infinity();
}

class Attend {
 public:
  Attend(const Plan& plan, const Task& task)
      : plan_(plan), task_(task), queries_(task.rows * plan.group), tiles_(queries_, std::min(plan.score_gemm.tile_rows, plan.value_gemm.tile_rows)),
        positions_(plan.call.positions + task.first_row) {
    const AttentionCall& call = plan.call;
    const int64_t query_bytes = plan.cells * plan.score_gemm.panel_cell_bytes;
    const bool widen = plan.dtype != call.q.dtype;
    panel_ = scratch(Buffer::rows).get<char>(queries_ * (query_bytes + (widen ? call.channels * 4 : 0)));
    float* wide = reinterpret_cast<float*>(panel_ + queries_ * query_bytes);
    for (int64_t t = 0; t < tiles_.count; ++t) {
      const void* rows[kMaxTileRows];
      for (int r = 0; r < tiles_.size(t); ++r) {
        const int64_t query = tiles_.start(t) + r;
        const int64_t element = (task.kv_head * plan.group + query % plan.group) * call.channels;
        rows[r] = static_cast<const char*>(call.q.at(task.first_row + query / plan.group)) + element * element_bytes(call.q.dtype);
        if (!widen) continue;
        float* row = wide + query * call.channels;
        plan.kernels.widen(static_cast<const uint16_t*>(rows[r]), row, static_cast<int>(call.channels));
        rows[r] = row;
      }
      plan.score_gemm.pack(panel_ + tiles_.start(t) * query_bytes, rows, tiles_.size(t), static_cast<int>(call.channels));
    }
    keys_ = scratch(Buffer::keys).get<uint32_t>(2 * plan.cells * kBlockOutputs + kKeyBlock * call.channels);
    values_ = scratch(Buffer::values).get<float>(plan.pieces * kKeyBlock * kBlockOutputs);
    scores_ = scratch(Buffer::scores).get<float>(2 * kMaxTileRows * kKeyBlock + 2 * kMaxTileRows * kBlockOutputs);
  }

  int64_t queries() const { return queries_; }
  const Tiles& tiles() const { return tiles_; }
  int64_t first_key() const { return plan_.first_visible(positions_[0]); }
  int64_t end_key() const { return positions_[task_.rows - 1] + 1; }

  // Takes the keys of [first, end) that the rows may see; `first` is a multiple of the block.
  void take(int64_t first, int64_t end, const Partial& partial) {
    const int64_t low = std::max(first, first_key()), high = std::min(end, end_key());
    for (int64_t block = low / kKeyBlock * kKeyBlock; block < high; block += kKeyBlock) {
      load(block);
      for (int64_t t = 0; t < tiles_.count; ++t) multiply(block, t, partial);
    }
  }

  void join(const Partial& partial, const Partial& later) {
    for (int64_t t = 0; t < tiles_.count; ++t)
      for (int r = 0; r < tiles_.size(t); ++r) {
        const int64_t query = tiles_.start(t) + r;
        if (later.state(query)[0] == -std::numeric_limits<float>::infinity()) continue;  // saw nothing of it
        plan_.kernels.softmax_merge(partial.state(query), partial.accumulator(queries_, tiles_, t) + r * kBlockOutputs, later.state(query),
                                    later.accumulator(queries_, tiles_, t) + r * kBlockOutputs, static_cast<int>(plan_.pieces),
                                    tiles_.size(t) * kBlockOutputs);
      }
  }

  void write(const Partial& partial) {
    const AttentionCall& call = plan_.call;
    float* row = scores_;
    for (int64_t t = 0; t < tiles_.count; ++t)
      for (int r = 0; r < tiles_.size(t); ++r) {
        const int64_t query = tiles_.start(t) + r;
        const float inverse = 1.0f / partial.state(query)[1];
        const float* accumulator = partial.accumulator(queries_, tiles_, t) + r * kBlockOutputs;
        const int64_t head = (task_.first_row + query / plan_.group) * call.heads + task_.kv_head * plan_.group + query % plan_.group;
        char* out = static_cast<char*>(call.out) + head * call.channels * element_bytes(call.q.dtype);
        for (int64_t piece = 0; piece < plan_.pieces; ++piece) {
          const float* from = accumulator + piece * tiles_.size(t) * kBlockOutputs;
          for (int c = 0; c < kBlockOutputs; ++c) row[c] = from[c] * inverse;
          const int64_t width = std::min<int64_t>(kBlockOutputs, call.channels - piece * kBlockOutputs);
          plan_.kernels.convert(row, out + piece * kBlockOutputs * element_bytes(call.q.dtype), static_cast<int>(width), call.q.dtype);
        }
      }
  }

 private:
  // Keys of a block as weights of the score product, values widened to fp32 weights of the second one. Positions that no
  // row of the task may see are zeros: their pages may be gone, or not yet written.
  void load(int64_t block) {
    const AttentionCall& call = plan_.call;
    const int channels = static_cast<int>(call.channels);
    const int32_t* table = call.block_table + task_.sequence * call.block_table_stride;
    const int64_t low = first_key(), high = end_key();
    const bool widen_keys = call.keys.dtype != plan_.dtype;
    float* wide = reinterpret_cast<float*>(keys_ + 2 * plan_.cells * kBlockOutputs);
    const void* keys[kKeyBlock];
    for (int64_t i = 0; i < kKeyBlock; ++i) {
      const int64_t position = block + i;
      float* value = values_ + i * kBlockOutputs;
      keys[i] = nullptr;
      if (position < low || position >= high) {
        for (int64_t piece = 0; piece < plan_.pieces; ++piece) std::memset(value + piece * kKeyBlock * kBlockOutputs, 0, kBlockOutputs * sizeof(float));
        continue;
      }
      const int64_t page = table[position / call.page_size], offset = position % call.page_size;
      keys[i] = call.keys.at(page, task_.kv_head, offset);
      if (widen_keys) {
        plan_.kernels.widen(static_cast<const uint16_t*>(keys[i]), wide + i * channels, channels);
        keys[i] = wide + i * channels;
      }
      const void* stored = call.values.at(page, task_.kv_head, offset);
      for (int64_t piece = 0; piece < plan_.pieces; ++piece) {
        const int64_t first = piece * kBlockOutputs;
        const int width = static_cast<int>(std::min<int64_t>(kBlockOutputs, channels - first));
        float* out = value + piece * kKeyBlock * kBlockOutputs;
        if (call.values.dtype == Dtype::bf16) {
          plan_.kernels.widen(static_cast<const uint16_t*>(stored) + first, out, width);
        } else {
          std::memcpy(out, static_cast<const float*>(stored) + first, width * sizeof(float));
        }
        for (int c = width; c < kBlockOutputs; ++c) out[c] = 0.0f;
      }
    }
    for (int half = 0; half < 2; ++half)
      plan_.kernels.transpose_cells(keys_ + half * plan_.cells * kBlockOutputs, kBlockOutputs, keys + half * kBlockOutputs, kBlockOutputs,
                                    channels * element_bytes(plan_.dtype));
  }

  void multiply(int64_t block, int64_t t, const Partial& partial) {
    const int size = tiles_.size(t);
    const int cells = static_cast<int>(plan_.cells);
    const char* panel = panel_ + tiles_.start(t) * plan_.cells * plan_.score_gemm.panel_cell_bytes;
    const int64_t first_position = positions_[tiles_.start(t) / plan_.group];
    const int64_t last_position = positions_[(tiles_.start(t) + size - 1) / plan_.group];
    if (last_position < block || plan_.first_visible(first_position) >= block + kKeyBlock) return;
    float* scores = scores_;                              // [query][64]
    float* probabilities = scores + size * kKeyBlock;     // [key][query]
    float* halves = probabilities + size * kKeyBlock;     // [half][query][32]
    for (int half = 0; half < 2; ++half) {
      float* out = halves + half * size * kBlockOutputs;
      plan_.score_gemm.run(size, panel, keys_ + half * cells * kBlockOutputs, cells, out, false);
      for (int r = 0; r < size; ++r) std::memcpy(scores + r * kKeyBlock + half * kBlockOutputs, out + r * kBlockOutputs, kBlockOutputs * sizeof(float));
    }
    float* accumulator = partial.accumulator(queries_, tiles_, t);
    const void* rows[kMaxTileRows];
    for (int r = 0; r < size; ++r) {
      const int64_t position = positions_[(tiles_.start(t) + r) / plan_.group];
      const int64_t first = std::clamp<int64_t>(plan_.first_visible(position) - block, 0, kKeyBlock);
      const int64_t last = std::clamp<int64_t>(position + 1 - block, 0, kKeyBlock);
      float* row = scores + r * kKeyBlock;
      rows[r] = row;
      if (first >= last) {
        std::memset(row, 0, kKeyBlock * sizeof(float));
      } else {
        plan_.kernels.softmax_step(row, static_cast<int>(first), static_cast<int>(last), plan_.call.scale, partial.state(tiles_.start(t) + r),
                                   accumulator + r * kBlockOutputs, static_cast<int>(plan_.pieces), size * kBlockOutputs);
      }
    }
    plan_.value_gemm.pack(probabilities, rows, size, kKeyBlock);
    for (int64_t piece = 0; piece < plan_.pieces; ++piece)
      plan_.value_gemm.run(size, probabilities, reinterpret_cast<const uint32_t*>(values_) + piece * kKeyBlock * kBlockOutputs, kKeyBlock,
                           accumulator + piece * size * kBlockOutputs, true);
  }

  const Plan& plan_;
  const Task& task_;
  int64_t queries_;
  Tiles tiles_;
  const int64_t* positions_;
  char* panel_;
  uint32_t* keys_;
  float* values_;
  float* scores_;
};

}  // namespace

void attention(const Context& context, const AttentionCall& call) {
  const bool narrow = call.q.dtype == Dtype::bf16 && call.keys.dtype == Dtype::bf16;
  const Plan plan(*context.kernels, call, narrow ? Dtype::bf16 : Dtype::fp32);
  const int64_t task_rows = std::max<int64_t>(1, kQueryRows / plan.group);
  std::vector<Task> tasks;
  std::vector<int64_t> stretches;  // of each task, and where its partial results start
  int64_t most_stretches = 1;
  // Long tasks first: the last rows of a sequence see the most keys.
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t begin = call.query_start[s], rows = call.query_start[s + 1] - begin;
    if (rows <= 0) continue;
    most_stretches = std::max(most_stretches, ceil_div(call.context_len[s], kStretch));
    const Tiles tiles(rows, task_rows);
    for (int64_t t = tiles.count - 1; t >= 0; --t)
      for (int64_t g = 0; g < call.kv_heads; ++g) tasks.push_back({s, g, begin + tiles.start(t), tiles.size(t)});
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t floats = plan.state_floats(task_rows * plan.group);
  const bool split = context.threads > 1 && num_tasks < 4 * context.threads && most_stretches > 1;
  if (!split) {
    for_each_task(context.threads, num_tasks, [&](int64_t i) {
      Attend attend(plan, tasks[i]);
      float* memory = scratch(Buffer::states).get<float>(2 * floats);
      const Partial total{memory, plan.pieces}, part{memory + floats, plan.pieces};
      clear(total, attend.queries());
      for (int64_t first = attend.first_key() / kStretch * kStretch; first < attend.end_key(); first += kStretch) {
        clear(part, attend.queries());
        attend.take(first, first + kStretch, part);
        attend.join(total, part);
      }
      attend.write(total);
    });
    return;
  }
  float* memory = scratch(Buffer::output).get<float>(num_tasks * most_stretches * floats);
  for_each_task(context.threads, num_tasks * most_stretches, [&](int64_t i) {
    Attend attend(plan, tasks[i / most_stretches]);
    const int64_t first = i % most_stretches * kStretch;
    const Partial part{memory + i * floats, plan.pieces};
    clear(part, attend.queries());
    attend.take(first, first + kStretch, part);
  });
  for_each_task(context.threads, num_tasks, [&](int64_t i) {
    Attend attend(plan, tasks[i]);
    const Partial total{scratch(Buffer::states).get<float>(floats), plan.pieces};
    clear(total, attend.queries());
    for (int64_t stretch = 0; stretch < most_stretches; ++stretch) attend.join(total, Partial{memory + (i * most_stretches + stretch) * floats, plan.pieces});
    attend.write(total);
  });
}

}  // namespace dynamoe_cpu
