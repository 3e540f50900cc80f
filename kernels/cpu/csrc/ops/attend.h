// What a task of attention computes for one key/value head; see attention.cpp, which alone includes this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/key_block.h"
#include "ops/operators.h"
#include "ops/packed.h"

namespace dynamoe_cpu {

namespace {

constexpr int64_t kStretch = 4 * kKeyBlock;
constexpr int64_t kQueryRows = 48;  // rows × query heads of a task
constexpr int64_t kFewQueries = 12;  // of a key head, up to which a task takes several of these

struct Task {
  int64_t sequence, first_head, heads, first_row, rows;  // key/value heads
  int64_t first_index;                                   // of the first row, in the cache
};

// Sizes and addresses that all tasks share.
struct Plan {
  const Kernels& kernels;
  const AttentionCall& call;
  Dtype dtype;  // of the score product: fp32 unless queries and keys are both bf16
  const Gemm& score_gemm;
  int64_t group, words, blocks;  // query heads per key head; words of a key, blocks of 32 channels of values

  Plan(const Kernels& kernels, const AttentionCall& call, Dtype dtype)
      : kernels(kernels),
        call(call),
        dtype(dtype),
        score_gemm(kernels.gemm[static_cast<int>(dtype)]),
        group(call.heads / call.kv_heads),
        words(score_gemm.words(call.channels)),
        blocks(ceil_div(call.value_channels(), kBlockOutputs)) {}

  bool coded() const { return call.keys.dtype == Dtype::int8; }
  // As they lie in the cache.
  int64_t key_bytes() const {
    if (coded() && call.latent) return call.latent + latent_tail(call.channels - call.latent);
    return call.channels * element_bytes(call.keys.dtype);
  }
  bool scores_directly(int64_t queries) const {
    return queries <= kernels.scored_rows && dtype == Dtype::bf16 && !coded() &&
           call.channels % (16 * score_gemm.inputs_per_word) == 0;
  }
  int64_t first_visible(int64_t index) const {
    return call.window ? std::max<int64_t>(0, index - call.window + 1) : 0;
  }
  int64_t first_key(const Task& task) const { return first_visible(task.first_index); }
  int64_t end_key(const Task& task) const { return task.first_index + task.rows; }
  // What a task reads first.
  void first_rows(const Task& task, KeyRows& rows) const {
    KeyBlock block;
    block.locate(call, task.sequence, first_key(task) / kKeyBlock * kKeyBlock, first_key(task), end_key(task));
    block.rows_of(call, task.first_head, rows);
  }
  PackedTiles tiles(int64_t queries) const { return {score_gemm, queries, call.channels}; }
  // Packed queries, and behind them the same widened, where they must be.
  int64_t query_bytes(int64_t queries) const {
    const int64_t wide = dtype != call.q.dtype ? queries * call.channels * static_cast<int64_t>(sizeof(float)) : 0;
    return tiles(queries).bytes() + ceil_div(wide, 64) * 64;
  }
  int64_t state_floats(int64_t queries) const { return queries * (2 + blocks * kBlockOutputs); }
};

// What a task has gathered of some stretch: per tile of queries, the states (max, sum), then the accumulators
// [channel / 32][query][32].
struct Partial {
  float* data;
  int64_t blocks;
  float* state(int64_t query) const { return data + query * 2; }
  float* accumulator(int64_t queries, const Tiles& tiles, int64_t tile) const {
    return data + queries * 2 + tiles.start(tile) * blocks * kBlockOutputs;
  }
};

// Some of a task's queries.
struct Share {
  int64_t index = 0, count = 1;
  bool has(int64_t query, int64_t queries) const { return query * count / queries == index; }
};

void clear(const Partial& partial, int64_t queries) {
  std::memset(partial.data, 0, queries * (2 + partial.blocks * kBlockOutputs) * sizeof(float));
  for (int64_t q = 0; q < queries; ++q) partial.state(q)[0] = -std::numeric_limits<float>::infinity();
}

class Attend {
 public:
  // `packed` has room for query_bytes().
  Attend(const Plan& plan, const Task& task, int64_t kv_head, char* packed)
      : plan_(plan),
        task_(task),
        kv_head_(kv_head),
        packed_(packed),
        queries_(task.rows * plan.group),
        tiles_(plan.tiles(queries_)) {
    const AttentionCall& call = plan.call;
    const bool widen = plan.dtype != call.q.dtype;
    float* wide = reinterpret_cast<float*>(packed + tiles_.bytes());
    for (int64_t t = 0; t < tiles_.count; ++t) {
      const void* rows[kMostTileRows];
      for (int r = 0; r < tiles_.size(t); ++r) {
        const int64_t query = tiles_.start(t) + r;
        const int64_t element = (kv_head * plan.group + query % plan.group) * call.channels;
        rows[r] = static_cast<const char*>(call.q.at(task.first_row + query / plan.group)) +
                  element * element_bytes(call.q.dtype);
        if (!widen) continue;
        float* row = wide + query * call.channels;
        plan.kernels.widen(static_cast<const uint16_t*>(rows[r]), row, static_cast<int>(call.channels));
        rows[r] = row;
      }
      plan.score_gemm.pack(tiles_.at(packed, t), rows, tiles_.size(t), static_cast<int>(call.channels));
    }
    keys_ = scratch(Buffer::keys).get<uint32_t>(2 * plan.words * kBlockOutputs + 2 * kKeyBlock * call.channels);
    scores_ = scratch(Buffer::scores).get<float>(2 * plan.score_gemm.tile_rows * kKeyBlock);
  }

