// Memory in which processes of one machine add up, without a message and without sleeping as long as all are at work.
#pragma once

#include <atomic>
#include <string>

#include "operators.h"

namespace dynamoe_cpu {

class SharedMemory {
 public:
  // Bytes of the file that `size` processes share, which one of them has made and filled with zeros.
  static int64_t file_bytes(int64_t size);

  // Opens the file, which may be unlinked once all have done so. Throws std::runtime_error where that fails.
  SharedMemory(const std::string& path, int64_t rank, int64_t size, double timeout);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // out = the sum of everybody's `in`, added up in the order of the ranks in fp32; they may be the same. All processes
  // call this alike. Throws std::runtime_error when one of them has died, or does not come in time.
  void sum(const Kernels& kernels, const void* in, void* out, int64_t count, Dtype dtype);

 private:
  char* place(uint64_t round, int64_t rank) const;
  std::atomic<uint64_t>& posted(int64_t rank) const;
  void wait_for(int64_t rank, uint64_t round) const;
  bool is_alive(int64_t rank) const;

  const int64_t rank_, size_;
  const double timeout_;
  int file_ = -1;
  char* data_ = nullptr;
  uint64_t round_ = 0;
};

}  // namespace dynamoe_cpu
