// Unsigned 8-bit panel times signed 8-bit weights where there is no dot-product instruction. The plain loop is exact,
// and the compiler widens it to whatever vectors the target has.
#pragma once

TARGET static void run_int8(int num_rows, const void* panel, const uint32_t* weights, int cells, void* tile,
                            bool accumulate, Ahead /*ahead*/) {
  int32_t* out = static_cast<int32_t*>(tile);
  for (int r = 0; r < num_rows; ++r, out += kBlockOutputs) {
    alignas(64) int32_t sum[kBlockOutputs] = {};
    const uint8_t* a = static_cast<const uint8_t*>(panel) + 4 * r;
    const int8_t* w = reinterpret_cast<const int8_t*>(weights);
    for (int cell = 0; cell < cells; ++cell, a += 4 * num_rows, w += 4 * kBlockOutputs) {
      for (int o = 0; o < kBlockOutputs; ++o)
        for (int i = 0; i < 4; ++i) sum[o] += static_cast<int32_t>(a[i]) * w[4 * o + i];
    }
    for (int o = 0; o < kBlockOutputs; ++o) out[o] = accumulate ? out[o] + sum[o] : sum[o];
  }
}
