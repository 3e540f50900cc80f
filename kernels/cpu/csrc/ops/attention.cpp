// Causal grouped-query attention over a paged cache, for decoding and prefill alike.
//
// A task takes some rows of a sequence and some key/value heads with the query heads that share them. Keys come in
// blocks of 64 at fixed cache indices, blocks in stretches of 256; a row goes through an online softmax within a
// stretch, and stretches are joined in rising order. Both orders are fixed by the row's index alone, so one row at a
// time, chunks of a prompt, and a long context shared out among threads all give the same bits. See Dao et al. 2022 and
// 2023.
//
// With few rows the cost is reading the cache. The heads of a page lie side by side, so a block goes through all heads
// of the task before the next block: the reads then run on in a few streams that the hardware can foresee.
#include <algorithm>
#include <vector>

#include "ops/attend.h"

namespace dynamoe_cpu {

namespace {

// The heads of a task, each with its results so far.
class TaskHeads {
 public:
  TaskHeads(const Plan& plan, const Task& task) : plan_(plan), task_(task) {
    const int64_t bytes = plan.query_bytes(task.rows * plan.group);
    char* packed = scratch(Buffer::rows).get<char>(task.heads * bytes);
    heads_.reserve(task.heads);
    for (int64_t h = 0; h < task.heads; ++h) heads_.emplace_back(plan, task, task.first_head + h, packed + h * bytes);
  }

  int64_t first_stretch() const { return heads_[0].first_key() / kStretch; }
  int64_t end_stretch() const { return ceil_div(heads_[0].end_key(), kStretch); }
  int64_t state_floats() const { return static_cast<int64_t>(heads_.size()) * plan_.state_floats(heads_[0].queries()); }

  // The results over one stretch of keys, into state_floats() floats. `after`: what is likely read when the task ends.
  void take_stretch(int64_t stretch, float* memory, const KeyRows* after) {
    for (size_t h = 0; h < heads_.size(); ++h) clear(partial(memory, h), heads_[h].queries());
    const int64_t first_key = heads_[0].first_key(), end_key = heads_[0].end_key();
    const int64_t low = std::max(stretch * kStretch, first_key / kKeyBlock * kKeyBlock);
    const int64_t high = std::min((stretch + 1) * kStretch, end_key);
    KeyBlock block, following;
    following.locate(plan_.call, task_.sequence, low, first_key, end_key);
    if (following.empty()) return;
    KeyRows rows[2];  // of what is read now and next
    int now = 0;
    following.rows_of(plan_.call, task_.first_head, rows[now]);
    for (int64_t index = low; index < high; index += kKeyBlock) {
      block = following;
      following.locate(plan_.call, task_.sequence, index + kKeyBlock, first_key, end_key);
      for (size_t h = 0; h < heads_.size(); ++h) {
        const bool last = h + 1 == heads_.size(), more = !last || !following.empty();
        const int64_t head = task_.first_head + (last ? 0 : static_cast<int64_t>(h) + 1);
        if (more) (last ? following : block).rows_of(plan_.call, head, rows[1 - now]);
        heads_[h].take(index, rows[now], partial(memory, h), more ? &rows[1 - now] : after);
        now = 1 - now;
      }
    }
  }

  void start(float* memory) {
    for (size_t h = 0; h < heads_.size(); ++h) clear(partial(memory, h), heads_[h].queries());
  }
  void join(float* memory, float* later, const Share& share = {}) {
    for (size_t h = 0; h < heads_.size(); ++h) heads_[h].join(partial(memory, h), partial(later, h), share);
  }
  void write(float* memory, const Share& share = {}) {
    for (size_t h = 0; h < heads_.size(); ++h) heads_[h].write(partial(memory, h), share);
  }

 private:
  Partial partial(float* memory, size_t head) const {
    return {memory + static_cast<int64_t>(head) * plan_.state_floats(heads_[0].queries()), plan_.blocks};
  }

