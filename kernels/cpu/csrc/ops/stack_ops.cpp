// A model's layers and exits as a torch class: tensors are checked here, and only here.
#include <torch/custom_class.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/paged.h"
#include "ops/stack_blocks.h"
#include "ops/state_tensors.h"
#include "ops/stack_torch.h"
#include "shared/shared_group.h"

namespace dynamoe_cpu {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMostGroups = 1024;

// The caches of all layers, checked once. `channels` are those of each layer's heads; `states` of a layer that keeps these
// instead of keys and values; `groups` the numbers of the layers whose pages have the same numbers, empty where all have.
class CacheHolder : public torch::CustomClassHolder {
 public:
  CacheHolder(Tensors keys, Tensors values, std::vector<int64_t> channels, std::vector<Tensors> states,
              std::vector<int64_t> groups)
      : keys_(std::move(keys)), values_(std::move(values)), channels_(std::move(channels)), states_(std::move(states)) {
    const size_t layers = keys_.size();
    TORCH_CHECK_VALUE(layers && values_.size() == layers && channels_.size() == layers && states_.size() == layers,
                      "there must be keys and values, or states, of every layer");
    caches_.groups = groups.empty() ? std::vector<int64_t>(layers) : std::move(groups);
    TORCH_CHECK_VALUE(caches_.groups.size() == layers, "there must be a group for each of ", layers, " layers");
    while (first_ < layers && !states_[first_].empty()) ++first_;
    if (first_ < layers) {
      check_caches(keys_[first_], values_[first_]);
      caches_.page_size = keys_[first_].size(2);
    }
    for (size_t layer = 0; layer < layers; ++layer) {
      const Tensors& kept = states_[layer];
      caches_.states.push_back({});
      if (!kept.empty()) {
        caches_.keys.push_back({});
        caches_.values.push_back({});
        num_states_ = kept[0].size(0);
        continue;
      }
      caches_.keys.push_back(cache_of(keys_[layer], channels_[layer], "keys"));
      caches_.values.push_back(cache_of(values_[layer], channels_[layer], "values"));
      check_caches(keys_[layer], values_[layer]);
      const int64_t group = caches_.groups[layer];
      TORCH_CHECK_VALUE(0 <= group && group < kMostGroups, "there is no group ", group);
      if (first_of_.size() <= static_cast<size_t>(group)) first_of_.resize(group + 1);
      if (!first_of_[group]) first_of_[group] = layer;
      TORCH_CHECK_VALUE(keys_[layer].size(0) == first(group).size(0) && keys_[layer].size(2) == caches_.page_size &&
                            keys_[layer].scalar_type() == keys_[first_].scalar_type(),
                        "a cache of shape ", keys_[layer].sizes(), " has other pages than that of the first layer, ",
                        first(group).sizes());
    }
  }

  size_t layers() const { return keys_.size(); }
  int64_t num_states() const { return num_states_; }
  // Groups of layers, of which some may have none here, and the cache of a group's first layer.
  size_t groups() const { return first_of_.size(); }
  bool has(size_t group) const { return first_of_[group].has_value(); }
  const Tensor& first(size_t group) const { return keys_[*first_of_[group]]; }
  void check(size_t layer, const AttentionBlock& attention) const {
    check_keys(layer);
    TORCH_CHECK_VALUE(keys_[layer].size(1) == attention.kv_heads && channels_[layer] == attention.channels,
                      "a cache of shape ", keys_[layer].sizes(), " does not fit the model");
    TORCH_CHECK_VALUE(attention.chunk % caches_.page_size == 0, "pages of ", caches_.page_size,
                      " tokens do not divide chunks of ", attention.chunk);
  }
  void check(size_t layer, const LatentBlock& block, Dtype dtype) const {
    check_keys(layer);
    const Cache entries = entries_of(keys_[layer], block.latent, block.rotated);
    TORCH_CHECK_VALUE(entries.dtype == Dtype::int8 || entries.dtype == dtype, "a cache of ", keys_[layer].scalar_type(),
                      " does not fit the model");
  }
  void check(size_t layer, const DeltaBlock& block) { recurrent(layer, block.heads, block.keys, block.values, block.convolution); }
  void check(size_t layer, const SpaceBlock& block) { recurrent(layer, block.heads, block.state, block.channels, block.convolution); }
  void check(size_t layer, const ConvolutionBlock& block) {
    check_states(layer, 1);
    caches_.states[layer].tails = tails(states_[layer][0], block.convolution);
  }
  const Caches& with(const Tensors& tables) {
    caches_.tables.clear();
    for (const Tensor& table : tables) caches_.tables.push_back(contiguous_data<float>(table, at::kFloat, "cos_sin"));
    return caches_;
  }

