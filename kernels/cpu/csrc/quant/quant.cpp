// Quantised weights: packing, linear layers, and rows read back.
#include "quant/quant.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace dynamoe_cpu {

namespace {

constexpr int64_t kPanelBytes = 384 * 1024;
constexpr int64_t kStretch = 128;  // inputs that are widened at once: 16 KiB

float widen_code(const QuantLayout& layout, uint8_t code, float scale, float offset) {
  if (layout.format != Format::fp8) {
    if (layout.has_offsets()) return static_cast<float>(code) * scale + offset;
    return static_cast<float>(code - (layout.format == Format::int4 ? 8 : 128)) * scale;
  }
  const uint32_t size = code & 0x7f;
  const float normal = std::bit_cast<float>((size << 20) + (120u << 23));
  const float value = size < 8 ? 2.0f * normal - 0.015625f : normal;
  return (code & 0x80 ? -value : value) * scale;
}

// Where the code of an input lies behind the scales of its group.
int64_t code_offset(Format format, int64_t input, int64_t output) {
  if (format == Format::fp8) return input * kBlockOutputs + output;
  if (format == Format::int8) return (input / 4 * kBlockOutputs + output) * 4 + input % 4;
  return (input / 8 * kBlockOutputs + output) * 4 + input % 4;
}

}  // namespace

bool uses_digits(const Kernels& kernels, const QuantLayout& layout, Dtype dtype) {
  if (layout.format == Format::fp8) return false;
  return layout.byte_rows || (kernels.quant.fixed_point && dtype == Dtype::bf16);
}

QuantProduct::QuantProduct(const Kernels& kernels, const QuantLayout& layout, Dtype dtype)
    : kernels_(kernels), layout_(layout), digits_(uses_digits(kernels, layout, dtype)) {
  shape_ = {layout.inputs, layout.group < layout.inputs ? layout.group : kStretch, layout.byte_rows ? 1 : 2};
  row_bytes_ = digits_ ? shape_.row_bytes : 4 * layout.inputs;
  tile_rows_ = !digits_ ? kernels.gemm[0].tile_rows : kernels.quant.tile_rows * (layout.byte_rows && kernels.quant.fixed_point ? 2 : 1);
}

int64_t QuantProduct::most_rows() const { return std::max<int64_t>(tile_rows_, kPanelBytes / row_bytes_); }

void QuantProduct::pack(char* panel, const void* const* rows, int num_rows, Dtype dtype) const {
  if (digits_) {
    if (num_rows == 1) return make_digits(panel, rows[0], dtype);
    char* digits = scratch(Buffer::values).get<char>(num_rows * row_bytes_);
    const void* made[kMaxTileRows];
    for (int r = 0; r < num_rows; ++r) {
      make_digits(digits + r * row_bytes_, rows[r], dtype);
      made[r] = digits + r * row_bytes_;
    }
    return pack_digits(panel, made, num_rows);
  }
  const int inputs = static_cast<int>(layout_.inputs);
  if (dtype == Dtype::fp32 && !layout_.byte_rows) return kernels_.gemm[0].pack(panel, rows, num_rows, inputs);
  float* wide = scratch(Buffer::values).get<float>(static_cast<int64_t>(num_rows) * inputs);
  const void* widened[kMaxTileRows];
  for (int r = 0; r < num_rows; ++r) {
    float* row = wide + static_cast<int64_t>(r) * inputs;
    if (dtype == Dtype::fp32) std::memcpy(row, rows[r], 4 * static_cast<size_t>(inputs));
    if (dtype == Dtype::bf16) kernels_.widen(static_cast<const uint16_t*>(rows[r]), row, inputs);
    if (layout_.byte_rows) kernels_.quant.round_fp8(row, inputs);
    widened[r] = row;
  }
  kernels_.gemm[0].pack(panel, widened, num_rows, inputs);
}

void QuantProduct::make_digits(char* digits, const void* row, Dtype dtype) const {
  kernels_.quant.make_digits(shape_, row, dtype, digits);
}

void QuantProduct::pack_digits(char* panel, const void* const* digits, int num_rows) const {
  if (num_rows == 1) std::memcpy(panel, digits[0], row_bytes_);
  else kernels_.transpose_cells(reinterpret_cast<uint32_t*>(panel), num_rows, digits, num_rows, static_cast<int>(row_bytes_));
}

// As run_block does it: a single tile reads the codes from memory as it goes; with several, the block after is fetched
// meanwhile, so that memory and arithmetic never wait for each other.
CodesAhead QuantProduct::ahead(const char* block, bool first, const char* after, int64_t tile, int64_t tiles) const {
  const int64_t early = kernels_.quant.ahead;
  const int lines = layout_.format == Format::int4 ? 2 : 4;
  const char* end = block + layout_.block_bytes();
  const int stride = layout_.format == Format::int4 ? 1 : kernels_.quant.byte_stride;
  if (tiles == 1 && after) return {end - early, early, after - end + early, 0, lines, stride};
  if (tile == 0 && (tiles == 1 || first)) return {end, early, early, 0, lines, tiles == 1 ? stride : 1};
  const int64_t next = (after ? after : end) - block;
  if (first) return {end, next, next, 0, tile == 1 ? lines : 0, 1};
  const int half = lines / 2 * static_cast<int>(tile);
  return {end, next, next, half, tile < 2 ? half + lines / 2 : half, 1};
}