  const Plan& plan_;
  const Task& task_;
  std::vector<Attend> heads_;
};

}  // namespace

void attention(const Context& context, const AttentionCall& call) {
  const bool kept = call.latent && call.keys.dtype == Dtype::int8;  // codes that become what queries are
  const bool narrow = call.q.dtype == Dtype::bf16 && (call.keys.dtype == Dtype::bf16 || kept);
  const Plan plan(*context.kernels, call, narrow ? Dtype::bf16 : Dtype::fp32);
  const int64_t most_rows = std::max<int64_t>(1, kQueryRows / plan.group);
  int64_t row_tasks = 0, stretches = 0, most_stretches = 1, widest = 1;  // stretches that some row sees
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t rows = call.query_start[s + 1] - call.query_start[s];
    row_tasks += ceil_div(rows, most_rows);
    widest = std::max(widest, std::min(rows, most_rows));
    const int64_t length = call.context_len[s];
    const int64_t seen = ceil_div(length, kStretch) - plan.first_visible(length - rows) / kStretch;
    most_stretches = std::max(most_stretches, seen);
    stretches += seen;
  }
  // As many heads per task as leave enough tasks; with many rows the cache is read from cache anyway.
  const int64_t enough = context.threads > 1 ? 4 * context.threads : 1;
  const bool split = row_tasks * call.kv_heads < enough && most_stretches > 1;
  int64_t heads = widest * plan.group > kFewQueries ? 1 : call.kv_heads;
  while (heads > 1 && (split ? stretches : row_tasks) * ceil_div(call.kv_heads, heads) < enough)
    heads = ceil_div(heads, 2);

  std::vector<Task> tasks;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t begin = call.query_start[s], rows = call.query_start[s + 1] - begin;
    if (rows <= 0) continue;
    const Tiles tiles(rows, most_rows), parts(call.kv_heads, heads);
    const int64_t before = call.context_len[s] - rows;  // tokens of the context in front of these rows
    // The last rows of a sequence see the most keys; long tasks go first.
    for (int64_t t = tiles.count - 1; t >= 0; --t)
      for (int64_t g = 0; g < parts.count; ++g)
        tasks.push_back({s, parts.start(g), parts.size(g), begin + tiles.start(t), tiles.size(t),
                         before + tiles.start(t)});
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  if (!split) {
    for_each_task(context.threads, num_tasks, [&](int64_t i) {
      const Products products(*context.kernels);
      TaskHeads task(plan, tasks[i]);
      float* total = scratch(Buffer::states).get<float>(2 * task.state_floats());
      float* part = total + task.state_floats();
      task.start(total);
      const int64_t likely = i + context.threads;  // the next task of this thread
      KeyRows after;
      if (likely < num_tasks) plan.first_rows(tasks[likely], after);
      for (int64_t stretch = task.first_stretch(); stretch < task.end_stretch(); ++stretch) {
        task.take_stretch(stretch, part, likely < num_tasks ? &after : nullptr);
        task.join(total, part);
      }
      task.write(total);
    });
    return;
  }
  const int64_t floats = heads * plan.state_floats(widest * plan.group);
  float* memory = scratch(Buffer::output).get<float>(num_tasks * most_stretches * floats);
  for_each_task(context.threads, num_tasks * most_stretches, [&](int64_t i) {
    const Products products(*context.kernels);
    TaskHeads task(plan, tasks[i / most_stretches]);
    task.take_stretch(task.first_stretch() + i % most_stretches, memory + i * floats, nullptr);  // behind the end: none
  });
  constexpr int64_t kManyStretches = 16;  // of which joining takes long enough to be shared out too
  const int64_t shares = most_stretches < kManyStretches ? 1 : context.threads;
  for_each_task(context.threads, num_tasks * shares, [&](int64_t i) {
    TaskHeads task(plan, tasks[i / shares]);
    const Share share{i % shares, shares};
    float* total = scratch(Buffer::states).get<float>(task.state_floats());
    task.start(total);
    for (int64_t stretch = 0; stretch < most_stretches; ++stretch)
      task.join(total, memory + (i / shares * most_stretches + stretch) * floats, share);
    task.write(total, share);
  });
}

}  // namespace dynamoe_cpu