 private:
  void check_keys(size_t layer) const {
    TORCH_CHECK_VALUE(states_[layer].empty(), "layer ", layer, " has states in the place of keys and values");
  }
  void check_states(size_t layer, size_t count) const {
    TORCH_CHECK_VALUE(states_[layer].size() == count, "layer ", layer, " has ", states_[layer].size(), " states, not ", count);
  }
  void recurrent(size_t layer, int64_t heads, int64_t keys, int64_t values, const Convolution& convolution) {
    check_states(layer, 2);
    const Tensor& memory = states_[layer][0];
    TORCH_CHECK_VALUE(memory.sizes() == at::IntArrayRef({num_states_, heads, keys, values}), "states of shape ",
                      memory.sizes(), " do not fit the model");
    caches_.states[layer] = {data_of<float>(memory, at::kFloat, memory.numel(), "states"),
                             tails(states_[layer][1], convolution)};
  }
  float* tails(const Tensor& t, const Convolution& convolution) const {
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef({num_states_, convolution.taps - 1, convolution.channels}),
                      "tails of shape ", t.sizes(), " do not fit the model");
    return data_of<float>(t, at::kFloat, t.numel(), "tails");
  }

  Tensors keys_, values_;
  std::vector<int64_t> channels_;
  std::vector<Tensors> states_;
  size_t first_ = 0;  // of the layers that have keys
  int64_t num_states_ = 0;
  std::vector<std::optional<size_t>> first_of_;
  Caches caches_;
};

using CachePointer = c10::intrusive_ptr<CacheHolder>;

class StackHolder : public torch::CustomClassHolder {
 public:
  StackHolder(int64_t isa, at::ScalarType dtype, int64_t hidden, double eps, double residual_scale)
      : isa_(isa), weights_(isa, dtype) {
    context_of(isa);
    stack_.shape = {dtype_of(dtype, "dtype"), size_of(hidden, "hidden"), static_cast<float>(eps),
                    static_cast<float>(residual_scale)};
    stack_.layer_norm = [width = hidden, eps](const Norm& norm, const float* x, int64_t rows, float* out) {
      torch_layer_norm(norm, width, eps, x, rows, out);
    };
    stack_.sparsemixer = torch_sparsemixer;
  }

  // Blocks in the order in which they run.
  void add_layer(std::vector<c10::intrusive_ptr<NamedBlock>> blocks) {
    TORCH_CHECK_VALUE(stack_.exits.empty(), "layers must be added before exits");
    Layer layer;
    for (const auto& block : blocks) layer.blocks.push_back(weights_.block(*block, stack_.shape.hidden));
    TORCH_CHECK_VALUE(layer.blocks.size() > 1 && (std::holds_alternative<NormBlock>(layer.blocks.front()) ||
                                                  std::holds_alternative<ReadBlock>(layer.blocks.front())),
                      "a layer must begin with a norm or a read and have another block behind it");
    bool attended = false, left = false;  // whether attention ran, and whether a block left something
    for (const Block& block : layer.blocks) {
      TORCH_CHECK_VALUE(!attends(block) || !attended, "a layer has one attention");
      TORCH_CHECK_VALUE(!leaves(block) || !left, "what a block leaves must be added before the next one runs");
      TORCH_CHECK_VALUE(left || !std::holds_alternative<OutNormBlock>(block), "an out_norm stands behind a block that leaves something");
      attended = attended || attends(block);
      left = leaves(block) || (left && std::holds_alternative<OutNormBlock>(block));
    }
    stack_.add(std::move(layer));
  }

