// Unsigned 8-bit panel times signed 8-bit weights with vpdpbusd; int32 sums are exact.
#pragma once

template <int kRows>
TARGET static void multiply_vnni(const uint32_t* a, const uint32_t* w, int cells, int32_t* tile, bool accumulate,
                                 Ahead ahead) {
  __m512i sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < 2; ++v)
      sum[r][v] = accumulate ? _mm512_loadu_si512(tile + r * kBlockOutputs + 16 * v) : _mm512_setzero_si512();
  for (int cell = 0; cell < cells; ++cell) {
    _mm_prefetch(ahead.first, _MM_HINT_T1);
    _mm_prefetch(ahead.first + 64, _MM_HINT_T1);
    ahead.first += ahead.step;
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i b = _mm512_set1_epi32(static_cast<int>(a[r]));
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], b, w0);
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], b, w1);
    }
    a += kRows;
    w += kBlockOutputs;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < 2; ++v) _mm512_storeu_si512(tile + r * kBlockOutputs + 16 * v, sum[r][v]);
}

template <int kRows = kTileRows>
TARGET static void run_vnni(int num_rows, const void* panel, const uint32_t* weights, int cells, void* tile,
                            bool accumulate, Ahead ahead) {
  if (num_rows == kRows) {
    multiply_vnni<kRows>(static_cast<const uint32_t*>(panel), weights, cells, static_cast<int32_t*>(tile), accumulate,
                         ahead);
  } else if constexpr (kRows > 1) {
    run_vnni<kRows - 1>(num_rows, panel, weights, cells, tile, accumulate, ahead);
  }
}
