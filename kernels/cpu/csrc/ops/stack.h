// A run of layers and the exits between them, on plain pointers: the same operators that a caller could name one by
// one, without going back to the caller in between. Results are bitwise those of the single operators.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "ops/exits.h"
#include "ops/states.h"
#include "quant/quant.h"

namespace dynamoe_cpu {

struct Projection {
  const uint32_t* weights;  // null: there is none
  const float* bias;
  int64_t outputs;
  QuantLayer quant;  // where not empty it takes the place of weights and bias

  bool exists() const { return weights || !quant.empty(); }
};

// Of the residual stream or of what a block adds to it, in the model's dtype.
struct Norm {
  const void* weight;
  Dtype dtype;        // of the weight; where it is wider than the model's, rows are normed wide and rounded once
  const float* bias;  // of a layer norm, or null
  bool centred;       // a layer norm, whose weight is fp32
};

// Adds what the last block left to the residual stream, and norms the sum for the blocks behind.
struct NormBlock {
  Norm norm;
};

// Adds what the last block left to the residual stream; the blocks behind read the sum as it is.
struct ReadBlock {};

// The same; the blocks behind read what that block read.
struct AddBlock {};

// Norms what the last block left.
struct OutNormBlock {
  Norm norm;
};

// Adds what the last block left to the residual stream, and multiplies the sum.
struct ScaleBlock {
  const float* factor;
};

// Queries at position p are multiplied by 1 + rate · log(1 + floor((p + offset) / period)).
struct Growth {
  double rate;
  int64_t period, offset;

  float factor(int64_t position) const {
    return static_cast<float>(1.0 + rate * std::log1p(static_cast<double>((position + offset) / period)));
  }
};

// Grouped-query attention over the rows that are read.
struct AttentionBlock {
  int64_t heads, kv_heads, channels;
  Projection qkv, o;
  const void *q_norm, *k_norm;  // or null
  Dtype norm_dtype;             // of these, see Norm; the model's where there are none
  bool norm_per_head;           // of queries and keys; otherwise over their full width
  float scale;
  int64_t window;
  const float* sinks;  // or null, see AttentionCall
  int64_t table;       // of rotations, among those of the step
  float softcap, clip;  // 0: none; clipped behind norms over the full width, in front of norms per head
  Projection gate;      // none, or: the heads' outputs are multiplied by its sigmoid
  bool norm_after_rotation;
  std::optional<Growth> growth;
  int64_t chunk;            // of positions that see each other; 0: all do
  int64_t values;           // channels of a value, up to those of a key
  float value_scale;        // factor on the values
  const float* value_norm;  // of a value, or null
  bool values_are_keys;     // what the keys' projection makes
  bool gated_queries;       // in the projection each head's queries lie in front of its gate

  int64_t q_width() const { return heads * channels; }
  int64_t projected_width() const { return (gated_queries ? 2 : 1) * q_width(); }  // of queries and gates between them
  int64_t kv_width() const { return kv_heads * channels; }
  int64_t out_width() const { return heads * values; }  // what `o` reads
  // Whether values are something else than what stands behind the keys.
  bool makes_values() const { return values < channels || value_scale != 1.0f || value_norm || values_are_keys; }
  // Whether keys and values are made as `project_kv` makes them.
  bool has_plain_keys(Dtype dtype) const {
    return !makes_values() && !norm_after_rotation && clip == 0.0f && norm_dtype == dtype;
  }
  // How many positions a row sees at most, its own included; 0: all.
  int64_t reach() const { return window && chunk ? std::min(window, chunk) : std::max(window, chunk); }
};

// Multi-head latent attention over the rows that are read; see dynamic/model/attention/mla.py.
struct LatentBlock {
  int64_t heads, latent, plain, rotated, values;  // channels of a latent, of a query's parts, and of a head's values
  Projection q_a, q, kv_a, o;                     // without q_a, queries are made of the rows that are read
  const void *q_norm, *kv_norm;                   // of what q_a makes, or null; of latents
  const uint32_t *key_up, *value_up;              // of every head
  float eps, scale;
  bool interleaved;
  int64_t window;
  int64_t table;  // of rotations, among those of the step

  int64_t query_width() const { return heads * (plain + rotated); }
  int64_t entry_channels() const { return latent + rotated; }
};

// A convolution of every channel, without what depends on the rows.
struct Convolution {
  int64_t channels;
  int taps;
  const float *weights, *bias;   // (W, X), and (X) or null
  std::vector<Columns> columns;  // where the channels are in the projection that it reads
};

// Linear attention with the delta rule over the rows that are read; see dynamic/model/attention/gated_delta.py.
struct DeltaBlock {
  int64_t groups, heads, keys, values;  // channels of a head's keys and values
  bool by_group;                        // how the outputs of both projections are ordered
  Projection qkvz, ba, out;
  Convolution convolution;
  const float *decay_rate, *decay_bias;
  const void* norm;  // of a head's output, in the model's dtype
  float length_eps;

