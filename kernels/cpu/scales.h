// Scales and offsets of quantised weights, in and out of memory.
#pragma once

#include <bit>
#include <cstring>

#include "kernels.h"

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

// The scales of a group, and its offsets behind them if there are any.
struct GroupScales {
  alignas(64) float values[2 * kBlockOutputs];
  GroupScales(const QuantLayout& layout, const char* from) {
    const int count = layout.offsets ? 2 * kBlockOutputs : kBlockOutputs, bytes = layout.scale_type == ScaleType::fp32 ? 4 : 2;
    for (int i = 0; i < count; ++i) values[i] = read_scale(from + bytes * i, layout.scale_type);
  }
};

}  // namespace dynamoe_cpu
