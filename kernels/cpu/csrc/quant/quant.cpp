// Quantised weights: packing, linear layers, and rows read back.
#include "quant/quant.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace dynamoe_cpu {

namespace {

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

void QuantProduct::multiply(const char* packed, const PackedTiles& tiles, const char* block, bool first, const char* after,
                            float* out) const {
  if (limbs_) {
    for (int64_t t = 0; t < tiles.count; ++t)
      kernels_.quant.multiply_limbs(layout_, shape_, tiles.size(t), tiles.at(packed, t), block,
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
        kernels_.gemm[0].run(tiles.size(t), tiles.at(packed, t) + kernels_.gemm[0].offset(tiles.size(t), first),
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
