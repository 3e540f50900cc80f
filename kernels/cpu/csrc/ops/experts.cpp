// The experts of a layer, fused: two parallel regions, whatever the routing.
//
// Region 1 gathers an expert's rows and computes gate and up together; the activation leaves the tile as the panel that
// region 2 multiplies with the down projection. In region 2 a task owns some output columns of all rows and adds the
// experts in rising order, in fp32: no atomics, no third region, and one order of summation per row.
#include <algorithm>
#include <cstring>

#include "ops/experts_plan.h"

namespace dynamoe_cpu {

namespace {

// hidden[slot] = act(gate x) * (up x), as panels of the tiles of each chunk.
// `segments` experts with consecutive blocks are taken together as one wide one.
void gate_and_up(const Context& context, const ExpertsCall& call, const Plan& plan, int64_t segments, char* hidden) {
  const Kernels& kernels = *context.kernels;
  const ExpertLayout& layout = call.layout;
  const Gemm& gemm = kernels.gemm[static_cast<int>(layout.dtype)];
  const int64_t row_bytes = layout.hidden_cells() * gemm.panel_cell_bytes;
  const int64_t hidden_bytes = segments * layout.width_cells() * gemm.panel_cell_bytes;
  const int64_t block_bytes = kGatedOutputs / gemm.inputs_per_cell * gemm.panel_cell_bytes;  // of one row's hidden
  const int64_t blocks = segments * layout.gate_blocks();
  Pieces pieces(static_cast<int64_t>(plan.chunks.size()), blocks, context.threads);
  int64_t most_rows = 0;
  for (const Chunk& chunk : plan.chunks) most_rows = std::max(most_rows, chunk.rows);
  on_all_threads(pieces.threads(), [&] {
    alignas(64) float tile[kMaxTileRows * kBlockOutputs];
    char* panel = scratch(Buffer::rows).get<char>(most_rows * row_bytes);
    int64_t packed = -1, first, last;
    while (pieces.take(first, last)) {
      const int64_t index = first / blocks;
      const Chunk& chunk = plan.chunks[index];
      const Tiles tiles(chunk.rows, gemm.tile_rows);
      if (packed != index) {
        for (int64_t t = 0; t < tiles.count; ++t) {
          const void* rows[kMaxTileRows];
          for (int r = 0; r < tiles.size(t); ++r) {
            const int64_t slot = chunk.first + tiles.start(t) + r;
            rows[r] = call.x.at(plan.slots.empty() ? slot : plan.slots[slot] / call.top_k);
          }
          gemm.pack(panel + tiles.start(t) * row_bytes, rows, tiles.size(t), static_cast<int>(layout.hidden));
        }
        packed = index;
      }
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, stored = chunk.expert * layout.gate_blocks() + block;
        const uint32_t* weights = call.gate_up + stored * layout.gate_block_words();
        const float* bias = call.gate_up_bias ? call.gate_up_bias + stored * kBlockOutputs : nullptr;
        for (int64_t t = 0; t < tiles.count; ++t) {
          run_block(gemm, tiles.size(t), panel + tiles.start(t) * row_bytes, weights, layout.hidden_cells(), tile, false,
                    item == first, nullptr, t, tiles.count);
          char* out = hidden + (chunk.first + tiles.start(t)) * hidden_bytes + block * block_bytes * tiles.size(t);
          kernels.gated(tile, tiles.size(t), bias, call.activation, out, layout.dtype);
        }
      }
    }
  });
}

}  // namespace

void pack_experts(const Context& context, const ExpertLayout& layout, const Strided3& gate, const Strided3& up,
                  const Strided3& down, uint32_t* gate_up, uint32_t* down_packed) {
  const Kernels& kernels = *context.kernels;
  const int bytes = element_bytes(layout.dtype);
  const auto row_of = [&](const Strided3& source, int64_t expert, int64_t row, int64_t rows) -> const void* {
    if (row >= rows) return nullptr;
    return static_cast<const char*>(source.data) + (expert * source.outer + row * source.inner) * bytes;
  };
  for_each_task(context.threads, layout.experts * layout.gate_blocks(), [&](int64_t task) {
    const int64_t expert = task / layout.gate_blocks(), first = task % layout.gate_blocks() * kGatedOutputs;
    const void* rows[kBlockOutputs];
    for (int o = 0; o < kGatedOutputs; ++o) {
      rows[o] = row_of(gate, expert, first + o, layout.width);
      rows[kGatedOutputs + o] = row_of(up, expert, first + o, layout.width);
    }
    kernels.transpose_cells(gate_up + task * layout.gate_block_words(), kBlockOutputs, rows, kBlockOutputs,
                            static_cast<int>(layout.hidden) * bytes);
  });
  for_each_task(context.threads, layout.experts * layout.down_blocks(), [&](int64_t task) {
    const int64_t expert = task / layout.down_blocks(), block = task % layout.down_blocks();
    const void* rows[kBlockOutputs];
    for (int o = 0; o < kBlockOutputs; ++o) rows[o] = row_of(down, expert, block * kBlockOutputs + o, layout.hidden);
    uint32_t* out = down_packed + layout.down_offset(expert, block);
    kernels.transpose_cells(out, kBlockOutputs, rows, kBlockOutputs, static_cast<int>(layout.width) * bytes);
    const int64_t written = ceil_div(layout.width, layout.per_cell()) * kBlockOutputs;
    std::memset(out + written, 0, (layout.down_block_words() - written) * sizeof(uint32_t));
  });
}

