#include "team/team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <utility>
#include <vector>

#include "team/counters.h"
#include "team/cpus.h"
#include "team/waiting.h"

namespace dynamoe_cpu {
namespace {

using std::chrono::milliseconds;

constexpr int kMostHelpers = 4095;
constexpr std::chrono::microseconds kCrowding{250};  // as lost as this is time in which a helper has the caller's core

std::atomic<int> trial_helpers{-1}, trial_delay_us{0};

// How many helpers pay. One that shares its core stops in the midst of a chunk, and the caller waits until it has its
// turn again; or it has the caller's own core. Where that takes more than the helper brings, it is not called for a while,
// which grows with every time that this is found again.
class Pace {
 public:
  // Of `wanted` helpers, those to call.
  int helpers(int wanted, Clock::time_point now) {
    if (now >= look_) {
      look_ = now + milliseconds(1000);
      cpus_ = usable_cpus() - 1;
    }
    wanted = std::min(wanted, cpus_);
    if (calls_ < wanted && now >= retry_) {
      calls_ = 2 * calls_ + 1;
      raised_ = window_ = now;
      retry_ = now + pause_;
      lost_ = Clock::duration::zero();
    }
    return std::min(wanted, calls_);
  }

  // Time was lost for `late` of the `called` helpers. Whether it is too much: of n + 1 threads, one brings a share of
  // 1 / (n + 1), and less than half of it where they wait for memory.
  bool loses(Clock::time_point now, Clock::duration lost, int called, int late) {
    lost_ += lost;
    const Clock::duration window = std::max<Clock::duration>(now - window_, kWindow);
    const bool loses = lost_ * (5 * (called + 1)) > window * 2;
    if (loses) {
      calls_ = std::max(called - late, 0);
      pause_ = now - raised_ < kProof ? std::min<Clock::duration>(pause_ * 2, kLongest) : kShortest;
      retry_ = now + pause_;
    }
    if (loses || window > kWindow) {
      window_ = now;
      lost_ = Clock::duration::zero();
    }
    return loses;
  }

 private:
  static constexpr milliseconds kWindow{20}, kProof{200}, kShortest{8}, kLongest{1000};

  int calls_ = kMostHelpers, cpus_ = 0;
  Clock::time_point look_, retry_, raised_, window_;
  Clock::duration pause_ = kShortest, lost_{};
};

// Bits of a piece of work that one thread computes must be those of another: rounding and denormals as the caller has set
// them.
#if defined(__x86_64__)
using FloatMode = unsigned;
FloatMode float_mode() { return _mm_getcsr() & ~0x3fu; }  // without the flags of what has happened
void set_float_mode(FloatMode mode) {
  if (float_mode() != mode) _mm_setcsr(mode);
}
#else
struct FloatMode {};
FloatMode float_mode() { return {}; }
void set_float_mode(FloatMode) {}
#endif

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

class Team {
 public:
  // False where another thread's work occupies the team, or no helper pays.
  bool run(int threads, void (*body)(const void*), const void* data) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    struct Free {
      std::atomic<bool>& busy;
      ~Free() { busy.store(false, std::memory_order_release); }
    } free{busy_};
    const auto begin = Clock::now();
    const int trial = trial_helpers.load(std::memory_order_relaxed);
    const int wanted = std::min(trial >= 0 ? trial : pace_.helpers(threads - 1, begin), kMostHelpers);
    const int called = made(wanted);
    if (!called) return false;
    body_ = body;
    data_ = data;
    mode_ = float_mode();
    cpu_.store(current_cpu(), std::memory_order_relaxed);
    wanted_.store(called, std::memory_order_relaxed);
    open();
    call(called);
    std::exception_ptr own;
    try {
      body(data);
    } catch (...) {
      own = std::current_exception();
    }
    close(begin, called);
    if (const std::exception_ptr other = std::exchange(error_, nullptr)) {
      failed_.clear();
      if (!own) own = other;
    }
    if (own) std::rethrow_exception(own);
    return true;
  }

  void count(TeamCounter counter, int64_t more = 1) {
    counters_[static_cast<int>(counter)].fetch_add(more, std::memory_order_relaxed);
  }
  auto counters() const {
    std::array<int64_t, static_cast<int>(TeamCounter::count)> values;
    for (size_t i = 0; i < values.size(); ++i) values[i] = counters_[i].load(std::memory_order_relaxed);
    return values;
  }

 private:
  // The state in one number, on one cache line with what is to be done: [round:32][entered:16][inside:16]. A helper is
  // inside from its entry on, though it finds the round closed or full and leaves at once. An odd round is open.
  static constexpr uint64_t kInside = 1, kEntered = 1 << 16, kRound = uint64_t{1} << 32;
  static uint32_t round_of(uint64_t state) { return static_cast<uint32_t>(state >> 32); }
  static int entered_of(uint64_t state) { return state >> 16 & 0xffff; }
  static int inside_of(uint64_t state) { return state & 0xffff; }