  // After all layers, in rising order. Without a probe (`weight`) no row can exit. `kv_layouts`: empty where they are not quantised.
  void add_exit(int64_t after_layers, const Tensor& down, const Tensor& up, int64_t rank, const OptionalTensor& weight,
                const OptionalTensor& bias, const OptionalTensor& out, const OptionalTensor& out_bias, bool previous,
                bool entropy, Tensors kv, Tensors kv_bias, std::vector<std::vector<int64_t>> kv_layouts) {
    const Shape& shape = stack_.shape;
    const int64_t layers = static_cast<int64_t>(stack_.layers.size());
    TORCH_CHECK_VALUE((stack_.exits.empty() ? 0 : stack_.exits.back().after_layers) < after_layers &&
                          after_layers < layers && static_cast<int64_t>(kv.size()) == layers - after_layers &&
                          (kv_bias.empty() || kv_bias.size() == kv.size()) && kv_layouts.size() == kv.size(),
                      "an exit after ", after_layers, " of ", layers, " layers does not fit");
    TORCH_CHECK_VALUE(!stack_.most.states, "layers that keep states are run without exits");
    Exit exit{};
    exit.after_layers = after_layers;
    size_of(rank, "rank");
    exit.down = weights_.projection(down, {}, shape.hidden, rank, "the adapter's first factor");
    exit.up = weights_.projection(up, {}, rank, shape.hidden, "the adapter's second factor");
    exit.can_exit = weight.has_value();
    exit.previous = previous;
    exit.entropy = entropy;
    if (weight) {
      ProbeCall& probe = exit.probe;
      probe.hidden = shape.hidden;
      probe.inner = weight->dim() ? weight->size(0) : 0;
      TORCH_CHECK_VALUE(weight->dim() == 2 && weight->size(1) == shape.hidden * (1 + previous) + entropy && bias &&
                            bias->numel() == probe.inner && (out ? out->numel() : 1) == probe.inner &&
                            (!out || (out_bias && out_bias->numel() == 1)),
                        "the probe does not fit hidden size ", shape.hidden);
      probe.weight = floats(weights_.keep(weight), "weight");
      probe.bias = floats(weights_.keep(bias), "bias");
      probe.out = floats(weights_.keep(out), "out");
      probe.out_bias = out ? *floats(out_bias, "out_bias") : 0.0f;
    }
    for (int64_t behind = 0; behind < layers - after_layers; ++behind) {
      const Layer& layer = stack_.layers[after_layers + behind];
      const auto* attention = layer.find<AttentionBlock>();
      const Norm* before = layer.first_norm();
      TORCH_CHECK_VALUE(before && !before->centred && before->dtype == shape.dtype && attention &&
                            std::holds_alternative<AttentionBlock>(layer.blocks[1]) &&
                            attention->has_plain_keys(shape.dtype),
                        "keys and values behind an exit need layers that begin with a plain norm and plain attention");
      ProjectCall call{};
      call.hidden = shape.hidden;
      call.kv_heads = attention->kv_heads;
      call.channels = attention->channels;
      call.norm = before->weight;
      call.dtype = shape.dtype;
      call.eps = shape.eps;
      const OptionalTensor with = kv_bias.empty() ? OptionalTensor() : OptionalTensor(kv_bias[behind]);
      const Projection pair = weights_.projection(kv[behind], with, shape.hidden, 2 * attention->kv_width(), "keys and values",
                                         kv_layouts[behind]);
      call.kv = pair.weights;
      call.kv_bias = pair.bias;
      call.quant = pair.quant;
      call.k_norm = attention->k_norm;
      if (call.k_norm) call.k_norm_width = attention->norm_per_head ? attention->channels : attention->kv_width();
      exit.projections.push_back(call);
    }
    stack_.exits.push_back(std::move(exit));
  }

  // Heads and neurons are parts of those that the processes of a group have together; exits are not for these.
  void share(const c10::intrusive_ptr<SharedGroup>& group) {
    TORCH_CHECK_VALUE(stack_.exits.empty(), "layers that several processes share are run without their exits");
    stack_.add_up = [group, dtype = stack_.shape.dtype](void* x, int64_t count) { group->add_up(x, x, count, dtype); };
  }

  Tensor run(Tensor x, int64_t first, int64_t last, const CachePointer& cache, Tensors tables,
             const Tensor& positions, const Tensor& slots, const Tensor& query_start, const Tensor& context_len,
             const Tensor& block_table, const OptionalTensor& entropy, const OptionalTensor& keep,
             const OptionalTensor& cap, const OptionalTensor& skipped, const OptionalTensor& state_slots,
             const OptionalTensor& kept_slots) {
    TORCH_CHECK_VALUE(0 <= first && first <= last && last <= static_cast<int64_t>(stack_.layers.size()), "layers ", first,
                      " … ", last, " are not those of a model of ", stack_.layers.size());
    x = stream(x);
    const Caches& caches = caches_of(*cache, tables);
    Places places = places_of(x.size(0), *cache, tables[0], positions, slots, query_start, context_len, block_table);
    places.budget = budget_of(x.size(0), keep, cap, skipped);
    StateRuns runs{};
    if (stack_.most.states) {
      TORCH_CHECK_VALUE(state_slots && state_slots->numel() == context_len.numel(),
                        "there must be a slot of states for each of ", context_len.numel(), " sequences");
      runs = runs_of(x.size(0), cache->num_states(), *state_slots, kept_slots, query_start, context_len);
      places.runs = &runs;
    }
    run_layers(context_of(isa_), stack_, first, last, static_cast<float*>(x.data_ptr()), places, caches,
               floats(entropy, x.size(0), "entropy"));
    return x;
  }

