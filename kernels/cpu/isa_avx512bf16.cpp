// AVX-512 with the BF16 and VNNI dot products (Zen 4 and later, Cooper Lake, Sapphire Rapids and later).
#include "isa_begin.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")))

namespace dynamoe_cpu {
namespace {

constexpr int kTileRows = 12;
constexpr int kPassVectors = 2;
constexpr bool kPairs = true;
constexpr int kPrefetchWords = 1024;

#include "simd_avx512.h"
#include "row_kernels.h"
#include "tile_kernels.h"
#include "vnni.h"

template <int kRows>
TARGET void multiply_pairs(const uint32_t* a, const uint32_t* w, int cells, float* tile, bool accumulate) {
  __m512 sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < 2; ++v)
      sum[r][v] = accumulate ? _mm512_loadu_ps(tile + r * kBlockOutputs + 16 * v) : _mm512_setzero_ps();
  for (int cell = 0; cell < cells; ++cell) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetchWords), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetchWords + 16), _MM_HINT_T0);
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
                      bool accumulate) {
  if (num_rows == kRows) {
    multiply_pairs<kRows>(static_cast<const uint32_t*>(panel), weights, cells, static_cast<float*>(tile), accumulate);
  } else if constexpr (kRows > 1) {
    run_pairs<kRows - 1>(num_rows, panel, weights, cells, tile, accumulate);
  }
}

}  // namespace

extern const Kernels kAvx512Bf16Kernels = {
    "avx512bf16",
    {{kTileRows, 1, 4, pack_fp32, run_float<1>}, {kTileRows, 2, 4, pack_bf16, run_pairs<>}},
    {kTileRows, 4, 4, pack_int8, run_vnni<>},
    transpose_cells,
    store,
    gated,
    scaled_add,
    weigh_values,
    convert,
    widen,
    rms_norm,
    rope,
    softmax_step,
    softmax_merge,
    quantize,
};

}  // namespace dynamoe_cpu
#endif
