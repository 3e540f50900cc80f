// A head's keys or values as n signed bytes and their scale, two bytes of bf16 (see kernels/api/kv_codes.py), in plain loops
// that the compiler turns into the target's vectors.
#pragma once

TARGET static void encode_head(const float* in, void* out, int n) {
  float most = 0.0f, check = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float size = std::fabs(in[i]);
    most = size > most ? size : most;
    check += in[i] * 0.0f;
  }
  most /= 127.0f;
  uint32_t bits;
  std::memcpy(&bits, &most, 4);
  uint16_t top = static_cast<uint16_t>((bits + 0xffffu) >> 16);  // rounded up, so that no code is cut off
  if (!(check == 0.0f)) top = 0x7fc0;
  const float scale = widen_bf16(top);
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  constexpr float kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  int8_t* codes = static_cast<int8_t*>(out);
  for (int i = 0; i < n; ++i) {
    float value = in[i] * inverse;
    value = value < 127.0f ? value : 127.0f;
    value = value > -127.0f ? value : -127.0f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>((value + kMagic) - kMagic));
  }
  std::memcpy(codes + n, &top, 2);
}

TARGET static void decode_head(const void* in, float* out, int n) {
  const int8_t* codes = static_cast<const int8_t*>(in);
  uint16_t top;
  std::memcpy(&top, codes + n, 2);
  const float scale = widen_bf16(top);
  for (int i = 0; i < n; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}