  // What each row hands to the LM head. `counts` takes, in one piece: the depth of each row; per exit how many rows
  // decided and how many of them went on; rows launched between exits.
  Tensor run_with_exits(Tensor x, const CachePointer& cache, Tensors tables,
                        const Tensor& positions, const Tensor& slots, const Tensor& query_start,
                        const Tensor& context_len, const Tensor& block_table, const Tensor& thresholds,
                        const Tensor& counts, const OptionalTensor& keep, const OptionalTensor& cap,
                        const OptionalTensor& skipped) {
    x = stream(x);
    TORCH_CHECK_VALUE(!stack_.most.states, "layers that keep states are run without exits");
    const int64_t rows = x.size(0), exits = static_cast<int64_t>(stack_.exits.size());
    const Caches& caches = caches_of(*cache, tables);
    TORCH_CHECK_VALUE(thresholds.dim() == 2 && thresholds.size(0) == exits && thresholds.size(1) == rows,
                      "thresholds must have one entry for each of ", exits, " exits and ", rows, " rows");
    TORCH_CHECK_VALUE(counts.numel() == rows + 3 * exits + 1, "counts must have ", rows + 3 * exits + 1, " entries");
    Tensor out = x;
    ExitsCall call{static_cast<float*>(x.data_ptr()),
                   places_of(rows, *cache, tables[0], positions, slots, query_start, context_len, block_table)};
    call.places.budget = budget_of(rows, keep, cap, skipped);
    call.thresholds = contiguous_data<float>(thresholds, at::kFloat, "thresholds");
    call.out = [&] {
      out = at::empty(x.sizes(), x.options());
      return static_cast<float*>(out.data_ptr());
    };
    call.depths = const_cast<int64_t*>(contiguous_data<int64_t>(counts, at::kLong, "counts"));
    call.decisions = call.depths + rows;
    call.launched = call.decisions + 2 * exits;
    run_exits(context_of(isa_), stack_, call, caches);
    return out;
  }

