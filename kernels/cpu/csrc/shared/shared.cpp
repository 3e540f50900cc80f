// In a round a process may write into its place and post that; others wait for the post, and read. Everybody says when it
// has read. Places alternate, so that a round begins as soon as the one before the last has been read by all.
#include "shared/shared.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace dynamoe_cpu {

// What a process tells the others, on two cache lines: processors fetch them in pairs.
struct alignas(128) SharedMemory::Counters {
  std::atomic<uint64_t> posted, read;  // the last rounds
  std::atomic<uint32_t> bell;          // changes with every post
  std::atomic<uint32_t> sleepers;      // processes that wait for it
};

namespace {

constexpr int64_t kPlaceBytes = 512 * 1024;
constexpr int64_t kStretch = 1024;  // elements that are added up at once

void nap() {
  const struct timespec pause {0, 100000};
  nanosleep(&pause, nullptr);
}

#if defined(__linux__)
// The byte of the file that a process holds a lock on as long as it lives, whatever ends it.
struct flock lock_of(int64_t rank) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}
bool take_lock(int file, int64_t rank) {
  struct flock lock = lock_of(rank);
  return fcntl(file, F_OFD_SETLK, &lock) == 0;
}
bool is_locked(int file, int64_t rank) {
  struct flock lock = lock_of(rank);
  return fcntl(file, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}
#else
bool take_lock(int, int64_t) { return true; }
bool is_locked(int, int64_t) { return true; }
#endif

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

int64_t places_offset(int64_t size) { return ceil_div(size * 128, 4096) * 4096; }

}  // namespace

int64_t SharedMemory::file_bytes(int64_t size) { return places_offset(size) + 2 * size * kPlaceBytes; }

SharedMemory::SharedMemory(const std::string& path, int64_t rank, int64_t size, double timeout)
    : rank_(rank), size_(size), timeout_(timeout) {
  file_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file_ < 0) fail("shared memory " + path + " cannot be opened");
  void* data = MAP_FAILED;
  // Reading behind the end of a file ends the process.
  if (lseek(file_, 0, SEEK_END) < file_bytes(size)) errno = EINVAL;
  else if (take_lock(file_, rank))
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

SharedMemory::Counters& SharedMemory::counters(int64_t rank) const {
  static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Counters) == 128);
  return reinterpret_cast<Counters*>(data_)[rank];
}

char* SharedMemory::place(int64_t rank) const {
  return data_ + places_offset(size_) + (static_cast<int64_t>(round_ % 2) * size_ + rank) * kPlaceBytes;
}

// Looks for a while, which is the shorter the more often the other does not come in it, as where processes share cores;
// then sleeps and looks after it. `rings`: whether its bell announces what is waited for.
template <class Arrived>
void SharedMemory::wait(int64_t rank, double timeout, bool rings, const Arrived& arrived) {
  constexpr double kStopped = 1.0;  // seconds: no sleep lasts as long, so that all processes may have been stopped
  const Looked looked = look_for(arrived, looking_);
  double waited = std::chrono::duration<double>(looked.took).count();
  for (auto before = Clock::now(); !arrived();) {
    if (rank != rank_ && !is_locked(file_, rank) && !arrived()) throw std::runtime_error("rank " + std::to_string(rank) + " of the group has died");
    if (waited > timeout)
      throw std::runtime_error("rank " + std::to_string(rank) + " of the group has not answered for " +
                               std::to_string(static_cast<int64_t>(waited)) + " s");
    if (rings) {
      Counters& other = counters(rank);
      const uint32_t value = other.bell.load();
      ++other.sleepers;
      if (!arrived()) sleep_on(other.bell, value, Among::processes);
      --other.sleepers;
    } else {
      nap();
    }
    const auto now = Clock::now();
    const double slept = std::chrono::duration<double>(now - before).count();
    waited += slept < kStopped ? slept : 0;
    before = now;
  }
  const bool soon = waited < std::chrono::duration<double>(kMostLooking).count();
  looking_ = soon ? std::min<Clock::duration>(looking_ + kMostLooking / 16, kMostLooking) : looking_ / 2;
}

void SharedMemory::begin_round(double timeout) {
  ++round_;
  for (int64_t rank = 0; round_ > 2 && rank < size_; ++rank)
    wait(rank, timeout, false, [&] { return counters(rank).read.load(std::memory_order_acquire) + 2 >= round_; });
}

void SharedMemory::post() {
  Counters& own = counters(rank_);
  own.posted.store(round_, std::memory_order_release);
  own.bell.store(static_cast<uint32_t>(round_));  // in one order with `sleepers`: either sees the other
  if (own.sleepers.load()) wake(own.bell, INT32_MAX, Among::processes);
}

void SharedMemory::wait_for_post(int64_t rank, double timeout) {
  const Counters& other = counters(rank);
  wait(rank, timeout, true, [&] { return other.posted.load(std::memory_order_acquire) >= round_; });
}

