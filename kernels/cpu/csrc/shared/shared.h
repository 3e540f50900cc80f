// Memory in which processes of one machine exchange what others send as messages: without system calls and without
// sleeping as long as all are at work.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "ops/operators.h"
#include "team/waiting.h"

namespace dynamoe_cpu {

// All processes of a group call the same functions in the same order; what is said of ranks is the group's numbering.
// Every function throws std::runtime_error when a process has died, or does not come in time; the memory is then useless.
class SharedMemory {
 public:
  // Bytes of the file that `size` processes share, which one of them has made and filled with zeros.
  static int64_t file_bytes(int64_t size);

  // Opens the file, which may be unlinked once all have done so. Throws std::runtime_error where that fails.
  SharedMemory(const std::string& path, int64_t rank, int64_t size, double timeout);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }

  // out = the sum of everybody's `in`, added up in the order of the ranks in fp32; they may be the same.
  void sum(const Kernels& kernels, const void* in, void* out, int64_t count, Dtype dtype);
  // The root's bytes to everybody; the others wait for them for `timeout` seconds.
  void broadcast(int64_t root, void* data, int64_t bytes, double timeout);
  // Everybody's bytes to the root, in the order of the ranks; `out` is looked at there only.
  void gather(int64_t root, const void* in, void* out, int64_t bytes);
  // To every rank its part of `rows`, in their order; between the two calls nothing else may be called. `rows` must live
  // until the second. `sent` and `coming` are bytes by rank. Throws std::logic_error when another number comes.
  void begin_swap(const char* rows, std::vector<int64_t> sent);
  void finish_swap(char* out, const std::vector<int64_t>& coming);

 private:
  struct Counters;
  Counters& counters(int64_t rank) const;
  char* place(int64_t rank) const;
  void begin_round(double timeout);
  void post();
  void wait_for_post(int64_t rank, double timeout);
  void end_round();
  template <class Arrived>
  void wait(int64_t rank, double timeout, bool rings, const Arrived& arrived);
  void write_parts(int64_t offset);

  const int64_t rank_, size_;
  const double timeout_;
  int file_ = -1;
  char* data_ = nullptr;
  uint64_t round_ = 0;
  Clock::duration looking_ = kMostLooking;  // before it sleeps
  const char* rows_ = nullptr;  // of the swap that has begun
  std::vector<int64_t> sent_;
};

}  // namespace dynamoe_cpu
