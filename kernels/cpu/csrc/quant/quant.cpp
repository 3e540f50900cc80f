// Quantised weights: linear layers, and rows read back.
#include "quant/quant.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace dynamoe_cpu {

namespace {

constexpr int64_t kStretch = 128;  // inputs that are widened at once: 16 KiB

float widen_code(const QuantLayout& layout, uint8_t code, float scale, float offset) {
  if (layout.format == Format::mxfp4) return static_cast<float>(mxfp4_number(code)) * scale;
  if (layout.format != Format::fp8) {
    if (layout.has_offsets()) return static_cast<float>(code) * scale + offset;
    return static_cast<float>(code - layout.zero()) * scale;
  }
  const uint32_t size = code & 0x7f;
  const float normal = std::bit_cast<float>((size << 20) + (120u << 23));
  const float value = size < 8 ? 2.0f * normal - 0.015625f : normal;
  return (code & 0x80 ? -value : value) * scale;
}

// Where among the codes of its group the code of an input lies, or the lower 4 bits of it.
int64_t code_offset(Format format, int64_t input, int64_t output) {
  if (format == Format::fp8) return input * kBlockOutputs + output;
  if (format == Format::int8) return (input / 4 * kBlockOutputs + output) * 4 + input % 4;
  return (input / 8 * kBlockOutputs + output) * 4 + input % 4;
}

// Likewise for the upper bits of codes of 5 and 6 bits, and where in their byte.
int64_t upper_offset(const QuantLayout& layout, int64_t input, int64_t output) {
  return layout.low_bytes() + output * 4 + input % 4;
}
int upper_shift(const QuantLayout& layout, int64_t input) { return static_cast<int>(input / 4) * (layout.bits() - 4); }

uint8_t read_code(const QuantLayout& layout, const uint8_t* codes, int64_t input, int64_t output) {
  uint8_t code = codes[code_offset(layout.format, input, output)];
  if (layout.bits() == 8) return code;
  code = input % 8 >= 4 ? code >> 4 : code & 15;
  if (layout.bits() == 4) return code;
  const int upper = codes[upper_offset(layout, input, output)] >> upper_shift(layout, input);
  return static_cast<uint8_t>(code | (upper & ((1 << (layout.bits() - 4)) - 1)) << 4);
}

}  // namespace

bool uses_limbs(const Kernels& kernels, const QuantLayout& layout, Dtype dtype) {
  if (layout.format == Format::fp8) return false;
  return layout.byte_rows || (kernels.quant.fixed_point && dtype == Dtype::bf16);
}

QuantProduct::QuantProduct(const Kernels& kernels, const QuantLayout& layout, Dtype dtype)
    : kernels_(kernels), layout_(layout), limbs_(uses_limbs(kernels, layout, dtype)) {
  shape_ = {layout.inputs, layout.group < layout.inputs ? layout.group : kStretch, layout.byte_rows ? 1 : 2};
  tile_rows_ = limbs_ ? kernels.quant.tile_rows[shape_.limbs - 1] : kernels.gemm[0].tile_rows;
}

int64_t QuantProduct::packed_bytes(int num_rows) const {
  return limbs_ ? kernels_.quant.packed_bytes(shape_, num_rows)
                : kernels_.gemm[0].packed_bytes(num_rows, layout_.inputs);
}

void QuantProduct::pack(char* packed, const void* const* rows, int num_rows, Dtype dtype) const {
  if (limbs_) {
    char* limbs = num_rows == 1 ? packed : scratch(Buffer::values).get<char>(num_rows * shape_.row_bytes);
    const void* made[kMostTileRows];
    for (int r = 0; r < num_rows; ++r) {
      make_limbs(limbs + r * shape_.row_bytes, rows[r], dtype);
      made[r] = limbs + r * shape_.row_bytes;
    }
    return pack_limbs(packed, made, num_rows);
  }
  const int inputs = static_cast<int>(layout_.inputs);
  if (dtype == Dtype::fp32 && !layout_.byte_rows) return kernels_.gemm[0].pack(packed, rows, num_rows, inputs);
  float* wide = scratch(Buffer::values).get<float>(static_cast<int64_t>(num_rows) * inputs);
  const void* widened[kMostTileRows];
  for (int r = 0; r < num_rows; ++r) {
    float* row = wide + static_cast<int64_t>(r) * inputs;
    if (dtype == Dtype::fp32) std::memcpy(row, rows[r], 4 * static_cast<size_t>(inputs));
    if (dtype == Dtype::bf16) kernels_.widen(static_cast<const uint16_t*>(rows[r]), row, inputs);
    if (layout_.byte_rows) kernels_.quant.round_fp8(row, inputs);
    widened[r] = row;
  }
  kernels_.gemm[0].pack(packed, widened, num_rows, inputs);
}

void QuantProduct::make_limbs(char* limbs, const void* row, Dtype dtype) const {
  kernels_.quant.make_limbs(shape_, row, dtype, limbs);
}

void QuantProduct::pack_limbs(char* packed, const void* const* limbs, int num_rows) const {
  kernels_.quant.pack_limbs(shape_, packed, limbs, num_rows);
}

