// Memory for packed weights, and the probe of how fast it can be read.
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "ops/parallel.h"
#include "ops/tensors.h"

namespace dynamoe_cpu {

// On huge pages: walking the tables of small ones costs a quarter of the bandwidth. Weights
// that are smaller than a few huge pages share a slab, which lives as long as any of them.
Tensor allocate(int64_t count) {
  TORCH_CHECK_VALUE(0 <= count && count < int64_t{1} << 56, "words must not be ", count);
  constexpr size_t kHuge = size_t{2} << 20, kSlab = 16 * kHuge;
  static std::mutex mutex;
  static std::weak_ptr<char> current;
  static size_t used = 0;
  const size_t bytes = (static_cast<size_t>(count) * 4 + 63) / 64 * 64;
  const auto map = [&](size_t size) {
    size = std::max<size_t>((size + kHuge - 1) / kHuge, 1) * kHuge;
    // Not from the heap, which hands out again what it has held in small pages.
    const size_t mapped = size + kHuge;
    void* pages = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(pages != MAP_FAILED, "no memory for ", size, " bytes of packed weights");
    const uintptr_t first = (reinterpret_cast<uintptr_t>(pages) + kHuge - 1) / kHuge * kHuge;
    char* data = reinterpret_cast<char*>(first);
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);
#endif
    return std::shared_ptr<char>(data, [pages, mapped](char*) { munmap(pages, mapped); });
  };
  std::shared_ptr<char> slab;
  char* data;
  if (bytes > kSlab / 4) {
    slab = map(bytes);
    data = slab.get();
  } else {
    const std::lock_guard<std::mutex> lock(mutex);
    slab = current.lock();
    if (!slab || used + bytes > kSlab) {
      slab = map(kSlab);
      current = slab;
      used = 0;
    }
    data = slab.get() + used;
    used += bytes;
  }
  return at::from_blob(data, {count}, [slab](void*) mutable { slab.reset(); }, at::TensorOptions().dtype(at::kInt));
}

namespace {

// Reads every word once, as a packed weight is read, and does next to nothing with it: the limit for the other
// operators.
int64_t read_words_op(const Tensor& source) {
  const uint32_t* data = words(source, source.numel(), "source");
  constexpr int64_t kWords = 64 * 1024, kLanes = 64, kAhead = 1024;
  std::atomic<uint32_t> total{0};
  for_each_task(at::get_num_threads(), source.numel() / kWords, [&](int64_t task) {
    const uint32_t* p = data + task * kWords;
    uint32_t lane[kLanes] = {};
    for (int64_t i = 0; i < kWords; i += kLanes) {
      for (int64_t line = 0; line < kLanes; line += 16) __builtin_prefetch(p + i + kAhead + line);
      for (int64_t j = 0; j < kLanes; ++j) lane[j] += p[i + j];
    }
    uint32_t sum = 0;
    for (uint32_t value : lane) sum += value;
    total.fetch_add(sum);
  });
  return total.load();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def("allocate(int words) -> Tensor", &allocate);
  m.def("read_words(Tensor source) -> int", &read_words_op);
}

}  // namespace dynamoe_cpu