  void open() {
    uint64_t state = state_.load(std::memory_order_relaxed);
    while (!state_.compare_exchange_weak(state, (uint64_t{round_of(state) + 1} << 32) | inside_of(state))) {
    }
  }

  // Wakes as many helpers as are missing from those that are awake.
  void call(int called) {
    uint32_t asleep = sleepers_.load();
    while (asleep) {
      const int missing = called - (helpers_ - static_cast<int>(asleep));
      if (missing <= 0) return;
      const uint32_t more = std::min<uint32_t>(missing, asleep);
      if (!sleepers_.compare_exchange_weak(asleep, asleep - more)) continue;
      tickets_.fetch_add(more);
      wake(tickets_, static_cast<int>(more), Among::threads);
      count(TeamCounter::wakes, more);
      return;
    }
  }

  // Nobody enters any more; waits for those inside.
  void close(Clock::time_point begin, int called) {
    const uint64_t state = state_.fetch_add(kRound, std::memory_order_acq_rel);
    count(TeamCounter::shared);
    count(TeamCounter::entered, std::min(entered_of(state), called));
    int late = inside_of(state);
    Clock::duration lost{};
    if (late) {
      const auto inside = [&] { return inside_of(state_.load()); };
      const Looked looked = look_for([&] { return !inside(); }, kMostLooking);
      Clock::duration waited = looked.took;
      if (!looked.arrived) {
        late = std::max(inside(), 1);
        const auto end = Clock::now() - waited;
        for (napping_.store(1); inside(); napping_.store(1)) {
          count(TeamCounter::naps);
          sleep_on(napping_, 1, Among::threads);
        }
        napping_.store(0);
        waited = Clock::now() - end;
      }
      if (waited.count()) {
        count(TeamCounter::waits);
        count(TeamCounter::waited_ns, std::chrono::nanoseconds(waited).count());
        // Chunks are about as long as each other, so that a wait as long as the work may be the last chunk.
        lost = std::max(2 * waited - (Clock::now() - begin), Clock::duration{});
      }
    }
    if (missed_ns_.load(std::memory_order_relaxed)) {
      lost += std::chrono::nanoseconds(missed_ns_.exchange(0));
      late = std::max(late, 1);
    }
    if (lost.count() && pace_.loses(Clock::now(), lost, called, late)) count(TeamCounter::drops);
  }

  // Whether a round is open that a helper has not taken part in, and that takes more.
  bool is_offered(uint32_t served) const {
    const uint64_t state = state_.load();
    return round_of(state) % 2 && round_of(state) != served &&
           entered_of(state) < wanted_.load(std::memory_order_relaxed);
  }

  [[noreturn]] void help(int number) {
    for (uint32_t served = 0;;) {
      const uint32_t before = round_of(state_.load());
      const bool crowds = current_cpu() == cpu_.load(std::memory_order_relaxed);  // the caller, which cannot go on
      const Looked looked = look_for([&] { return is_offered(served); }, crowds ? Clock::duration{} : kMostLooking);
      if (crowds && before % 2) miss(kCrowding);
      if (!looked.arrived) {
        if (round_of(state_.load()) != before) miss(looked.gone);
        sleep(served);
        continue;
      }
      const uint64_t state = state_.fetch_add(kInside | kEntered);
      if (round_of(state) % 2 && entered_of(state) < wanted_.load(std::memory_order_relaxed)) {
        served = round_of(state);
        set_float_mode(mode_);
        delay(served, number);
        try {
          body_(data_);
        } catch (...) {
          if (!failed_.test_and_set()) error_ = std::current_exception();
        }
        delay(served + 1, number);
      }
      const uint64_t left = state_.fetch_sub(kInside);
      if (inside_of(left) == 1 && round_of(left) % 2 == 0 && napping_.load() && napping_.exchange(0))
        wake(napping_, 1, Among::threads);
    }
  }

  // The caller should know of time in which it had work for this thread, but the core was another's.
  void miss(Clock::duration time) {
    if (time.count()) missed_ns_.fetch_add(std::chrono::nanoseconds(time).count());
  }

  // Until a caller has use of a helper. Whoever is on the way to sleep is counted first, then looks once more; a caller
  // opens a round first, then looks whether somebody sleeps. A caller counts whom it wakes as awake, and gives a ticket
  // for each; whoever it has counted takes one.
  void sleep(uint32_t served) {
    sleepers_.fetch_add(1);
    if (is_offered(served)) {
      uint32_t asleep = sleepers_.load();
      while (asleep)
        if (sleepers_.compare_exchange_weak(asleep, asleep - 1)) return;
    }
    count(TeamCounter::sleeps);
    for (;;) {
      uint32_t tickets = tickets_.load();
      while (tickets)
        if (tickets_.compare_exchange_weak(tickets, tickets - 1)) return;
      sleep_on(tickets_, 0, Among::threads);
    }
  }

