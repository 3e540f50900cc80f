// What the files of the stack share: a run of layers, the memory between its operators, and its kinds of blocks.
#pragma once

#include <deque>

#include "ops/parallel.h"
#include "ops/stack.h"

namespace dynamoe_cpu {

// What lies between the operators of a layer. All rows are of the model's dtype unless said otherwise.
struct Work {
  char *read, *pending;                        // what blocks read, what the last one adds to the residual stream
  char *qkv, *q, *attended, *values, *gates;   // of attention
  char *logits, *shared, *shared_gates, *other;  // of mixtures; `other`: what a router or experts read in place of `read`
  float *mixed, *decays, *steps, *remembered;  // of recurrent states: convolved, and what heads read there
  float *wide, *weights, *chosen_weights;      // rows in float32; of the experts in use, and of those that were chosen
  int32_t *ids, *chosen_ids, *counts;
  int64_t* origin;  // of every row: position 0
  float* upright;   // the rotation by nothing

  Work(Arena& arena, const Stack& stack, int64_t rows);
};

// Chunks of sequences as sequences of their own.
struct Chunks {
  const Places* whole;
  int64_t size;
  std::vector<int32_t> query_start, context_len, tables;
  Places places;

  Chunks(const Places& whole, int64_t size, int64_t page_size);
};

// Some layers over the rows of a step.
class Run {
 public:
  Run(const Context& context, const Stack& stack, const Places& places, const Caches& caches, const Work& work, float* x)
      : context(context), stack(stack), shape(stack.shape), places(places), caches(caches), work(work), x(x) {
    for (const Pages& pages : places.more) groups_.push_back(places.of_group(pages));
  }

  const Context& context;
  const Stack& stack;
  const Shape& shape;
  const Places& places;
  const Caches& caches;
  const Work& work;
  float* const x;  // the residual stream

  int64_t rows() const { return places.rows; }
  int64_t bytes() const { return element_bytes(shape.dtype); }
  Rows rows_of(const void* data, int64_t width) const { return {data, width, shape.dtype}; }
  // Where rows live in a layer.
  const Places& of(int64_t layer) const {
    const int64_t group = caches.groups[layer];
    return group && !groups_.empty() ? groups_[group - 1] : places;
  }
  const Places& chunks(const Places& whole, int64_t size) {
    for (const Chunks& made : chunks_)
      if (made.whole == &whole && made.size == size) return made.places;
    return chunks_.emplace_back(whole, size, caches.page_size).places;
  }

 private:
  std::vector<Places> groups_;  // behind the first
  std::deque<Chunks> chunks_;  // which stay where they are
};

// One row of the model's dtype, normed; `out` may be `row`.
void norm_row(const Run& run, const void* weight, Dtype weight_dtype, const void* row, int64_t width, void* out);
// All of what a block leaves, in place.
void norm_rows(const Run& run, const Norm& norm, char* rows);

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// From what is read to what attention adds to the residual stream.
void attend(Run& run, const AttentionBlock& block, int64_t layer);
void attend(Run& run, const LatentBlock& block, int64_t layer);
void attend(Run& run, const DeltaBlock& block, int64_t layer);
void attend(Run& run, const SpaceBlock& block, int64_t layer);
void attend(Run& run, const ConvolutionBlock& block, int64_t layer);
// The same of experts. `entropy`, if given, takes `share` of each router's.
void feed_forward(Run& run, const ExpertsBlock& block, int64_t layer, float* entropy, float share);

}  // namespace dynamoe_cpu
