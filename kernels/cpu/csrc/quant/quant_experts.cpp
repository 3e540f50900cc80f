// The experts of a layer with quantised weights, as experts.cpp. A scale of the hidden rows needs a whole group of them,
// so they are packed by whoever finishes the last of a chunk's tasks.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "ops/experts_plan.h"
#include "quant/quant.h"

namespace dynamoe_cpu {

namespace {

// Blocks of one expert; `places` as in QuantExperts.
const char* block_of(const QuantWeights& weights, const int64_t* places, int64_t experts, int64_t expert,
                     int64_t block) {
  if (places) return weights.data + places[expert] + block * weights.layout.block_bytes();
  return weights.block(expert * (weights.layout.blocks() / experts) + block);
}

// Packs the hidden rows of a chunk, once the last of its groups is done.
void pack_hidden(const QuantProduct& product, const Chunk& chunk, const float* hidden, int64_t width, char* packed) {
  const PackedTiles tiles = product.tiles(chunk.rows);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const void* rows[kMostTileRows];
    const int64_t first = chunk.first + tiles.start(t);
    for (int r = 0; r < tiles.size(t); ++r) rows[r] = hidden + (first + r) * width;
    product.pack(tiles.at(packed + chunk.hidden, t), rows, tiles.size(t), Dtype::fp32);
  }
}

// Packed act(gate x) * (up x) of every slot, for `down`.
void gate_and_up(const Context& context, const ExpertsCall& call, const QuantExperts& weights,
                 const QuantProduct& product, const QuantProduct& down, const Plan& plan, char* packed_hidden) {
  const ExpertLayout& layout = call.layout;
  const int64_t width = layout.gate_blocks() * kGatedOutputs, blocks = layout.gate_blocks();
  float* hidden = scratch(Buffer::hidden).get<float>(static_cast<int64_t>(plan.slots.size()) * width);
  const int64_t limb_bytes = product.limb_bytes();
  char* limbs = scratch(Buffer::limbs).get<char>(call.rows * limb_bytes);
  for_each_row(context.threads, limb_bytes ? call.rows : 0,
               [&](int64_t row) { product.make_limbs(limbs + row * limb_bytes, call.x.at(row), call.x.dtype); });
  std::vector<std::atomic<int64_t>> finished(plan.chunks.size());
  WorkChunks work(static_cast<int64_t>(plan.chunks.size()), blocks, context.threads);
  on_all_threads(work.threads(), [&] {
    const Products products(*context.kernels);
    const Chunk* packed_chunk = nullptr;
    char* packed = nullptr;
    const auto source = [&](int64_t slot) { return plan.slots[slot] / call.top_k; };
    const auto same_rows = [&](const Chunk& one, const Chunk& other) {
      for (int64_t r = 0; r < one.rows; ++r)
        if (one.rows != other.rows || source(one.first + r) != source(other.first + r)) return false;
      return true;
    };
    int64_t first, last;
    while (work.take(first, last)) {
      const int64_t index = first / blocks;
      const Chunk& chunk = plan.chunks[index];
      const PackedTiles tiles = product.tiles(chunk.rows);
      if (!packed_chunk || !same_rows(chunk, *packed_chunk)) {
        packed = scratch(Buffer::rows).get<char>(tiles.bytes());
        for (int64_t t = 0; t < tiles.count; ++t) {
          const void* rows[kMostTileRows];
          for (int r = 0; r < tiles.size(t); ++r) {
            const int64_t row = source(chunk.first + tiles.start(t) + r);
            rows[r] = limb_bytes ? limbs + row * limb_bytes : call.x.at(row);
          }
          char* out = tiles.at(packed, t);
          if (limb_bytes) product.pack_limbs(out, rows, tiles.size(t));
          else product.pack(out, rows, tiles.size(t), call.x.dtype);
        }
        packed_chunk = &chunk;
      }
      float* tile = scratch(Buffer::scores).get<float>(chunk.rows * kBlockOutputs);
      for (int64_t item = first; item < last; ++item) {
        const int64_t block = item % blocks, likely = item + 1 == last ? work.likely() : -1;
        const auto at = [&](int64_t chunk, int64_t block) {
          return block_of(weights.gate_up, weights.gate_up_places, layout.experts, plan.chunks[chunk].expert, block);
        };
        product.multiply(packed, tiles, at(index, block), item == first,
                         likely < 0 ? nullptr : at(likely / blocks, likely % blocks), tile);
        const float* bias =
            call.gate_up_bias ? call.gate_up_bias + (chunk.expert * blocks + block) * kBlockOutputs : nullptr;
        context.kernels->gated_rows(tile, static_cast<int>(chunk.rows), bias, call.activation,
                                    hidden + chunk.first * width + block * kGatedOutputs, width);
      }
      if (finished[index].fetch_add(last - first, std::memory_order_acq_rel) + last - first == blocks)
        pack_hidden(down, chunk, hidden, width, packed_hidden);
    }
  });
}

}  // namespace

