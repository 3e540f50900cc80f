// AVX-512 with the BF16 and VNNI dot products (Zen 4 and later).
#include "isa/isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kPassVectors = 2;
constexpr int kScoredRows = 4;  // above, transposing the keys for all pays
constexpr int kCodesAhead = 0;
constexpr int kByteStride = 2;  // Zen 4 fetches lines in twos, and has few at a time under way

#include "isa/simd_avx512.h"
#include "isa/row_kernels.h"
#include "isa/state_kernels.h"
#include "isa/packed_words.h"
#include "ops/kv_codes.h"
#include "isa/tile_kernels.h"
#include "isa/fp8_avx512.h"
#include "quant/quant_rows.h"
#include "quant/quant_vnni.h"
#include "isa/table.h"

template <int kRows>
TARGET void multiply_pairs(const uint32_t* a, const uint32_t* w, int words, float* tile, bool accumulate,
                           Ahead ahead) {
  __m512 sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < 2; ++v)
      sum[r][v] = accumulate ? _mm512_loadu_ps(tile + r * kBlockOutputs + 16 * v) : _mm512_setzero_ps();
  for (int word = 0; word < words; ++word) {
    _mm_prefetch(ahead.first, _MM_HINT_T1);
    _mm_prefetch(ahead.first + 64, _MM_HINT_T1);
    ahead.first += ahead.step;
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh b = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r]));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], w0, b);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], w1, b);
    }
    a += kRows;
    w += kBlockOutputs;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(tile + r * kBlockOutputs + 16 * v, sum[r][v]);
}

template <int kRows = kTileRows>
TARGET void run_pairs(int num_rows, const void* packed, const uint32_t* weights, int words, float* tile,
                      bool accumulate, Ahead ahead) {
  if (num_rows == kRows) {
    multiply_pairs<kRows>(static_cast<const uint32_t*>(packed), weights, words, tile, accumulate, ahead);
  } else if constexpr (kRows > 1) {
    run_pairs<kRows - 1>(num_rows, packed, weights, words, tile, accumulate, ahead);
  }
}

// Sixteen keys at a time are transposed in registers and multiplied at once, word by word as above.
template <int kRows>
TARGET void score_rows(const void* const* keys, int words, const uint32_t* packed, float* scores,
                       const void* const* ahead) {
  constexpr int kGroups = kKeyBlock / 16;
  __m512 sum[kGroups][kRows];
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[g][r] = _mm512_setzero_ps();
  for (int word = 0; word < words; word += 16) {
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; ++g) {
      __m512i key[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (ahead) _mm_prefetch(static_cast<const char*>(ahead[16 * g + i]) + 4 * word, _MM_HINT_T1);
        key[i] = _mm512_loadu_si512(static_cast<const char*>(keys[16 * g + i]) + 4 * word);
      }
      transpose_16x16(key);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          sum[g][r] = _mm512_dpbf16_ps(sum[g][r], (__m512bh)key[i],
                                       (__m512bh)_mm512_set1_epi32(static_cast<int>(packed[(word + i) * kRows + r])));
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      _mm512_storeu_ps(scores + ((g / 2) * kRows + r) * kBlockOutputs + 16 * (g % 2), sum[g][r]);
}

template <int kRows = kScoredRows>
TARGET void score_keys(int num_rows, const void* const* keys, int words, const void* packed, float* scores,
                       const void* const* ahead) {
  if (num_rows == kRows) {
    score_rows<kRows>(keys, words, static_cast<const uint32_t*>(packed), scores, ahead);
  } else if constexpr (kRows > 1) {
    score_keys<kRows - 1>(num_rows, keys, words, packed, scores, ahead);
  }
}

Kernels kernels() {
  Kernels kernels = common_kernels();
  kernels.gemm[1] = {kTileRows, 2, 2, word_offset<2>, pack_pairs, append_pairs, run_pairs<>};
  kernels.scored_rows = kScoredRows;
  kernels.score_keys = score_keys<>;
  return kernels;
}

// Intel's BF16 dot product runs at half the rate of fp32 multiply-adds; by name it can still be had.
Fit fit() {
  if (!has_avx512bf16()) return Fit::none;
  return __builtin_cpu_is("intel") ? Fit::by_name : Fit::automatic;
}

const Isa registered("avx512bf16", 40, fit, kernels());

}  // namespace
}  // namespace dynamoe_cpu
#endif
