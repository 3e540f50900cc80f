// A run of layers and the exits between them, on plain pointers: the same operators that a caller could name one by
// one, without going back to the caller in between. Results are bitwise those of the single operators.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "ops/exits.h"
#include "quant/quant.h"

namespace dynamoe_cpu {

struct Projection {
  const uint32_t* weights;  // null: there is none
  const float* bias;
  int64_t outputs;
  QuantLayer quant;  // where not empty it takes the place of weights and bias

  bool exists() const { return weights || !quant.empty(); }
};

// Adds what the last block left to the residual stream, and norms the sum.
struct NormBlock {
  const void* weight;
};

// Grouped-query attention over the normed rows.
struct AttentionBlock {
  int64_t heads, kv_heads, channels;
  Projection qkv, o;
  const void *q_norm, *k_norm;  // or null
  bool norm_per_head;           // of queries and keys; otherwise over their full width
  float scale;
  int64_t window;
  const float* sinks;  // or null, see AttentionCall

  int64_t q_width() const { return heads * channels; }
  int64_t kv_width() const { return kv_heads * channels; }
};

// Experts, without what depends on the rows.
struct Ffn {
  ExpertsCall call;
  std::optional<QuantExperts> quant;  // takes the place of the call's weights
};

// A mixture of experts over the normed rows.
struct ExpertsBlock {
  Projection router;         // none: every expert has weight 1
  bool float32_logits;       // the router runs in float32, whatever the rows are
  RouteCall rule;            // what does not depend on the rows
  const float* scale;        // contribution of each expert per unit of weight, or null
  Ffn experts;
  std::optional<Ffn> shared;  // an expert that every row uses beside them
  Projection shared_gate;     // none: with weight 1; otherwise with the sigmoid of this
};

using Block = std::variant<NormBlock, AttentionBlock, ExpertsBlock>;

struct Layer {
  std::vector<Block> blocks;  // a norm, then others

  const NormBlock& first_norm() const { return std::get<NormBlock>(blocks.front()); }
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

// Where rows live, as AttentionCall wants it, and what they may use.
struct Places {
  int64_t rows;
  const int64_t *positions, *slots;
  const int32_t *query_start, *context_len, *block_table;
  int64_t block_table_stride, sequences;
  Budget budget;
};

// The caches of all layers.
struct Caches {
  std::vector<Cache> keys, values;
  int64_t page_size;
  const float* cos_sin;
};

struct Exit {
  int64_t after_layers;
  Projection down, up;                // of the exit head's adapter
  bool can_exit;                      // whether it has a probe
  bool previous, entropy;             // what the probe looks at beside the residual stream
  ProbeCall probe;                    // weights
  std::vector<ProjectCall> projections;  // weights, one per layer behind the exit
};

struct Stack {
  Shape shape;
  std::vector<Layer> layers;
  std::vector<Exit> exits;  // rising
  // Where several processes share heads and neurons: makes so many numbers, of the shape's dtype, the sum of everybody's.
  std::function<void(void*, int64_t)> add_up;
  int64_t most_qkv = 0, most_queries = 0, most_experts = 0, most_top_k = 0;  // of any block
  bool float32_logits = false, shared = false;                               // whether any block has them

  // Behind how many tokens no layer sees anything; 0: one sees all.
  int64_t widest_window() const {
    int64_t widest = 0;
    for (const Layer& layer : layers)
      for (const Block& block : layer.blocks)
        if (const auto* attention = std::get_if<AttentionBlock>(&block)) {
          if (!attention->window) return 0;
          widest = std::max(widest, attention->window);
        }
    return widest;
  }

  void add(Layer layer) {
    for (const Block& block : layer.blocks) {
      if (const auto* attention = std::get_if<AttentionBlock>(&block)) {
        most_qkv = std::max(most_qkv, attention->qkv.outputs);
        most_queries = std::max(most_queries, attention->q_width());
      } else if (const auto* experts = std::get_if<ExpertsBlock>(&block)) {
        most_experts = std::max(most_experts, experts->router.outputs);
        most_top_k = std::max(most_top_k, experts->rule.top_k);
        float32_logits |= experts->float32_logits;
        shared |= experts->shared.has_value();
      }
    }
    layers.push_back(std::move(layer));
  }
};

// One projection of contiguous rows.
void project(const Context& context, const Shape& shape, const Projection& projection, const void* x, int64_t inputs,
             int64_t rows, void* out);
// x += scale * added
void add_pending(const Context& context, const Shape& shape, const void* pending, float scale, float* x, int64_t rows);

// A fusion boundary, where a run of layers meets its neighbours: the sum at its end and the norm behind it are one pass over the rows, when
// the next run is of the same rows and follows at once.
struct Boundary {
  bool normed = false;     // the run before has done the first norm
  bool norm_next = false;  // do that of the layer behind
};

// Layers [first, last) on a residual stream of float32, in place. `entropy`, if given, takes the mean entropy of the
// layers' routers.
void run_layers(const Context& context, const Stack& stack, int64_t first, int64_t last, float* x, const Places& places,
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
