// Work sharing over the team of threads, tiles of rows, and scratch memory that grows and is kept.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "isa/kernels.h"
#include "team/team.h"

namespace dynamoe_cpu {

// body() on this thread and on up to `threads` - 1 of the team's, whichever are free: each call takes what work is left.
template <class Body>
void on_all_threads(int threads, const Body& body) {
  if (threads <= 1) body();
  else run_on_team(threads, [](const void* data) { (*static_cast<const Body*>(data))(); }, &body);
}

// body(task) for every task, handed out in order to whichever thread is free.
template <class Body>
void for_each_task(int threads, int64_t tasks, const Body& body) {
  alignas(128) std::atomic<int64_t> next{0};  // away from what the caller writes
  on_all_threads(static_cast<int>(threads < tasks ? threads : tasks), [&] {
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) body(task);
  });
}

// body(row) for every row, a few rows per task: waking the pool costs more than a few rows do.
template <class Body>
void for_each_row(int threads, int64_t rows, const Body& body, int64_t rows_per_task = 8) {
  for_each_task(threads, ceil_div(rows, rows_per_task), [&](int64_t task) {
    const int64_t last = (task + 1) * rows_per_task < rows ? (task + 1) * rows_per_task : rows;
    for (int64_t row = task * rows_per_task; row < last; ++row) body(row);
  });
}

// The same where a row takes one pass over its `width` elements, or as little as that.
template <class Body>
void for_each_light_row(int threads, int64_t rows, int64_t width, const Body& body) {
  for_each_row(threads, rows, body, ceil_div(8192, width));
}

// `parts` · `size` items in chunks of work for threads that take the next whenever they are free: large ones first and
// single items at the end, so that all finish at nearly the same time, and what a thread reads lies in few stretches. No
// chunk has items of two parts.
class WorkChunks {
 public:
  WorkChunks(int64_t parts, int64_t size, int threads)
      : items_(parts * size),
        size_(size),
        threads_(static_cast<int>(threads < items_ ? threads : items_)),
        share_(2 * threads) {}
  int threads() const { return threads_; }  // that find any
  bool take(int64_t& first, int64_t& last) {
    first = next_.load(std::memory_order_relaxed);
    do {
      if (first >= items_) return false;
      const int64_t wanted = ceil_div(items_ - first, share_), rest = size_ - first % size_;
      last = first + (wanted < rest ? wanted : rest);
    } while (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed));
    return true;
  }
  // What is taken next, most likely by the thread that asks; -1 if nothing is left.
  int64_t likely() const {
    const int64_t next = next_.load(std::memory_order_relaxed);
    return next < items_ ? next : -1;
  }

 private:
  const int64_t items_, size_;
  const int threads_, share_;
  alignas(128) std::atomic<int64_t> next_{0};  // away from what the caller writes
};

// `rows` rows in the fewest tiles of at most `most` rows, as even as possible.
struct Tiles {
  int64_t rows;
  int64_t count;
  Tiles(int64_t rows, int64_t most) : rows(rows), count(ceil_div(rows, most)) {}
  int64_t start(int64_t tile) const { return rows * tile / count; }
  int size(int64_t tile) const { return static_cast<int>(start(tile + 1) - start(tile)); }
  int largest() const { return count ? static_cast<int>(ceil_div(rows, count)) : 0; }
};

// For as long as a thread multiplies: what its instruction set does before and after.
class Products {
 public:
  explicit Products(const Kernels& kernels) : end_(kernels.end_products) {
    if (kernels.begin_products) kernels.begin_products();
  }
  ~Products() {
    if (end_) end_();
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

 private:
  void (*const end_)();
};

// One growing buffer per thread and purpose. What was in it is lost when it grows.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > bytes_) {
      std::free(data_);
      data_ = std::aligned_alloc(4096, bytes);
      bytes_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Parts of one stretch of memory, each on a cache line of its own.
class Arena {
 public:
  explicit Arena(char* data) : data_(data) {}
  template <class T = char>
  T* take(int64_t count) {
    char* part = data_ + used_;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* data_;
  int64_t used_ = 0;
};

enum class Buffer { rows, hidden, output, keys, values, scores, states, packed, limbs, stack, leaving, count };

inline Scratch& scratch(Buffer buffer) {
  thread_local Scratch buffers[static_cast<int>(Buffer::count)];
  return buffers[static_cast<int>(buffer)];
}

}  // namespace dynamoe_cpu
