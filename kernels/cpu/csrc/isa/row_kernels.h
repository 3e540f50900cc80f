// Row kernels in terms of Vec: conversions, norms, rotary embedding, softmax, activations. Included by each instruction
// set's file, inside its own anonymous namespace. Every reduction has one fixed order.
#pragma once

TARGET static inline float widen_bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// `count` < kLanes elements, the missing ones zero.
TARGET static inline Vec::F load_part(const void* p, Dtype dtype, int count) {
  alignas(64) float buffer[Vec::kLanes] = {};
  for (int i = 0; i < count; ++i)
    buffer[i] = dtype == Dtype::bf16 ? widen_bf16(static_cast<const uint16_t*>(p)[i]) : static_cast<const float*>(p)[i];
  return Vec::load(buffer);
}

TARGET static inline void store_part(void* p, Dtype dtype, int count, Vec::F a) {
  if (dtype == Dtype::bf16) {
    uint16_t buffer[Vec::kLanes];
    Vec::store_bf16(buffer, a);
    std::memcpy(p, buffer, 2 * count);
  } else {
    float buffer[Vec::kLanes];
    Vec::store(buffer, a);
    std::memcpy(p, buffer, 4 * count);
  }
}

TARGET static inline Vec::F load_row(const void* row, Dtype dtype, int i, int n) {
  const char* p = static_cast<const char*>(row) + static_cast<ptrdiff_t>(i) * element_bytes(dtype);
  if (n - i < Vec::kLanes) return load_part(p, dtype, n - i);
  return dtype == Dtype::bf16 ? Vec::load_bf16(reinterpret_cast<const uint16_t*>(p))
                              : Vec::load(reinterpret_cast<const float*>(p));
}

TARGET static inline void store_row(void* row, Dtype dtype, int i, int n, Vec::F a) {
  char* p = static_cast<char*>(row) + static_cast<ptrdiff_t>(i) * element_bytes(dtype);
  if (n - i < Vec::kLanes) return store_part(p, dtype, n - i, a);
  if (dtype == Dtype::bf16) return Vec::store_bf16(reinterpret_cast<uint16_t*>(p), a);
  Vec::store(reinterpret_cast<float*>(p), a);
}

TARGET static void convert(const float* in, void* out, int n, Dtype out_dtype) {
  for (int i = 0; i < n; i += Vec::kLanes) store_row(out, out_dtype, i, n, load_row(in, Dtype::fp32, i, n));
}

TARGET static void widen(const uint16_t* in, float* out, int n) {
  for (int i = 0; i < n; i += Vec::kLanes) store_row(out, Dtype::fp32, i, n, load_row(in, Dtype::bf16, i, n));
}

// The words of rows, transposed; a last, partly filled word is padded with zeros.
TARGET static void transpose_words(uint32_t* dst, int dst_stride, const void* const* rows, int num_rows,
                                   int row_bytes) {
  const int full = row_bytes / 4, rest = row_bytes % 4;
  transpose_full_words(dst, dst_stride, rows, num_rows, full);
  if (!rest) return;
  for (int r = 0; r < num_rows; ++r) {
    uint32_t word = 0;
    if (rows[r]) std::memcpy(&word, static_cast<const char*>(rows[r]) + 4 * full, rest);
    dst[static_cast<ptrdiff_t>(full) * dst_stride + r] = word;
  }
}

// Half by half, so that the order is the same for all widths below.
TARGET static inline float sum_lanes(Vec::F a) {
  if constexpr (Vec::kLanes > 8) a = Vec::add(a, Vec::upper<8>(a));
  if constexpr (Vec::kLanes > 4) a = Vec::add(a, Vec::upper<4>(a));
  a = Vec::add(a, Vec::upper<2>(a));
  return Vec::first(Vec::add(a, Vec::upper<1>(a)));
}

TARGET static inline float max_lanes(Vec::F a) {
  if constexpr (Vec::kLanes > 8) a = Vec::max(a, Vec::upper<8>(a));
  if constexpr (Vec::kLanes > 4) a = Vec::max(a, Vec::upper<4>(a));
  a = Vec::max(a, Vec::upper<2>(a));
  return Vec::first(Vec::max(a, Vec::upper<1>(a)));
}

