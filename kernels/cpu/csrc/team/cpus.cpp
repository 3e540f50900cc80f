#include "team/cpus.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#if defined(__linux__)
#include <sched.h>
#endif

// Of torch's OpenMP library, if it has one.
extern "C" {
__attribute__((weak)) int omp_get_num_places();
__attribute__((weak)) int omp_get_place_num_procs(int place);
__attribute__((weak)) void omp_get_place_proc_ids(int place, int* ids);
}

namespace dynamoe_cpu {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "0-3,8" as numbers.
std::vector<int> numbers(const std::string& list) {
  std::vector<int> found;
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    int first, last;
    char dash;
    std::istringstream range(part);
    if (!(range >> first)) continue;
    if (!(range >> dash >> last)) last = first;
    for (int cpu = first; cpu <= last; ++cpu) found.push_back(cpu);
  }
  return found;
}

// Of one group; 0 is no limit.
double limit_of(const std::string& folder, bool unified) {
  double quota = 0, period = 0;
  if (unified) {
    std::istringstream(first_line(folder + "/cpu.max")) >> quota >> period;  // "max" is no number
  } else {
    std::istringstream(first_line(folder + "/cpu.cfs_quota_us")) >> quota;  // -1 is no limit
    std::istringstream(first_line(folder + "/cpu.cfs_period_us")) >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

bool holds(const std::string& list, const std::string& word) {
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');)
    if (part == word) return true;
  return false;
}

}  // namespace

std::vector<int> allowed_cpus() {
  std::vector<int> found;
  for (int place = 0, places = omp_get_num_places ? omp_get_num_places() : 0; place < places; ++place) {
    std::vector<int> ids(omp_get_place_num_procs(place));
    omp_get_place_proc_ids(place, ids.data());
    found.insert(found.end(), ids.begin(), ids.end());
  }
#if defined(__linux__)
  for (int most = 1024; found.empty() && most <= 1 << 20; most *= 2) {  // the kernel refuses sets that are too small
    cpu_set_t* set = CPU_ALLOC(most);
    if (!set) break;
    if (sched_getaffinity(0, CPU_ALLOC_SIZE(most), set) == 0)
      for (int cpu = 0; cpu < most; ++cpu)
        if (CPU_ISSET_S(cpu, CPU_ALLOC_SIZE(most), set)) found.push_back(cpu);
    CPU_FREE(set);
  }
#endif
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

double cpu_quota(const std::string& root) {
  double least = 0;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !holds(controllers, "cpu")) continue;
    const std::string top = root + "/sys/fs/cgroup" + (controllers.empty() ? "" : "/cpu");  // a link where "cpu,cpuacct" is
    // A container may see its own group as the top, under a path from outside that does not exist.
    for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {
      if (const double limit = limit_of(top + path, controllers.empty()); limit > 0)
        least = least > 0 ? std::min(least, limit) : limit;
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return least;
}

int usable_cpus() {
  const std::vector<int> allowed = allowed_cpus();
  int count = allowed.empty() ? 1 << 20 : static_cast<int>(allowed.size());
  if (const double quota = cpu_quota(); quota > 0) count = std::min(count, static_cast<int>(std::ceil(quota)));
  return std::max(count, 1);
}

std::vector<std::vector<int>> helper_places(int helpers, int here, const std::vector<int>& allowed,
                                            const std::string& root) {
  const std::string system = root + "/sys/devices/system/";
  struct Node {
    std::vector<int> cpus;
    int cores;
  };
  std::vector<Node> nodes;
  for (const int number : numbers(first_line(system + "node/has_cpu"))) {
    Node node{numbers(first_line(system + "node/node" + std::to_string(number) + "/cpulist")), 0};
    for (const int cpu : node.cpus) {  // the first thread of each core stands for it
      const auto threads = numbers(first_line(system + "cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list"));
      node.cores += threads.empty() || threads.front() == cpu;
    }
    if (!node.cores) continue;
    const bool own = std::find(node.cpus.begin(), node.cpus.end(), here) != node.cpus.end();
    nodes.insert(own ? nodes.begin() : nodes.end(), std::move(node));
  }
  if (nodes.size() < 2 || allowed != numbers(first_line(system + "cpu/online")) || cpu_quota(root) > 0) return {};
  std::vector<std::vector<int>> places;
  while (static_cast<int>(places.size()) <= helpers)  // the caller's is the first
    for (const Node& node : nodes) places.insert(places.end(), node.cores, node.cpus);
  places.erase(places.begin());
  places.resize(helpers);
  return places;
}

}  // namespace dynamoe_cpu