  int64_t queries() const { return queries_; }
  int64_t first_key() const { return plan_.first_key(task_); }
  int64_t end_key() const { return plan_.end_key(task_); }

  // Takes the keys from index `first` on, as far as the rows may see them. `ahead` is what comes next, or null.
  void take(int64_t first, KeyRows& rows, const Partial& partial, const KeyRows* ahead) {
    const bool direct = tiles_.count == 1 && plan_.scores_directly(queries_);
    const bool values_follow = ahead && !plan_.call.latent;  // rather than being the keys
    if (direct) {
      if (!sees(first, 0)) return;
      plan_.kernels.score_keys(static_cast<int>(queries_), rows.keys(), static_cast<int>(plan_.words),
                               packed_, scores_, ahead ? ahead->keys() : nullptr);
    } else {
      load(rows, ahead);
      if (plan_.coded() && values_follow) ask_for(ahead->values(), kKeyBlock);
    }
    for (int64_t t = 0; t < tiles_.count; ++t) {
      if (!sees(first, t)) continue;
      if (!direct) score(t);
      weigh(first, rows, t, partial, t || plan_.coded() || !values_follow ? nullptr : ahead->values());
    }
  }

  void join(const Partial& partial, const Partial& later, const Share& share) {
    for (int64_t t = 0; t < tiles_.count; ++t)
      for (int r = 0; r < tiles_.size(t); ++r) {
        const int64_t query = tiles_.start(t) + r;
        if (!share.has(query, queries_)) continue;
        if (later.state(query)[0] == -std::numeric_limits<float>::infinity()) continue;  // saw nothing of it
        plan_.kernels.softmax_merge(partial.state(query), partial.accumulator(queries_, tiles_, t) + r * kBlockOutputs,
                                    later.state(query), later.accumulator(queries_, tiles_, t) + r * kBlockOutputs,
                                    static_cast<int>(plan_.blocks), tiles_.size(t) * kBlockOutputs);
      }
  }

