// All layers, where rows may exit: decisions, exit heads, keys and values of skipped layers, and the rows that go on.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ops/parallel.h"
#include "ops/stack.h"

namespace dynamoe_cpu {

namespace {

Pages pages_of(const Places& places, size_t group) {
  return group ? places.more[group - 1] : Pages{places.slots, places.block_table, places.block_table_stride};
}

// The rows that are still on their way, and where they live.
class Live {
 public:
  Live(const ExitsCall& call, const Shape& shape) : hidden_(shape.hidden), x_(call.x), places_(call.places) {
    numbers_.resize(places_.rows);
    std::iota(numbers_.begin(), numbers_.end(), 0);
    places_.budget.numbers = numbers_.data();
  }
  float* x() const { return x_; }
  int64_t rows() const { return places_.rows; }
  int64_t number(int64_t row) const { return numbers_[row]; }
  const Places& places() const { return places_; }

  // Keeps the first `continuing` rows of an order that rises; a sequence of several rows continues as a whole.
  void keep(const int64_t* order, int64_t continuing) {
    positions_.swap(old_positions_);
    query_start_.swap(old_query_start_);
    context_len_.swap(old_context_len_);
    pages_.swap(old_pages_);
    positions_.clear();
    query_start_.assign(1, 0);
    context_len_.clear();
    pages_.assign(1 + places_.more.size(), {});
    int64_t sequence = 0;
    for (int64_t row = 0; row < continuing; ++row) {
      const int64_t from = order[row];
      std::copy_n(x_ + from * hidden_, hidden_, x_ + row * hidden_);
      numbers_[row] = numbers_[from];
      positions_.push_back(places_.positions[from]);
      for (size_t group = 0; group < pages_.size(); ++group)
        pages_[group].slots.push_back(pages_of(places_, group).slots[from]);
      while (places_.query_start[sequence + 1] <= from) ++sequence;
      if (row > 0 && places_.query_start[sequence] <= order[row - 1]) {
        ++query_start_.back();
        continue;
      }
      query_start_.push_back(static_cast<int32_t>(row + 1));
      context_len_.push_back(places_.context_len[sequence]);
      for (size_t group = 0; group < pages_.size(); ++group) {
        const Pages whole = pages_of(places_, group);
        const int32_t* table = whole.block_table + sequence * whole.block_table_stride;
        pages_[group].tables.insert(pages_[group].tables.end(), table, table + whole.block_table_stride);
      }
    }
    std::vector<Pages> more = std::move(places_.more);
    places_ = {continuing, positions_.data(), pages_[0].slots.data(), query_start_.data(), context_len_.data(),
               pages_[0].tables.data(), places_.block_table_stride, static_cast<int64_t>(context_len_.size()),
               places_.budget};
    for (size_t group = 1; group < pages_.size(); ++group)
      more[group - 1] = {pages_[group].slots.data(), pages_[group].tables.data(), more[group - 1].block_table_stride};
    places_.more = std::move(more);
  }

 private:
  struct OwnPages {  // of one group of layers
    std::vector<int64_t> slots;
    std::vector<int32_t> tables;
  };

  int64_t hidden_;
  float* x_;
  Places places_;
  std::vector<int64_t> numbers_, positions_, old_positions_;
  std::vector<int32_t> query_start_, context_len_, old_query_start_, old_context_len_;
  std::vector<OwnPages> pages_, old_pages_;
};

// Rows that exit: what they hand to the LM head, and the keys and values of the layers behind.
class Exiting {
 public:
  Exiting(const Context& context, const Stack& stack, const ExitsCall& call, const Caches& caches)
      : context_(context), stack_(stack), call_(call), caches_(caches) {}

  // What rows hand to the LM head; null as long as none has exited.
  float* out() const { return out_; }

  void take(const Exit& exit, const Live& live, const int64_t* order, int64_t count) {
    if (!out_) out_ = call_.out();
    const Shape& shape = stack_.shape;
    const int64_t hidden = shape.hidden, bytes = element_bytes(shape.dtype);
    int64_t kv_width = 0;
    for (const ProjectCall& layer : exit.projections) kv_width = std::max(kv_width, layer.kv_heads * layer.channels);
    const int64_t scratch_elements = count * (hidden + 3 * kv_width);
    const int64_t layers = static_cast<int64_t>(exit.projections.size());
    const auto parts = [&](Arena& arena) {
      x_ = arena.take<float>(count * hidden);
      narrow_ = arena.take(count * hidden * bytes);
      inner_ = arena.take(count * exit.down.outputs * bytes);
      scratch_ = arena.take(layers * scratch_elements * bytes);
    };
    Arena sizes(nullptr);
    parts(sizes);
    Arena arena(scratch(Buffer::leaving).get<char>(sizes.used()));
    parts(arena);
    positions_.clear();
    slots_.assign(1 + live.places().more.size(), {});
    for (int64_t row = 0; row < count; ++row) {
      std::copy_n(live.x() + order[row] * hidden, hidden, x_ + row * hidden);
      positions_.push_back(live.places().positions[order[row]]);
      for (size_t group = 0; group < slots_.size(); ++group)
        slots_[group].push_back(pages_of(live.places(), group).slots[order[row]]);
      call_.depths[live.number(order[row])] = exit.after_layers;
    }
    write_keys_and_values(exit, count, scratch_elements * bytes);
    apply_exit_head(exit, live, order, count);
  }

