// Probes, router entropy, and the keys and values of skipped layers.
#include "ops/exits.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/parallel.h"

namespace dynamoe_cpu {

namespace {

constexpr float kProbeEps = 1e-6f;

float inverse_size(const Kernels& kernels, const float* x, int64_t n) {
  float squares;
  kernels.dots(x, n, 1, x, n, &squares);
  return 1.0f / std::sqrt(squares / static_cast<float>(n) + kProbeEps);
}

void clip(const Kernels& kernels, void* data, Dtype dtype, int64_t count, float limit) {
  const auto bounded = [&](float value) { return std::min(std::max(value, -limit), limit); };
  float* wide = static_cast<float*>(data);
  if (dtype == Dtype::bf16) {
    wide = scratch(Buffer::hidden).get<float>(count);
    kernels.widen(static_cast<const uint16_t*>(data), wide, static_cast<int>(count));
  }
  for (int64_t i = 0; i < count; ++i) wide[i] = bounded(wide[i]);
  if (dtype == Dtype::bf16) kernels.convert(wide, data, static_cast<int>(count), dtype);
}

}  // namespace

void probe(const Context& context, const ProbeCall& call) {
  const Kernels& kernels = *context.kernels;
  const int64_t inputs = call.hidden * (call.previous ? 2 : 1) + (call.entropy ? 1 : 0);
  for_each_light_row(context.threads, call.rows, call.inner * inputs / 4, [&](int64_t row) {
    const float* x = call.x + row * call.hidden;
    const float* previous = call.previous ? call.previous + row * call.hidden : nullptr;
    const float size = inverse_size(kernels, x, call.hidden);
    const float previous_size = previous ? inverse_size(kernels, previous, call.hidden) : 0;
    float* products = scratch(Buffer::rows).get<float>(2 * call.inner);
    kernels.dots(call.weight, inputs, call.inner, x, call.hidden, products);
    if (previous) kernels.dots(call.weight + call.hidden, inputs, call.inner, previous, call.hidden, products + call.inner);
    float logit = call.out ? call.out_bias : 0.0f;
    for (int64_t j = 0; j < call.inner; ++j) {
      float inner = call.bias[j] + size * products[j];
      if (previous) inner += previous_size * products[call.inner + j];
      if (call.entropy) inner += call.weight[(j + 1) * inputs - 1] * call.entropy[row];
      logit += call.out ? call.out[j] * (inner / (1.0f + std::exp(-inner))) : inner;
    }
    call.logits[row] = logit;
  });
}

int64_t partition(const float* logits, const float* thresholds, int64_t rows, int64_t* order) {
  const auto exits = [&](int64_t row) {
    return logits[row] >= thresholds[row] && thresholds[row] < std::numeric_limits<float>::infinity();
  };
  int64_t continuing = 0;
  for (int64_t row = 0; row < rows; ++row)
    if (!exits(row)) order[continuing++] = row;
  for (int64_t row = 0, next = continuing; row < rows; ++row)
    if (exits(row)) order[next++] = row;
  return continuing;
}

void router_entropy(const Context& context, const Rows& logits, int64_t rows, int64_t experts, float share,
                    float* out) {
  for_each_row(context.threads, rows, [&](int64_t row) {
    float* wide = scratch(Buffer::rows).get<float>(experts);
    if (logits.dtype == Dtype::bf16) {
      context.kernels->widen(static_cast<const uint16_t*>(logits.at(row)), wide, static_cast<int>(experts));
    } else {
      std::copy_n(static_cast<const float*>(logits.at(row)), experts, wide);
    }
    const float top = *std::max_element(wide, wide + experts);
    float total = 0, weighted = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const float below = wide[e] - top, weight = std::exp(below);
      total += weight;
      weighted += weight > 0 ? weight * below : 0;  // an expert that is masked out has no share in the sum
    }
    out[row] += share * (std::log(total) - weighted / total);
  });
}

void project_kv(const Context& context, const ProjectCall& call) {
  const Kernels& kernels = *context.kernels;
  const int64_t width = call.kv_heads * call.channels, bytes = element_bytes(call.dtype);
  char* normed = static_cast<char*>(call.scratch);
  char* kv = normed + call.rows * call.hidden * bytes;
  char* keys = kv + call.rows * 2 * width * bytes;

  NormCall norm{};
  norm.x = call.x;
  norm.scale = 1.0f;
  norm.weight = call.norm;
  norm.weight_dtype = call.dtype;
  norm.eps = call.eps;
  norm.rows = call.rows;
  norm.hidden = call.hidden;
  norm.out = normed;
  rms_norm(context, norm);
  const Rows normed_rows{normed, call.hidden, call.dtype};
  if (!call.quant.empty())
    quant_linear(context, {normed_rows, call.rows, &call.quant, kv, 2 * width, call.dtype});
  else
    linear(context, {normed_rows, call.rows, call.hidden, 2 * width, call.kv, call.kv_bias, kv, 2 * width, call.dtype});

  Rows k{kv, 2 * width, call.dtype};
  const bool per_head = call.k_norm && call.k_norm_width == call.channels;
  const auto norm_keys = [&](const Rows& from, int64_t row, int64_t pieces) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t offset = piece * call.k_norm_width * bytes;
      kernels.rms_norm(static_cast<const char*>(from.at(row)) + offset, call.dtype, nullptr, 1.0f, call.k_norm,
                       call.dtype, call.eps, static_cast<int>(call.k_norm_width), nullptr, call.dtype,
                       keys + row * width * bytes + offset);
    }
  };
  for_each_row(context.threads, call.rows, [&](int64_t row) {
    char* both = kv + row * 2 * width * bytes;
    if (call.k_norm && !per_head) norm_keys(k, row, 1);
    if (call.clip > 0) {
      clip(kernels, both, call.dtype, 2 * width, call.clip);
      if (call.k_norm && !per_head) clip(kernels, keys + row * width * bytes, call.dtype, width, call.clip);
    }
    if (per_head) norm_keys(k, row, call.kv_heads);
  });
  if (call.k_norm) k = {keys, width, call.dtype};

  RopeCall rope{k, k, {kv + width * bytes, 2 * width, call.dtype}, call.rows, 0, call.kv_heads, call.channels};
  rope.cos_sin = call.cos_sin;
  rope.positions = call.positions;
  rope.slots = call.slots;
  rope.keys = call.keys;
  rope.values = call.values;
  rope.page_size = call.page_size;
  rope_and_write(context, rope);
}

}  // namespace dynamoe_cpu
