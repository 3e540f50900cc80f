#include "quant/rounding.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "isa/x86.h"
#include "ops/parallel.h"
#include "quant/scales.h"

// The loops are plain C++, compiled once for every processor and once for those with AVX2: both divide and round as IEEE
// 754 says, so that their bits are the same.
#define INLINE static inline __attribute__((always_inline))

namespace dynamoe_cpu {
namespace {

constexpr int64_t kStretch = 512;  // inputs that are widened at once
constexpr float kMagic = 12582912.0f;  // adding 1.5 * 2^23 rounds what is below 2^22 to a whole number, ties to even
constexpr float kTiny = 0x1p-126f;
constexpr float kLargestFp8 = 448.0f;
constexpr uint32_t kInfinity = 0x7f800000u;

INLINE void widen(const float* from, int64_t n, float* to) { std::memcpy(to, from, sizeof(float) * n); }
struct Bf16 { uint16_t bits; };
INLINE void widen(const Bf16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i].bits) << 16);
}
struct Fp16 { uint16_t bits; };
INLINE void widen(const Fp16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t size = from[i].bits & 0x7fffu;
    const uint32_t normal = size < 0x7c00u ? (size << 13) + (112u << 23) : (size << 13) | kInfinity;
    const float small = static_cast<float>(static_cast<int>(size)) * 0x1p-24f;
    const uint32_t bits = size < 0x400u ? std::bit_cast<uint32_t>(small) : normal;
    to[i] = std::bit_cast<float>(bits | (from[i].bits & 0x8000u) << 16);
  }
}

// How far weights reach from zero, as bits of floats, which rise as the numbers do.
struct Reach {
  uint32_t below = 0, above = 0;
};
INLINE Reach reach(const float* w, int64_t n, Reach found) {
  uint32_t below = found.below, above = found.above;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(w[i]), size = bits & 0x7fffffffu;
    const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
    below = std::max(below, size & sign);
    above = std::max(above, size & ~sign);
  }
  return {below, above};
}

INLINE float positive(float scale) { return scale > 0 ? std::max(scale, kTiny) : 1.0f; }
INLINE float as_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}
INLINE int32_t nearest(float value) {
  return std::bit_cast<int32_t>(value + kMagic) - std::bit_cast<int32_t>(kMagic);
}

struct Grid {
  float scale;
  int32_t zero;
};
INLINE Grid grid_of(const RoundCall& call, const Reach& found) {
  const float low = std::bit_cast<float>(found.below), high = std::bit_cast<float>(found.above);  // sizes
  const float largest = std::max(low, high);
  if (call.format == Format::fp8) return {positive(largest / kLargestFp8), 0};
  if (call.format == Format::int8) {
    const float scale = positive(largest / 127.0f);
    return {call.group ? as_bf16(scale) : scale, 0};
  }
  const float range = call.symmetric ? largest + largest : high + low;
  const float scale = as_bf16(positive(range / 15.0f));
  return {scale, call.symmetric ? 8 : std::clamp(nearest(low / scale), 0, 15)};
}

INLINE void to_int8(const float* w, int64_t n, float scale, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(std::clamp(nearest(w[i] / scale), -127, 127));
}

INLINE void to_int4(const float* w, int64_t n, const Grid& grid, uint8_t* out) {
  uint8_t codes[kStretch + 1];
  for (int64_t i = 0; i < n; ++i)
    codes[i] = static_cast<uint8_t>(std::clamp(nearest(w[i] / grid.scale) + grid.zero, 0, 15));
  codes[n] = 0;  // behind an odd number of inputs
  for (int64_t i = 0; i < (n + 1) / 2; ++i) out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}

INLINE void to_fp8(const float* w, int64_t n, float scale, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t all = std::bit_cast<uint32_t>(w[i] / scale), sign = all >> 24 & 0x80u;
    const float size = std::min(std::bit_cast<float>(all & 0x7fffffffu), kLargestFp8);
    const uint32_t bits = std::bit_cast<uint32_t>(size);
    const uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    const uint32_t small = static_cast<uint32_t>(nearest(size * 512.0f));  // below 2^-6, in steps of 2^-9
    out[i] = static_cast<uint8_t>((size < 0x1p-6f ? small : normal) | sign);
  }
}

INLINE void write_codes(const RoundCall& call, const float* w, int64_t n, const Grid& grid, uint8_t* out) {
  if (call.format == Format::int8) return to_int8(w, n, grid.scale, out);
  if (call.format == Format::int4) return to_int4(w, n, grid, out);
  to_fp8(w, n, grid.scale, out);
}

// The outputs of one block, of a layer's or an expert's: one, or as many as share scales.
template <class T>
INLINE bool round_block(const RoundCall& call, int64_t expert, int64_t block) {
  const int64_t first = block * call.block_outputs, last = std::min(first + call.block_outputs, call.outputs);
  const int64_t groups = call.groups(), group_inputs = call.group ? call.group : call.inputs;
  const T* rows = static_cast<const T*>(call.weight) + expert * call.expert_stride;
  uint32_t largest = 0;
  float wide[kStretch];
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * group_inputs, end = std::min(begin + group_inputs, call.inputs);
    Reach found;
    for (int64_t o = first; o < last; ++o)
      for (int64_t i = begin; i < end; i += kStretch) {
        const int64_t n = std::min(kStretch, end - i);
        widen(rows + o * call.output_stride + i, n, wide);
        found = reach(wide, n, found);
      }
    largest = std::max({largest, found.below, found.above});
    const Grid grid = grid_of(call, found);
    const int64_t at = (expert * call.blocks() + block) * groups + group;
    call.scales[at] = grid.scale;
    if (call.zeros) call.zeros[at] = static_cast<uint8_t>(grid.zero);
    const bool kept = last - first == 1 && end - begin <= kStretch;  // what was widened last is all there is
    for (int64_t o = first; o < last; ++o)
      for (int64_t i = begin; i < end; i += kStretch) {
        const int64_t n = std::min(kStretch, end - i);
        if (!kept) widen(rows + o * call.output_stride + i, n, wide);
        uint8_t* row = call.codes + (expert * call.outputs + o) * call.row_bytes();
        write_codes(call, wide, n, grid, row + (call.format == Format::int4 ? i / 2 : i));
      }
  }
  return largest < kInfinity;
}

using RoundBlock = bool (*)(const RoundCall&, int64_t expert, int64_t block);

template <class T>
bool round_portable(const RoundCall& call, int64_t expert, int64_t block) {
  return round_block<T>(call, expert, block);
}

template <class T>
RoundBlock best() {
#if defined(__x86_64__)
  struct Avx2 {
    __attribute__((target("avx2"))) static bool round(const RoundCall& call, int64_t expert, int64_t block) {
      return round_block<T>(call, expert, block);
    }
  };
  if (has_avx2()) return Avx2::round;
#endif
  return round_portable<T>;
}

}  // namespace

bool round_weight(int threads, const RoundCall& call) {
  const RoundBlock round = call.source == Source::fp32   ? best<float>()
                           : call.source == Source::bf16 ? best<Bf16>()
                                                         : best<Fp16>();
  std::atomic<bool> finite{true};
  for_each_light_row(threads, call.experts * call.blocks(), call.inputs * call.block_outputs, [&](int64_t task) {
    if (!round(call, task / call.blocks(), task % call.blocks())) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

}  // namespace dynamoe_cpu