int64_t experts(const Context& context, const ExpertsCall& call) {
  const Kernels& kernels = *context.kernels;
  const ExpertLayout& layout = call.layout;
  const Gemm& gemm = kernels.gemm[static_cast<int>(layout.dtype)];
  const int64_t row_bytes = std::max(layout.hidden_cells(), layout.width_cells()) * gemm.panel_cell_bytes;
  Plan plan;
  const int64_t bad = make_plan(call, most_chunk_rows(gemm, row_bytes), plan);
  if (bad >= 0) return bad;

  const int64_t hidden_bytes = layout.width_cells() * gemm.panel_cell_bytes;
  char* hidden = scratch(Buffer::hidden).get<char>(static_cast<int64_t>(plan.slots.size()) * hidden_bytes);
  gate_and_up(context, call, plan, 1, hidden);

  const int64_t blocks = layout.down_blocks();
  OutputSums sums(kernels, call, plan);
  Pieces pieces(1, blocks, context.threads);
  on_all_threads(pieces.threads(), [&] {
    alignas(64) float tile[kMaxTileRows * kBlockOutputs];
    int64_t first_block, last_block;
    while (pieces.take(first_block, last_block)) {
      sums.clear(first_block, last_block);
      for (size_t c = 0; c < plan.chunks.size(); ++c) {
        const Chunk& chunk = plan.chunks[c];
        const uint32_t* after = c + 1 < plan.chunks.size()
                                    ? call.down + layout.down_offset(plan.chunks[c + 1].expert, first_block)
                                    : nullptr;
        const Tiles tiles(chunk.rows, gemm.tile_rows);
        for (int64_t block = first_block; block < last_block; ++block) {
          const float* bias = call.down_bias ? call.down_bias + (chunk.expert * blocks + block) * kBlockOutputs : nullptr;
          const uint32_t* weights = call.down + layout.down_offset(chunk.expert, block);
          for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t slot = chunk.first + tiles.start(t);
            run_block(gemm, tiles.size(t), hidden + slot * hidden_bytes, weights, layout.width_cells(), tile, false,
                      block == first_block, block + 1 == last_block ? after : nullptr, t, tiles.count);
            sums.add(block, slot, tiles.size(t), tile, bias);
          }
        }
      }
      sums.write(first_block, last_block);
    }
  });
  return -1;
}

void all_experts(const Context& context, const ExpertsCall& call) {
  const Kernels& kernels = *context.kernels;
  const ExpertLayout& layout = call.layout;
  const Gemm& gemm = kernels.gemm[static_cast<int>(layout.dtype)];
  const int64_t cells = layout.experts * layout.width_cells(), hidden_bytes = cells * gemm.panel_cell_bytes;
  const int64_t row_bytes = std::max(layout.hidden_cells() * gemm.panel_cell_bytes, hidden_bytes);
  Plan plan;
  add_chunks(plan, 0, 0, call.rows, most_chunk_rows(gemm, row_bytes));
  char* hidden = scratch(Buffer::hidden).get<char>(call.rows * hidden_bytes);
  gate_and_up(context, call, plan, layout.experts, hidden);

  const int64_t blocks = layout.down_blocks();
  // Experts that follow each other in a block are one long column; otherwise the accumulators go from one to the next.
  const int64_t segments = layout.dense_down ? 1 : layout.experts, segment_cells = cells / segments;
  Pieces pieces(static_cast<int64_t>(plan.chunks.size()), blocks, context.threads);
  on_all_threads(pieces.threads(), [&] {
    alignas(64) float tile[kMaxTileRows * kBlockOutputs];
    int64_t first, last;
    while (pieces.take(first, last)) {
      const Chunk& chunk = plan.chunks[first / blocks];
      const Tiles tiles(chunk.rows, gemm.tile_rows);
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, output = block * kBlockOutputs;
        const int width = static_cast<int>(std::min<int64_t>(kBlockOutputs, layout.hidden - output));
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t row = chunk.first + tiles.start(t);
          const char* panel = hidden + row * hidden_bytes;
          for (int64_t s = 0; s < segments; ++s) {
            const uint32_t* weights = call.down + layout.down_offset(s, block);
            run_block(gemm, tiles.size(t), panel + s * segment_cells * gemm.panel_cell_bytes * tiles.size(t), weights,
                      segment_cells, tile, s > 0, false, nullptr, t, tiles.count);
          }
          kernels.store(tile, tiles.size(t), width, call.down_bias ? call.down_bias + output : nullptr,
                        static_cast<char*>(call.out) + (row * layout.hidden + output) * element_bytes(layout.dtype),
                        layout.hidden, layout.dtype);
        }
      }
    }
  });
}

}  // namespace dynamoe_cpu
