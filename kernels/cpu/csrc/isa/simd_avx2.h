// 8 floats in an AVX2 register, with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

struct Vec {
  using F = __m256;
  static constexpr int kLanes = 8;
  SIMD_FN F zero() { return _mm256_setzero_ps(); }
  SIMD_FN F set(float x) { return _mm256_set1_ps(x); }
  SIMD_FN F load(const float* p) { return _mm256_loadu_ps(p); }
  SIMD_FN void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  SIMD_FN F add(F a, F b) { return _mm256_add_ps(a, b); }
  SIMD_FN F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  SIMD_FN F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  SIMD_FN F div(F a, F b) { return _mm256_div_ps(a, b); }
  SIMD_FN F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  SIMD_FN F min(F a, F b) { return _mm256_min_ps(a, b); }
  SIMD_FN F max(F a, F b) { return _mm256_max_ps(a, b); }
  SIMD_FN F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  SIMD_FN F zero_where_below(F x, F limit, F y) { return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), y); }
  SIMD_FN F scale_by_power(F x, F n) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
  }
  template <int kWidth>
  SIMD_FN F upper(F a) {
    if constexpr (kWidth == 4) return _mm256_permute2f128_ps(a, a, 0x11);
    return _mm256_permute_ps(a, kWidth == 2 ? 0xee : 0x55);
  }
  SIMD_FN float first(F a) { return _mm256_cvtss_f32(a); }
  SIMD_FN __m256i load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  SIMD_FN F low_half(const uint32_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_words(p), 16)); }
  SIMD_FN F high_half(const uint32_t* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(load_words(p), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  SIMD_FN F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  SIMD_FN __m256i bf16_bits(F a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  }
  SIMD_FN void store_bf16(uint16_t* p, F a) {
    const __m256i bits = bf16_bits(a);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  SIMD_FN F round_bf16(F a) { return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(a), 16)); }
};
