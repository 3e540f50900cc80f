// The experts of a layer, fused: two parallel regions, whatever the routing.
//
// Region 1 gathers an expert's rows and computes gate and up together; the activation leaves the tile as packed
// activations, which region 2 multiplies with the down projection. In region 2 a task owns some output columns of all rows
// and adds the experts in rising order, in fp32: no atomics, no third region, and one order of summation per row.
#include <algorithm>
#include <cstring>

#include "ops/experts_plan.h"

namespace dynamoe_cpu {

namespace {

// Packed act(gate x) * (up x) of a chunk's rows. Experts that are taken together make one long row of it, or each one of
// its own, which then follow each other.
struct Hidden {
  const Gemm& gemm;
  int64_t inputs, matrices;

  PackedTiles tiles(const Chunk& chunk) const { return {gemm, chunk.rows, inputs}; }
  int64_t bytes(const Chunk& chunk) const { return matrices * tiles(chunk).bytes(); }
};

// `segments` experts with consecutive blocks are taken together.
void gate_and_up(const Context& context, const ExpertsCall& call, const Plan& plan, int64_t segments,
                 const Hidden& hidden, char* packed_hidden) {
  const Kernels& kernels = *context.kernels;
  const ExpertLayout& layout = call.layout;
  const Gemm& gemm = hidden.gemm;
  const int64_t blocks = segments * layout.gate_blocks(), matrix_blocks = blocks / hidden.matrices;
  WorkChunks work(static_cast<int64_t>(plan.chunks.size()), blocks, context.threads);
  on_all_threads(work.threads(), [&] {
    const Products products(kernels);
    alignas(64) float tile[kMostTileRows * kBlockOutputs];
    alignas(64) float gated[kMostTileRows * kGatedOutputs];
    char* packed = nullptr;
    int64_t packed_chunk = -1, first, last;
    while (work.take(first, last)) {
      const int64_t index = first / blocks;
      const Chunk& chunk = plan.chunks[index];
      const PackedTiles tiles(gemm, chunk.rows, layout.hidden), out_tiles = hidden.tiles(chunk);
      if (packed_chunk != index) {
        packed = scratch(Buffer::rows).get<char>(tiles.bytes());
        for (int64_t t = 0; t < tiles.count; ++t) {
          const void* rows[kMostTileRows];
          for (int r = 0; r < tiles.size(t); ++r) {
            const int64_t slot = chunk.first + tiles.start(t) + r;
            rows[r] = call.x.at(plan.slots.empty() ? slot : plan.slots[slot] / call.top_k);
          }
          gemm.pack(tiles.at(packed, t), rows, tiles.size(t), static_cast<int>(layout.hidden));
        }
        packed_chunk = index;
      }
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, stored = chunk.expert * layout.gate_blocks() + block;
        const uint32_t* weights = call.gate_up + stored * layout.gate_block_words();
        const float* bias = call.gate_up_bias ? call.gate_up_bias + stored * kBlockOutputs : nullptr;
        char* out = packed_hidden + chunk.hidden + block / matrix_blocks * out_tiles.bytes();
        for (int64_t t = 0; t < tiles.count; ++t) {
          run_block(gemm, tiles.size(t), tiles.at(packed, t), weights, layout.hidden_words(), tile, false,
                    item == first, nullptr, t, tiles.count);
          kernels.gated_rows(tile, tiles.size(t), bias, call.activation, gated, kGatedOutputs);
          gemm.append(out_tiles.at(out, t), block % matrix_blocks * kGatedOutputs, gated, tiles.size(t));
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
    kernels.transpose_words(gate_up + task * layout.gate_block_words(), kBlockOutputs, rows, kBlockOutputs,
                            static_cast<int>(layout.hidden) * bytes);
  });
  for_each_task(context.threads, layout.experts * layout.down_blocks(), [&](int64_t task) {
    const int64_t expert = task / layout.down_blocks(), block = task % layout.down_blocks();
    const void* rows[kBlockOutputs];
    for (int o = 0; o < kBlockOutputs; ++o) rows[o] = row_of(down, expert, block * kBlockOutputs + o, layout.hidden);
    uint32_t* out = down_packed + layout.down_offset(expert, block);
    kernels.transpose_words(out, kBlockOutputs, rows, kBlockOutputs, static_cast<int>(layout.width) * bytes);
    const int64_t written = ceil_div(layout.width, layout.inputs_per_word()) * kBlockOutputs;
    std::memset(out + written, 0, (layout.down_block_words() - written) * sizeof(uint32_t));
  });
}

int64_t experts(const Context& context, const ExpertsCall& call) {
  const Kernels& kernels = *context.kernels;
  const ExpertLayout& layout = call.layout;
  const Gemm& gemm = kernels.gemm[static_cast<int>(layout.dtype)];
  const Hidden hidden{gemm, layout.padded_width(), 1};
  Plan plan;
  const int64_t most_rows = most_packed_rows(gemm, std::max(layout.hidden, hidden.inputs));
  const int64_t bad = make_plan(call, most_rows, plan);
  if (bad >= 0) return bad;

  const int64_t hidden_bytes = place_hidden(plan, [&](const Chunk& chunk) { return hidden.bytes(chunk); });
  char* packed_hidden = scratch(Buffer::hidden).get<char>(hidden_bytes);
  gate_and_up(context, call, plan, 1, hidden, packed_hidden);

  const int64_t blocks = layout.down_blocks();
  OutputSums sums(kernels, call, plan);
  WorkChunks work(1, blocks, context.threads);
  on_all_threads(work.threads(), [&] {
    const Products products(kernels);
    alignas(64) float tile[kMostTileRows * kBlockOutputs];
    int64_t first_block, last_block;
    while (work.take(first_block, last_block)) {
      sums.clear(first_block, last_block);
      for (size_t c = 0; c < plan.chunks.size(); ++c) {
        const Chunk& chunk = plan.chunks[c];
        const uint32_t* after = c + 1 < plan.chunks.size()
                                    ? call.down + layout.down_offset(plan.chunks[c + 1].expert, first_block)
                                    : nullptr;
        const PackedTiles tiles = hidden.tiles(chunk);
        for (int64_t block = first_block; block < last_block; ++block) {
          const float* bias = call.down_bias ? call.down_bias + (chunk.expert * blocks + block) * kBlockOutputs : nullptr;
          const uint32_t* weights = call.down + layout.down_offset(chunk.expert, block);
          for (int64_t t = 0; t < tiles.count; ++t) {
            run_block(gemm, tiles.size(t), tiles.at(packed_hidden + chunk.hidden, t), weights, layout.width_words(),
                      tile, false, block == first_block, block + 1 == last_block ? after : nullptr, t, tiles.count);
            sums.add(block, chunk.first + tiles.start(t), tiles.size(t), tile, bias);
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
  // Experts that follow each other in a block are one long column; otherwise the accumulators go from one to the next.
  const int64_t segments = layout.dense_down ? 1 : layout.experts, all_inputs = layout.experts * layout.padded_width();
  const Hidden hidden{gemm, all_inputs / segments, segments};
  const int64_t segment_words = gemm.words(hidden.inputs);
  Plan plan;
  add_chunks(plan, 0, 0, call.rows, most_packed_rows(gemm, std::max(layout.hidden, all_inputs)));
  const int64_t hidden_bytes = place_hidden(plan, [&](const Chunk& chunk) { return hidden.bytes(chunk); });
  char* packed_hidden = scratch(Buffer::hidden).get<char>(hidden_bytes);
  gate_and_up(context, call, plan, layout.experts, hidden, packed_hidden);

  const int64_t blocks = layout.down_blocks();
  WorkChunks work(static_cast<int64_t>(plan.chunks.size()), blocks, context.threads);
  on_all_threads(work.threads(), [&] {
    const Products products(kernels);
    alignas(64) float tile[kMostTileRows * kBlockOutputs];
    int64_t first, last;
    while (work.take(first, last)) {
      const Chunk& chunk = plan.chunks[first / blocks];
      const PackedTiles tiles = hidden.tiles(chunk);
      const char* packed = packed_hidden + chunk.hidden;
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, output = block * kBlockOutputs;
        const int width = static_cast<int>(std::min<int64_t>(kBlockOutputs, layout.hidden - output));
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t row = chunk.first + tiles.start(t);
          for (int64_t s = 0; s < segments; ++s)
            run_block(gemm, tiles.size(t), tiles.at(packed + s * tiles.bytes(), t),
                      call.down + layout.down_offset(s, block), segment_words, tile, s > 0, false, nullptr, t,
                      tiles.count);
          kernels.store(tile, tiles.size(t), width, call.down_bias ? call.down_bias + output : nullptr,
                        static_cast<char*>(call.out) + (row * layout.hidden + output) * element_bytes(layout.dtype),
                        layout.hidden, layout.dtype);
        }
      }
    }
  });
}

}  // namespace dynamoe_cpu
