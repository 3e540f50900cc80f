// 8-bit floats widened by way of fp16, whose exponents are 8 lower: exact, subnormal numbers included.
//
// The including file defines kCodesAhead: how many bytes ahead quantised weights are asked for, or 0.
#pragma once

TARGET static void widen_fp8_rows(const uint8_t* code, const float* scales, int inputs, float* out) {
  const __m512 factor = _mm512_set1_ps(256.0f);
  const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(scales), factor);
  const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(scales + 16), factor);
  const __m512i keep = _mm512_set1_epi16(static_cast<short>(0xbfff));
  for (int i = 0; i < inputs; ++i, code += kBlockOutputs, out += kBlockOutputs) {
    if constexpr (kCodesAhead > 0) _mm_prefetch(reinterpret_cast<const char*>(code) + kCodesAhead, _MM_HINT_T1);
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code)));
    // Sign to bit 15, the rest to bits 13 … 7.
    const __m512i half = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(wide, 8), 1), keep);
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), low));
    _mm512_storeu_ps(out + 16, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), high));
  }
}