  int64_t per_group() const { return heads / groups; }
  int64_t key_width() const { return groups * keys; }
  int64_t value_width() const { return heads * values; }
  // Where a head's gate of the output, what becomes its step, and what becomes its decay begin in the projections.
  int64_t gate_at(int64_t head) const {
    if (!by_group) return convolution.channels + head * values;
    const int64_t of_groups = 2 * (keys + per_group() * values), behind = 2 * keys + per_group() * values;
    return head / per_group() * of_groups + behind + head % per_group() * values;
  }
  int64_t step_at(int64_t head) const {
    return by_group ? head / per_group() * 2 * per_group() + head % per_group() : head;
  }
  int64_t decay_at(int64_t head) const { return step_at(head) + (by_group ? per_group() : heads); }
};

// A state space over the rows that are read; see dynamic/model/attention/mamba2.py.
struct SpaceBlock {
  int64_t groups, heads, channels, state;
  Projection into, out;
  Convolution convolution;
  const float *decay_rate, *step_bias, *skip, *norm;

  int64_t width() const { return heads * channels; }
  int64_t matrices() const { return groups * state; }
};

// A gated convolution over the rows that are read; see dynamic/model/attention/short_conv.py.
struct ConvolutionBlock {
  Projection gates, out;
  Convolution convolution;
};

// Experts, without what depends on the rows.
struct Ffn {
  ExpertsCall call;
  std::optional<QuantExperts> quant;  // takes the place of the call's weights
};

// Where a mixture and its router read the residual stream itself, beside a shared expert over the rows that are read.
struct Apart {
  const void* router;  // weight of the norm in front of the router, in the model's dtype
  float router_eps;
  Norm in, out, shared_out;  // in front of the mixture, of what it leaves, and of what the shared expert leaves
};

// A mixture of experts over the rows that are read.
struct ExpertsBlock {
  Projection router;         // none: every expert has weight 1
  bool float32_logits;       // the router runs in float32, whatever the rows are
  RouteCall rule;            // what does not depend on the rows
  const float* scale;        // contribution of each expert per unit of weight, or null
  std::optional<double> jitter;  // of the rule `sparsemixer`, which takes the place of the score
  int64_t always_on;         // experts in front of those that are chosen, with weight 1
  bool weight_on_input;      // of rules that choose one expert: the weight multiplies what it reads
  Ffn experts;
  std::optional<Ffn> shared;  // an expert that every row uses beside them
  Projection shared_gate;     // none: with weight 1; otherwise with the sigmoid of this
  float shared_scale;
  std::optional<Apart> apart;

  int64_t slots() const { return rule.top_k + always_on; }  // of a row
};

using Block = std::variant<NormBlock, ReadBlock, AddBlock, OutNormBlock, ScaleBlock, AttentionBlock, LatentBlock,
                           DeltaBlock, SpaceBlock, ConvolutionBlock, ExpertsBlock>;

inline bool keeps_states(const Block& block) {
  return std::holds_alternative<DeltaBlock>(block) || std::holds_alternative<SpaceBlock>(block) ||
         std::holds_alternative<ConvolutionBlock>(block);
}
// Attention, or what a layer has in its place.
inline bool attends(const Block& block) {
  return std::holds_alternative<AttentionBlock>(block) || std::holds_alternative<LatentBlock>(block) ||
         keeps_states(block);
}
// Whether it leaves something that is to be added to the residual stream.
inline bool leaves(const Block& block) { return attends(block) || std::holds_alternative<ExpertsBlock>(block); }

struct Layer {
  std::vector<Block> blocks;

  // The norm that it begins with, or null.
  const Norm* first_norm() const {
    const NormBlock* found = std::get_if<NormBlock>(&blocks.front());
    return found ? &found->norm : nullptr;
  }
  // The first block of a kind, or null.
  template <class Kind>
  const Kind* find() const {
    for (const Block& block : blocks)
      if (const Kind* found = std::get_if<Kind>(&block)) return found;
    return nullptr;
  }
};

struct Shape {
  Dtype dtype;
  int64_t hidden;
  float eps, residual_scale;
};

// How many experts rows may use in each layer, (T, layers), and how many they went without. Without `keep`: no limit.
struct Budget {
  const float* keep;
  const int32_t* cap;
  int64_t* skipped;        // (T), added to
  int64_t layers;
  const int64_t* numbers;  // the row of the step that each row is, or null: they are the same
};

// What of Places is another in a group of layers that has pages of its own.
struct Pages {
  const int64_t* slots;
  const int32_t* block_table;
  int64_t block_table_stride;
};

// Where rows live, as AttentionCall wants it, and what they may use.
struct Places {
  int64_t rows;
  const int64_t *positions, *slots;
  const int32_t *query_start, *context_len, *block_table;
  int64_t block_table_stride, sequences;
  Budget budget;
  const StateRuns* runs = nullptr;  // of layers that keep states
  std::vector<Pages> more = {};  // of groups of layers behind the first; none: all have the same pages