  static void delay(uint32_t round, int number) {
    if (const int most = trial_delay_us.load(std::memory_order_relaxed)) {
      const uint32_t mixed = (round * 2654435761u) ^ (number * 40503u);
      const struct timespec pause {0, static_cast<long>(mixed % (most + 1)) * 1000};
      nanosleep(&pause, nullptr);
    }
  }

  // Makes helpers until there are `wanted`; fewer where the system has no more threads for this process.
  int made(int wanted) {
    while (helpers_ < wanted) {
      if (places_.size() < static_cast<size_t>(wanted)) places_ = places(wanted);
      struct Start {
        Team* team;
        int number;
      };
      auto* start = new Start{this, helpers_};
      sigset_t others, before;  // signals are for the interpreter's threads, but for those of what a thread does itself
      sigfillset(&others);
      for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&others, own);
      pthread_sigmask(SIG_SETMASK, &others, &before);
      pthread_t thread;
      const int error = pthread_create(
          &thread, nullptr,
          [](void* argument) -> void* {
            const Start start = *static_cast<Start*>(argument);
            delete static_cast<Start*>(argument);
            start.team->help(start.number);
          },
          start);
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (error) {
        delete start;
        break;
      }
      place(thread, places_[helpers_]);
      pthread_detach(thread);
      ++helpers_;
      count(TeamCounter::helpers);
    }
    return std::min(wanted, helpers_);
  }

  static std::vector<std::vector<int>> places(int wanted) {
    const std::vector<int> allowed = allowed_cpus();
    std::vector<std::vector<int>> nodes = helper_places(wanted, current_cpu(), allowed);
    if (nodes.empty()) nodes.assign(wanted, allowed);  // where OpenMP has bound the caller, its helpers go elsewhere
    return nodes;
  }

  static void place(pthread_t thread, const std::vector<int>& cpus) {
#if defined(__linux__)
    if (cpus.empty()) return;
    cpu_set_t* set = CPU_ALLOC(cpus.back() + 1);
    if (!set) return;
    const size_t bytes = CPU_ALLOC_SIZE(cpus.back() + 1);
    CPU_ZERO_S(bytes, set);
    for (const int cpu : cpus) CPU_SET_S(cpu, bytes, set);
    pthread_setaffinity_np(thread, bytes, set);  // where that fails, the thread runs where the system puts it
    CPU_FREE(set);
    pthread_setname_np(thread, "dynamoe helper");
#endif
  }

  alignas(128) std::atomic<uint64_t> state_{0};
  void (*body_)(const void*) = nullptr;
  const void* data_ = nullptr;
  FloatMode mode_{};
  std::atomic<int> wanted_{0}, cpu_{-1};  // helpers; where the caller runs

  alignas(128) std::atomic<uint32_t> sleepers_{0};  // that no caller has counted as awake
  std::atomic<uint32_t> tickets_{0};
  std::atomic<uint32_t> napping_{0};  // whether the caller sleeps
  std::atomic_flag failed_;
  std::atomic<int64_t> missed_ns_{0};
  std::exception_ptr error_;  // of the helper that set `failed_`

  alignas(128) std::atomic<bool> busy_{false};  // whose setter alone touches what follows
  int helpers_ = 0;
  Pace pace_;
  std::vector<std::vector<int>> places_;
  std::array<std::atomic<int64_t>, static_cast<int>(TeamCounter::count)> counters_{};
};

std::atomic<Team*> current{nullptr};

// Never destroyed: its threads run until the process ends. A forked process has none of them, and makes its own.
Team& team() {
  Team* found = current.load(std::memory_order_acquire);
  if (!found) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    static_cast<void>(registered);
    auto* made = new Team;
    if (current.compare_exchange_strong(found, made)) found = made;
    else delete made;
  }
  return *found;
}

}  // namespace

void run_on_team(int threads, void (*body)(const void*), const void* data) {
  Team& all = team();
  if (all.run(threads, body, data)) return;
  all.count(TeamCounter::alone);
  body(data);
}

std::array<int64_t, static_cast<int>(TeamCounter::count)> team_counters() { return team().counters(); }

}  // namespace dynamoe_cpu

extern "C" void dynamoe_set_team_trial(int helpers, int delay_us) {
  dynamoe_cpu::trial_helpers.store(helpers);
  dynamoe_cpu::trial_delay_us.store(delay_us);
}
