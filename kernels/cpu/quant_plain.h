// Products of digits where there is no dot-product instruction: exact integer sums in plain loops. Rows come here only
// when they are rounded to one digit, and then the weights have one scale per output.
#pragma once

TARGET static void multiply_digits(const QuantLayout& layout, const DigitShape& shape, int num_rows, const char* panel,
                                   const char* block, float* tile, Ahead) {
  const float* scales = reinterpret_cast<const float*>(block);
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(block + layout.scale_bytes());
  for (int64_t begin = 0; begin < shape.inputs; begin += shape.group) {
    const int64_t inputs = shape.inputs - begin < shape.group ? shape.inputs - begin : shape.group;
    const int64_t cells = ceil_div(inputs, 8) * 2;
    for (int r = 0; r < num_rows; ++r) {
      alignas(64) int32_t sum[kBlockOutputs] = {};
      const int8_t* a = reinterpret_cast<const int8_t*>(panel) + 4 * (2 * num_rows + r);
      const uint8_t* w = codes;
      for (int64_t cell = 0; cell < cells; ++cell, a += 4 * num_rows, w += 4 * kBlockOutputs)
        for (int o = 0; o < kBlockOutputs; ++o)
          for (int i = 0; i < 4; ++i) sum[o] += static_cast<int32_t>(w[4 * o + i]) * a[i];
      float scale;
      int32_t total;
      std::memcpy(&scale, panel + 4 * r, 4);
      std::memcpy(&total, panel + 4 * (num_rows + r), 4);
      float* out = tile + r * kBlockOutputs;
      for (int o = 0; o < kBlockOutputs; ++o) {
        const float product = static_cast<float>(sum[o] - 128 * total) * scale;
        out[o] = begin ? out[o] + product : product;
        if (begin + inputs == shape.inputs) out[o] *= scales[o];
      }
    }
    panel += 4 * DigitShape::words(inputs, 1) * num_rows;
    codes += 4 * kBlockOutputs * cells;
  }
}

constexpr Quant kPlainQuant{kTileRows, false, pack_digits, 0, multiply_digits, round_fp8, widen_codes};
