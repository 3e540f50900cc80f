// Linear layers: packing, product, and rows read back.
#include <algorithm>
#include <cstring>

#include "ops/operators.h"
#include "ops/parallel.h"

namespace dynamoe_cpu {

namespace {

// Rows whose panel stays in the second-level cache while all weights pass by.
constexpr int64_t kPanelBytes = 384 * 1024;

}  // namespace

int64_t packed_words(const Gemm& gemm, int64_t outputs, int64_t inputs) {
  return ceil_div(outputs, kBlockOutputs) * ceil_div(inputs, gemm.inputs_per_cell) * kBlockOutputs;
}

void pack_linear(const Context& context, const Rows& weight, int64_t outputs, int64_t inputs, uint32_t* packed) {
  const Kernels& kernels = *context.kernels;
  const int64_t block_words = packed_words(kernels.gemm[static_cast<int>(weight.dtype)], 1, inputs);
  for_each_task(context.threads, ceil_div(outputs, kBlockOutputs), [&](int64_t block) {
    const void* rows[kBlockOutputs];
    for (int o = 0; o < kBlockOutputs; ++o) {
      const int64_t output = block * kBlockOutputs + o;
      rows[o] = output < outputs ? weight.at(output) : nullptr;
    }
    kernels.transpose_cells(packed + block * block_words, kBlockOutputs, rows, kBlockOutputs,
                            static_cast<int>(inputs) * element_bytes(weight.dtype));
  });
}

void linear(const Context& context, const LinearCall& call) {
  if (!call.rows) return;
  const Kernels& kernels = *context.kernels;
  const Gemm& gemm = kernels.gemm[static_cast<int>(call.x.dtype)];
  const int64_t cells = ceil_div(call.inputs, gemm.inputs_per_cell), blocks = ceil_div(call.outputs, kBlockOutputs);
  const int64_t row_bytes = cells * gemm.panel_cell_bytes;
  const Tiles chunks(call.rows, std::max<int64_t>(gemm.tile_rows, kPanelBytes / row_bytes));
  Pieces pieces(chunks.count, blocks, context.threads);
  on_all_threads(pieces.threads(), [&] {
    alignas(64) float tile[kMaxTileRows * kBlockOutputs];
    char* panel = scratch(Buffer::rows).get<char>(chunks.size(0) * row_bytes + row_bytes);
    int64_t packed = -1, first, last;
    while (pieces.take(first, last)) {
      const int64_t chunk = first / blocks, first_row = chunks.start(chunk);
      const Tiles tiles(chunks.size(chunk), gemm.tile_rows);
      if (packed != chunk) {
        for (int64_t t = 0; t < tiles.count; ++t) {
          const void* rows[kMaxTileRows];
          for (int r = 0; r < tiles.size(t); ++r) rows[r] = call.x.at(first_row + tiles.start(t) + r);
          gemm.pack(panel + tiles.start(t) * row_bytes, rows, tiles.size(t), static_cast<int>(call.inputs));
        }
        packed = chunk;
      }
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, output = block * kBlockOutputs;
        const int width = static_cast<int>(std::min<int64_t>(kBlockOutputs, call.outputs - output));
        const uint32_t* weights = call.weights + block * cells * kBlockOutputs;
        for (int64_t t = 0; t < tiles.count; ++t) {
          run_block(gemm, tiles.size(t), panel + tiles.start(t) * row_bytes, weights, cells, tile, false,
                    item == first, nullptr, t, tiles.count);
          const int64_t element = (first_row + tiles.start(t)) * call.out_stride + output;
          kernels.store(tile, tiles.size(t), width, call.bias ? call.bias + output : nullptr,
                        static_cast<char*>(call.out) + element * element_bytes(call.out_dtype), call.out_stride,
                        call.out_dtype);
        }
      }
    }
  });
}

void unpack_rows(const Context& context, const uint32_t* packed, Dtype dtype, int64_t inputs, const int64_t* ids,
                 int64_t count, void* out) {
  const int64_t row_bytes = inputs * element_bytes(dtype), cells = ceil_div(row_bytes, 4);
  const int threads = count < 64 ? 1 : context.threads;
  for_each_task(threads, count, [&](int64_t i) {
    const uint32_t* word = packed + (ids[i] / kBlockOutputs * cells * kBlockOutputs + ids[i] % kBlockOutputs);
    char* row = static_cast<char*>(out) + i * row_bytes;
    for (int64_t cell = 0; cell < cells; ++cell)
      std::memcpy(row + 4 * cell, word + cell * kBlockOutputs, std::min<int64_t>(4, row_bytes - 4 * cell));
  });
}

}  // namespace dynamoe_cpu