int64_t quant_experts(const Context& context, const ExpertsCall& given, const QuantExperts& weights) {
  const Kernels& kernels = *context.kernels;
  ExpertsCall call = given;
  const ExpertLayout& layout = call.layout;
  std::vector<int32_t> all;
  std::vector<float> ones;
  if (!call.ids) {  // every row through every expert
    call.top_k = layout.experts;
    ones.assign(call.rows * layout.experts, 1.0f);
    for (int64_t slot = 0; slot < call.rows * layout.experts; ++slot)
      all.push_back(static_cast<int32_t>(slot % layout.experts));
    call.ids = all.data();
    call.weights = ones.data();
  }
  const QuantProduct gate_up(kernels, weights.gate_up.layout, call.x.dtype),
      down(kernels, weights.down.layout, call.x.dtype);
  Plan plan;
  const int64_t bad = make_plan(call, std::min(gate_up.most_rows(), down.most_rows()), plan);
  if (bad >= 0) return bad;
  const int64_t hidden_bytes = place_hidden(plan, [&](const Chunk& chunk) { return down.tiles(chunk.rows).bytes(); });
  char* packed = scratch(Buffer::packed).get<char>(hidden_bytes);
  gate_and_up(context, call, weights, gate_up, down, plan, packed);
  const auto down_at = [&](const Chunk& chunk, int64_t block) {
    return block_of(weights.down, weights.down_places, layout.experts, chunk.expert, block);
  };

  const int64_t blocks = layout.down_blocks();
  OutputSums sums(kernels, call, plan);
  WorkChunks work(1, blocks, context.threads);
  on_all_threads(work.threads(), [&] {
    const Products products(kernels);
    int64_t first_block, last_block;
    while (work.take(first_block, last_block)) {
      sums.clear(first_block, last_block);
      for (size_t c = 0; c < plan.chunks.size(); ++c) {
        const Chunk& chunk = plan.chunks[c];
        const bool more = c + 1 < plan.chunks.size();
        const int64_t next = more ? first_block : work.likely();
        const char* after = next < 0 ? nullptr : down_at(plan.chunks[more ? c + 1 : 0], next);
        const PackedTiles tiles = down.tiles(chunk.rows);
        float* tile = scratch(Buffer::scores).get<float>(chunk.rows * kBlockOutputs);
        for (int64_t block = first_block; block < last_block; ++block) {
          down.multiply(packed + chunk.hidden, tiles, down_at(chunk, block), block == first_block,
                        block + 1 == last_block ? after : nullptr, tile);
          const float* bias =
              call.down_bias ? call.down_bias + (chunk.expert * blocks + block) * kBlockOutputs : nullptr;
          sums.add(block, chunk.first, chunk.rows, tile, bias);
        }
      }
      sums.write(first_block, last_block);
    }
  });
  return -1;
}

}  // namespace dynamoe_cpu
