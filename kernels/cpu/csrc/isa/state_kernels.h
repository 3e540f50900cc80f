// Kernels of layers with recurrent states in terms of Vec; see states.cpp. Included by each instruction set's file behind
// row_kernels.h. Every column of a state, and every channel of a convolution, is summed in one order, whatever its lane.
#pragma once

TARGET static void convolve(const float* const* rows, const float* weights, int64_t stride, int taps, const float* bias,
                            bool silu, int n, float* out) {
  for (int i = 0; i < n; i += Vec::kLanes) {
    Vec::F sum = Vec::mul(load_row(rows[0], Dtype::fp32, i, n), load_row(weights, Dtype::fp32, i, n));
    for (int tap = 1; tap < taps; ++tap)
      sum = Vec::fma(load_row(rows[tap], Dtype::fp32, i, n), load_row(weights + tap * stride, Dtype::fp32, i, n), sum);
    if (bias) sum = Vec::add(sum, load_row(bias, Dtype::fp32, i, n));
    store_row(out, Dtype::fp32, i, n, silu ? activate(sum, Activation::silu) : sum);
  }
}

// out = a · b, or a · silu(b)
TARGET static void multiply(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype, bool silu, int n, void* out,
                            Dtype out_dtype) {
  for (int i = 0; i < n; i += Vec::kLanes) {
    Vec::F by = load_row(b, b_dtype, i, n);
    if (silu) by = activate(by, Activation::silu);
    store_row(out, out_dtype, i, n, Vec::mul(load_row(a, a_dtype, i, n), by));
  }
}

TARGET static void unit_length(const float* x, int n, float eps, float scale, float* out) {
  Vec::F squares = Vec::zero();
  for (int i = 0; i < n; i += Vec::kLanes) {
    const Vec::F part = load_row(x, Dtype::fp32, i, n);
    squares = Vec::fma(part, part, squares);
  }
  const float factor = scale / std::sqrt(sum_lanes(squares) + eps);
  for (int i = 0; i < n; i += Vec::kLanes)
    store_row(out, Dtype::fp32, i, n, Vec::mul(load_row(x, Dtype::fp32, i, n), Vec::set(factor)));
}

// Columns `first` … of the state; with `kWhole` no lane is beyond the last column.
template <int kVectors, bool kWhole, bool kByChannel>
TARGET static void recur_columns(float* state, int64_t stride, int keys, int columns, int first, const float* q,
                                 const float* k, const float* v, const float* decay, float step, bool delta_rule,
                                 float* out) {
  const auto load = [&](const float* row, int vector) TARGET {
    const int i = first + vector * Vec::kLanes;
    return kWhole ? Vec::load(row + i) : load_row(row, Dtype::fp32, i, columns);
  };
  const auto store = [&](float* row, int vector, Vec::F a) TARGET {
    const int i = first + vector * Vec::kLanes;
    if (kWhole)
      Vec::store(row + i, a);
    else
      store_row(row, Dtype::fp32, i, columns, a);
  };
  const Vec::F kept = Vec::set(decay[0]);
  Vec::F value[kVectors], sum[kVectors];
  for (int i = 0; i < kVectors; ++i) value[i] = load(v, i), sum[i] = Vec::zero();
  if (delta_rule) {
    for (int c = 0; c < keys; ++c) {
      const Vec::F key = Vec::set(kByChannel ? k[c] * decay[c] : k[c]);
      for (int i = 0; i < kVectors; ++i) sum[i] = Vec::fma(key, load(state + c * stride, i), sum[i]);
    }
    for (int i = 0; i < kVectors; ++i) {
      value[i] = Vec::sub(value[i], kByChannel ? sum[i] : Vec::mul(kept, sum[i]));
      sum[i] = Vec::zero();
    }
  }
  for (int i = 0; i < kVectors; ++i) value[i] = Vec::mul(value[i], Vec::set(step));
  for (int c = 0; c < keys; ++c) {
    float* row = state + c * stride;
    const Vec::F left = kByChannel ? Vec::set(decay[c]) : kept;
    for (int i = 0; i < kVectors; ++i) {
      const Vec::F written = Vec::fma(Vec::set(k[c]), value[i], Vec::mul(left, load(row, i)));
      store(row, i, written);
      sum[i] = Vec::fma(Vec::set(q[c]), written, sum[i]);
    }
  }
  for (int i = 0; i < kVectors; ++i) store(out, i, sum[i]);
}

template <bool kByChannel>
TARGET static void recur_all(float* state, int64_t stride, int keys, int columns, const float* q, const float* k,
                             const float* v, const float* decay, float step, bool delta_rule, float* out) {
  constexpr int kVectors = 4;
  int i = 0;
  for (; i + kVectors * Vec::kLanes <= columns; i += kVectors * Vec::kLanes)
    recur_columns<kVectors, true, kByChannel>(state, stride, keys, columns, i, q, k, v, decay, step, delta_rule, out);
  for (; i + Vec::kLanes <= columns; i += Vec::kLanes)
    recur_columns<1, true, kByChannel>(state, stride, keys, columns, i, q, k, v, decay, step, delta_rule, out);
  if (i < columns)
    recur_columns<1, false, kByChannel>(state, stride, keys, columns, i, q, k, v, decay, step, delta_rule, out);
}

TARGET static void recur(float* state, int64_t stride, int keys, int columns, const float* q, const float* k,
                         const float* v, const float* decay, bool by_channel, float step, bool delta_rule, float* out) {
  if (by_channel)
    recur_all<true>(state, stride, keys, columns, q, k, v, decay, step, delta_rule, out);
  else
    recur_all<false>(state, stride, keys, columns, q, k, v, decay, step, delta_rule, out);
}

TARGET static void scan(float* state, const float* rates, int64_t stride, int keys, int n, const float* q, const float* k,
                        const float* v, const float* step, float* out) {
  for (int i = 0; i < n; i += Vec::kLanes) {
    const Vec::F steps = load_row(step, Dtype::fp32, i, n);
    const Vec::F value = Vec::mul(load_row(v, Dtype::fp32, i, n), steps);
    Vec::F sum = Vec::zero();
    for (int c = 0; c < keys; ++c) {
      float* row = state + c * stride;
      const Vec::F kept = exponential(Vec::mul(load_row(rates + c * stride, Dtype::fp32, i, n), steps));
      const Vec::F written = Vec::fma(Vec::set(k[c]), value, Vec::mul(kept, load_row(row, Dtype::fp32, i, n)));
      store_row(row, Dtype::fp32, i, n, written);
      sum = Vec::fma(Vec::set(q[c]), written, sum);
    }
    store_row(out, Dtype::fp32, i, n, sum);
  }
}
