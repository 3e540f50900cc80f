// What an instruction set offers to the operators: a table of row-level and tile-level kernels.
//
// Weights lie in blocks of 32 outputs: [word][32], where a word of 4 bytes holds 1 fp32 or 2 bf16 inputs of an output.
// Every output element has exactly one accumulator, which takes the words in rising order, whatever the number of rows;
// so a row's result never depends on the rows beside it, nor on how work is split.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynamoe_cpu {

constexpr int kBlockOutputs = 32;
constexpr int kGatedOutputs = 16;  // a gated block holds 16 gate outputs, then the 16 up outputs that belong to them
constexpr int kMostTileRows = 32;  // of any instruction set
constexpr int kKeyBlock = 64;  // keys that attention takes in one step, aligned to multiples of it

// int8 is for keys and values in the cache only: a head's codes, then their scale.
enum class Dtype : int { fp32 = 0, bf16 = 1, int8 = 2 };
// The last takes gate · sigmoid(1.702 gate) and up + 1, with gate up to 7 and up within ± 7.
enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2, clamped_swiglu = 3 };

constexpr int kScaleBytes = 2;  // behind the codes of a head
inline int element_bytes(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : dtype == Dtype::bf16 ? 2 : 1; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a product asks memory for while it runs: with word w of a block's weights the line at `first` + w * `step` and the
// line after it.
struct Ahead {
  const char* first;
  int step;
};

// The same for codes of quantised weights: with every pair of 4 inputs of their lines [from, to) every `stride`-th, as far
// behind those that are read as `near` says, and from `edge` on as `far` says.
struct CodesAhead {
  const char* edge;
  int64_t near, far;
  int from, to, stride;
};

enum class Format : int { int8 = 0, int4 = 1, fp8 = 2, q4_k = 3, q5_k = 4, q6_k = 5, mxfp4 = 6 };
// Of scales and offsets in memory. fp16 holds no infinities or NaN, bf16 no subnormal numbers either; e8m0 is the exponent
// of a normal power of two, for mxfp4 only.
enum class ScaleType : int { fp32 = 0, fp16 = 1, bf16 = 2, e8m0 = 3 };
// Of int4, q4_k and q5_k: weight = code * scale + offset. The offset is in memory, like a scale, or for int4 -zero *
// scale, with a zero point of 16 bits in memory; without either code - `zero()` takes the place of code.
enum class Offsets : int { none = 0, values = 1, zeros = 2 };

constexpr int64_t kOuterInputs = 256;  // that share an outer scale

// Twice what a code of mxfp4 stands for, a whole number within ± 12: 4-bit floats (e2m1), the sign in the upper bit.
inline constexpr int mxfp4_number(int code) {
  const int size = code & 7, twice = size + (size > 4) + (size > 5) + 3 * (size > 6);
  return code & 8 ? -twice : twice;
}

// How quantised weights lie in memory; see quant.h. A block is made of sections: groups, or with two levels of scales
// the groups of 256 inputs.
struct QuantLayout {
  Format format;
  int64_t outputs, inputs;
  int64_t group;   // inputs that share a scale
  Offsets offsets;
  bool byte_rows;  // rows are rounded: for int4 a scale per group, for int8 of one group per 128 inputs; for fp8 to e4m3
  ScaleType scale_type = ScaleType::fp32;

  int64_t groups() const { return ceil_div(inputs, group); }
  int64_t blocks() const { return ceil_div(outputs, kBlockOutputs); }
  bool has_offsets() const { return offsets != Offsets::none; }
  bool two_level() const { return Format::q4_k <= format && format <= Format::q6_k; }
  int bits() const {
    if (two_level()) return 1 + static_cast<int>(format);
    return format == Format::int4 || format == Format::mxfp4 ? 4 : 8;
  }
  int zero() const { return 1 << (bits() - 1); }
  int64_t section_groups() const { return two_level() ? kOuterInputs / group : 1; }
  int64_t section_inputs() const { return section_groups() * group; }
  int64_t bytes_per_scale() const {
    return scale_type == ScaleType::fp32 ? 4 : scale_type == ScaleType::e8m0 ? 1 : 2;
  }
  // Of outer scales and offsets, 16 bits each; what belongs to groups follows.
  int64_t outer_bytes() const { return two_level() ? kBlockOutputs * (has_offsets() ? 4 : 2) : 0; }
  // Of all that comes in front of a section's codes.
  int64_t scale_bytes() const {
    if (two_level()) return outer_bytes() + kBlockOutputs * section_groups() * (has_offsets() ? 2 : 1);
    const int64_t bytes = bytes_per_scale();
    return kBlockOutputs * (bytes + (offsets == Offsets::none ? 0 : offsets == Offsets::zeros ? 2 : bytes));
  }
  // Of the codes of a group, or of so many inputs at its beginning: a multiple of 8, or the whole group.
  static int64_t code_bytes(Format format, int64_t inputs) {
    if (format == Format::fp8) return ceil_div(inputs, 2) * 2 * kBlockOutputs;
    return ceil_div(inputs, 8) * kBlockOutputs * (format == Format::int8 ? 8 : 4);
  }
  int64_t low_bytes() const { return code_bytes(format, group); }  // of 4 bits of each code, where there are more
  int64_t group_bytes() const { return low_bytes() + (4 < bits() && bits() < 8 ? 4 * kBlockOutputs : 0); }
  int64_t section_bytes() const { return scale_bytes() + section_groups() * group_bytes(); }
  int64_t block_bytes() const {
    if (two_level()) return ceil_div(inputs, kOuterInputs) * section_bytes();
    const int64_t last = inputs - (groups() - 1) * group;
    return (groups() - 1) * section_bytes() + scale_bytes() + code_bytes(format, last);
  }
  // Where in a block the section of a group begins, the group's codes, and those from an input on, a multiple of 128.
  int64_t section_at(int64_t number) const { return number / section_groups() * section_bytes(); }
  int64_t codes_at(int64_t number) const {
    return section_at(number) + scale_bytes() + number % section_groups() * group_bytes();
  }
  int64_t codes_of(int64_t input) const {
    const int64_t number = input / group;
    return codes_at(number) + code_bytes(format, input - number * group);
  }
};

// A row as int8 limbs: for each group of `group` inputs float scale, int32 sum, then [8 inputs][limb][8] bytes, zeros
// behind the last input. More significant limbs come first.
struct LimbShape {
  static constexpr int64_t kHeader = 8;
  int64_t inputs = 0, group = 0;
  int limbs = 1;
  int64_t row_bytes = 0;

  LimbShape() = default;
  LimbShape(int64_t inputs, int64_t group, int limbs) : inputs(inputs), group(group), limbs(limbs) {
    const int64_t groups = ceil_div(inputs, group), last = inputs - (groups - 1) * group;
    row_bytes = (groups - 1) * bytes(group, limbs) + bytes(last, limbs);
  }
  static int64_t bytes(int64_t inputs, int limbs) { return kHeader + ceil_div(inputs, 8) * 8 * limbs; }
};

// Products with quantised weights. Rows become limbs one by one; a tile of them is packed in the order in which
// `multiply_limbs` reads them, which only the instruction set's own file knows.
struct Quant {
  int tile_rows[2];  // most rows of a tile of one limb and of two limbs each
  bool fixed_point;  // whether rows of bf16 are worth two limbs each
  void (*make_limbs)(const LimbShape& shape, const void* row, Dtype dtype, char* limbs);
  int64_t (*packed_bytes)(const LimbShape& shape, int num_rows);  // at least those of the rows
  // The limbs of one row may lie in `packed` itself.
  void (*pack_limbs)(const LimbShape& shape, char* packed, const void* const* limbs, int num_rows);
  int ahead;        // bytes that codes are asked for in front of their use
  int byte_stride;  // of so many lines of 8-bit codes one is asked for, where the processor brings the others along
  // tile[row][32] = packed · block
  void (*multiply_limbs)(const QuantLayout& layout, const LimbShape& shape, int num_rows, const char* packed,
                         const char* block, float* tile, CodesAhead ahead);
  // A row rounded to e4m3 and back, with a scale per 128 inputs.
  void (*round_fp8)(float* row, int n);
  // A stretch of a block's inputs as fp32 [input][32]; `first` is a multiple of 128.
  void (*widen_codes)(const QuantLayout& layout, const char* block, int64_t first, int64_t inputs, float* out);
};

// A matrix product in one format. It owns the packed activations: a tile of rows in the order in which `run` reads them.
// Others find their way about them by these functions, and do no arithmetic of their own on them.
struct Gemm {
  int tile_rows;        // most rows of a tile, up to kMostTileRows
  int inputs_per_word;  // of the weights
  int step;  // inputs that lie together in a packed tile, whole words of the weights; for fp32 it divides 8
  // Bytes in front of input `input`, a multiple of `step`, in a packed tile of `num_rows` rows.
  int64_t (*offset)(int num_rows, int64_t input);
  void (*pack)(void* packed, const void* const* rows, int num_rows, int inputs);
  // Inputs `first` … `first` + 15, `first` being a multiple of 16, from rows of fp32 [row][16], which are lost.
  void (*append)(void* packed, int64_t first, float* rows, int num_rows);
  // tile[row][32] (+)= packed · weights, in fp32. `packed` is where a tile begins, or an offset into it.
  void (*run)(int num_rows, const void* packed, const uint32_t* weights, int words, float* tile, bool accumulate,
              Ahead ahead);

  int64_t words(int64_t inputs) const { return ceil_div(inputs, inputs_per_word); }  // of the weights, per output
  int64_t packed_bytes(int num_rows, int64_t inputs) const { return offset(num_rows, ceil_div(inputs, step) * step); }
};

struct Kernels {
  Gemm gemm[2];  // by Dtype, fp32 and bf16
  Quant quant;

  // What a thread does before and after its products, such as setting up registers; null where there is nothing.
  void (*begin_products)();
  void (*end_products)();

  // dst[word * dst_stride + r] = word of rows[r]; a null row reads as zeros. num_rows <= 32.
  void (*transpose_words)(uint32_t* dst, int dst_stride, const void* const* rows, int num_rows, int row_bytes);

  // Epilogues on a tile of 32 outputs, of which `width` are real.
  void (*store)(const float* tile, int num_rows, int width, const float* bias, void* out, int64_t out_stride,
                Dtype out_dtype);
  // act(gate) * up of every row, `stride` floats apart.
  void (*gated_rows)(const float* tile, int num_rows, const float* bias, Activation activation, float* out,
                     int64_t stride);
  void (*scaled_add)(const float* tile, int num_rows, int width, const float* bias, const float* scales,
                     float* const* out);

  // scores[half][row][32] = packed · keys[0 … 63] of bf16, the bits of `gemm[1].run` on the transposed keys, for whole
  // lines and up to `scored_rows` rows: 0 where that is no faster, and the function is null. Asks for the rows at
  // ahead[0 … 63], if given: the keys that come next.
  int scored_rows;
  void (*score_keys)(int num_rows, const void* const* keys, int words, const void* packed, float* scores,
                     const void* const* ahead);
  // accumulator[channel / 32][row][32] += sum over keys begin … end - 1 of probabilities[row][key] · values[key]. Asks for
  // the rows at ahead[0 … 63], if given: the values that come next.
  void (*weigh_values)(int num_rows, const float* probabilities, const void* const* values, int begin, int end,
                       Dtype dtype, int channels, float* accumulator, const void* const* ahead);

  // out[row] = weights[row] · x. Sixteen running sums, joined in one order: the same bits on every processor.
  void (*dots)(const float* weights, int64_t stride, int64_t count, const float* x, int64_t n, float* out);
  // sum += scale * added
  void (*add)(const void* added, Dtype dtype, float scale, float* sum, int n);
  void (*convert)(const float* in, void* out, int n, Dtype out_dtype);
  void (*widen)(const uint16_t* in, float* out, int n);
  // n channels of a head as the int8 cache keeps them: n codes and their scale.
  void (*encode_head)(const float* in, void* out, int n);
  void (*decode_head)(const void* in, float* out, int n);
  void (*rms_norm)(const void* x, Dtype x_dtype, const void* residual, float scale, const void* weight,
                   Dtype weight_dtype, float eps, int n, void* sum, Dtype stream_dtype, void* out);
  void (*rope)(const void* in, const float* cos_sin, int channels, void* out, Dtype dtype);
  // Scores s of 64 keys, in two halves `half_stride` apart, become cap · tanh(scale · s / cap).
  void (*cap_scores)(float* scores, int64_t half_stride, float scale, float cap);
  // One step of the online softmax over 64 keys, of which [first, last) are visible. Their scores lie in two halves,
  // `half_stride` apart, and are lost; state is {running max, running sum}; the row's accumulator (`blocks` of 32 channels,
  // `stride` apart) is rescaled.
  void (*softmax_step)(float* scores, int64_t half_stride, int first, int last, float scale, float* state,
                       float* probabilities, float* accumulator, int blocks, int stride);
  // Joins the state and accumulator of a later stretch of keys to `state` and `accumulator`.
  void (*softmax_merge)(float* state, float* accumulator, const float* later_state, const float* later, int blocks,
                        int stride);

  // One row of a convolution of every channel: `taps` rows of n channels, each times its weights (`stride` apart).
  void (*convolve)(const float* const* rows, const float* weights, int64_t stride, int taps, const float* bias, bool silu,
                   int n, float* out);
  // out = a · b, or a · silu(b), rounded once.
  void (*multiply)(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype, bool silu, int n, void* out,
                   Dtype out_dtype);
  // x divided by its length, times `scale`.
  void (*unit_length)(const float* x, int n, float eps, float scale, float* out);
  // One row of linear attention: what it writes to some columns of a head's state, whose rows are `stride` apart and as
  // many as there are keys, and what it reads from them. `decay` is one number, or one for each key.
  void (*recur)(float* state, int64_t stride, int keys, int columns, const float* q, const float* k, const float* v,
                const float* decay, bool by_channel, float step, bool delta_rule, float* out);
  // One row of n channels of a state space, each with a column of the state and of the rates at which that decays.
  void (*scan)(float* state, const float* rates, int64_t stride, int keys, int n, const float* q, const float* k,
               const float* v, const float* step, float* out);
};

}  // namespace dynamoe_cpu