  void write(const Partial& partial, const Share& share) {
    const AttentionCall& call = plan_.call;
    float* scaled = scores_;
    for (int64_t t = 0; t < tiles_.count; ++t)
      for (int r = 0; r < tiles_.size(t); ++r) {
        const int64_t query = tiles_.start(t) + r;
        if (!share.has(query, queries_)) continue;
        const int64_t row = task_.first_row + query / plan_.group, head = kv_head_ * plan_.group + query % plan_.group;
        const float inverse = inverse_sum(partial.state(query), row, head);
        const float* accumulator = partial.accumulator(queries_, tiles_, t) + r * kBlockOutputs;
        char* out = static_cast<char*>(call.out) +
                    (row * call.heads + head) * call.value_channels() * element_bytes(call.q.dtype);
        for (int64_t block = 0; block < plan_.blocks; ++block) {
          const float* from = accumulator + block * tiles_.size(t) * kBlockOutputs;
          for (int c = 0; c < kBlockOutputs; ++c) scaled[c] = from[c] * inverse;
          const int64_t width = std::min<int64_t>(kBlockOutputs, call.value_channels() - block * kBlockOutputs);
          plan_.kernels.convert(scaled, out + block * kBlockOutputs * element_bytes(call.q.dtype), static_cast<int>(width),
                                call.q.dtype);
        }
      }
  }

 private:
  // What the accumulator of a row and query head is multiplied with; the logarithm of its sum goes out where it is wanted.
  float inverse_sum(const float* state, int64_t row, int64_t head) const {
    const AttentionCall& call = plan_.call;
    float top = state[0], total = state[1], shrink = 1.0f;
    if (call.sinks) {
      const float sink = call.sinks[head];
      top = std::max(top, sink);
      shrink = std::exp(state[0] - top);
      total = total * shrink + std::exp(sink - top);
    }
    if (call.lse) call.lse[row * call.heads + head] = top + std::log(total);
    return shrink / total;
  }

  // Keys of a block as weights of the score product, and its values as `weigh` wants them.
  void load(KeyRows& block, const KeyRows* ahead) {
    const AttentionCall& call = plan_.call;
    const int channels = static_cast<int>(call.channels);
    float* wide = reinterpret_cast<float*>(keys_ + 2 * plan_.words * kBlockOutputs);
    const bool coded = plan_.coded() && !call.latent, widened = !plan_.coded() && call.keys.dtype != plan_.dtype;
    if (plan_.coded() && call.latent) decode_entries(block, reinterpret_cast<char*>(wide));
    for (int i = 0; i < (coded ? 2 : widened ? 1 : 0) * kKeyBlock; ++i, wide += channels) {
      if (coded) plan_.kernels.decode_head(block.rows[i], wide, channels);
      else plan_.kernels.widen(static_cast<const uint16_t*>(block.rows[i]), wide, channels);
      block.rows[i] = wide;
    }
    constexpr int kPart = 16;  // of the keys, so that few requests wait at a time
    for (int i = 0; i < kKeyBlock; i += kPart) {
      if (ahead) ask_for(ahead->keys() + i, kPart);
      uint32_t* half = keys_ + i / kBlockOutputs * plan_.words * kBlockOutputs;
      plan_.kernels.transpose_words(half + i % kBlockOutputs, kBlockOutputs, block.keys() + i, kPart,
                                    channels * element_bytes(plan_.dtype));
    }
  }

  // Entries as keys of the score product, and as values. `memory` has room for twice as many floats.
  void decode_entries(KeyRows& block, char* memory) {
    const Kernels& kernels = plan_.kernels;
    const int64_t latent = plan_.call.latent, rotated = plan_.call.channels - latent;
    const int64_t bytes = element_bytes(plan_.dtype), row_bytes = plan_.call.channels * bytes;
    float* wide = reinterpret_cast<float*>(memory + kKeyBlock * row_bytes);
    for (int i = 0; i < kKeyBlock; ++i, memory += row_bytes) {
      const char* entry = static_cast<const char*>(block.rows[i]);
      const char* key = entry + latent + kScaleBytes;
      if (plan_.dtype == Dtype::fp32) {
        float* row = reinterpret_cast<float*>(memory);
        kernels.decode_head(entry, row, static_cast<int>(latent));
        kernels.widen(reinterpret_cast<const uint16_t*>(key), row + latent, static_cast<int>(rotated));
      } else {
        kernels.decode_head(entry, wide, static_cast<int>(latent));
        kernels.convert(wide, memory, static_cast<int>(latent), Dtype::bf16);
        std::memcpy(memory + latent * bytes, key, rotated * bytes);
      }
      block.rows[i] = block.rows[kKeyBlock + i] = memory;
    }
  }

