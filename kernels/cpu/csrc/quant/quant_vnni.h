// Products of limbs with vpdpbusd: unsigned codes, signed limbs; the sums of a group are exact. The including file
// defines kByteStride, see `Quant`.
#pragma once

constexpr int kLimbRows = 6;  // of two limbs each, whose sums take 24 of 32 registers
constexpr int kRoundedRows = 2 * kLimbRows;  // of one limb each
constexpr int kLimbsAhead = 4096;            // bytes

// Inputs first … first + 15 of a row, zeros from `end` on.
TARGET static inline __m512 load_inputs(const void* row, int first, int end, Dtype dtype) {
  const int left = end - first;
  const __mmask16 mask = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xffffu);
  if (dtype == Dtype::fp32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + first);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + first);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// As `make_limbs` of quant_rows.h, 16 inputs at a time.
TARGET static void make_limb_vectors(const LimbShape& shape, const void* row, Dtype dtype, char* out) {
  const int inputs = static_cast<int>(shape.inputs), group = static_cast<int>(shape.group), limbs = shape.limbs;
  const __m512 limit = _mm512_set1_ps(static_cast<float>(limb_limit(limbs)));
  for (int begin = 0; begin < inputs; begin += group) {
    const int end = begin + group < inputs ? begin + group : inputs;
    __m512 most = _mm512_setzero_ps(), check = _mm512_setzero_ps();
    for (int first = begin; first < end; first += 16) {
      const __m512 x = load_inputs(row, first, end, dtype);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
      check = _mm512_fmadd_ps(x, _mm512_setzero_ps(), check);
    }
    const bool finite = _mm512_cmp_ps_mask(check, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
    const float scale = _mm512_reduce_max_ps(most) / static_cast<float>(limb_limit(limbs));
    const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f);
    const float written = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    __m512i sum = _mm512_setzero_si512();
    char* to = out + LimbShape::kHeader;
    for (int first = begin; first < end; first += 16) {
      __m512 value = _mm512_mul_ps(load_inputs(row, first, end, dtype), inverse);
      value = _mm512_max_ps(_mm512_min_ps(value, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
      const __m512i integer = _mm512_cvtps_epi32(value);
      sum = _mm512_add_epi32(sum, integer);
      const __m512i above =
          limbs == 1 ? _mm512_setzero_si512() : _mm512_srai_epi32(_mm512_add_epi32(integer, _mm512_set1_epi32(128)), 8);
      const __m128i low = _mm512_cvtepi32_epi8(_mm512_sub_epi32(integer, _mm512_slli_epi32(above, 8)));
      const __m128i high = limbs == 1 ? low : _mm512_cvtepi32_epi8(above);
      const int bytes = limbs * (end - first > 8 ? 16 : 8);
      if (limbs == 1) {
        _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << bytes) - 1), low);
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi64(high, low));
        if (bytes == 32) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi64(high, low));
      }
      to += bytes;
    }
    const int32_t row_sum = _mm512_reduce_add_epi32(sum);
    std::memcpy(out, &written, 4);
    std::memcpy(out + 4, &row_sum, 4);
    out += LimbShape::bytes(end - begin, limbs);
  }
}

// sum += codes · the 4 limbs at `limbs`. Compilers move sums from register to register around the intrinsic.
TARGET static inline void add_products(__m512i& sum, __m512i codes, const char* limbs) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(limbs)));
}

TARGET static inline void ask_for_codes(const CodesAhead& ahead, const char* codes) {
  const char* first = codes + (codes < ahead.edge ? ahead.near : ahead.far);
  for (int line = ahead.from; line < ahead.to; line += ahead.stride) _mm_prefetch(first + 64 * line, _MM_HINT_T1);
}

TARGET static inline __m512 load_halves(const char* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Scales 16 n … 16 n + 15 behind `from`.
TARGET static inline __m512 load_scales(const char* from, int n, ScaleType type) {
  if (type == ScaleType::fp32) return _mm512_loadu_ps(from + 64 * n);
  if (type == ScaleType::fp16) return load_halves(from + 32 * n);
  if (type == ScaleType::e8m0) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * n));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23));
  }
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * n));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The same with two levels, of codes at `codes`.
template <bool kSigned>
TARGET static inline __m512 outer_product(const char* outer, const uint8_t* codes, int n) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * n));
  const __m512i wide = kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(wide), load_halves(outer + 32 * n));
}

