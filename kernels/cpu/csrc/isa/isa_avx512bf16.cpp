// AVX-512 with the BF16 and VNNI dot products (Zen 4 and later).
#include "isa/isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kPassVectors = 2;
constexpr bool kPairs = true;
constexpr int kCodesAhead = 0;
constexpr int kByteStride = 2;  // Zen 4 fetches lines in twos, and has few at a time under way

#include "isa/simd_avx512.h"
#include "isa/row_kernels.h"
#include "ops/kv_codes.h"
#include "isa/tile_kernels.h"
#include "isa/fp8_avx512.h"
#include "quant/quant_rows.h"
#include "quant/quant_vnni.h"

template <int kRows>
TARGET void multiply_pairs(const uint32_t* a, const uint32_t* w, int cells, float* tile, bool accumulate,
                           Ahead ahead) {
  __m512 sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < 2; ++v)
      sum[r][v] = accumulate ? _mm512_loadu_ps(tile + r * kBlockOutputs + 16 * v) : _mm512_setzero_ps();
  for (int cell = 0; cell < cells; ++cell) {
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
TARGET void run_pairs(int num_rows, const void* panel, const uint32_t* weights, int cells, void* tile,
                      bool accumulate, Ahead ahead) {
  if (num_rows == kRows) {
    multiply_pairs<kRows>(static_cast<const uint32_t*>(panel), weights, cells, static_cast<float*>(tile), accumulate,
                          ahead);
  } else if constexpr (kRows > 1) {
    run_pairs<kRows - 1>(num_rows, panel, weights, cells, tile, accumulate, ahead);
  }
}

// Sixteen keys at a time are transposed in registers and multiplied at once, cell by cell as above.
template <int kRows>
TARGET void score_rows(const void* const* keys, int cells, const uint32_t* panel, float* scores,
                       const void* const* ahead) {
  constexpr int kGroups = kKeyBlock / 16;
  __m512 sum[kGroups][kRows];
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[g][r] = _mm512_setzero_ps();
  for (int cell = 0; cell < cells; cell += 16) {
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; ++g) {
      __m512i key[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (ahead) _mm_prefetch(static_cast<const char*>(ahead[16 * g + i]) + 4 * cell, _MM_HINT_T1);
        key[i] = _mm512_loadu_si512(static_cast<const char*>(keys[16 * g + i]) + 4 * cell);
      }
      transpose_16x16(key);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          sum[g][r] = _mm512_dpbf16_ps(sum[g][r], (__m512bh)key[i],
                                       (__m512bh)_mm512_set1_epi32(static_cast<int>(panel[(cell + i) * kRows + r])));
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      _mm512_storeu_ps(scores + ((g / 2) * kRows + r) * kBlockOutputs + 16 * (g % 2), sum[g][r]);
}

template <int kRows = kScoredRows>
TARGET void score_keys(int num_rows, const void* const* keys, int cells, const uint32_t* panel, float* scores,
                       const void* const* ahead) {
  if (num_rows == kRows) {
    score_rows<kRows>(keys, cells, panel, scores, ahead);
  } else if constexpr (kRows > 1) {
    score_keys<kRows - 1>(num_rows, keys, cells, panel, scores, ahead);
  }
}

}  // namespace

KERNEL_TABLE(kAvx512Bf16Kernels, "avx512bf16", 4, run_pairs<>, kVnniQuant, score_keys<>);

}  // namespace dynamoe_cpu
#endif
