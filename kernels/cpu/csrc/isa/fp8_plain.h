// 8-bit floats widened in a plain loop.
#pragma once

// Shifting the code into place would meet subnormal numbers; arithmetic on the exponent does not.
TARGET static inline float widen_fp8(uint32_t code) {
  const uint32_t size = code & 0x7f;
  const float normal = std::bit_cast<float>((size << 20) + (120u << 23));
  const float value = size < 8 ? 2.0f * normal - 0.015625f : normal;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | (code & 0x80) << 24);
}

TARGET static void widen_fp8_rows(const uint8_t* code, const float* scales, int inputs, float* out) {
  for (int i = 0; i < inputs; ++i, code += kBlockOutputs, out += kBlockOutputs)
    for (int o = 0; o < kBlockOutputs; ++o) out[o] = widen_fp8(code[o]) * scales[o];
}