// e^x to about 1 ulp (Cephes' expf); zero below the smallest normal result, NaN stays NaN.
TARGET static inline Vec::F exponential(Vec::F x) {
  const Vec::F low = Vec::set(-87.33f);
  const Vec::F bounded = Vec::min(Vec::set(88.37f), Vec::max(low, x));
  const Vec::F magic = Vec::set(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const Vec::F n = Vec::sub(Vec::fma(bounded, Vec::set(1.44269504f), magic), magic);
  Vec::F r = Vec::fma(n, Vec::set(-0.693359375f), bounded);
  r = Vec::fma(n, Vec::set(2.12194440e-4f), r);
  Vec::F p = Vec::set(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set(5.0000001201e-1f));
  p = Vec::add(Vec::fma(p, Vec::mul(r, r), r), Vec::set(1.0f));
  return Vec::zero_where_below(x, low, Vec::scale_by_power(p, n));
}

TARGET static inline Vec::F activate(Vec::F x, Activation activation) {
  const Vec::F one = Vec::set(1.0f);
  if (activation == Activation::silu) return Vec::div(x, Vec::add(one, exponential(Vec::sub(Vec::zero(), x))));
  if (activation == Activation::gelu_tanh) {
    // (1 + tanh u) / 2 = 1 / (1 + e^(-2u))
    const Vec::F cubic = Vec::mul(x, Vec::fma(Vec::mul(x, x), Vec::set(0.044715f), one));
    return Vec::div(x, Vec::add(one, exponential(Vec::mul(cubic, Vec::set(-2 * 0.7978845608f)))));
  }
  if (activation == Activation::clamped_swiglu)
    return Vec::div(x, Vec::add(one, exponential(Vec::mul(x, Vec::set(-1.702f)))));
  alignas(64) float lane[Vec::kLanes];
  Vec::store(lane, x);
  for (float& value : lane) value = 0.5f * value * (1.0f + std::erf(value * 0.70710678f));
  return Vec::load(lane);
}

TARGET static inline Vec::F rounded(Vec::F a, Dtype dtype) { return dtype == Dtype::bf16 ? Vec::round_bf16(a) : a; }

// `stream_dtype` is that of the residual and of the sum, and x's where there is no residual; `out` has the weight's.
TARGET static void rms_norm(const void* x, Dtype x_dtype, const void* residual, float scale, const void* weight,
                            Dtype weight_dtype, float eps, int n, void* sum, Dtype stream_dtype, void* out) {
  Vec::F squares = Vec::zero();
  for (int i = 0; i < n; i += Vec::kLanes) {
    Vec::F a = load_row(x, x_dtype, i, n);
    if (residual) {
      if (scale != 1.0f) a = rounded(Vec::mul(a, Vec::set(scale)), stream_dtype);
      a = rounded(Vec::add(load_row(residual, stream_dtype, i, n), a), stream_dtype);
      store_row(sum, stream_dtype, i, n, a);
    }
    squares = Vec::fma(a, a, squares);
  }
  const Vec::F inverse = Vec::set(1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(n) + eps));
  const void* source = residual ? sum : x;
  for (int i = 0; i < n; i += Vec::kLanes) {
    const Vec::F a = rounded(Vec::mul(load_row(source, stream_dtype, i, n), inverse), stream_dtype);
    store_row(out, weight_dtype, i, n, Vec::mul(load_row(weight, weight_dtype, i, n), a));
  }
}

TARGET static void rope(const void* in, const float* cos_sin, int channels, void* out, Dtype dtype) {
  const int half = channels / 2;
  const char* in_b = static_cast<const char*>(in) + static_cast<ptrdiff_t>(half) * element_bytes(dtype);
  char* out_b = static_cast<char*>(out) + static_cast<ptrdiff_t>(half) * element_bytes(dtype);
  for (int i = 0; i < half; i += Vec::kLanes) {
    const Vec::F a = load_row(in, dtype, i, half), b = load_row(in_b, dtype, i, half);
    const Vec::F cos = load_row(cos_sin, Dtype::fp32, i, half), sin = load_row(cos_sin + half, Dtype::fp32, i, half);
    store_row(out, dtype, i, half, Vec::sub(Vec::mul(a, cos), Vec::mul(b, sin)));
    store_row(out_b, dtype, i, half, Vec::fma(b, cos, Vec::mul(a, sin)));
  }
}

TARGET static void cap_scores(float* scores, int64_t half_stride, float scale, float cap) {
  const Vec::F one = Vec::set(1.0f), twice = Vec::set(2.0f * scale / cap);
  for (int i = 0; i < kKeyBlock; i += Vec::kLanes) {
    float* at = scores + i / kBlockOutputs * half_stride + i % kBlockOutputs;
    // tanh u = (e^(2u) - 1) / (e^(2u) + 1)
    const Vec::F power = exponential(Vec::mul(Vec::load(at), twice));
    Vec::store(at, Vec::mul(Vec::set(cap), Vec::div(Vec::sub(power, one), Vec::add(power, one))));
  }
}