  // With the pages of a group; it needs `more` itself no longer.
  Places of_group(const Pages& pages) const {
    Places own = *this;
    own.slots = pages.slots;
    own.block_table = pages.block_table;
    own.block_table_stride = pages.block_table_stride;
    own.more.clear();
    return own;
  }
};

// What a layer keeps of sequences, by slot: its memory, which a convolution alone has not, and tails of convolutions.
struct States {
  float *memory, *tails;
};

// The caches of all layers, and the tables of rotations.
struct Caches {
  std::vector<Cache> keys, values;
  std::vector<States> states;
  std::vector<int64_t> groups;  // by layer: of those whose pages have the same numbers
  int64_t page_size;
  std::vector<const float*> tables;
};

struct Exit {
  int64_t after_layers;
  Projection down, up;                // of the exit head's adapter
  bool can_exit;                      // whether it has a probe
  bool previous, entropy;             // what the probe looks at beside the residual stream
  ProbeCall probe;                    // weights
  std::vector<ProjectCall> projections;  // weights, one per layer behind the exit
};

// What the blocks of a model have at most, or whether any has it.
struct Most {
  int64_t qkv = 0, queries = 0, keys = 0, gates = 0, channels = 0;  // of attention; gates and keys of blocks that need room
  int64_t experts = 0, slots = 0;                                   // of mixtures
  int64_t mixed = 0, state_heads = 0, remembered = 0;               // of convolutions and states, in float32
  bool float32_logits = false, shared = false, always_on = false, other_input = false, layer_norm = false;
  bool states = false;

  void count(const Block& block);
};

struct Stack {
  Shape shape;
  std::vector<Layer> layers;
  std::vector<Exit> exits;  // rising
  // Where several processes share heads and neurons: makes so many numbers, of the shape's dtype, the sum of everybody's.
  std::function<void(void*, int64_t)> add_up;
  // Layer norms of contiguous rows, both fp32: torch's own.
  std::function<void(const Norm&, const float*, int64_t, float*)> layer_norm;
  // A routing rule that is torch's too, with its `jitter`.
  std::function<void(const RouteCall&, double)> sparsemixer;
  Most most;

  // Behind how many tokens no layer sees anything; 0: one sees all.
  int64_t widest_window() const {
    int64_t widest = 0;
    for (const Layer& layer : layers)
      for (const Block& block : layer.blocks) {
        const auto* attention = std::get_if<AttentionBlock>(&block);
        const auto* latents = std::get_if<LatentBlock>(&block);
        if (!attention && !latents) continue;
        const int64_t reach = attention ? attention->reach() : latents->window;
        if (!reach) return 0;
        widest = std::max(widest, reach);
      }
    return widest;
  }

  void add(Layer layer) {
    for (const Block& block : layer.blocks) most.count(block);
    layers.push_back(std::move(layer));
  }
};

// One projection of rows.
void project(const Context& context, const Shape& shape, const Projection& projection, const Rows& x, int64_t inputs,
             int64_t rows, void* out);
// x += scale * added
void add_pending(const Context& context, const Shape& shape, const void* pending, float scale, float* x, int64_t rows);

// A fusion boundary, where a run of layers meets its neighbours: the sum at its end and the norm behind it are one pass
// over the rows, when the next run is of the same rows and follows at once.
struct Boundary {
  bool normed = false;     // the run before has done the first norm
  bool norm_next = false;  // do that of the layer behind, if it begins with one
};

// Layers [first, last) on a residual stream of float32, in place. `entropy`, if given, takes the mean entropy of the
// layers' routers. Returns whether the first norm of the layer behind is done.
bool run_layers(const Context& context, const Stack& stack, int64_t first, int64_t last, float* x, const Places& places,
                const Caches& caches, float* entropy, Boundary boundary = {});

// All layers, where rows may exit. As long as none does, x is what the rows hand to the LM head.
struct ExitsCall {
  float* x;
  Places places;
  const float* thresholds;      // (exits, rows); +inf stays
  std::function<float*()> out;  // (rows, hidden), wanted once a row exits: what each row hands to the LM head
  int64_t* depths;              // (rows): layers that ran for it
  int64_t* decisions;           // (exits, 2): rows with a finite threshold that reached the exit, and that continued
  int64_t* launched;            // (exits + 1): rows that ran the layers up to each exit and behind the last
};
void run_exits(const Context& context, const Stack& stack, const ExitsCall& call, const Caches& caches);

}  // namespace dynamoe_cpu