 private:
  Tensor stream(const Tensor& x) const {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == stack_.shape.hidden && x.scalar_type() == at::kFloat,
                      "x must be float32 with ", stack_.shape.hidden, " columns, not ", x.scalar_type(), " of shape ",
                      x.sizes());
    check_host(x, "x");
    return x.contiguous();
  }

  const Caches& caches_of(CacheHolder& cache, const Tensors& tables) const {
    TORCH_CHECK_VALUE(cache.layers() == stack_.layers.size(), "there must be one cache per layer");
    TORCH_CHECK_VALUE(!tables.empty(), "there must be a rotary table");
    for (const Tensor& table : tables)
      TORCH_CHECK_VALUE(table.dim() == 2 && tables[0].dim() == 2 && table.size(0) == tables[0].size(0),
                        "rotary tables must be of one length, not ", table.sizes(), " and ", tables[0].sizes());
    for (size_t layer = 0; layer < stack_.layers.size(); ++layer) {
      if (const auto* delta = stack_.layers[layer].find<DeltaBlock>()) cache.check(layer, *delta);
      if (const auto* space = stack_.layers[layer].find<SpaceBlock>()) cache.check(layer, *space);
      if (const auto* convolution = stack_.layers[layer].find<ConvolutionBlock>()) cache.check(layer, *convolution);
      if (const auto* latents = stack_.layers[layer].find<LatentBlock>()) {
        cache.check(layer, *latents, stack_.shape.dtype);
        check_table(tables, latents->table, latents->rotated);
      }
      const auto* attention = stack_.layers[layer].find<AttentionBlock>();
      if (!attention) continue;
      cache.check(layer, *attention);
      check_table(tables, attention->table, attention->channels);
    }
    return cache.with(tables);
  }

  static void check_table(const Tensors& tables, int64_t number, int64_t channels) {
    TORCH_CHECK_VALUE(number < static_cast<int64_t>(tables.size()), "table ", number, " is not among ", tables.size());
    TORCH_CHECK_VALUE(tables[number].size(1) == channels, "rotary table of shape ", tables[number].sizes(),
                      " does not fit heads of ", channels);
  }

  Budget budget_of(int64_t rows, const OptionalTensor& keep, const OptionalTensor& cap,
                   const OptionalTensor& skipped) const {
    if (!keep) return {};
    const int64_t layers = static_cast<int64_t>(stack_.layers.size());
    TORCH_CHECK_VALUE(keep->numel() == rows * layers && cap && cap->sizes() == keep->sizes() && skipped &&
                          skipped->numel() == rows,
                      "a budget must have one entry for each of ", rows, " rows and ", layers, " layers");
    return {contiguous_data<float>(*keep, at::kFloat, "keep"), contiguous_data<int32_t>(*cap, at::kInt, "cap"),
            const_cast<int64_t*>(contiguous_data<int64_t>(*skipped, at::kLong, "skipped")), layers};
  }

  // `slots` and `block_table` may have a dimension of groups in front.
  Places places_of(int64_t rows, const CacheHolder& cache, const Tensor& cos_sin, const Tensor& positions,
                   const Tensor& slots, const Tensor& query_start, const Tensor& context_len,
                   const Tensor& block_table) const {
    const bool grouped = block_table.dim() == 3;
    TORCH_CHECK_VALUE(block_table.is_contiguous(), "block_table must be contiguous");
    TORCH_CHECK_VALUE(!grouped || (slots.dim() == 2 && slots.size(0) == block_table.size(0) &&
                                   static_cast<int64_t>(cache.groups()) <= slots.size(0)),
                      "slots and block_table must be those of ", cache.groups(), " groups, not of shapes ", slots.sizes(),
                      " and ", block_table.sizes());
    Places places{};
    places.rows = rows;
    for (size_t group = 0; group < cache.groups(); ++group) {
      if (!cache.has(group)) continue;
      const Tensor own_slots = grouped ? slots[group] : slots, table = grouped ? block_table[group] : block_table;
      const RowPlaces own = row_places(rows, positions, own_slots, cos_sin, cache.first(group));
      const SequencePlaces of = sequence_places(rows, query_start, context_len, table, cache.first(group),
                                                group ? 0 : stack_.widest_window());
      const Pages pages{own.slots, of.block_table, table.size(1)};
      if (!places.positions) {
        places = {rows, own.positions, own.slots, of.query_start, of.context_len, of.block_table, table.size(1),
                  of.sequences, {}};
        if (grouped) places.more.assign(slots.size(0) - 1, pages);
      }
      if (grouped && group) places.more[group - 1] = pages;
    }
    return places;
  }

  int64_t isa_;
  StackWeights weights_;
  Stack stack_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def("shared_bytes(int size) -> int", &SharedGroup::file_bytes);
  m.class_<SharedGroup>("SharedGroup")
      .def(torch::init<int64_t, const std::string&, int64_t, int64_t, double>())
      .def("sum", &SharedGroup::sum)
      .def("broadcast", &SharedGroup::broadcast)
      .def("gather", &SharedGroup::gather)
      .def("begin_swap", &SharedGroup::begin_swap)
      .def("finish_swap", &SharedGroup::finish_swap);
  m.class_<NamedBlock>("Block")
      .def(torch::init<std::string, c10::Dict<std::string, Tensor>, c10::Dict<std::string, int64_t>,
                       c10::Dict<std::string, double>, c10::Dict<std::string, c10::List<int64_t>>>());
  m.class_<CacheHolder>("Cache").def(
      torch::init<Tensors, Tensors, std::vector<int64_t>, std::vector<Tensors>, std::vector<int64_t>>(), "",
      {torch::arg("keys"), torch::arg("values"), torch::arg("channels"), torch::arg("states"),
       torch::arg("groups") = std::vector<int64_t>{}});
  m.class_<StackHolder>("Stack")
      .def(torch::init<int64_t, at::ScalarType, int64_t, double, double>())
      .def("add_layer", &StackHolder::add_layer)
      .def("add_exit", &StackHolder::add_exit)
      .def("share", &StackHolder::share)
      .def("run", &StackHolder::run)
      .def("run_with_exits", &StackHolder::run_with_exits);
}

}  // namespace dynamoe_cpu