TARGET static void softmax_step(float* scores, int64_t half_stride, int first, int last, float scale, float* state,
                                float* probabilities, float* accumulator, int blocks, int stride) {
  const float infinity = std::numeric_limits<float>::infinity();
  const auto score = [&](int i) -> float* { return scores + i / kBlockOutputs * half_stride + i % kBlockOutputs; };
  for (int i = 0; i < first; ++i) *score(i) = -infinity;
  for (int i = last; i < kKeyBlock; ++i) *score(i) = -infinity;
  constexpr int kVectors = kKeyBlock / Vec::kLanes;
  Vec::F s[kVectors];
  Vec::F top = Vec::set(-infinity);
  for (int v = 0; v < kVectors; ++v) {
    s[v] = Vec::mul(Vec::load(score(v * Vec::kLanes)), Vec::set(scale));
    top = Vec::max(top, s[v]);
  }
  const float block_max = max_lanes(top);
  const float new_max = state[0] > block_max ? state[0] : block_max;
  Vec::F total = Vec::zero();
  for (int v = 0; v < kVectors; ++v) {
    s[v] = exponential(Vec::sub(s[v], Vec::set(new_max)));
    Vec::store(probabilities + v * Vec::kLanes, s[v]);
    total = Vec::add(total, s[v]);
  }
  if (new_max != state[0]) {
    alignas(64) float shrink[Vec::kLanes];
    Vec::store(shrink, exponential(Vec::set(state[0] - new_max)));
    state[0] = new_max;
    state[1] *= shrink[0];
    for (int block = 0; block < blocks; ++block) {
      float* out = accumulator + static_cast<ptrdiff_t>(block) * stride;
      for (int i = 0; i < kBlockOutputs; i += Vec::kLanes)
        Vec::store(out + i, Vec::mul(Vec::load(out + i), Vec::set(shrink[0])));
    }
  }
  state[1] += sum_lanes(total);
}

TARGET static void softmax_merge(float* state, float* accumulator, const float* later_state, const float* later,
                                 int blocks, int stride) {
  const float top = state[0] > later_state[0] ? state[0] : later_state[0];
  alignas(64) float factor[2][Vec::kLanes];
  Vec::store(factor[0], exponential(Vec::set(state[0] - top)));
  Vec::store(factor[1], exponential(Vec::set(later_state[0] - top)));
  state[0] = top;
  state[1] = state[1] * factor[0][0] + later_state[1] * factor[1][0];
  const Vec::F first = Vec::set(factor[0][0]), second = Vec::set(factor[1][0]);
  for (int block = 0; block < blocks; ++block) {
    const ptrdiff_t base = static_cast<ptrdiff_t>(block) * stride;
    for (int i = 0; i < kBlockOutputs; i += Vec::kLanes) {
      const Vec::F scaled = Vec::mul(Vec::load(later + base + i), second);
      Vec::store(accumulator + base + i, Vec::fma(Vec::load(accumulator + base + i), first, scaled));
    }
  }
}

// Of `count` rows of weights with one x, whose loads and waits they share.
template <int count>
SIMD_FN void some_dots(const float* weights, int64_t stride, const float* x, int64_t n, float* out) {
  constexpr int kSums = 16, kVectors = kSums / Vec::kLanes;
  Vec::F sum[count][kVectors];
  for (int row = 0; row < count; ++row)
    for (int v = 0; v < kVectors; ++v) sum[row][v] = Vec::zero();
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t from = i + v * Vec::kLanes;
      const Vec::F wide = Vec::load(x + from);
      for (int row = 0; row < count; ++row)
        sum[row][v] = Vec::add(sum[row][v], Vec::mul(Vec::load(weights + row * stride + from), wide));
    }
  float lane[count][kSums];
  for (int row = 0; row < count; ++row) {
    for (int v = 0; v < kVectors; ++v) Vec::store(lane[row] + v * Vec::kLanes, sum[row][v]);
    for (int j = 0; i + j < n; ++j) lane[row][j] += weights[row * stride + i + j] * x[i + j];
    for (int width = kSums / 2; width; width /= 2)
      for (int j = 0; j < width; ++j) lane[row][j] += lane[row][j + width];
    out[row] = lane[row][0];
  }
}

TARGET static void dots(const float* weights, int64_t stride, int64_t count, const float* x, int64_t n, float* out) {
  int64_t row = 0;
  for (; row + 4 <= count; row += 4) some_dots<4>(weights + row * stride, stride, x, n, out + row);
  for (; row < count; ++row) some_dots<1>(weights + row * stride, stride, x, n, out + row);
}

TARGET static void add(const void* added, Dtype dtype, float scale, float* sum, int n) {
  const Vec::F factor = Vec::set(scale);
  for (int i = 0; i < n; i += Vec::kLanes)
    store_row(sum, Dtype::fp32, i, n,
              Vec::add(load_row(sum, Dtype::fp32, i, n), Vec::mul(load_row(added, dtype, i, n), factor)));
}