// What codes of mxfp4 become: twice their values, with 12 added.
constexpr int kMxfp4Zero = 12;
TARGET static inline __m512i mxfp4_table() {
  alignas(16) constexpr uint8_t kTable[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kTable)));
}

// Offsets beside scales, with one level.
TARGET static inline __m512 load_offsets(const QuantLayout& layout, const char* from, int n, __m512 scales) {
  if (layout.offsets == Offsets::values) return load_scales(from, 2 + n, layout.scale_type);
  from += kBlockOutputs * layout.bytes_per_scale();
  const __m256i zeros = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * n));
  return _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(zeros))), scales);
}

template <Format kFormat, int kLimbs, int kRows>
TARGET static void multiply_tile(const QuantLayout& layout, const LimbShape& shape, const char* packed,
                                 const char* block, float* tile, CodesAhead ahead) {
  constexpr bool kNibbles = kFormat != Format::int8, kTable = kFormat == Format::mxfp4;
  constexpr bool kTwoLevel = Format::q4_k <= kFormat && kFormat <= Format::q6_k;
  constexpr bool kSigned = kFormat == Format::q6_k;  // scales, where there are no offsets
  constexpr int kUpper = kFormat == Format::q5_k ? 1 : kFormat == Format::q6_k ? 2 : 0;  // bits above the lower four
  constexpr int kZero = kSigned ? 32 : kTable ? kMxfp4Zero : kNibbles ? 8 : 128;
  constexpr int kChains = kRows * kLimbs <= 2 ? 2 : 1;  // of sums that do not wait for each other
  const char* scales = block;  // with two levels those of the section
  const char* codes = block + layout.scale_bytes();
  const uint8_t* group_scales = kTwoLevel ? scale_codes(layout, block, 0) : nullptr;
  const int64_t outer_group = kTwoLevel ? layout.section_groups() : 1;
  int64_t group = 0;  // of its section
  const bool grouped = kTwoLevel || layout.group < layout.inputs;  // else the scales are those of whole outputs
  for (int64_t begin = 0; begin < shape.inputs; begin += shape.group) {
    const int64_t inputs = shape.inputs - begin < shape.group ? shape.inputs - begin : shape.group;
    if (grouped && begin && (!kTwoLevel || ++group == outer_group)) {
      scales = codes;
      codes += layout.scale_bytes();
      group = 0;
      if constexpr (kTwoLevel) group_scales = scale_codes(layout, scales, 0);
    }
    if constexpr (kTwoLevel) {
      for (const char* line = scales; !group && line < codes; line += 4 * kBlockOutputs) ask_for_codes(ahead, line);
    } else if (grouped || !begin) {
      ask_for_codes(ahead, scales);
    }
    const char* a = packed + LimbShape::kHeader * kRows;
    __m512i sum[kChains][kRows][kLimbs][2];
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int d = 0; d < kLimbs; ++d) sum[c][r][d][0] = sum[c][r][d][1] = _mm512_setzero_si512();
    // A group's upper bits are turned, quad by quad, to where they belong in their bytes.
    __m512i upper[2];
    const __m512i upper_mask = _mm512_set1_epi8(kUpper == 1 ? 16 : 48);
    if constexpr (kUpper > 0) {
      const char* behind = codes + layout.low_bytes();
      ask_for_codes(ahead, behind);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) upper[v] = _mm512_rol_epi32(_mm512_loadu_si512(behind + 64 * v), 4);
    }
    [[maybe_unused]] const __m512i table = mxfp4_table();
    for (int64_t pair = ceil_div(inputs, 8); pair > 0; --pair) {
      ask_for_codes(ahead, codes);
      const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int c = half % kChains;
        __m512i w[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          w[v] = _mm512_loadu_si512(codes + (kNibbles ? 64 * v : 128 * half + 64 * v));
          if constexpr (kNibbles) w[v] = _mm512_and_si512(half ? _mm512_srli_epi16(w[v], 4) : w[v], mask);
          if constexpr (kTable) w[v] = _mm512_shuffle_epi8(table, w[v]);
          if constexpr (kUpper > 0) {
            w[v] = _mm512_or_si512(w[v], _mm512_and_si512(upper[v], upper_mask));
            upper[v] = _mm512_ror_epi32(upper[v], kUpper);
          }
        }
#pragma GCC unroll 2
        for (int d = 0; d < kLimbs; ++d)
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const char* limbs = a + 4 * (kRows * (2 * d + half) + r);
            add_products(sum[c][r][d][0], w[0], limbs);
            add_products(sum[c][r][d][1], w[1], limbs);
          }
      }
      codes += kNibbles ? 128 : 256;
      a += 8 * kLimbs * kRows;
    }
    const bool scaled = grouped || begin + inputs == shape.inputs;
    const bool offsets = kTwoLevel ? !kSigned : kNibbles && layout.has_offsets();
    __m512 scale_of[2], offset_of[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if constexpr (kTwoLevel) {
        scale_of[v] = outer_product<kSigned>(scales, group_scales, v);
        if (offsets)
          offset_of[v] =
              outer_product<false>(scales + 2 * kBlockOutputs, group_scales + outer_group * kBlockOutputs, v);
        continue;
      }
      if (scaled) scale_of[v] = load_scales(scales, v, layout.scale_type);
      if (offsets) offset_of[v] = load_offsets(layout, scales, v, scale_of[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float row_scale;
      int32_t row_sum;
      std::memcpy(&row_scale, packed + 4 * r, 4);
      std::memcpy(&row_sum, packed + 4 * (kRows + r), 4);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        __m512i total = sum[0][r][0][v];
        if constexpr (kChains == 2) total = _mm512_add_epi32(total, sum[1][r][0][v]);
        if constexpr (kLimbs == 2) {
          total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), sum[0][r][1][v]);
          if constexpr (kChains == 2) total = _mm512_add_epi32(total, sum[1][r][1][v]);
        }
        float* out = tile + r * kBlockOutputs + 16 * v;
        __m512 result = begin ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
        const __m512 scale = _mm512_set1_ps(row_scale);
        if (offsets) {
          const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale);
          const __m512 all = _mm512_set1_ps(static_cast<float>(row_sum) * row_scale);
          result = _mm512_fmadd_ps(all, offset_of[v], result);
          result = _mm512_fmadd_ps(product, scale_of[v], result);
        } else {
          total = _mm512_sub_epi32(total, _mm512_set1_epi32(kZero * row_sum));
          const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale);
          result = grouped ? _mm512_fmadd_ps(product, scale_of[v], result) : _mm512_add_ps(product, result);
          if (!grouped && scaled) result = _mm512_mul_ps(result, scale_of[v]);
        }
        _mm512_storeu_ps(out, result);
      }
    }
    packed += LimbShape::bytes(inputs, kLimbs) * kRows;
    if constexpr (kTwoLevel) {
      group_scales += kBlockOutputs;
      if constexpr (kUpper > 0) codes += 4 * kBlockOutputs;
    }
  }
}