// As run_block does it: a single tile reads the codes from memory as it goes; with several, the block after is fetched
// meanwhile, so that memory and arithmetic never wait for each other.
CodesAhead QuantProduct::ahead(const char* block, bool first, const char* after, int64_t tile, int64_t tiles) const {
  const int64_t early = kernels_.quant.ahead;
  const bool nibbles = layout_.bits() < 8;
  const int lines = nibbles ? 2 : 4, stride = nibbles ? 1 : kernels_.quant.byte_stride;
  const char* end = block + layout_.block_bytes();
  if (tiles == 1 && after) return {end - early, early, after - end + early, 0, lines, stride};
  if (tile == 0 && (tiles == 1 || first)) return {end, early, early, 0, lines, tiles == 1 ? stride : 1};
  const int64_t next = (after ? after : end) - block;
  if (first) return {end, next, next, 0, tile == 1 ? lines : 0, 1};
  const int half = lines / 2 * static_cast<int>(tile);
  return {end, next, next, half, tile < 2 ? half + lines / 2 : half, 1};
}

void QuantProduct::multiply(const char* packed, const PackedTiles& tiles, const char* block, bool first, const char* after,
                            float* out) const {
  if (limbs_) {
    for (int64_t t = 0; t < tiles.count; ++t)
      kernels_.quant.multiply_limbs(layout_, shape_, tiles.size(t), tiles.at(packed, t), block,
                                     out + tiles.start(t) * kBlockOutputs, ahead(block, first, after, t, tiles.count));
    return;
  }
  alignas(64) float wide[kStretch * kBlockOutputs];
  for (int64_t begin = 0; begin < layout_.inputs; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, layout_.inputs);
    kernels_.quant.widen_codes(layout_, block, begin, end - begin, wide);
    const char* next = block + (end < layout_.inputs ? layout_.codes_of(end) : layout_.block_bytes());
    for (int64_t t = 0; t < tiles.count; ++t)
      kernels_.gemm[0].run(tiles.size(t), tiles.at(packed, t) + kernels_.gemm[0].offset(tiles.size(t), begin),
                           reinterpret_cast<const uint32_t*>(wide), static_cast<int>(end - begin),
                           out + tiles.start(t) * kBlockOutputs, begin > 0, {next, 0});
  }
}

namespace {

// `out` is where the part's outputs begin.
void linear_part(const Context& context, const QuantLinearCall& call, const QuantWeights& weights, char* out) {
  const Kernels& kernels = *context.kernels;
  const QuantProduct product(kernels, weights.layout, call.x.dtype);
  const int64_t blocks = weights.layout.blocks();
  const Tiles chunks(call.rows, product.most_rows());
  WorkChunks work(chunks.count, blocks, context.threads);
  on_all_threads(work.threads(), [&] {
    const Products products(kernels);
    float* tile = scratch(Buffer::scores).get<float>(chunks.largest() * kBlockOutputs);
    char* packed = nullptr;
    int64_t packed_chunk = -1, first, last;
    while (work.take(first, last)) {
      const int64_t chunk = first / blocks, first_row = chunks.start(chunk);
      const PackedTiles tiles = product.tiles(chunks.size(chunk));
      if (packed_chunk != chunk) packed = scratch(Buffer::rows).get<char>(tiles.bytes());
      for (int64_t t = 0; packed_chunk != chunk && t < tiles.count; ++t) {
        const void* rows[kMostTileRows];
        for (int r = 0; r < tiles.size(t); ++r) rows[r] = call.x.at(first_row + tiles.start(t) + r);
        product.pack(tiles.at(packed, t), rows, tiles.size(t), call.x.dtype);
      }
      packed_chunk = chunk;
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, output = block * kBlockOutputs;
        const int64_t likely = item + 1 == last ? work.likely() : -1;
        product.multiply(packed, tiles, weights.block(block), item == first,
                         likely >= 0 ? weights.block(likely % blocks) : nullptr, tile);
        kernels.store(tile, static_cast<int>(tiles.rows),
                      static_cast<int>(std::min<int64_t>(kBlockOutputs, weights.layout.outputs - output)),
                      weights.bias ? weights.bias + output : nullptr,
                      out + (first_row * call.out_stride + output) * element_bytes(call.out_dtype),
                      call.out_stride, call.out_dtype);
      }
    }
  });
}

}  // namespace

void quant_linear(const Context& context, const QuantLinearCall& call) {
  if (!call.rows) return;
  char* out = static_cast<char*>(call.out);
  for (const QuantWeights& part : *call.layer) {
    linear_part(context, call, part, out);
    out += part.layout.outputs * element_bytes(call.out_dtype);
  }
}

void quant_rows(const Context& context, const QuantLayer& layer, const int64_t* ids, int64_t count, float* out) {
  for_each_task(count < 64 ? 1 : context.threads, count, [&](int64_t row) {
    int64_t id = ids[row];
    const QuantWeights* part = layer.data();
    for (; id >= part->layout.outputs; ++part) id -= part->layout.outputs;
    const QuantLayout& layout = part->layout;
    const int64_t o = id % kBlockOutputs;
    const char* block = part->block(id / kBlockOutputs);
    for (int64_t group = 0; group < layout.groups(); ++group) {
      const GroupScales scales(layout, block + layout.section_at(group), group % layout.section_groups());
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(block) + layout.codes_at(group);
      const int64_t begin = group * layout.group;
      for (int64_t i = begin; i < std::min(begin + layout.group, layout.inputs); ++i)
        out[row * layout.inputs + i] = widen_code(layout, read_code(layout, codes, i - begin, o), scales.values[o],
                                                  layout.has_offsets() ? scales.values[kBlockOutputs + o] : 0.0f);
    }
  });
}

}  // namespace dynamoe_cpu
