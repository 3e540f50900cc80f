// What the team has done, and how tests change what it does.
#pragma once

#include <array>
#include <cstdint>

namespace dynamoe_cpu {

// Of this process since it began, in the order of team.py's fields.
enum class TeamCounter {
  shared,     // pieces of work that helpers were called to
  alone,      // that one thread did, though more were asked for
  entered,    // helpers that took part in one
  sleeps,     // of helpers
  wakes,      // helpers that were woken
  waits,      // of callers for helpers, longer than a few looks
  naps,       // of them, in which the caller slept
  waited_ns,  // in `waits`
  drops,      // how often helpers were found to cost more than they brought
  helpers,    // that exist
  count
};
std::array<int64_t, static_cast<int>(TeamCounter::count)> team_counters();

}  // namespace dynamoe_cpu

// For tests: call exactly so many helpers, whatever the CPUs (-1: as many as pay), each of which sleeps for up to so many
// microseconds before and after its part, another time in every piece of work.
extern "C" void dynamoe_set_team_trial(int helpers, int delay_us);
