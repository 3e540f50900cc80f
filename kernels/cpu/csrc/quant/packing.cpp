#include "quant/packing.h"

#include <algorithm>
#include <cstring>

#include "ops/parallel.h"

namespace dynamoe_cpu {
namespace {

constexpr int64_t kStretch = 512;  // inputs that are transposed at once

// Of the outputs from `first` on, the scales of a group, and its offsets if there are any.
void write_scales(const QuantLayout& layout, const GroupValues& values, int64_t first, int64_t last, int64_t group,
                  char* block) {
  const int64_t groups = layout.groups(), bytes = layout.bytes_per_scale();
  char* section = block + layout.section_at(group);
  if (!layout.two_level()) {
    for (int64_t o = 0, at = first * groups + group; o < last - first; ++o, at += groups) {
      write_scale(values.scales[at], section + bytes * o, layout.scale_type);
      if (layout.has_offsets()) write_offset(layout, section, o, values.offsets[at]);
    }
    return;
  }
  const int64_t sections = ceil_div(layout.inputs, kOuterInputs), inside = group % layout.section_groups();
  uint8_t* codes = const_cast<uint8_t*>(scale_codes(layout, section, inside));
  for (int64_t o = 0; o < last - first; ++o) {
    const int64_t at = (first + o) * groups + group, outer = (first + o) * sections + group / layout.section_groups();
    codes[o] = values.scale_codes[at];
    std::memcpy(section + 2 * o, values.outer_scales + outer, 2);
    if (!layout.has_offsets()) continue;
    codes[o + layout.section_groups() * kBlockOutputs] = values.offset_codes[at];
    std::memcpy(section + 2 * (kBlockOutputs + o), values.outer_offsets + outer, 2);
  }
}

// Bits of a word that belong to `left` codes of so many bits.
uint32_t first_codes(int64_t left, int bits) { return left * bits < 32 ? (1u << left * bits) - 1 : ~0u; }

using Rows32 = const uint8_t* [kBlockOutputs];  // null where there is none

// Words of the 32 rows from a byte on, side by side.
void transpose(const Kernels& kernels, const Rows32& rows, int64_t first, int64_t bytes, uint32_t* out) {
  const void* from[kBlockOutputs];
  for (int o = 0; o < kBlockOutputs; ++o) from[o] = rows[o] ? rows[o] + first : nullptr;
  kernels.transpose_words(out, kBlockOutputs, from, kBlockOutputs, static_cast<int>(bytes));
}

// Calls `word(i, out)` for every `per_word`-th input from `begin` to `end`, with where the codes from it on lie in a block.
template <class Word>
void for_each_word(const QuantLayout& layout, int64_t begin, int64_t end, int64_t per_word, char* block,
                   const Word& word) {
  for (int64_t i = begin; i < end;) {
    const int64_t group = i / layout.group, inside = i - group * layout.group;
    const int64_t last = std::min(end, (group + 1) * layout.group);
    uint32_t* out = reinterpret_cast<uint32_t*>(block + layout.codes_at(group)) + inside / per_word * kBlockOutputs;
    for (; i < last; i += per_word, out += kBlockOutputs) word(i, out);
    i = last;
  }
}

// Codes of 8 bits that are numbers, of all groups.
void pack_bytes(const Kernels& kernels, const QuantLayout& layout, const Rows32& rows, bool with_sign, char* block) {
  uint32_t words[kStretch / 4 * kBlockOutputs], flip[kBlockOutputs];
  for (int o = 0; o < kBlockOutputs; ++o) flip[o] = rows[o] && with_sign ? 0x80808080u : 0;
  for (int64_t begin = 0; begin < layout.inputs; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, layout.inputs);
    transpose(kernels, rows, begin, end - begin, words);
    const uint32_t* in = words;
    for_each_word(layout, begin, end, 4, block, [&](int64_t i, uint32_t* out) {
      const uint32_t codes = first_codes(end - i, 8);
      for (int o = 0; o < kBlockOutputs; ++o) out[o] = in[o] ^ (flip[o] & codes);
      in += kBlockOutputs;
    });
  }
}

// Codes of 4 bits, of all groups.
void pack_nibbles(const Kernels& kernels, const QuantLayout& layout, const Rows32& rows, char* block) {
  uint32_t words[kStretch / 8 * kBlockOutputs];
  for (int64_t begin = 0; begin < layout.inputs; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, layout.inputs);
    transpose(kernels, rows, begin / 2, ceil_div(end - begin, 2), words);
    const uint32_t* in = words;
    for_each_word(layout, begin, end, 8, block, [&](int64_t i, uint32_t* out) {
      const uint32_t codes = first_codes(end - i, 4);
      for (int o = 0; o < kBlockOutputs; ++o) {
        // Codes 0 1, 2 3, 4 5, 6 7 become 0 4, 1 5, 2 6, 3 7: two middle bytes change places, then two middle halves.
        uint32_t x = in[o] & codes, t = (x ^ x >> 8) & 0x0000ff00u;
        x ^= t ^ t << 8;
        t = (x ^ x >> 4) & 0x00f000f0u;
        out[o] = x ^ t ^ t << 4;
      }
      in += kBlockOutputs;
    });
  }
}

