// Tile kernels in terms of Vec: matrix products of up to kTileRows rows with one block of 32 outputs, and what is done
// with the finished tile. Included by each instruction set's file, inside its own anonymous namespace.
//
// The including file defines kTileRows and kPassVectors (vectors of outputs held in registers at once). Products want
// packed activations as in packed_words.h.
#pragma once

// Requests ahead go to the second-level cache: more of them can be under way than to the first.
constexpr int kAheadLocality = 2;

// fp32 weights, and bf16 weights against rows widened to fp32: per word, `kInputs` multiplications in a fixed order.
template <int kRows, int kInputs>
TARGET static void multiply(const float* packed, const uint32_t* weights, int words, float* tile, bool accumulate,
                            Ahead ahead) {
  constexpr int kVectors = kPassVectors;
  constexpr int kPassOutputs = kVectors * Vec::kLanes;
  for (int o = 0; o < kBlockOutputs; o += kPassOutputs) {
    Vec::F sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = accumulate ? Vec::load(tile + r * kBlockOutputs + o + v * Vec::kLanes) : Vec::zero();
    const float* a = packed;
    const uint32_t* w = weights + o;
    const char* next = ahead.first;
    for (int word = 0; word < words; ++word) {
      __builtin_prefetch(next, 0, kAheadLocality);
      __builtin_prefetch(next + 64, 0, kAheadLocality);
      next += ahead.step;
      // Input by input, so that each activation is broadcast once for all vectors of outputs.
#pragma GCC unroll 2
      for (int i = 0; i < kInputs; ++i) {
        Vec::F b[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const uint32_t* from = w + v * Vec::kLanes;
          if constexpr (kInputs == 1) {
            b[v] = Vec::load(reinterpret_cast<const float*>(from));
          } else {
            b[v] = i == 0 ? Vec::low_half(from) : Vec::high_half(from);
          }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec::F x = Vec::set(a[i * kRows + r]);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::fma(x, b[v], sum[r][v]);
        }
      }
      a += kInputs * kRows;
      w += kBlockOutputs;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) Vec::store(tile + r * kBlockOutputs + o + v * Vec::kLanes, sum[r][v]);
  }
}

template <int kInputs, int kRows = kTileRows>
TARGET static void run_float(int num_rows, const void* packed, const uint32_t* weights, int words, float* tile,
                             bool accumulate, Ahead ahead) {
  if (num_rows == kRows) {
    multiply<kRows, kInputs>(static_cast<const float*>(packed), weights, words, tile, accumulate, ahead);
  } else if constexpr (kRows > 1) {
    run_float<kInputs, kRows - 1>(num_rows, packed, weights, words, tile, accumulate, ahead);
  }
}

// The part of a 32-wide row that exists, with its bias, in `row`.
TARGET static inline const float* with_bias(const float* tile_row, const float* bias, float* row) {
  if (!bias) return tile_row;
  for (int o = 0; o < kBlockOutputs; o += Vec::kLanes)
    Vec::store(row + o, Vec::add(Vec::load(tile_row + o), Vec::load(bias + o)));
  return row;
}

TARGET static void store(const float* tile, int num_rows, int width, const float* bias, void* out, int64_t out_stride,
                         Dtype out_dtype) {
  alignas(64) float biased[kBlockOutputs];
  for (int r = 0; r < num_rows; ++r) {
    const float* row = with_bias(tile + r * kBlockOutputs, bias, biased);
    convert(row, static_cast<char*>(out) + r * out_stride * element_bytes(out_dtype), width, out_dtype);
  }
}

// act(gate) * up of every row, `stride` floats apart.
TARGET static void gated_rows(const float* tile, int num_rows, const float* bias, Activation activation, float* out,
                              int64_t stride) {
  alignas(64) float biased[kBlockOutputs];
  for (int r = 0; r < num_rows; ++r) {
    const float* row = with_bias(tile + r * kBlockOutputs, bias, biased);
    for (int o = 0; o < kGatedOutputs; o += Vec::kLanes) {
      Vec::F gate = Vec::load(row + o), up = Vec::load(row + kGatedOutputs + o);
      if (activation == Activation::clamped_swiglu) {
        const Vec::F limit = Vec::set(7.0f);
        gate = Vec::min(limit, gate);
        up = Vec::add(Vec::set(1.0f), Vec::max(Vec::set(-7.0f), Vec::min(limit, up)));
      }
      Vec::store(out + r * stride + o, Vec::mul(activate(gate, activation), up));
    }
  }
}