 private:
  void write_keys_and_values(const Exit& exit, int64_t count, int64_t scratch_bytes) {
    for_each_task(context_.threads, static_cast<int64_t>(exit.projections.size()), [&](int64_t behind) {
      const int64_t layer = exit.after_layers + behind;
      ProjectCall call = exit.projections[behind];
      call.x = {x_, stack_.shape.hidden, Dtype::fp32};
      call.rows = count;
      call.cos_sin = caches_.tables[stack_.layers[layer].find<AttentionBlock>()->table];
      call.positions = positions_.data();
      call.slots = slots_[slots_.size() > 1 ? caches_.groups[layer] : 0].data();
      call.keys = caches_.keys[layer];
      call.values = caches_.values[layer];
      call.page_size = caches_.page_size;
      call.scratch = scratch_ + behind * scratch_bytes;
      project_kv({context_.kernels, 1}, call);
    });
  }

  void apply_exit_head(const Exit& exit, const Live& live, const int64_t* order, int64_t count) {
    const Shape& shape = stack_.shape;
    const int64_t hidden = shape.hidden;
    context_.kernels->convert(x_, narrow_, static_cast<int>(count * hidden), shape.dtype);
    project(context_, shape, exit.down, {narrow_, hidden, shape.dtype}, hidden, count, inner_);
    const int64_t rank = exit.down.outputs;
    project(context_, shape, exit.up, {inner_, rank, shape.dtype}, rank, count, narrow_);
    add_pending(context_, shape, narrow_, 1.0f, x_, count);
    for (int64_t row = 0; row < count; ++row)
      std::copy_n(x_ + row * hidden, hidden, out_ + live.number(order[row]) * hidden);
  }

  const Context& context_;
  const Stack& stack_;
  const ExitsCall& call_;
  const Caches& caches_;
  float *out_ = nullptr, *x_ = nullptr;
  char *narrow_ = nullptr, *inner_ = nullptr, *scratch_ = nullptr;
  std::vector<int64_t> positions_;
  std::vector<std::vector<int64_t>> slots_;  // by group of layers
};

}  // namespace

void run_exits(const Context& context, const Stack& stack, const ExitsCall& call, const Caches& caches) {
  const int64_t rows = call.places.rows, hidden = stack.shape.hidden, layers = static_cast<int64_t>(stack.layers.size());
  if (!rows) return;
  Live live(call, stack.shape);
  Exiting exiting(context, stack, call, caches);
  std::vector<float> previous, entropy(rows), thresholds(rows), logits(rows);
  std::vector<int64_t> order(rows);
  std::fill_n(call.depths, rows, layers);
  std::fill_n(call.decisions, 2 * stack.exits.size(), 0);
  std::fill_n(call.launched, stack.exits.size() + 1, 0);
  int64_t first = 0;
  bool normed = false;
  for (size_t number = 0; number < stack.exits.size() && live.rows(); ++number) {
    const Exit& exit = stack.exits[number];
    bool asked = false;
    for (int64_t row = 0; row < live.rows(); ++row) {
      thresholds[row] = call.thresholds[number * rows + live.number(row)];
      asked = asked || thresholds[row] < std::numeric_limits<float>::infinity();
    }
    asked = asked && exit.can_exit;
    if (asked && exit.previous) previous.assign(live.x(), live.x() + live.rows() * hidden);
    call.launched[number] = live.rows();
    normed = run_layers(context, stack, first, exit.after_layers, live.x(), live.places(), caches,
                        asked && exit.entropy ? entropy.data() : nullptr, {normed, true});
    first = exit.after_layers;
    if (!asked) continue;
    ProbeCall probing = exit.probe;
    probing.x = live.x();
    probing.previous = exit.previous ? previous.data() : nullptr;
    probing.entropy = exit.entropy ? entropy.data() : nullptr;
    probing.rows = live.rows();
    probing.logits = logits.data();
    probe(context, probing);
    const int64_t continuing = partition(logits.data(), thresholds.data(), live.rows(), order.data());
    const int64_t exited = live.rows() - continuing;
    for (int64_t place = 0; place < live.rows(); ++place) {
      if (!std::isfinite(thresholds[order[place]])) continue;
      ++call.decisions[2 * number];
      if (place < continuing) ++call.decisions[2 * number + 1];
    }
    if (!exited) continue;
    exiting.take(exit, live, order.data() + continuing, exited);
    live.keep(order.data(), continuing);
    normed = false;
  }
  if (!live.rows()) return;
  call.launched[stack.exits.size()] = live.rows();
  run_layers(context, stack, first, layers, live.x(), live.places(), caches, nullptr, {normed, false});
  for (int64_t row = 0; exiting.out() && row < live.rows(); ++row)
    std::copy_n(live.x() + row * hidden, hidden, exiting.out() + live.number(row) * hidden);
}

}  // namespace dynamoe_cpu
