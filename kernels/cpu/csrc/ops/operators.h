// The operators, on plain pointers. ops.cpp checks tensors and calls these.
//
// Strides of rows are in elements. Shapes as in types.py: T rows, D hidden size, E experts, F expert width, K experts
// per row, H query heads, G key/value heads, C channels of a head, P tokens per page, S sequences.
#pragma once

#include <cstring>

#include "isa/kernels.h"

namespace dynamoe_cpu {

struct Context {
  const Kernels* kernels;
  int threads;
};

struct Rows {
  const void* data;
  int64_t stride;
  Dtype dtype;
  const void* at(int64_t row) const { return static_cast<const char*>(data) + row * stride * element_bytes(dtype); }
};

// Sizes of packed weights, in 4-byte words.
int64_t packed_words(const Gemm& gemm, int64_t outputs, int64_t inputs);

void pack_linear(const Context& context, const Rows& weight, int64_t outputs, int64_t inputs, uint32_t* packed);

struct LinearCall {
  Rows x;
  int64_t rows, inputs, outputs;
  const uint32_t* weights;
  const float* bias;  // padded to whole blocks, or null
  void* out;
  int64_t out_stride;
  Dtype out_dtype;
  // Of layers that every head has for itself, whose weights follow each other; they have no bias. Strides in elements.
  int64_t heads = 1, x_head_stride = 0, out_head_stride = 0;
};
void linear(const Context& context, const LinearCall& call);
// Rows of a packed weight as they were: the embedding of a model whose head is tied to it.
void unpack_rows(const Context& context, const uint32_t* packed, Dtype dtype, int64_t inputs, const int64_t* ids,
                 int64_t count, void* out);

// How the experts of a layer lie in memory, in words.
struct ExpertLayout {
  Dtype dtype;
  int64_t experts, hidden, width;
  bool dense_down;  // [block][expert] instead of [expert][block]: all experts together read as one matrix

  int64_t inputs_per_word() const { return dtype == Dtype::bf16 ? 2 : 1; }
  int64_t gate_blocks() const { return ceil_div(width, kGatedOutputs); }
  int64_t hidden_words() const { return ceil_div(hidden, inputs_per_word()); }
  int64_t gate_block_words() const { return hidden_words() * kBlockOutputs; }
  int64_t padded_width() const { return gate_blocks() * kGatedOutputs; }
  int64_t width_words() const { return padded_width() / inputs_per_word(); }
  int64_t down_blocks() const { return ceil_div(hidden, kBlockOutputs); }
  int64_t down_block_words() const { return width_words() * kBlockOutputs; }
  int64_t down_offset(int64_t expert, int64_t block) const {
    return (dense_down ? block * experts + expert : expert * down_blocks() + block) * down_block_words();
  }
  int64_t gate_words() const { return experts * gate_blocks() * gate_block_words(); }
  int64_t down_words() const { return experts * down_blocks() * down_block_words(); }
};

struct Strided3 {
  const void* data;
  int64_t outer, inner;  // strides in elements; the last dimension is contiguous
};
void pack_experts(const Context& context, const ExpertLayout& layout, const Strided3& gate, const Strided3& up,
                  const Strided3& down, uint32_t* gate_up, uint32_t* down_packed);

struct ExpertsCall {
  Rows x;
  int64_t rows;
  ExpertLayout layout;
  const uint32_t* gate_up;
  const uint32_t* down;
  const float* gate_up_bias;  // [expert][gate block][32], or null
  const float* down_bias;     // [expert][down block][32], or null; for all_experts the sum over experts
  Activation activation;
  const int32_t* ids;     // (T, K)
  const float* weights;   // (T, K)
  const int32_t* counts;  // (T), or null
  int64_t top_k;
  void* out;  // (T, D), contiguous, x's dtype
};
// Returns the first expert number out of range, or -1.
int64_t experts(const Context& context, const ExpertsCall& call);
void all_experts(const Context& context, const ExpertsCall& call);

struct NormCall {
  Rows x, residual;  // residual.data may be null
  float scale;
  const void* weight;
  Dtype weight_dtype;
  float eps;
  int64_t rows, hidden;
  void* sum;  // may be the residual's memory
  int64_t sum_stride;
  void* out;  // contiguous, the weight's dtype
};
void rms_norm(const Context& context, const NormCall& call);

struct Cache {
  void* data;
  Dtype dtype;
  int64_t page_stride, head_stride, token_stride;
  void* at(int64_t page, int64_t head, int64_t offset) const {
    const int64_t element = page * page_stride + head * head_stride + offset * token_stride;
    return static_cast<char*>(data) + element * element_bytes(dtype);
  }
};

struct RopeCall {
  Rows q, k, v;
  int64_t rows, heads, kv_heads, channels;
  const float* cos_sin;
  const int64_t* positions;
  const int64_t* slots;
  Cache keys, values;
  int64_t page_size;
  void* q_out;  // contiguous
};
void rope_and_write(const Context& context, const RopeCall& call);

struct AttentionCall {
  Rows q;
  int64_t heads, kv_heads, channels;
  Cache keys, values;
  int64_t page_size;
  const int32_t* query_start;
  const int32_t* context_len;
  const int32_t* block_table;
  int64_t block_table_stride, sequences;
  float scale;
  int64_t window;      // 0: none
  void* out;           // contiguous, q's dtype
  const float* sinks;  // (H): a logit of each head that takes part in the softmax and has no value, or null
  float* lse;          // (T, H): takes the logarithm of the softmax's denominator, sinks included, or null
  float softcap;       // scaled scores s become softcap · tanh(s / softcap); 0: they stay
  // Values are the first so many channels of the keys, which lie in the same memory; 0: they lie in a cache of their own.
  // In int8 such an entry has the latent's codes, their scale, and the rest of the key in bf16.
  int64_t latent = 0;