void QuantProduct::multiply(const char* panels, const Tiles& tiles, const char* block, bool first, const char* after,
                            float* out) const {
  if (digits_) {
    for (int64_t t = 0; t < tiles.count; ++t)
      kernels_.quant.multiply_digits(layout_, shape_, tiles.size(t), panels + tiles.start(t) * row_bytes_, block,
                                     out + tiles.start(t) * kBlockOutputs, ahead(block, first, after, t, tiles.count));
    return;
  }
  alignas(64) float wide[kStretch * kBlockOutputs];
  for (int64_t begin = 0; begin < layout_.inputs; begin += layout_.group) {
    const int64_t end = std::min(begin + layout_.group, layout_.inputs);
    const GroupScales scales(layout_, block);
    const char* codes = block + layout_.scale_bytes();
    for (int64_t first = begin; first < end; first += kStretch) {
      const int count = static_cast<int>(std::min(kStretch, end - first));
      kernels_.quant.widen_codes(layout_, codes, scales.values, count, wide);
      codes += QuantLayout::code_bytes(layout_.format, count);
      for (int64_t t = 0; t < tiles.count; ++t)
        kernels_.gemm[0].run(tiles.size(t), panels + tiles.start(t) * row_bytes_ + first * tiles.size(t) * 4,
                             reinterpret_cast<const uint32_t*>(wide), count, out + tiles.start(t) * kBlockOutputs,
                             first > 0, {codes, 0});
    }
    block = codes;
  }
}

void quant_linear(const Context& context, const QuantLinearCall& call) {
  if (!call.rows) return;
  const Kernels& kernels = *context.kernels;
  const QuantWeights& weights = *call.weights;
  const QuantProduct product(kernels, weights.layout, call.x.dtype);
  const int64_t blocks = weights.layout.blocks();
  const Tiles chunks(call.rows, product.most_rows());
  Pieces pieces(chunks.count, blocks, context.threads);
  on_all_threads(pieces.threads(), [&] {
    char* panel = scratch(Buffer::rows).get<char>((chunks.size(0) + 1) * product.row_bytes());
    float* tile = scratch(Buffer::scores).get<float>((chunks.size(0) + 1) * kBlockOutputs);
    int64_t packed = -1, first, last;
    while (pieces.take(first, last)) {
      const int64_t chunk = first / blocks, first_row = chunks.start(chunk);
      const Tiles tiles(chunks.size(chunk), product.tile_rows());
      for (int64_t t = 0; packed != chunk && t < tiles.count; ++t) {
        const void* rows[kMaxTileRows];
        for (int r = 0; r < tiles.size(t); ++r) rows[r] = call.x.at(first_row + tiles.start(t) + r);
        product.pack(panel + tiles.start(t) * product.row_bytes(), rows, tiles.size(t), call.x.dtype);
      }
      packed = chunk;
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, output = block * kBlockOutputs;
        const int64_t likely = item + 1 == last ? pieces.likely() : -1;
        product.multiply(panel, tiles, weights.block(block), item == first,
                         likely >= 0 ? weights.block(likely % blocks) : nullptr, tile);
        kernels.store(tile, static_cast<int>(tiles.rows),
                      static_cast<int>(std::min<int64_t>(kBlockOutputs, weights.layout.outputs - output)),
                      weights.bias ? weights.bias + output : nullptr,
                      static_cast<char*>(call.out) +
                          (first_row * call.out_stride + output) * element_bytes(call.out_dtype),
                      call.out_stride, call.out_dtype);
      }
    }
  });
}

void pack_quant(const Context& context, const QuantLayout& layout, const uint8_t* codes, const float* scales,
                const float* offsets, char* packed) {
  const int64_t groups = layout.groups(), bytes = layout.bytes_per_scale();
  for_each_task(context.threads, layout.blocks(), [&](int64_t block) {
    char* out = packed + block * layout.block_bytes();
    std::memset(out, 0, layout.block_bytes());
    for (int64_t group = 0; group < groups; ++group, out += layout.group_bytes()) {
      const int64_t begin = group * layout.group, end = std::min(begin + layout.group, layout.inputs);
      uint8_t* out_codes = reinterpret_cast<uint8_t*>(out) + layout.scale_bytes();
      for (int64_t o = 0; o < kBlockOutputs && block * kBlockOutputs + o < layout.outputs; ++o) {
        const int64_t output = block * kBlockOutputs + o;
        write_scale(scales[output * groups + group], out + bytes * o, layout.scale_type);
        if (layout.has_offsets()) write_offset(layout, out, o, offsets[output * groups + group]);
        for (int64_t i = begin; i < end; ++i) {
          const uint8_t code = codes[output * layout.inputs + i];
          const bool high = layout.format == Format::int4 && (i - begin) % 8 >= 4;
          out_codes[code_offset(layout.format, i - begin, o)] |= static_cast<uint8_t>(high ? code << 4 : code);
        }
      }
    }
  });
}

void quant_rows(const Context& context, const QuantWeights& weights, const int64_t* ids, int64_t count, float* out) {
  const QuantLayout& layout = weights.layout;
  for_each_task(count < 64 ? 1 : context.threads, count, [&](int64_t row) {
    const int64_t o = ids[row] % kBlockOutputs, bytes = layout.bytes_per_scale();
    const char* from = weights.block(ids[row] / kBlockOutputs);
    for (int64_t begin = 0; begin < layout.inputs; begin += layout.group, from += layout.group_bytes()) {
      const float scale = read_scale(from + bytes * o, layout.scale_type);
      const float offset = layout.has_offsets() ? read_offset(layout, from, o, scale) : 0.0f;
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(from) + layout.scale_bytes();
      for (int64_t i = begin; i < std::min(begin + layout.group, layout.inputs); ++i) {
        uint8_t code = codes[code_offset(layout.format, i - begin, o)];
        if (layout.format == Format::int4) code = (i - begin) % 8 >= 4 ? code >> 4 : code & 15;
        out[row * layout.inputs + i] = widen_code(layout, code, scale, offset);
      }
    }
  });
}

}  // namespace dynamoe_cpu
