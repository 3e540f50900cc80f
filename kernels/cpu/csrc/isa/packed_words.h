// Packed activations as [word of 4 bytes][row]: fp32, pairs of bf16, or four limbs. Included by each instruction set's file
// that wants them so, inside its own anonymous namespace.
#pragma once

template <int kInputBytes>
static inline int64_t word_offset(int num_rows, int64_t input) {
  return kInputBytes * num_rows * input;
}

// A last, partly filled word is padded with zeros.
TARGET static inline void pack_words(uint32_t* packed, const void* const* rows, int num_rows, int row_bytes) {
  if (num_rows == 1 && rows[0]) {
    std::memcpy(packed, rows[0], row_bytes);
    if (row_bytes % 4) std::memset(reinterpret_cast<char*>(packed) + row_bytes, 0, 4 - row_bytes % 4);
    return;
  }
  transpose_words(packed, num_rows, rows, num_rows, row_bytes);
}

TARGET static inline void pack_fp32(void* packed, const void* const* rows, int num_rows, int inputs) {
  pack_words(static_cast<uint32_t*>(packed), rows, num_rows, 4 * inputs);
}

TARGET static inline void pack_pairs(void* packed, const void* const* rows, int num_rows, int inputs) {
  pack_words(static_cast<uint32_t*>(packed), rows, num_rows, 2 * inputs);
}

// bf16 as fp32: stretches of the rows, widened into the first-level cache and transposed from there.
TARGET static inline void pack_widened(void* packed, const void* const* rows, int num_rows, int inputs) {
  constexpr int kStretch = 128;
  alignas(64) float wide[kTileRows][kStretch];
  for (int first = 0; first < inputs; first += kStretch) {
    const int count = inputs - first < kStretch ? inputs - first : kStretch;
    const void* stretch[kTileRows];
    for (int r = 0; r < num_rows; ++r) {
      widen(static_cast<const uint16_t*>(rows[r]) + first, wide[r], count);
      stretch[r] = wide[r];
    }
    pack_words(static_cast<uint32_t*>(packed) + first * num_rows, stretch, num_rows, 4 * count);
  }
  if (inputs % 2) std::memset(static_cast<float*>(packed) + inputs * num_rows, 0, num_rows * sizeof(float));
}

template <int kInputBytes>
TARGET static inline void append_words(void* packed, int64_t first, const float* rows, int num_rows) {
  const void* from[kTileRows];
  for (int r = 0; r < num_rows; ++r) from[r] = rows + r * kGatedOutputs;
  char* to = static_cast<char*>(packed) + word_offset<kInputBytes>(num_rows, first);
  pack_words(reinterpret_cast<uint32_t*>(to), from, num_rows, kInputBytes * kGatedOutputs);
}

TARGET static inline void append_fp32(void* packed, int64_t first, float* rows, int num_rows) {
  append_words<4>(packed, first, rows, num_rows);
}

TARGET static inline void append_pairs(void* packed, int64_t first, float* rows, int num_rows) {
  for (int r = 0; r < num_rows; ++r) {
    float* row = rows + r * kGatedOutputs;
    for (int o = 0; o < kGatedOutputs; o += Vec::kLanes)
      Vec::store_bf16(reinterpret_cast<uint16_t*>(row) + o, Vec::load(row + o));
  }
  append_words<2>(packed, first, rows, num_rows);
}

TARGET static inline void append_widened(void* packed, int64_t first, float* rows, int num_rows) {
  for (int i = 0; i < num_rows * kGatedOutputs; i += Vec::kLanes)
    Vec::store(rows + i, Vec::round_bf16(Vec::load(rows + i)));
  append_words<4>(packed, first, rows, num_rows);
}

static inline int64_t limb_bytes(const LimbShape& shape, int num_rows) { return num_rows * shape.row_bytes; }

TARGET static inline void pack_limbs(const LimbShape& shape, char* packed, const void* const* limbs, int num_rows) {
  if (num_rows == 1 && limbs[0] == packed) return;
  pack_words(reinterpret_cast<uint32_t*>(packed), limbs, num_rows, static_cast<int>(shape.row_bytes));
}
