// What multi-head latent attention has beside plain products and attention: entries of the cache, and rotations.
#include <cstring>

#include "ops/operators.h"
#include "ops/parallel.h"

namespace dynamoe_cpu {

void rotate_head(const void* in, const float* cos_sin, int64_t channels, bool interleaved, void* out, Dtype dtype) {
  const int64_t half = channels / 2, step = interleaved ? 2 : 1, behind = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = read_number(in, dtype, i * step), b = read_number(in, dtype, i * step + behind);
    const float cos = cos_sin[i], sin = cos_sin[half + i];
    write_number(out, dtype, i, a * cos - b * sin);
    write_number(out, dtype, half + i, b * cos + a * sin);
  }
}

void write_latents(const Context& context, const LatentCall& call) {
  const Kernels& kernels = *context.kernels;
  const Dtype dtype = call.x.dtype;
  const int64_t bytes = element_bytes(dtype);
  const int latent = static_cast<int>(call.latent), rotated = static_cast<int>(call.rotated);
  for_each_row(context.threads, call.rows, [&](int64_t row) {
    const char* x = static_cast<const char*>(call.x.at(row));
    const int64_t slot = call.slots[row];
    char* entry = static_cast<char*>(call.entries.at(slot / call.page_size, 0, slot % call.page_size));
    Arena arena(scratch(Buffer::rows).get<char>((call.latent + call.rotated) * 12 + 256));
    float* wide = arena.take<float>(latent);
    char *normed = arena.take(latent * bytes), *key = arena.take(rotated * bytes);
    kernels.rms_norm(x, dtype, nullptr, 1.0f, call.norm, dtype, call.eps, latent, nullptr, dtype, normed);
    rotate_head(x + latent * bytes, call.cos_sin + call.positions[row] * rotated, rotated, call.interleaved, key, dtype);
    if (call.entries.dtype == dtype) {
      std::memcpy(entry, normed, latent * bytes);
      std::memcpy(entry + latent * bytes, key, rotated * bytes);
      return;
    }
    // Codes, their scale, and a key of 16 bits.
    const bool narrow = dtype == Dtype::bf16;
    if (narrow) kernels.widen(reinterpret_cast<const uint16_t*>(normed), wide, latent);
    else kernels.convert(reinterpret_cast<const float*>(key), key, rotated, Dtype::bf16);
    kernels.encode_head(narrow ? wide : reinterpret_cast<const float*>(normed), entry, latent);
    std::memcpy(entry + latent + kScaleBytes, key, 2 * rotated);
  });
}

}  // namespace dynamoe_cpu
