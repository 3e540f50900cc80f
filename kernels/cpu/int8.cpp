// The 8-bit product: rows quantised once to unsigned 8 bits around 128, weights signed with one scale per output.
// sum (a - 128) w = sum a w - 128 sum w; the second sum is known when the weights are packed.
#include <algorithm>
#include <atomic>

#include "operators.h"
#include "parallel.h"

namespace dynamoe_cpu {

void pack_int8(const Context& context, const int8_t* weight, int64_t outputs, int64_t inputs, uint32_t* packed,
               int32_t* row_sums) {
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
    context.kernels->transpose_cells(packed + block * cells * kBlockOutputs, kBlockOutputs, rows, kBlockOutputs,
                                     static_cast<int>(inputs));
  });
}

void quantize_rows(const Context& context, const Rows& x, int64_t rows, int64_t inputs, uint8_t* out, float* scales) {
  constexpr int64_t kRowsPerTask = 8;
  const Kernels& kernels = *context.kernels;
  const int64_t row_bytes = 4 * ceil_div(inputs, 4);
  for_each_task(context.threads, ceil_div(rows, kRowsPerTask), [&](int64_t task) {
    float* wide = scratch(Buffer::values).get<float>(inputs);
    for (int64_t row = task * kRowsPerTask; row < std::min(rows, (task + 1) * kRowsPerTask); ++row) {
      const void* source = x.at(row);
      if (x.dtype == Dtype::bf16) {
        kernels.widen(static_cast<const uint16_t*>(source), wide, static_cast<int>(inputs));
        source = wide;
      }
      scales[row] =
          kernels.quantize(static_cast<const float*>(source), static_cast<int>(inputs), out + row * row_bytes);
      for (int64_t i = inputs; i < row_bytes; ++i) out[row * row_bytes + i] = 0;
    }
  });
}

void dequantize(const int32_t* sums, int num_rows, const float* row_scales, const float* scales,
                const int32_t* weight_sums, float* tile) {
  for (int r = 0; r < num_rows; ++r)
    for (int o = 0; o < kBlockOutputs; ++o) {
      const int i = r * kBlockOutputs + o;
      tile[i] = static_cast<float>(sums[i] - 128 * weight_sums[o]) * (row_scales[r] * scales[o]);
    }
}

void linear_int8(const Context& context, const Int8LinearCall& call) {
  if (!call.rows) return;
  const Kernels& kernels = *context.kernels;
  const Gemm& gemm = kernels.gemm_int8;
  const int64_t cells = ceil_div(call.inputs, 4), blocks = ceil_div(call.outputs, kBlockOutputs), row_bytes = cells * 4;
  uint8_t* quantized = scratch(Buffer::quantized).get<uint8_t>(call.rows * row_bytes);
  float* row_scales = scratch(Buffer::states).get<float>(call.rows);
  quantize_rows(context, call.x, call.rows, call.inputs, quantized, row_scales);
  const Tiles chunks(call.rows, std::max<int64_t>(gemm.tile_rows, 384 * 1024 / row_bytes));
  const int64_t groups = std::min(blocks, ceil_div(8 * context.threads, chunks.count));
  std::atomic<int64_t> next{0};
  on_all_threads(context.threads, [&] {
    alignas(64) int32_t sums[kMaxTileRows * kBlockOutputs];
    alignas(64) float tile[kMaxTileRows * kBlockOutputs];
    char* panel = scratch(Buffer::rows).get<char>((chunks.size(0) + 1) * row_bytes);
    int64_t packed = -1;
    for (int64_t task = next.fetch_add(1); task < chunks.count * groups; task = next.fetch_add(1)) {
      const int64_t chunk = task / groups, group = task % groups, first_row = chunks.start(chunk);
      const Tiles tiles(chunks.size(chunk), gemm.tile_rows);
      for (int64_t t = 0; packed != chunk && t < tiles.count; ++t) {
        const void* rows[kMaxTileRows];
        for (int r = 0; r < tiles.size(t); ++r) rows[r] = quantized + (first_row + tiles.start(t) + r) * row_bytes;
        gemm.pack(panel + tiles.start(t) * row_bytes, rows, tiles.size(t), static_cast<int>(row_bytes));
      }
      packed = chunk;
      const int64_t first_block = blocks * group / groups, last_block = blocks * (group + 1) / groups;
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t output = block * kBlockOutputs;
        const int width = static_cast<int>(std::min<int64_t>(kBlockOutputs, call.outputs - output));
        const uint32_t* weights = call.weights + block * cells * kBlockOutputs;
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t row = first_row + tiles.start(t);
          run_block(gemm, tiles.size(t), panel + tiles.start(t) * row_bytes, weights, cells, sums, false,
                    block == first_block, nullptr, t, tiles.count);
          dequantize(sums, tiles.size(t), row_scales + row, call.scales + output, call.row_sums + output, tile);
          const int64_t element = row * call.out_stride + output;
          kernels.store(tile, tiles.size(t), width, call.bias ? call.bias + output : nullptr,
                        static_cast<char*>(call.out) + element * element_bytes(call.out_dtype), call.out_stride,
                        call.out_dtype);
        }
      }
    }
  });
}

}  // namespace dynamoe_cpu
