// The 8-bit product: rows quantised once to unsigned 8 bits around 128, weights signed with one scale per output.
// sum (a - 128) w = sum a w - 128 sum w; the second sum is known when the weights are packed.
#include <algorithm>

#include "operators.h"
#include "parallel.h"

namespace dynamoe_cpu {

void pack_int8(const Context& context, const int8_t* weight, int64_t outputs, int64_t inputs, uint32_t* packed, int32_t* row_sums) {
  const int64_t cells = ceil_div(inputs, 4);
  for_each_task(context.threads, ceil_div(outputs, kBlockOutputs), [&](int64_t block) {
    const void* rows[kBlockOutputs];
    for (int64_t o = 0; o < kBlockOutputs; ++o) {
      const int64_t output = block * kBlockOutputs + o;
      const int8_t* row = output < outputs ? weight + output * inputs : nullptr;
      rows[o] = row;
      int32_t sum = 0;
      for (int64_t i = 0; row && i < inputs; ++i) sum += row[i];
      row_sums[output] = sum;
    }
    context.kernels->transpose_cells(packed + block * cells * kBlockOutputs, kBlockOutputs, rows, kBlockOutputs, static_cast<int>(inputs));
  });
}

void linear_int8(const Context& context, const Int8LinearCall& call) {
  const Kernels& kernels = *context.kernels;
  const Gemm& gemm = kernels.gemm_int8;
  const int64_t cells = ceil_div(call.inputs, 4), blocks = ceil_div(call.outputs, kBlockOutputs), row_bytes = cells * 4;
  const Tiles tiles(call.rows, gemm.tile_rows);
  char* panels = scratch(Buffer::hidden).get<char>(call.rows * row_bytes);
  float* scales = scratch(Buffer::states).get<float>(call.rows);
  for_each_task(context.threads, tiles.count, [&](int64_t t) {
    uint8_t* bytes = scratch(Buffer::quantized).get<uint8_t>(tiles.size(t) * row_bytes);
    float* wide = scratch(Buffer::values).get<float>(call.inputs);
    const void* rows[kMaxTileRows];
    for (int r = 0; r < tiles.size(t); ++r) {
      const void* x = call.x.at(tiles.start(t) + r);
      if (call.x.dtype == Dtype::bf16) {
        kernels.widen(static_cast<const uint16_t*>(x), wide, static_cast<int>(call.inputs));
        x = wide;
      }
      scales[tiles.start(t) + r] = kernels.quantize(static_cast<const float*>(x), static_cast<int>(call.inputs), bytes + r * row_bytes);
      rows[r] = bytes + r * row_bytes;
    }
    gemm.pack(panels + tiles.start(t) * row_bytes, rows, tiles.size(t), static_cast<int>(call.inputs));
  });
  const int64_t groups = std::min<int64_t>(blocks, 8 * context.threads);
  for_each_task(context.threads, groups, [&](int64_t group) {
    alignas(64) int32_t sums[kMaxTileRows * kBlockOutputs];
    alignas(64) float tile[kMaxTileRows * kBlockOutputs];
    for (int64_t block = blocks * group / groups; block < blocks * (group + 1) / groups; ++block) {
      const int64_t output = block * kBlockOutputs;
      const int width = static_cast<int>(std::min<int64_t>(kBlockOutputs, call.outputs - output));
      for (int64_t t = 0; t < tiles.count; ++t) {
        gemm.run(tiles.size(t), panels + tiles.start(t) * row_bytes, call.weights + block * cells * kBlockOutputs, static_cast<int>(cells), sums, false);
        for (int r = 0; r < tiles.size(t); ++r)
          for (int o = 0; o < kBlockOutputs; ++o) {
            const int i = r * kBlockOutputs + o;
            const int32_t compensation = 128 * call.row_sums[output + o];
            tile[i] = static_cast<float>(sums[i] - compensation) * (scales[tiles.start(t) + r] * call.scales[output + o]);
          }
        const int64_t element = tiles.start(t) * call.out_stride + output;
        kernels.store(tile, tiles.size(t), width, call.bias ? call.bias + output : nullptr,
                      static_cast<char*>(call.out) + element * element_bytes(call.out_dtype), call.out_stride, call.out_dtype);
      }
    }
  });
}

}  // namespace dynamoe_cpu