void SharedMemory::end_round() { counters(rank_).read.store(round_, std::memory_order_release); }

void SharedMemory::sum(const Kernels& kernels, const void* in, void* out, int64_t count, Dtype dtype) {
  const int64_t bytes = element_bytes(dtype), most = kPlaceBytes / bytes;
  for (int64_t first = 0; first < count; first += most) {
    const int64_t part = std::min(most, count - first);
    begin_round(timeout_);
    std::memcpy(place(rank_), static_cast<const char*>(in) + first * bytes, part * bytes);
    post();
    for (int64_t rank = 0; rank < size_; ++rank)
      if (rank != rank_) wait_for_post(rank, timeout_);
    for (int64_t begin = 0; begin < part; begin += kStretch) {
      alignas(64) float total[kStretch];
      const int n = static_cast<int>(std::min(kStretch, part - begin));
      const char* own = place(0) + begin * bytes;
      if (dtype == Dtype::bf16) kernels.widen(reinterpret_cast<const uint16_t*>(own), total, n);
      else std::memcpy(total, own, n * sizeof(float));
      for (int64_t rank = 1; rank < size_; ++rank) kernels.add(place(rank) + begin * bytes, dtype, 1.0f, total, n);
      kernels.convert(total, static_cast<char*>(out) + (first + begin) * bytes, n, dtype);
    }
    end_round();
  }
}

void SharedMemory::broadcast(int64_t root, void* data, int64_t bytes, double timeout) {
  for (int64_t first = 0; first < bytes; first += kPlaceBytes) {
    char* part = static_cast<char*>(data) + first;
    const int64_t n = std::min(kPlaceBytes, bytes - first);
    if (rank_ == root) {
      begin_round(timeout_);
      std::memcpy(place(root), part, n);
      post();
    } else {
      begin_round(timeout);
      wait_for_post(root, timeout);
      std::memcpy(part, place(root), n);
    }
    end_round();
  }
}

void SharedMemory::gather(int64_t root, const void* in, void* out, int64_t bytes) {
  for (int64_t first = 0; first < bytes; first += kPlaceBytes) {
    const int64_t n = std::min(kPlaceBytes, bytes - first);
    begin_round(timeout_);
    std::memcpy(place(rank_), static_cast<const char*>(in) + first, n);
    post();
    for (int64_t rank = 0; rank_ == root && rank < size_; ++rank) {
      wait_for_post(rank, timeout_);
      std::memcpy(static_cast<char*>(out) + rank * bytes + first, place(rank), n);
    }
    end_round();
  }
}

namespace {

// A place holds the sizes of all parts, then room for as much of each.
int64_t room(int64_t size) { return (kPlaceBytes - 8 * size) / size / 64 * 64; }

}  // namespace

void SharedMemory::write_parts(int64_t offset) {
  char* to = place(rank_);
  std::memcpy(to, sent_.data(), 8 * size_);
  to += 8 * size_;
  const char* from = rows_;
  for (int64_t rank = 0; rank < size_; from += sent_[rank], to += room(size_), ++rank)
    if (const int64_t left = sent_[rank] - offset; rank != rank_ && left > 0)
      std::memcpy(to, from + offset, std::min(left, room(size_)));
}

void SharedMemory::begin_swap(const char* rows, std::vector<int64_t> sent) {
  rows_ = rows;
  sent_ = std::move(sent);
  begin_round(timeout_);
  write_parts(0);
  post();
}

void SharedMemory::finish_swap(char* out, const std::vector<int64_t>& coming) {
  int64_t most = 0;  // of all parts of all ranks, which decides how many rounds there are
  for (int64_t offset = 0; offset == 0 || offset < most; offset += room(size_)) {
    if (offset) {
      begin_round(timeout_);
      write_parts(offset);
      post();
    }
    char* to = out;
    const char* own = rows_;
    for (int64_t rank = 0; rank < size_; to += coming[rank], own += sent_[rank], ++rank) {
      if (rank == rank_ && offset == 0) std::memcpy(to, own, coming[rank]);
      if (rank != rank_) wait_for_post(rank, timeout_);
      const char* from = place(rank);
      std::vector<int64_t> sizes(size_);
      std::memcpy(sizes.data(), from, 8 * size_);
      if (sizes[rank_] != coming[rank])
        throw std::logic_error("rank " + std::to_string(rank) + " sends " + std::to_string(sizes[rank_]) + " bytes, not " +
                               std::to_string(coming[rank]));
      for (int64_t other = 0; other < size_; ++other)
        if (other != rank) most = std::max(most, sizes[other]);
      if (const int64_t left = coming[rank] - offset; rank != rank_ && left > 0)
        std::memcpy(to + offset, from + 8 * size_ + rank_ * room(size_), std::min(left, room(size_)));
    }
    end_round();
  }
}

}  // namespace dynamoe_cpu
