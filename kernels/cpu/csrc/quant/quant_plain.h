// Products of limbs where there is no dot-product instruction: exact integer sums in plain loops. Rows come here only
// when they are rounded to one limb.
#pragma once

TARGET static void multiply_limbs(const QuantLayout& layout, const LimbShape& shape, int num_rows, const char* packed,
                                   const char* block, float* tile, CodesAhead) {
  const bool nibbles = layout.bits() == 4;
  const bool grouped = layout.group < layout.inputs;  // else the scales are those of whole outputs
  GroupScales read(layout, block);
  const float* scales = read.values;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(block + layout.scale_bytes());
  for (int64_t begin = 0; begin < shape.inputs; begin += shape.group) {
    const int64_t inputs = shape.inputs - begin < shape.group ? shape.inputs - begin : shape.group;
    const int64_t pairs = ceil_div(inputs, 8);
    if (grouped && begin) {
      read = GroupScales(layout, reinterpret_cast<const char*>(codes));
      codes += layout.scale_bytes();
    }
    for (int r = 0; r < num_rows; ++r) {
      alignas(64) int32_t sum[kBlockOutputs] = {};
      const char* header = packed + 4 * r;
      const int8_t* a = reinterpret_cast<const int8_t*>(header) + LimbShape::kHeader * num_rows;
      const uint8_t* w = codes;
      for (int64_t pair = 0; pair < pairs; ++pair)
        for (int half = 0; half < 2; ++half, a += 4 * num_rows) {
          for (int o = 0; o < kBlockOutputs; ++o)
            for (int i = 0; i < 4; ++i) {
              const int32_t code = !nibbles ? w[4 * o + i] : half ? w[4 * o + i] >> 4 : w[4 * o + i] & 15;
              sum[o] += code * a[i];
            }
          if (half || !nibbles) w += 4 * kBlockOutputs;
        }
      float scale;
      int32_t total;
      std::memcpy(&scale, header, 4);
      std::memcpy(&total, header + 4 * num_rows, 4);
      float* out = tile + r * kBlockOutputs;
      for (int o = 0; o < kBlockOutputs; ++o) {
        float result = begin ? out[o] : 0.0f;
        if (layout.has_offsets()) {
          result += static_cast<float>(total) * scale * scales[kBlockOutputs + o];
          result += static_cast<float>(sum[o]) * scale * scales[o];
        } else {
          const float product = static_cast<float>(sum[o] - layout.zero() * total) * scale;
          result += grouped ? product * scales[o] : product;
          if (!grouped && begin + inputs == shape.inputs) result *= scales[o];
        }
        out[o] = result;
      }
    }
    packed += LimbShape::bytes(inputs, 1) * num_rows;
    codes += QuantLayout::code_bytes(layout.format, inputs);
  }
}

constexpr Quant kQuant{{kTileRows, kTileRows}, false, make_limbs,      limb_bytes, pack_limbs, 0,
                       1,                     multiply_limbs, round_fp8, widen_codes};
