// Packed activations of many rows, tile after tile, and one tile's product with a block of weights.
#pragma once

#include <algorithm>

#include "isa/kernels.h"
#include "ops/parallel.h"

namespace dynamoe_cpu {

// Rows of which a tile of the most rows takes `tile_bytes` when packed, so few that they stay in the second-level cache
// while all weights pass by.
inline int64_t most_packed_rows(int tile_rows, int64_t tile_bytes) {
  constexpr int64_t kCacheBytes = 384 * 1024;
  return std::max<int64_t>(tile_rows, kCacheBytes * tile_rows / tile_bytes);
}
inline int64_t most_packed_rows(const Gemm& gemm, int64_t inputs) {
  return most_packed_rows(gemm.tile_rows, gemm.packed_bytes(gemm.tile_rows, inputs));
}

// Some rows in tiles, and where these lie when they are packed: each begins a cache line.
class PackedTiles : public Tiles {
 public:
  // `packed_bytes(rows)` is the size of a tile.
  template <class PackedBytes>
  PackedTiles(int64_t rows, int tile_rows, const PackedBytes& packed_bytes)
      : Tiles(rows, tile_rows), tile_bytes_(count ? ceil_div(packed_bytes(largest()), 64) * 64 : 0) {}
  PackedTiles(const Gemm& gemm, int64_t rows, int64_t inputs)
      : PackedTiles(rows, gemm.tile_rows, [&](int size) { return gemm.packed_bytes(size, inputs); }) {}

  int64_t bytes() const { return count * tile_bytes_; }
  char* at(char* packed, int64_t tile) const { return packed + tile * tile_bytes_; }
  const char* at(const char* packed, int64_t tile) const { return packed + tile * tile_bytes_; }

 private:
  int64_t tile_bytes_;
};

// One tile of rows times one block of weights, that block being one of a stretch that is read in order. The stretch
// begins with block `first`, and `after` is what will be read when it ends, or null.
//
// A single tile reads the weights from memory as it goes, some lines behind its requests. With several, the block
// after is fetched meanwhile, so that memory and arithmetic never wait for each other.
inline void run_block(const Gemm& gemm, int num_rows, const char* packed, const uint32_t* weights, int64_t words,
                      float* tile, bool accumulate, bool first, const uint32_t* after, int64_t tile_index,
                      int64_t tiles) {
  constexpr int kLine = 64, kWordBytes = 2 * kLine, kDistance = 48;  // bytes of a word of all outputs; words
  const char* block = reinterpret_cast<const char*>(weights);
  const int count = static_cast<int>(words);
  if (tiles == 1) {
    const int step = gemm.step / gemm.inputs_per_word;
    const int early = after && count > kDistance ? (count - kDistance) / step * step : count;
    gemm.run(num_rows, packed, weights, early, tile, accumulate, {block + kDistance * kWordBytes, kWordBytes});
    if (early < count)
      gemm.run(num_rows, packed + gemm.offset(num_rows, static_cast<int64_t>(early) * gemm.inputs_per_word),
               weights + static_cast<int64_t>(early) * kBlockOutputs, count - early, tile, true,
               {reinterpret_cast<const char*>(after), kWordBytes});
    return;
  }
  const char* next = after ? reinterpret_cast<const char*>(after) : block + words * kWordBytes;
  Ahead ahead{next, 0};
  if (first && tile_index == 0) ahead = {block + kDistance * kWordBytes, kWordBytes};
  if (first && tile_index == 1) ahead = {next, kWordBytes};
  if (!first && tile_index < 2) ahead = {next + tile_index * words * kLine, kLine};
  gemm.run(num_rows, packed, weights, count, tile, accumulate, ahead);
}

}  // namespace dynamoe_cpu
