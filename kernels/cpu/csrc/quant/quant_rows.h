// Rows rounded to limbs, and codes widened to fp32, in plain loops that the compiler turns into the target's vectors.
// Included by each instruction set's file, inside its own anonymous namespace.
#pragma once

// The largest integer of one or two signed limbs: two are 256 high + low with -128 <= low < 128.
constexpr int limb_limit(int limbs) { return limbs == 1 ? 127 : 32639; }

[[maybe_unused]] TARGET static void make_limbs(const LimbShape& shape, const void* row, Dtype dtype,
                                                char* out) {
  constexpr int kStretch = 128;
  alignas(64) int32_t values[kStretch];
  alignas(64) float wide[kStretch];
  const int inputs = static_cast<int>(shape.inputs), group = static_cast<int>(shape.group), limbs = shape.limbs;
  const auto load = [&](int first, int count) -> const float* {
    if (dtype == Dtype::fp32) return static_cast<const float*>(row) + first;
    widen(static_cast<const uint16_t*>(row) + first, wide, count);
    return wide;
  };
  for (int begin = 0; begin < inputs; begin += group) {
    const int end = begin + group < inputs ? begin + group : inputs;
    // A group may be longer than a stretch, so its scale comes first.
    float top = 0.0f;
    bool finite = true;
    for (int first = begin; first < end; first += kStretch) {
      const int count = end - first < kStretch ? end - first : kStretch;
      const float* x = load(first, count);
      float most = 0.0f, check = 0.0f;
      for (int i = 0; i < count; ++i) {
        const float size = std::fabs(x[i]);
        most = size > most ? size : most;
        check += x[i] * 0.0f;
      }
      top = most > top ? most : top;
      finite = finite && check == 0.0f;
    }
    const float limit = static_cast<float>(limb_limit(limbs)), scale = top / limit;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    const float written = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    int32_t sum = 0;
    char* to = out + LimbShape::kHeader;
    for (int first = begin; first < end; first += kStretch) {
      const int count = end - first < kStretch ? end - first : kStretch;
      const int padded = static_cast<int>(ceil_div(count, 8)) * 8;
      const float* x = load(first, count);
      for (int i = 0; i < count; ++i) {
        constexpr float kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
        float value = x[i] * inverse;
        value = value < limit ? value : limit;
        value = value > -limit ? value : -limit;
        values[i] = static_cast<int32_t>((value + kMagic) - kMagic);
      }
      for (int i = count; i < padded; ++i) values[i] = 0;
      for (int i = 0; i < count; ++i) sum += values[i];
      for (int i = 0; i < padded; i += 8, to += 8 * limbs)
        for (int j = 0; j < 8; ++j) {
          const int32_t above = limbs == 1 ? 0 : (values[i + j] + 128) >> 8;
          if (limbs == 2) to[j] = static_cast<char>(above);
          to[8 * (limbs - 1) + j] = static_cast<char>(values[i + j] - 256 * above);
        }
    }
    std::memcpy(out, &written, 4);
    std::memcpy(out + 4, &sum, 4);
    out += LimbShape::bytes(end - begin, limbs);
  }
}

TARGET static void round_fp8(float* row, int n) {
  constexpr int kGroup = 128;
  for (int first = 0; first < n; first += kGroup) {
    float* x = row + first;
    const int count = n - first < kGroup ? n - first : kGroup;
    float top = 0.0f;
    for (int i = 0; i < count; ++i) {
      const float size = std::fabs(x[i]);
      top = size > top ? size : top;
    }
    const float scale = top > 0 ? top / 448.0f : 1.0f;
    for (int i = 0; i < count; ++i) {
      const float value = x[i] / scale;
      const uint32_t bits = std::bit_cast<uint32_t>(value);
      const float normal = std::bit_cast<float>((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
      constexpr float kMagic = 24576.0f;  // 1.5 * 2^14: adding it rounds to multiples of 2^-9
      const float small = (value + kMagic) - kMagic;
      x[i] = (std::fabs(value) < 0.015625f ? small : normal) * scale;
    }
  }
}

// Inputs of one group, the first a multiple of 8 into it, and of codes of 5 and 6 bits its own first. The including
// file brings `widen_fp8_rows`.
TARGET static inline void widen_group(const QuantLayout& layout, const char* codes, const float* scales, int64_t inputs,
                                      float* out) {
  if (layout.format == Format::fp8)
    return widen_fp8_rows(reinterpret_cast<const uint8_t*>(codes), scales, static_cast<int>(inputs), out);
  const float* offsets = scales + kBlockOutputs;
  const bool has_offsets = layout.has_offsets(), nibbles = layout.bits() < 8;
  const int upper = nibbles ? layout.bits() - 4 : 0, zero = layout.zero();
  const uint32_t lower_mask = nibbles ? 15 : 255, upper_mask = (1u << upper) - 1;
  const uint32_t* highs = reinterpret_cast<const uint32_t*>(codes + layout.low_bytes());
  for (int i = 0; i < inputs; ++i, out += kBlockOutputs) {
    const int byte = 8 * (i % 4), quad = i / 4;
    const uint32_t* lows = reinterpret_cast<const uint32_t*>(codes) + (nibbles ? i / 8 : quad) * kBlockOutputs;
    const int shift = byte + (nibbles ? 4 * (quad % 2) : 0), upper_shift = byte + upper * quad;
    if (layout.format == Format::mxfp4) {
      for (int o = 0; o < kBlockOutputs; ++o)
        out[o] = static_cast<float>(mxfp4_number(static_cast<int>(lows[o] >> shift & lower_mask))) * scales[o];
    } else if (upper) {
      for (int o = 0; o < kBlockOutputs; ++o) {
        const int value = static_cast<int>((lows[o] >> shift & 15) | (highs[o] >> upper_shift & upper_mask) << 4);
        out[o] = has_offsets ? static_cast<float>(value) * scales[o] + offsets[o]
                             : static_cast<float>(value - zero) * scales[o];
      }
    } else {
      for (int o = 0; o < kBlockOutputs; ++o) {
        const int value = static_cast<int>(lows[o] >> shift & lower_mask);
        out[o] = has_offsets ? static_cast<float>(value) * scales[o] + offsets[o]
                             : static_cast<float>(value - zero) * scales[o];
      }
    }
  }
}

TARGET static void widen_codes(const QuantLayout& layout, const char* block, int64_t first, int64_t inputs,
                               float* out) {
  for (int64_t i = first, end = first + inputs; i < end;) {
    const int64_t group = i / layout.group, begin = group * layout.group;
    const int64_t stop = end < begin + layout.group ? end : begin + layout.group;
    const GroupScales scales(layout, block + layout.section_at(group), group % layout.section_groups());
    widen_group(layout, block + layout.codes_of(i), scales.values, stop - i, out);
    out += (stop - i) * kBlockOutputs;
    i = stop;
  }
}
