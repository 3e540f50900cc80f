// 16 floats in an AVX-512 register.
#pragma once

#include <immintrin.h>

#include <cstdint>

struct Vec {
  using F = __m512;
  static constexpr int kLanes = 16;
  SIMD_FN F zero() { return _mm512_setzero_ps(); }
  SIMD_FN F set(float x) { return _mm512_set1_ps(x); }
  SIMD_FN F load(const float* p) { return _mm512_loadu_ps(p); }
  SIMD_FN void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  SIMD_FN F add(F a, F b) { return _mm512_add_ps(a, b); }
  SIMD_FN F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  SIMD_FN F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  SIMD_FN F div(F a, F b) { return _mm512_div_ps(a, b); }
  SIMD_FN F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  SIMD_FN F min(F a, F b) { return _mm512_min_ps(a, b); }
  SIMD_FN F max(F a, F b) { return _mm512_max_ps(a, b); }
  SIMD_FN F abs(F a) { return _mm512_abs_ps(a); }
  SIMD_FN F zero_where_below(F x, F limit, F y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), _mm512_setzero_ps());
  }
  // x * 2^n for an integral n held as a float.
  SIMD_FN F scale_by_power(F x, F n) { return _mm512_scalef_ps(x, n); }
  // Lane i + kWidth in the place of lane i < kWidth.
  template <int kWidth>
  SIMD_FN F upper(F a) {
    if constexpr (kWidth == 8) return _mm512_shuffle_f32x4(a, a, 0xee);
    if constexpr (kWidth == 4) return _mm512_shuffle_f32x4(a, a, 0x55);
    return _mm512_permute_ps(a, kWidth == 2 ? 0xee : 0x55);
  }
  SIMD_FN float first(F a) { return _mm512_cvtss_f32(a); }
  // The low and the high bf16 of each word, widened.
  SIMD_FN F low_half(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  SIMD_FN F high_half(const uint32_t* p) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  SIMD_FN F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  SIMD_FN __m512i bf16_bits(F a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  }
  SIMD_FN void store_bf16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(a)));
  }
  SIMD_FN F round_bf16(F a) { return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(a), 16)); }
};

// 16 rows of 16 words, transposed in registers.
TARGET static inline void transpose_16x16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

TARGET static inline void transpose_full_words(uint32_t* dst, int dst_stride, const void* const* rows, int num_rows,
                                               int words) {
  for (int base = 0; base < num_rows; base += 16) {
    const int count = num_rows - base < 16 ? num_rows - base : 16;
    const __mmask16 row_mask = static_cast<__mmask16>((1u << count) - 1);
    for (int c = 0; c < words; c += 16) {
      const int columns = words - c < 16 ? words - c : 16;
      const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
      uint32_t* out = dst + static_cast<ptrdiff_t>(c) * dst_stride + base;
      __m512i r[16];
      if (count == 16 && columns == 16) {
        for (int i = 0; i < 16; ++i)
          r[i] = rows[base + i] ? _mm512_loadu_si512(static_cast<const char*>(rows[base + i]) + 4 * c)
                                : _mm512_setzero_si512();
        transpose_16x16(r);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + static_cast<ptrdiff_t>(i) * dst_stride, r[i]);
        continue;
      }
      for (int i = 0; i < 16; ++i) {
        const void* row = i < count ? rows[base + i] : nullptr;
        r[i] = row ? _mm512_maskz_loadu_epi32(mask, static_cast<const char*>(row) + 4 * c) : _mm512_setzero_si512();
      }
      transpose_16x16(r);
      for (int i = 0; i < columns; ++i)
        _mm512_mask_storeu_epi32(out + static_cast<ptrdiff_t>(i) * dst_stride, row_mask, r[i]);
    }
  }
}
