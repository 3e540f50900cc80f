// How threads and processes wait for each other: they look often while what they wait for is about to come, and sleep
// where it is not, or where somebody else has use of the core.
#pragma once

#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dynamoe_cpu {

using Clock = std::chrono::steady_clock;

// Between two looks at memory that somebody else writes.
inline void rest() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Whether only threads of this process wait at an address, or other processes too.
enum class Among { threads, processes };

// Sleeps while `word` is `value`; it may wake for no reason. Where other processes should wake it, which may die, it
// sleeps for at most a tenth of a second.
inline void sleep_on(std::atomic<uint32_t>& word, uint32_t value, Among among) {
#if defined(__linux__)
  const struct timespec most {0, 100000000};
  if (among == Among::threads) syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
  else syscall(SYS_futex, &word, FUTEX_WAIT, value, &most, nullptr, 0);
#else
  const struct timespec nap {0, 100000};
  if (word.load() == value) nanosleep(&nap, nullptr);
#endif
}

// Wakes up to `count` of those that sleep on `word`.
inline void wake(std::atomic<uint32_t>& word, int count, Among among) {
#if defined(__linux__)
  syscall(SYS_futex, &word, among == Among::threads ? FUTEX_WAKE_PRIVATE : FUTEX_WAKE, count, nullptr, nullptr, 0);
#endif
}

// How a while of looking ended: whether what was waited for came, how long that took (0: at once), and how much of it the
// core was another's.
struct Looked {
  bool arrived;
  Clock::duration took{}, gone{};
};

constexpr std::chrono::microseconds kMostLooking{200};  // waking a thread takes about a quarter of this

// Looks until `arrived()`, for `bound` at most, and not after another had the core: it may be there again.
template <class Arrived>
Looked look_for(const Arrived& arrived, Clock::duration bound) {
  constexpr int kLooks = 32;                      // without looking at the clock
  constexpr std::chrono::microseconds kGone{50};  // between two looks at the clock
  const auto begin = Clock::now();
  for (auto before = begin;;) {
    for (int look = 0; look < kLooks; ++look) {
      if (arrived()) return {true, before - begin};
      rest();
    }
    const auto now = Clock::now();
    const bool gone = now - before > kGone;
    if (gone || now - begin > bound) return {false, now - begin, gone ? now - before : Clock::duration{}};
    before = now;
  }
}

}  // namespace dynamoe_cpu
