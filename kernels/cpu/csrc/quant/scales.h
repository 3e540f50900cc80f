// Scales and offsets of quantised weights, in and out of memory.
#pragma once

#include <bit>
#include <cstring>

#include "isa/kernels.h"

namespace dynamoe_cpu {

// One scale in memory as fp32, and a scale that its type holds exactly into memory.
inline float read_scale(const char* from, ScaleType type) {
  if (type == ScaleType::fp32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  if (type == ScaleType::bf16) return std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
  const uint32_t size = half & 0x7fffu;
  return std::bit_cast<float>((half & 0x8000u) << 16 | (size ? (size << 13) + (112u << 23) : 0u));
}
inline void write_scale(float value, char* to, ScaleType type) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), size = bits & 0x7fffffffu;
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (type == ScaleType::fp16) half = static_cast<uint16_t>((half & 0x8000u) | (size ? (size - (112u << 23)) >> 13 : 0u));
  if (type == ScaleType::fp32) std::memcpy(to, &value, 4);
  else std::memcpy(to, &half, 2);
}

// What is added to code * scale of one output of a group, and the same into memory; `value` is an offset or a zero point.
inline float read_offset(const QuantLayout& layout, const char* group, int64_t output, float scale) {
  const int64_t bytes = layout.bytes_per_scale();
  const char* from = group + bytes * kBlockOutputs;
  if (layout.offsets == Offsets::values) return read_scale(from + bytes * output, layout.scale_type);
  uint16_t zero = 0;
  if (layout.offsets == Offsets::zeros) std::memcpy(&zero, from + 2 * output, 2);
  return -static_cast<float>(zero) * scale;
}
inline void write_offset(const QuantLayout& layout, char* group, int64_t output, float value) {
  const int64_t bytes = layout.bytes_per_scale();
  char* to = group + bytes * kBlockOutputs;
  if (layout.offsets == Offsets::values) return write_scale(value, to + bytes * output, layout.scale_type);
  const uint16_t zero = static_cast<uint16_t>(value);
  std::memcpy(to + 2 * output, &zero, 2);
}

// The scales of a group, and its offsets behind them if there are any.
struct GroupScales {
  alignas(64) float values[2 * kBlockOutputs];
  GroupScales(const QuantLayout& layout, const char* from) {
    const int64_t bytes = layout.bytes_per_scale();
    for (int i = 0; i < kBlockOutputs; ++i) values[i] = read_scale(from + bytes * i, layout.scale_type);
    for (int i = 0; layout.has_offsets() && i < kBlockOutputs; ++i)
      values[kBlockOutputs + i] = read_offset(layout, from, i, values[i]);
  }
};

}  // namespace dynamoe_cpu
