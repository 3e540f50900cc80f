// The process's threads: made once, woken for every piece of parallel work, asleep where there is none.
//
// A thread that calls shares its work out to helpers. It never waits for one that has not begun: whoever is free claims
// the next chunk, and a helper that another program keeps from its core takes none. So how many threads there are decides
// how work is cut (callers see to that), never who computes it, and results do not depend on it.
#pragma once

namespace dynamoe_cpu {

// body(data) on this thread and at once on up to `threads` - 1 helpers, fewer where the process has fewer CPUs or others
// use them, or another thread's work occupies the team; returns when all that have begun it are done. Any one of them
// alone must be able to do the whole work. Throws what one of them has thrown; the others finish first.
void run_on_team(int threads, void (*body)(const void*), const void* data);

}  // namespace dynamoe_cpu
