// Scales and offsets of quantised weights, in and out of memory.
#pragma once

#include <bit>
#include <cstring>

#include "isa/kernels.h"

namespace dynamoe_cpu {

inline float read_half(uint16_t half) {
  const int size = half & 0x7fff;
  const float normal = std::bit_cast<float>((size << 13) + (112 << 23)), small = static_cast<float>(size) * 0x1p-24f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(size < 0x400 ? small : normal) | (half & 0x8000u) << 16);
}

// A scale that its type holds exactly into memory.
inline void write_scale(float value, char* to, ScaleType type) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), size = bits & 0x7fffffffu;
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (type == ScaleType::fp16) {
    const bool small = size < 113u << 23;
    const uint32_t normal = (size - (112u << 23)) >> 13;
    const uint32_t code = small ? static_cast<uint32_t>(std::bit_cast<float>(size) * 0x1p24f) : normal;
    half = static_cast<uint16_t>((half & 0x8000u) | code);
  }
  if (type == ScaleType::e8m0) *to = static_cast<char>(bits >> 23);
  else if (type == ScaleType::fp32) std::memcpy(to, &value, 4);
  else std::memcpy(to, &half, 2);
}

// The offset or zero point of one output of a group into memory.
inline void write_offset(const QuantLayout& layout, char* group, int64_t output, float value) {
  const int64_t bytes = layout.bytes_per_scale();
  char* to = group + bytes * kBlockOutputs;
  if (layout.offsets == Offsets::values) return write_scale(value, to + bytes * output, layout.scale_type);
  const uint16_t zero = static_cast<uint16_t>(value);
  std::memcpy(to + 2 * output, &zero, 2);
}

// With two levels: where a section has the scales of one of its groups; its offsets are `section_groups()` groups
// behind.
inline const uint8_t* scale_codes(const QuantLayout& layout, const char* section, int64_t group) {
  return reinterpret_cast<const uint8_t*>(section) + layout.outer_bytes() + group * kBlockOutputs;
}

// The scales of a group of a section, and its offsets behind them if there are any. Inlined, to become the target's
// vectors.
struct GroupScales {
  alignas(64) float values[2 * kBlockOutputs];
  __attribute__((always_inline)) GroupScales(const QuantLayout& layout, const char* section, int64_t group = 0) {
    float* offsets = values + kBlockOutputs;
    if (layout.two_level()) {
      const uint8_t* codes = scale_codes(layout, section, group);
      multiply(section, codes, layout.format == Format::q6_k, values);
      if (layout.has_offsets())
        multiply(section + 2 * kBlockOutputs, codes + layout.section_groups() * kBlockOutputs, false, offsets);
      return;
    }
    widen(section, layout.scale_type, values);
    const char* behind = section + kBlockOutputs * layout.bytes_per_scale();
    if (layout.offsets == Offsets::values) widen(behind, layout.scale_type, offsets);
    if (layout.offsets != Offsets::zeros) return;
    const uint16_t* zeros = reinterpret_cast<const uint16_t*>(behind);
    for (int o = 0; o < kBlockOutputs; ++o) offsets[o] = -static_cast<float>(zeros[o]) * values[o];
  }

 private:
  __attribute__((always_inline)) static void widen(const char* from, ScaleType type, float* out) {
    if (type == ScaleType::fp32) {
      std::memcpy(out, from, 4 * kBlockOutputs);
      return;
    }
    if (type == ScaleType::e8m0) {
      const uint8_t* exponents = reinterpret_cast<const uint8_t*>(from);
      for (int o = 0; o < kBlockOutputs; ++o) out[o] = std::bit_cast<float>(static_cast<uint32_t>(exponents[o]) << 23);
      return;
    }
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    for (int o = 0; o < kBlockOutputs; ++o) {
      const float bf16 = std::bit_cast<float>(static_cast<uint32_t>(halves[o]) << 16);
      out[o] = type == ScaleType::fp16 ? read_half(halves[o]) : bf16;
    }
  }
  __attribute__((always_inline)) static void multiply(const char* outer, const uint8_t* codes, bool with_sign,
                                                      float* out) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(outer);
    for (int o = 0; o < kBlockOutputs; ++o)
      out[o] = static_cast<float>(with_sign ? static_cast<int8_t>(codes[o]) : codes[o]) * read_half(halves[o]);
  }
};

}  // namespace dynamoe_cpu