  int64_t value_channels() const { return latent ? latent : channels; }
};
void attention(const Context& context, const AttentionCall& call);

// Latents and the keys that heads share, on their way into the cache.
struct LatentCall {
  Rows x;  // (T, latent + rotated)
  int64_t rows, latent, rotated;
  const void* norm;  // of latents, x's dtype
  float eps;
  const float* cos_sin;
  bool interleaved;  // see rotate_head
  const int64_t *positions, *slots;
  Cache entries;
  int64_t page_size;
};
void write_latents(const Context& context, const LatentCall& call);
// Rotary embedding of a head, half-split; `interleaved`: channels 0 and 1 make a pair, not 0 and channels / 2. The bits of
// reference.rope, which rounds every product.
void rotate_head(const void* in, const float* cos_sin, int64_t channels, bool interleaved, void* out, Dtype dtype);
// Bytes of an entry behind the latent's codes, in int8.
inline int64_t latent_tail(int64_t rotated) { return kScaleBytes + 2 * rotated; }

enum class Score : int { softmax = 0, sigmoid = 1, sqrt_softplus = 2, constant = 3 };
// A number of a row of fp32 or bf16.
inline float read_number(const void* row, Dtype dtype, int64_t i) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(row)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(row)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// The same, rounded to the nearest, ties to even.
inline void write_number(void* row, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::fp32) {
    static_cast<float*>(row)[i] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  static_cast<uint16_t*>(row)[i] = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct RouteCall {
  Rows logits;
  int64_t rows, experts, top_k;
  Score score;
  bool softmax_after_topk, renormalize;
  float scale;
  int32_t* ids;
  float* weights;
  const float* selection_bias;     // (E), or null: added to the scores for choosing only
  const float* expert_scale;       // (E), or null: factor on the final weights
  int64_t groups, top_groups;      // experts in runs of equal length, and how many of these a row chooses from
  bool top2_sum;                   // a run is worth its two best experts together, not its best one
  float norm_floor, norm_epsilon;  // what the chosen weights' sum is at least, and what is added to it
};
void route(const Context& context, const RouteCall& call);

struct LimitCall {
  int64_t rows, top_k;
  int32_t* ids;          // (T, K)
  float* weights;        // (T, K)
  int32_t* counts;       // (T): slots in use, before and after
  const float* scale;    // (E), or null
  const float* keep;     // of row 0
  const int32_t* cap;    // likewise
  int64_t stride;        // from row to row of both
  const int64_t* numbers;  // (T): whose keep and cap a row has, or null: its own
};
// Every expert number in use must be within the scale.
void limit_experts(const Context& context, const LimitCall& call);

}  // namespace dynamoe_cpu