void pack_floats(const Kernels& kernels, const Rows32& rows, int64_t begin, int64_t n, uint8_t* out) {
  uint32_t words[kStretch / 4 * kBlockOutputs];
  for (int64_t first = 0; first < n; first += kStretch) {
    const int64_t count = std::min(kStretch, n - first);
    transpose(kernels, rows, begin + first, count, words);
    for (int64_t i = 0; i < count; ++i)
      for (int o = 0; o < kBlockOutputs; ++o)
        out[(first + i) * kBlockOutputs + o] = static_cast<uint8_t>(words[i / 4 * kBlockOutputs + o] >> 8 * (i % 4));
  }
}

// Codes of 5 and 6 bits, eight at a time: of each four the lower halves of bytes or the upper ones, and two words behind
// those of the group for the bits above.
void pack_wide(const QuantLayout& layout, const Rows32& rows, int64_t row_bytes, int64_t begin, int64_t n, uint8_t* out) {
  const int bits = layout.bits();
  for (int o = 0; o < kBlockOutputs; ++o) {
    uint32_t upper = 0;
    for (int64_t i = 0; rows[o] && i < n; i += 8) {
      const int64_t at = (begin + i) * bits / 8;
      uint64_t codes = 0;
      std::memcpy(&codes, rows[o] + at, std::min<int64_t>(bits, row_bytes - at));
      uint32_t lower = 0;
      for (int k = 0; k < 8 && i + k < n; ++k) {
        const uint32_t code = codes >> k * bits & ((1u << bits) - 1);
        lower |= (code & 15u) << (8 * (k % 4) + 4 * (k / 4));
        upper |= code >> 4 << (8 * (k % 4) + (i + k) / 4 * (bits - 4));
      }
      std::memcpy(out + (i / 8 * kBlockOutputs + o) * 4, &lower, 4);
    }
    std::memcpy(out + layout.low_bytes() + 4 * o, &upper, 4);
  }
}

// One run; its length is a constant where that is common, so that it becomes a few vectors.
inline __attribute__((always_inline)) void order_halves(const uint8_t* __restrict__ in, int64_t run,
                                                        uint8_t* __restrict__ out) {
  for (int64_t i = 0; i < run / 2; ++i) {
    const int pair = in[2 * i] | in[2 * i + 1] << 8;
    out[i] = static_cast<uint8_t>((pair & 0x0f) | (pair >> 4 & 0xf0));
    out[run / 2 + i] = static_cast<uint8_t>((pair >> 4 & 0x0f) | (pair >> 8 & 0xf0));
  }
}

}  // namespace

void pack_quant(const Context& context, const QuantLayout& layout, const CodeRows& codes, const GroupValues& values,
                char* packed) {
  const Kernels& kernels = *context.kernels;
  for_each_task(context.threads, layout.blocks(), [&](int64_t number) {
    char* block = packed + number * layout.block_bytes();
    const int64_t first = number * kBlockOutputs, last = std::min(first + kBlockOutputs, layout.outputs);
    std::memset(block, 0, layout.block_bytes());
    Rows32 rows;
    for (int o = 0; o < kBlockOutputs; ++o) rows[o] = codes.row(first + o);
    for (int64_t group = 0; group < layout.groups(); ++group) {
      const int64_t begin = group * layout.group, n = std::min(layout.group, layout.inputs - begin);
      write_scales(layout, values, first, last, group, block);
      char* out = block + layout.codes_at(group);
      if (layout.format == Format::fp8) pack_floats(kernels, rows, begin, n, reinterpret_cast<uint8_t*>(out));
      if (4 < layout.bits() && layout.bits() < 8)
        pack_wide(layout, rows, codes.row_bytes, begin, n, reinterpret_cast<uint8_t*>(out));
    }
    if (layout.format == Format::int8) pack_bytes(kernels, layout, rows, codes.with_sign, block);
    if (layout.bits() == 4) pack_nibbles(kernels, layout, rows, block);
  });
}

void pack_halves(int threads, const HalvesCall& call) {
  for_each_light_row(threads, call.rows, call.pieces * call.piece, [&](int64_t row) {
    uint8_t* out = call.out + row * call.pieces * call.piece;
    for (int64_t piece = 0; piece < call.pieces; ++piece) {
      const uint8_t* in = call.bytes + row * call.row_stride + piece * call.piece_stride;
      for (int64_t at = 0; at < call.piece; at += call.run, in += call.run, out += call.run) {
        if (call.run == 16) order_halves(in, 16, out);
        else if (call.run == 32) order_halves(in, 32, out);
        else order_halves(in, call.run, out);
      }
    }
  });
}

}  // namespace dynamoe_cpu
