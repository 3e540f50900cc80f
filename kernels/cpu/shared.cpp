// Rounds: a process writes its addends into its place, says so with its counter, waits for the counters of the others, and
// adds up. Places alternate: whoever posts round n + 1 has read round n, so that round n + 2 may overwrite it.
#include "shared.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynamoe_cpu {

namespace {

constexpr int64_t kCounterBytes = 128;  // two cache lines: processors fetch them in pairs
constexpr int64_t kPlaceBytes = 512 * 1024;
constexpr int64_t kStretch = 1024;  // elements that are added up at once

void rest() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int64_t places_offset(int64_t size) { return ceil_div(size * kCounterBytes, 4096) * 4096; }

// The byte of the file that a process holds a lock on as long as it lives, whatever ends it.
struct flock lock_of(int64_t rank, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

}  // namespace

int64_t SharedMemory::file_bytes(int64_t size) { return places_offset(size) + 2 * size * kPlaceBytes; }

SharedMemory::SharedMemory(const std::string& path, int64_t rank, int64_t size, double timeout)
    : rank_(rank), size_(size), timeout_(timeout) {
  file_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file_ < 0) fail("shared memory " + path + " cannot be opened");
  struct flock lock = lock_of(rank, F_WRLCK);
  void* data = MAP_FAILED;
  if (fcntl(file_, F_OFD_SETLK, &lock) == 0)
    data = mmap(nullptr, file_bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    close(file_);
    errno = error;
    fail("shared memory " + path + " cannot be used");
  }
  data_ = static_cast<char*>(data);
}

SharedMemory::~SharedMemory() {
  munmap(data_, file_bytes(size_));
  close(file_);
}

char* SharedMemory::place(uint64_t round, int64_t rank) const {
  return data_ + places_offset(size_) + (static_cast<int64_t>(round % 2) * size_ + rank) * kPlaceBytes;
}

std::atomic<uint64_t>& SharedMemory::posted(int64_t rank) const {
  static_assert(std::atomic<uint64_t>::is_always_lock_free);
  return *reinterpret_cast<std::atomic<uint64_t>*>(data_ + rank * kCounterBytes);
}

bool SharedMemory::is_alive(int64_t rank) const {
  struct flock lock = lock_of(rank, F_WRLCK);
  return fcntl(file_, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

// Spins while the others are about to come, then lets other threads run, then sleeps and looks after the one it waits for.
void SharedMemory::wait_for(int64_t rank, uint64_t round) const {
  using Clock = std::chrono::steady_clock;
  const std::atomic<uint64_t>& counter = posted(rank);
  const auto arrived = [&] { return counter.load(std::memory_order_acquire) >= round; };
  for (int spin = 0; spin < 4096; ++spin) {
    if (arrived()) return;
    rest();
  }
  const auto begin = Clock::now();
  const auto waited = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  while (waited() < 2e-3) {
    if (arrived()) return;
    sched_yield();
  }
  while (!arrived()) {
    if (!is_alive(rank) && !arrived()) throw std::runtime_error("process " + std::to_string(rank) + " of the group has died");
    if (waited() > timeout_)
      throw std::runtime_error("process " + std::to_string(rank) + " of the group does not answer within " +
                               std::to_string(static_cast<int64_t>(timeout_ + 0.5)) + " s");
    const struct timespec pause {0, 100000};
    nanosleep(&pause, nullptr);
  }
}

void SharedMemory::sum(const Kernels& kernels, const void* in, void* out, int64_t count, Dtype dtype) {
  const int64_t bytes = element_bytes(dtype), most = kPlaceBytes / bytes;
  for (int64_t first = 0; first < count; first += most) {
    const int64_t part = std::min(most, count - first);
    ++round_;
    std::memcpy(place(round_, rank_), static_cast<const char*>(in) + first * bytes, part * bytes);
    posted(rank_).store(round_, std::memory_order_release);
    for (int64_t rank = 0; rank < size_; ++rank)
      if (rank != rank_) wait_for(rank, round_);
    for (int64_t begin = 0; begin < part; begin += kStretch) {
      alignas(64) float total[kStretch];
      const int n = static_cast<int>(std::min(kStretch, part - begin));
      const char* own = place(round_, 0) + begin * bytes;
      if (dtype == Dtype::bf16) kernels.widen(reinterpret_cast<const uint16_t*>(own), total, n);
      else std::memcpy(total, own, n * sizeof(float));
      for (int64_t rank = 1; rank < size_; ++rank) kernels.add(place(round_, rank) + begin * bytes, dtype, 1.0f, total, n);
      kernels.convert(total, static_cast<char*>(out) + (first + begin) * bytes, n, dtype);
    }
  }
}

}  // namespace dynamoe_cpu
