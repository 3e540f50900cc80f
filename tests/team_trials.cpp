// Work for the team of threads that tests can look into, and what it reads of the system.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

#include "ops/parallel.h"
#include "team/counters.h"
#include "team/cpus.h"

using namespace dynamoe_cpu;

namespace {

int64_t value_of(int64_t task) {
  int64_t value = task;
  for (int i = 0; i < 2000; ++i) value = value * 6364136223846793005 + 1442695040888963407;
  return value;
}

}  // namespace

extern "C" {

// Adds each task's value to its place of `out`. Task `bad` throws instead; from `inner` > 0, each task shares its work out
// once more. Returns whether the caller was told.
int trial_tasks(int threads, int64_t tasks, int64_t* out, int64_t bad, int64_t inner) {
  try {
    for_each_task(threads, tasks, [&](int64_t task) {
      if (task == bad) throw std::runtime_error("task " + std::to_string(task));
      if (!inner) out[task] += value_of(task);
      std::atomic<int64_t> sum{0};
      for_each_task(threads, inner, [&](int64_t part) { sum += value_of(part); });
      out[task] += sum;
    });
  } catch (const std::runtime_error& error) {
    return error.what() == "task " + std::to_string(bad);
  }
  return 0;
}

// The same in chunks that get smaller.
void trial_chunks(int threads, int64_t parts, int64_t size, int64_t* out) {
  WorkChunks work(parts, size, threads);
  on_all_threads(work.threads(), [&] {
    int64_t first, last;
    while (work.take(first, last))
      for (; first < last; ++first) out[first] += value_of(first);
  });
}

// How many of the tasks see that the caller flushes denormal numbers to zero.
int64_t trial_flushed(int threads, int64_t tasks) {
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);
  std::atomic<int64_t> flushed{0};
  for_each_task(threads, tasks, [&](int64_t) {
    value_of(0);
    volatile float smallest = 1e-40f;
    flushed += smallest * 1.0f == 0.0f;
  });
  __builtin_ia32_ldmxcsr(before);
  return flushed;
#else
  return tasks;
#endif
}

// What a forked process computes with threads of its own: 0 if that is right.
int trial_fork(int threads, int64_t tasks, const int64_t* expected) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::string memory(tasks * sizeof(int64_t), '\0');
    auto* out = reinterpret_cast<int64_t*>(memory.data());
    trial_tasks(threads, tasks, out, -1, 0);
    const auto counters = team_counters();
    const bool own = counters[static_cast<int>(TeamCounter::helpers)] == threads - 1;
    _exit(own && !std::memcmp(out, expected, memory.size()) ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  return status;
}

void trial_counters(int64_t* out) {
  for (const int64_t value : team_counters()) *out++ = value;
}

double trial_quota(const char* root) { return cpu_quota(root); }
int trial_usable() { return usable_cpus(); }

// One line per helper.
const char* trial_places(int helpers, int here, int allowed, const char* root) {
  static std::string text;
  std::vector<int> cpus;
  for (int cpu = 0; cpu < allowed; ++cpu) cpus.push_back(cpu);
  std::ostringstream lines;
  for (const auto& place : helper_places(helpers, here, cpus, root)) {
    for (const int cpu : place) lines << cpu << ' ';
    lines << '\n';
  }
  return (text = lines.str()).c_str();
}

}  // extern "C"
