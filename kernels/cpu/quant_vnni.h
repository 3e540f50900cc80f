// Products of digits with vpdpbusd: unsigned codes, signed digits; the sums of a group are exact.
#pragma once

constexpr int kDigitRows = 6;
constexpr int kCodesAhead = 4096;  // bytes

template <bool kNibbles, int kDigits, int kRows>
TARGET static void multiply_tile(const QuantLayout& layout, const DigitShape& shape, const char* panel,
                                 const char* block, float* tile) {
  constexpr int kChains = kRows * kDigits <= 2 ? 2 : 1;  // of sums that do not wait for each other
  const float* scales = reinterpret_cast<const float*>(block);
  const char* codes = block + layout.scale_bytes();
  const bool grouped = layout.group < layout.inputs;  // else the scales are those of whole outputs
  const uint32_t* a = reinterpret_cast<const uint32_t*>(panel);
  for (int64_t begin = 0; begin < shape.inputs; begin += shape.group) {
    const int64_t inputs = shape.inputs - begin < shape.group ? shape.inputs - begin : shape.group;
    if (grouped && begin) {
      scales = reinterpret_cast<const float*>(codes);
      codes += layout.scale_bytes();
    }
    const uint32_t *row_scales = a, *row_sums = a + kRows;
    a += 2 * kRows;
    __m512i sum[kChains][kRows][kDigits][2];
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int d = 0; d < kDigits; ++d) sum[c][r][d][0] = sum[c][r][d][1] = _mm512_setzero_si512();
    for (int64_t pair = ceil_div(inputs, 8); pair > 0; --pair) {
      _mm_prefetch(codes + kCodesAhead, _MM_HINT_T1);
      _mm_prefetch(codes + kCodesAhead + 64, _MM_HINT_T1);
      __m512i w[2][2];
      w[0][0] = _mm512_loadu_si512(codes);
      w[0][1] = _mm512_loadu_si512(codes + 64);
      if constexpr (kNibbles) {
        const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          w[1][v] = _mm512_and_si512(_mm512_srli_epi16(w[0][v], 4), mask);
          w[0][v] = _mm512_and_si512(w[0][v], mask);
        }
        codes += 128;
      } else {
        _mm_prefetch(codes + kCodesAhead + 128, _MM_HINT_T1);
        _mm_prefetch(codes + kCodesAhead + 192, _MM_HINT_T1);
        w[1][0] = _mm512_loadu_si512(codes + 128);
        w[1][1] = _mm512_loadu_si512(codes + 192);
        codes += 256;
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int c = half % kChains;
#pragma GCC unroll 2
        for (int d = 0; d < kDigits; ++d)
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const __m512i x = _mm512_set1_epi32(static_cast<int>(a[d * kRows + r]));
            sum[c][r][d][0] = _mm512_dpbusd_epi32(sum[c][r][d][0], w[half][0], x);
            sum[c][r][d][1] = _mm512_dpbusd_epi32(sum[c][r][d][1], w[half][1], x);
          }
        a += kDigits * kRows;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float row_scale;
      std::memcpy(&row_scale, row_scales + r, 4);
      const int32_t row_sum = static_cast<int32_t>(row_sums[r]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        __m512i total = sum[0][r][0][v];
        if constexpr (kChains == 2) total = _mm512_add_epi32(total, sum[1][r][0][v]);
        if constexpr (kDigits == 2) {
          total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), sum[0][r][1][v]);
          if constexpr (kChains == 2) total = _mm512_add_epi32(total, sum[1][r][1][v]);
        }
        float* out = tile + r * kBlockOutputs + 16 * v;
        __m512 result = begin ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
        const __m512 scale = _mm512_set1_ps(row_scale);
        if (kNibbles && layout.offsets) {
          const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale);
          const __m512 all = _mm512_set1_ps(static_cast<float>(row_sum) * row_scale);
          result = _mm512_fmadd_ps(all, _mm512_loadu_ps(scales + kBlockOutputs + 16 * v), result);
          result = _mm512_fmadd_ps(product, _mm512_loadu_ps(scales + 16 * v), result);
        } else {
          total = _mm512_sub_epi32(total, _mm512_set1_epi32((kNibbles ? 8 : 128) * row_sum));
          const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale);
          result = grouped ? _mm512_fmadd_ps(product, _mm512_loadu_ps(scales + 16 * v), result)
                           : _mm512_add_ps(product, result);
          if (!grouped && begin + inputs == shape.inputs)
            result = _mm512_mul_ps(result, _mm512_loadu_ps(scales + 16 * v));
        }
        _mm512_storeu_ps(out, result);
      }
    }
  }
}

template <bool kNibbles, int kDigits, int kRows = kDigitRows>
TARGET static void choose_tile(const QuantLayout& layout, const DigitShape& shape, int num_rows, const char* panel,
                               const char* block, float* tile) {
  if (num_rows == kRows) {
    multiply_tile<kNibbles, kDigits, kRows>(layout, shape, panel, block, tile);
  } else if constexpr (kRows > 1) {
    choose_tile<kNibbles, kDigits, kRows - 1>(layout, shape, num_rows, panel, block, tile);
  }
}

TARGET static void multiply_digits(const QuantLayout& layout, const DigitShape& shape, int num_rows, const char* panel,
                                   const char* block, float* tile) {
  if (layout.format == Format::int4) return choose_tile<true, 2>(layout, shape, num_rows, panel, block, tile);
  if (shape.digits == 2) return choose_tile<false, 2>(layout, shape, num_rows, panel, block, tile);
  choose_tile<false, 1, 2 * kDigitRows>(layout, shape, num_rows, panel, block, tile);
}

constexpr Quant kVnniQuant{kDigitRows, true, pack_digits, multiply_digits, round_fp8, widen_codes};