TARGET static void scaled_add(const float* tile, int num_rows, int width, const float* bias, const float* scales,
                              float* const* out) {
  alignas(64) float biased[kBlockOutputs];
  for (int r = 0; r < num_rows; ++r) {
    const float* row = with_bias(tile + r * kBlockOutputs, bias, biased);
    const Vec::F scale = Vec::set(scales[r]);
    for (int o = 0; o < width; o += Vec::kLanes)  // the accumulator rows are padded to whole blocks
      Vec::store(out[r] + o, Vec::fma(scale, Vec::load(row + o), Vec::load(out[r] + o)));
  }
}

// The second product of attention, values straight from the cache. `kBlocks` blocks of 32 channels at once; the last
// one may be ragged.
template <int kRows, int kBlocks, bool kRagged>
TARGET static void weigh_blocks(const float* probabilities, const void* const* values, int begin, int end,
                                Dtype dtype, int first, int channels, float* accumulator, const void* const* ahead) {
  constexpr int kVectors = kPassVectors;
  constexpr int kPassOutputs = kVectors * Vec::kLanes;
  for (int o = 0; o < kBlockOutputs; o += kPassOutputs) {
    Vec::F sum[kBlocks][kRows][kVectors];
    float* out = accumulator + o;
#pragma GCC unroll 16
    for (int p = 0; p < kBlocks; ++p)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
          sum[p][r][v] = Vec::load(out + (p * kRows + r) * kBlockOutputs + v * Vec::kLanes);
    const auto ask_for = [&](int key) __attribute__((always_inline)) {
      for (int byte = 0; byte < channels * element_bytes(dtype); byte += 64)
        __builtin_prefetch(static_cast<const char*>(ahead[key]) + byte, 0, kAheadLocality);
    };
    for (int key = 0; ahead && key < begin; ++key) ask_for(key);
    for (int key = end; ahead && key < kKeyBlock; ++key) ask_for(key);
    for (int key = begin; key < end; ++key) {
      if (ahead) ask_for(key);
      const float* weight = probabilities + key;
#pragma GCC unroll 16
      for (int p = 0; p < kBlocks; ++p)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const int c = first + p * kBlockOutputs + o + v * Vec::kLanes;
          Vec::F value;
          if constexpr (kRagged) {
            value = c < channels ? load_row(values[key], dtype, c, channels) : Vec::zero();
          } else if (dtype == Dtype::bf16) {
            value = Vec::load_bf16(static_cast<const uint16_t*>(values[key]) + c);
          } else {
            value = Vec::load(static_cast<const float*>(values[key]) + c);
          }
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) sum[p][r][v] = Vec::fma(Vec::set(weight[r * kKeyBlock]), value, sum[p][r][v]);
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < kBlocks; ++p)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
          Vec::store(out + (p * kRows + r) * kBlockOutputs + v * Vec::kLanes, sum[p][r][v]);
  }
}

template <int kRows = kTileRows>
TARGET static void weigh_values(int num_rows, const float* probabilities, const void* const* values, int begin,
                                int end, Dtype dtype, int channels, float* accumulator, const void* const* ahead) {
  if (num_rows == kRows) {
    constexpr int kBlocks = 2 * kRows <= kTileRows ? 2 : 1;
    int c = 0;
    for (; c + kBlocks * kBlockOutputs <= channels; c += kBlocks * kBlockOutputs)
      weigh_blocks<kRows, kBlocks, false>(probabilities, values, begin, end, dtype, c, channels,
                                          accumulator + c * kRows, c ? nullptr : ahead);
    for (; c < channels; c += kBlockOutputs)
      weigh_blocks<kRows, 1, true>(probabilities, values, begin, end, dtype, c, channels, accumulator + c * kRows,
                                   c ? nullptr : ahead);
  } else if constexpr (kRows > 1) {
    weigh_values<kRows - 1>(num_rows, probabilities, values, begin, end, dtype, channels, accumulator, ahead);
  }
}
