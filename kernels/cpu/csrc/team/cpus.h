// Which processors this process may use.
#pragma once

#include <string>
#include <vector>

namespace dynamoe_cpu {

// Of the calling thread, rising; those of all of OpenMP's places where it has bound this thread to one. Empty where the
// system does not say.
std::vector<int> allowed_cpus();

// CPUs' worth of time that the process's control groups (version 2 or 1) and those around them allow; 0 is no limit.
// `root` stands in front of /proc and /sys.
double cpu_quota(const std::string& root = "");

// How many threads can run at once.
int usable_cpus();

// For every helper of a thread that runs on CPU `here`, the CPUs it should keep to: those of a memory node, the caller's
// first, then others, each node with as many threads as it has cores. Nothing where there is one node only, or where the
// process may not use every CPU that is online all the time: then the system places its threads.
std::vector<std::vector<int>> helper_places(int helpers, int here, const std::vector<int>& allowed,
                                            const std::string& root = "");

}  // namespace dynamoe_cpu
