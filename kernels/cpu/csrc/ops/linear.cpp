// Linear layers: packing, product, and rows read back.
#include <algorithm>
#include <cstring>

#include "ops/operators.h"
#include "ops/packed.h"

namespace dynamoe_cpu {

int64_t packed_words(const Gemm& gemm, int64_t outputs, int64_t inputs) {
  return ceil_div(outputs, kBlockOutputs) * gemm.words(inputs) * kBlockOutputs;
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
    kernels.transpose_words(packed + block * block_words, kBlockOutputs, rows, kBlockOutputs,
                            static_cast<int>(inputs) * element_bytes(weight.dtype));
  });
}

void linear(const Context& context, const LinearCall& call) {
  if (!call.rows) return;
  const Kernels& kernels = *context.kernels;
  const Gemm& gemm = kernels.gemm[static_cast<int>(call.x.dtype)];
  const int64_t words = gemm.words(call.inputs), blocks = ceil_div(call.outputs, kBlockOutputs);
  const Tiles chunks(call.rows, most_packed_rows(gemm, call.inputs));
  WorkChunks work(call.heads * chunks.count, blocks, context.threads);
  on_all_threads(work.threads(), [&] {
    const Products products(kernels);
    alignas(64) float tile[kMostTileRows * kBlockOutputs];
    char* packed = nullptr;
    int64_t packed_part = -1, first, last;
    while (work.take(first, last)) {
      const int64_t part = first / blocks, head = part / chunks.count, chunk = part % chunks.count;
      const int64_t first_row = chunks.start(chunk), x_bytes = head * call.x_head_stride * element_bytes(call.x.dtype);
      const PackedTiles tiles(gemm, chunks.size(chunk), call.inputs);
      if (packed_part != part) {
        packed = scratch(Buffer::rows).get<char>(tiles.bytes());
        for (int64_t t = 0; t < tiles.count; ++t) {
          const void* rows[kMostTileRows];
          for (int r = 0; r < tiles.size(t); ++r)
            rows[r] = static_cast<const char*>(call.x.at(first_row + tiles.start(t) + r)) + x_bytes;
          gemm.pack(tiles.at(packed, t), rows, tiles.size(t), static_cast<int>(call.inputs));
        }
        packed_part = part;
      }
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, output = block * kBlockOutputs;
        const int width = static_cast<int>(std::min<int64_t>(kBlockOutputs, call.outputs - output));
        const uint32_t* weights = call.weights + (head * blocks + block) * words * kBlockOutputs;
        for (int64_t t = 0; t < tiles.count; ++t) {
          run_block(gemm, tiles.size(t), tiles.at(packed, t), weights, words, tile, false, item == first, nullptr, t,
                    tiles.count);
          const int64_t element =
              (first_row + tiles.start(t)) * call.out_stride + head * call.out_head_stride + output;
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
  const int64_t row_bytes = inputs * element_bytes(dtype), words = ceil_div(row_bytes, 4);
  const int threads = count < 64 ? 1 : context.threads;
  for_each_task(threads, count, [&](int64_t i) {
    const uint32_t* from = packed + (ids[i] / kBlockOutputs * words * kBlockOutputs + ids[i] % kBlockOutputs);
    char* row = static_cast<char*>(out) + i * row_bytes;
    for (int64_t word = 0; word < words; ++word)
      std::memcpy(row + 4 * word, from + word * kBlockOutputs, std::min<int64_t>(4, row_bytes - 4 * word));
  });
}

}  // namespace dynamoe_cpu