  // Inlined, because GCC drops calls of functions that only prefetch.
  __attribute__((always_inline)) void ask_for(const void* const* rows, int count) const {
    const int64_t bytes = plan_.key_bytes();
    for (int i = 0; i < count; ++i)
      for (int64_t byte = 0; byte < bytes; byte += 64)
        __builtin_prefetch(static_cast<const char*>(rows[i]) + byte, 0, 2);
  }

  int64_t index_of(int64_t query) const { return task_.first_index + query / plan_.group; }  // in the cache

  // Whether a tile's rows see any of the 64 keys from `first` on.
  bool sees(int64_t first, int64_t t) const {
    return index_of(tiles_.start(t + 1) - 1) >= first &&
           plan_.first_visible(index_of(tiles_.start(t))) < first + kKeyBlock;
  }

  // Scores of a tile with the loaded keys, [half][query][32].
  void score(int64_t t) {
    const int size = tiles_.size(t), words = static_cast<int>(plan_.words);
    const char* packed = tiles_.at(packed_, t);
    for (int half = 0; half < 2; ++half)
      plan_.score_gemm.run(size, packed, keys_ + half * words * kBlockOutputs, words,
                           scores_ + half * size * kBlockOutputs, false, {packed, 0});
  }

  void weigh(int64_t block, const KeyRows& keys, int64_t t, const Partial& partial, const void* const* ahead) {
    const int size = tiles_.size(t);
    const int64_t half_stride = size * kBlockOutputs;
    float *probabilities = scores_ + size * kKeyBlock, *accumulator = partial.accumulator(queries_, tiles_, t);  // [query][64]
    for (int r = 0; r < size; ++r) {
      const int64_t index = index_of(tiles_.start(t) + r);
      const int first = static_cast<int>(std::clamp<int64_t>(plan_.first_visible(index) - block, 0, kKeyBlock));
      const int last = static_cast<int>(std::clamp<int64_t>(index + 1 - block, 0, kKeyBlock));
      if (first >= last) {
        std::memset(probabilities + r * kKeyBlock, 0, kKeyBlock * sizeof(float));
      } else {
        float *scores = scores_ + r * kBlockOutputs, cap = plan_.call.softcap, scale = cap > 0.0f ? 1.0f : plan_.call.scale;
        if (cap > 0.0f) plan_.kernels.cap_scores(scores, half_stride, plan_.call.scale, cap);
        plan_.kernels.softmax_step(scores, half_stride, first, last, scale, partial.state(tiles_.start(t) + r),
                                   probabilities + r * kKeyBlock, accumulator + r * kBlockOutputs,
                                   static_cast<int>(plan_.blocks), size * kBlockOutputs);
      }
    }
    plan_.kernels.weigh_values(size, probabilities, keys.values(), keys.begin, keys.end, values_dtype(),
                               static_cast<int>(plan_.call.value_channels()), accumulator, ahead);
  }

  Dtype values_dtype() const {  // as `load` leaves them
    if (plan_.call.latent && plan_.coded()) return plan_.dtype;
    return plan_.coded() ? Dtype::fp32 : plan_.call.values.dtype;
  }

  const Plan& plan_;
  const Task& task_;
  int64_t kv_head_;
  char* packed_;
  int64_t queries_;
  PackedTiles tiles_;
  uint32_t* keys_;
  float* scores_;
};

}  // namespace

}  // namespace dynamoe_cpu