template <Format kFormat, int kLimbs, int kRows = kLimbRows>
TARGET static void choose_tile(const QuantLayout& layout, const LimbShape& shape, int num_rows, const char* packed,
                               const char* block, float* tile, CodesAhead ahead) {
  if (num_rows == kRows) {
    multiply_tile<kFormat, kLimbs, kRows>(layout, shape, packed, block, tile, ahead);
  } else if constexpr (kRows > 1) {
    choose_tile<kFormat, kLimbs, kRows - 1>(layout, shape, num_rows, packed, block, tile, ahead);
  }
}

TARGET static void multiply_limbs(const QuantLayout& layout, const LimbShape& shape, int num_rows, const char* packed,
                                   const char* block, float* tile, CodesAhead ahead) {
  const auto run = [&]<Format kFormat>() {
    if (shape.limbs == 2) return choose_tile<kFormat, 2>(layout, shape, num_rows, packed, block, tile, ahead);
    if constexpr (kFormat < Format::q4_k)
      choose_tile<kFormat, 1, kRoundedRows>(layout, shape, num_rows, packed, block, tile, ahead);
  };
  switch (layout.format) {
    case Format::int8: return run.template operator()<Format::int8>();
    case Format::int4: return run.template operator()<Format::int4>();
    case Format::q4_k: return run.template operator()<Format::q4_k>();
    case Format::q5_k: return run.template operator()<Format::q5_k>();
    case Format::q6_k: return run.template operator()<Format::q6_k>();
    case Format::mxfp4: return run.template operator()<Format::mxfp4>();
    case Format::fp8: return;  // rows never become limbs for it
  }
}

constexpr Quant kQuant{{kRoundedRows, kLimbRows}, true, make_limb_vectors, limb_bytes, pack_limbs, kLimbsAhead,
                       kByteStride, multiply_limbs, round_fp8, widen_codes};
