// Which rows go to which expert, and in what chunks.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/operators.h"
#include "ops/packed.h"

namespace dynamoe_cpu {

// Rows of one expert that are multiplied together: sorted slots [first, first + rows).
struct Chunk {
  int64_t expert, first, rows;
  int64_t hidden = 0;  // where its packed hidden rows begin, in bytes
};

struct Plan {
  std::vector<int32_t> slots;  // indices into ids, sorted by expert, stable in the row
  std::vector<Chunk> chunks;
};

inline void add_chunks(Plan& plan, int64_t expert, int64_t first, int64_t rows, int64_t most) {
  if (!rows) return;
  const Tiles parts(rows, most);
  for (int64_t i = 0; i < parts.count; ++i) plan.chunks.push_back({expert, first + parts.start(i), parts.size(i)});
}

inline int64_t count_of(const ExpertsCall& call, int64_t row) {
  return call.counts ? std::clamp<int64_t>(call.counts[row], 0, call.top_k) : call.top_k;
}

// Sorts the used slots by expert. Returns the first expert number out of range, or -1.
inline int64_t make_plan(const ExpertsCall& call, int64_t most_rows, Plan& plan) {
  const int64_t experts = call.layout.experts;
  std::vector<int64_t> start(experts + 1, 0);
  for (int64_t t = 0; t < call.rows; ++t)
    for (int64_t k = 0; k < count_of(call, t); ++k) {
      const int32_t expert = call.ids[t * call.top_k + k];
      if (expert < 0 || expert >= experts) return expert < 0 ? experts : expert;
      ++start[expert + 1];
    }
  for (int64_t e = 0; e < experts; ++e) {
    add_chunks(plan, e, start[e], start[e + 1], most_rows);
    start[e + 1] += start[e];
  }
  plan.slots.resize(start[experts]);
  for (int64_t t = 0; t < call.rows; ++t)
    for (int64_t k = 0; k < count_of(call, t); ++k) {
      const int64_t slot = t * call.top_k + k;
      plan.slots[start[call.ids[slot]]++] = static_cast<int32_t>(slot);
    }
  return -1;
}

// Finds places for the packed hidden rows, which take `bytes_of(chunk)`; returns how many bytes they take together.
template <class BytesOf>
int64_t place_hidden(Plan& plan, const BytesOf& bytes_of) {
  int64_t bytes = 0;
  for (Chunk& chunk : plan.chunks) {
    chunk.hidden = bytes;
    bytes += bytes_of(chunk);
  }
  return bytes;
}

// Sums of the experts' outputs, [block][row][32]: those of a block lie together, whatever the hidden size.
class OutputSums {
 public:
  OutputSums(const Kernels& kernels, const ExpertsCall& call, const Plan& plan)
      : kernels_(kernels),
        call_(call),
        plan_(plan),
        data_(scratch(Buffer::output).get<float>(call.rows * call.layout.down_blocks() * kBlockOutputs)) {}

  void clear(int64_t first_block, int64_t last_block) {
    std::memset(at(first_block, 0), 0, (last_block - first_block) * call_.rows * kBlockOutputs * sizeof(float));
  }
  // Adds the outputs of sorted slots first … first + rows - 1, each with its router weight.
  void add(int64_t block, int64_t first, int64_t rows, const float* tile, const float* bias) {
    for (int64_t begin = 0; begin < rows; begin += kMostTileRows) {
      const int count = static_cast<int>(std::min<int64_t>(kMostTileRows, rows - begin));
      float scales[kMostTileRows];
      float* out[kMostTileRows];
      for (int r = 0; r < count; ++r) {
        const int32_t slot = plan_.slots[first + begin + r];
        scales[r] = call_.weights[slot];
        out[r] = at(block, slot / call_.top_k);
      }
      kernels_.scaled_add(tile + begin * kBlockOutputs, count, kBlockOutputs, bias, scales, out);
    }
  }
  void write(int64_t first_block, int64_t last_block) {
    const ExpertLayout& layout = call_.layout;
    for (int64_t t = 0; t < call_.rows; ++t)
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t output = block * kBlockOutputs;
        kernels_.convert(at(block, t),
                         static_cast<char*>(call_.out) + (t * layout.hidden + output) * element_bytes(layout.dtype),
                         static_cast<int>(std::min<int64_t>(kBlockOutputs, layout.hidden - output)), layout.dtype);
      }
  }

 private:
  float* at(int64_t block, int64_t row) { return data_ + (block * call_.rows + row) * kBlockOutputs; }

  const Kernels& kernels_;
  const ExpertsCall& call_;
  const Plan& plan_;
  float* data_;
};

}  // namespace dynamoe_cpu
