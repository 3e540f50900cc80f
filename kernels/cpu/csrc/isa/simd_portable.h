// 4 floats in the compiler's generic vectors: any processor.
#pragma once

#include <cstdint>
#include <cstring>

struct Vec {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  SIMD_FN F zero() { return F{0, 0, 0, 0}; }
  SIMD_FN F set(float x) { return F{x, x, x, x}; }
  SIMD_FN F load(const float* p) {
    F a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  SIMD_FN U load_words(const uint32_t* p) {
    U a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  SIMD_FN void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  SIMD_FN F add(F a, F b) { return a + b; }
  SIMD_FN F sub(F a, F b) { return a - b; }
  SIMD_FN F mul(F a, F b) { return a * b; }
  SIMD_FN F div(F a, F b) { return a / b; }
  SIMD_FN F fma(F a, F b, F c) { return a * b + c; }
  // As on x86: where either is NaN the second operand comes out.
  SIMD_FN F min(F a, F b) { return a < b ? a : b; }
  SIMD_FN F max(F a, F b) { return a > b ? a : b; }
  SIMD_FN F abs(F a) { return (F)((U)a & 0x7fffffffu); }
  SIMD_FN F zero_where_below(F x, F limit, F y) { return x < limit ? zero() : y; }
  SIMD_FN F scale_by_power(F x, F n) { return x * (F)((__builtin_convertvector(n, I) + 127) << 23); }
  template <int kWidth>
  SIMD_FN F upper(F a) {
    return kWidth == 2 ? F{a[2], a[3], a[2], a[3]} : F{a[1], a[1], a[3], a[3]};
  }
  SIMD_FN float first(F a) { return a[0]; }
  SIMD_FN F low_half(const uint32_t* p) { return (F)(load_words(p) << 16); }
  SIMD_FN F high_half(const uint32_t* p) { return (F)(load_words(p) & 0xffff0000u); }
  SIMD_FN F load_bf16(const uint16_t* p) { return (F)(U{p[0], p[1], p[2], p[3]} << 16); }
  SIMD_FN U bf16_bits(F a) {
    const U bits = (U)a;
    const U rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
    return a == a ? rounded : U{0x7fc0, 0x7fc0, 0x7fc0, 0x7fc0};
  }
  SIMD_FN void store_bf16(uint16_t* p, F a) {
    const U bits = bf16_bits(a);
    for (int i = 0; i < 4; ++i) p[i] = static_cast<uint16_t>(bits[i]);
  }
  SIMD_FN F round_bf16(F a) { return (F)(bf16_bits(a) << 16); }
};
