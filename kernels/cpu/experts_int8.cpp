// The experts of a layer with 8-bit weights. As experts.cpp, but rows and hidden activations are quantised on the way,
// the latter in a step of its own, for a row's scale needs the whole row.
#include <atomic>
#include <cstring>

#include "experts_plan.h"

namespace dynamoe_cpu {

namespace {

struct Int8Weights {
  const uint32_t* packed;
  const float* scales;
  const int32_t* sums;
  int64_t cells;
};

// One block of one chunk: each tile of rows times the block, as floats, handed to `finish(tile start, rows, tile)`.
template <class Finish>
void multiply_block(const Gemm& gemm, const Int8Weights& weights, int64_t block, const Chunk& chunk, const char* panel,
                    const float* row_scales, const Finish& finish) {
  alignas(64) int32_t sums[kMaxTileRows * kBlockOutputs];
  alignas(64) float tile[kMaxTileRows * kBlockOutputs];
  const Tiles tiles(chunk.rows, gemm.tile_rows);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t start = tiles.start(t);
    const uint32_t* packed = weights.packed + block * weights.cells * kBlockOutputs;
    run_block(gemm, tiles.size(t), panel + start * weights.cells * 4, packed, weights.cells, sums, false, false, nullptr,
              t, tiles.count);
    dequantize(sums, tiles.size(t), row_scales + start, weights.scales + block * kBlockOutputs,
               weights.sums + block * kBlockOutputs, tile);
    finish(start, tiles.size(t), tile);
  }
}

// Packs the rows of a chunk; `row_of(i)` is the quantised row number i of the chunk.
template <class RowOf>
void pack_chunk(const Gemm& gemm, const Chunk& chunk, int64_t row_bytes, char* panel, const RowOf& row_of) {
  const Tiles tiles(chunk.rows, gemm.tile_rows);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const void* rows[kMaxTileRows];
    for (int r = 0; r < tiles.size(t); ++r) rows[r] = row_of(tiles.start(t) + r);
    gemm.pack(panel + tiles.start(t) * row_bytes, rows, tiles.size(t), static_cast<int>(row_bytes));
  }
}

}  // namespace

int64_t experts_int8(const Context& context, const Int8ExpertsCall& call) {
  const ExpertsCall& base = call.base;
  const ExpertLayout& layout = base.layout;
  const Kernels& kernels = *context.kernels;
  const Gemm& gemm = kernels.gemm_int8;
  const int64_t width = layout.gate_blocks() * kGatedOutputs, hidden_cells = ceil_div(layout.hidden, 4),
                width_cells = width / 4;
  Plan plan;
  const int64_t bad = make_plan(base, most_chunk_rows(gemm, 4 * std::max(hidden_cells, width_cells)), plan);
  if (bad >= 0) return bad;
  const int64_t slots = static_cast<int64_t>(plan.slots.size()), x_bytes = 4 * hidden_cells, h_bytes = 4 * width_cells;
  const int64_t num_chunks = static_cast<int64_t>(plan.chunks.size());

  uint8_t* quantized = scratch(Buffer::quantized).get<uint8_t>(base.rows * x_bytes + slots * h_bytes);
  uint8_t* quantized_hidden = quantized + base.rows * x_bytes;
  float* row_scales = scratch(Buffer::states).get<float>(base.rows + 2 * slots);
  float *slot_scales = row_scales + base.rows, *hidden_scales = slot_scales + slots;
  quantize_rows(context, base.x, base.rows, layout.hidden, quantized, row_scales);
  for (int64_t i = 0; i < slots; ++i) slot_scales[i] = row_scales[plan.slots[i] / base.top_k];

  float* hidden = scratch(Buffer::hidden).get<float>(slots * width);
  const Int8Weights gate_up{base.gate_up, call.gate_up_scales, call.gate_up_sums, hidden_cells};
  const int64_t gate_groups = groups_per_chunk(context, num_chunks, layout.gate_blocks());
  std::atomic<int64_t> next{0};
  on_all_threads(context.threads, [&] {
    int64_t packed = -1;
    char* panel = nullptr;
    for (int64_t task = next.fetch_add(1); task < num_chunks * gate_groups; task = next.fetch_add(1)) {
      const Chunk& chunk = plan.chunks[task / gate_groups];
      if (packed != task / gate_groups) {
        panel = scratch(Buffer::rows).get<char>(chunk.rows * x_bytes);
        pack_chunk(gemm, chunk, x_bytes, panel,
                   [&](int64_t i) { return quantized + plan.slots[chunk.first + i] / base.top_k * x_bytes; });
        packed = task / gate_groups;
      }
      const int64_t group = task % gate_groups;
      for (int64_t block = layout.gate_blocks() * group / gate_groups;
           block < layout.gate_blocks() * (group + 1) / gate_groups; ++block)
        multiply_block(gemm, gate_up, chunk.expert * layout.gate_blocks() + block, chunk, panel,
                       slot_scales + chunk.first, [&](int64_t start, int rows, const float* tile) {
                         for (int r = 0; r < rows; ++r)
                           kernels.gated(tile + r * kBlockOutputs, 1, nullptr, base.activation,
                                         hidden + (chunk.first + start + r) * width + block * kGatedOutputs,
                                         Dtype::fp32);
                       });
    }
  });

  quantize_rows(context, {hidden, width, Dtype::fp32}, slots, width, quantized_hidden, hidden_scales);

  const int64_t blocks = layout.down_blocks(), padded = blocks * kBlockOutputs;
  float* sums = scratch(Buffer::output).get<float>(base.rows * padded);
  const Int8Weights down{base.down, call.down_scales, call.down_sums, width_cells};
  const int64_t groups = std::min<int64_t>(blocks, context.threads * (base.rows < 64 ? 8 : 2));
  for_each_task(context.threads, groups, [&](int64_t group) {
    const int64_t first_block = blocks * group / groups, last_block = blocks * (group + 1) / groups;
    const int64_t first = first_block * kBlockOutputs, last = last_block * kBlockOutputs;
    for (int64_t t = 0; t < base.rows; ++t) std::memset(sums + t * padded + first, 0, (last - first) * sizeof(float));
    for (const Chunk& chunk : plan.chunks) {
      char* panel = scratch(Buffer::rows).get<char>(chunk.rows * h_bytes);
      pack_chunk(gemm, chunk, h_bytes, panel,
                 [&](int64_t i) { return quantized_hidden + (chunk.first + i) * h_bytes; });
      for (int64_t block = first_block; block < last_block; ++block)
        multiply_block(gemm, down, chunk.expert * blocks + block, chunk, panel, hidden_scales + chunk.first,
                       [&](int64_t start, int rows, const float* tile) {
                         float scales[kMaxTileRows];
                         float* out[kMaxTileRows];
                         for (int r = 0; r < rows; ++r) {
                           const int32_t slot = plan.slots[chunk.first + start + r];
                           scales[r] = base.weights[slot];
                           out[r] = sums + slot / base.top_k * padded + block * kBlockOutputs;
                         }
                         kernels.scaled_add(tile, rows, kBlockOutputs, nullptr, scales, out);
                       });
    }
    for (int64_t t = 0; t < base.rows; ++t)
      kernels.convert(sums + t * padded + first,
                      static_cast<char*>(base.out) + (t * layout.hidden + first) * element_bytes(layout.dtype),
                      static_cast<int>(std::min(last, layout.hidden) - first), layout.dtype);
  });
  return -1;
}

}  // namespace dynamoe_cpu
