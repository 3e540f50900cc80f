// The instruction sets that the kernels know. Each registers itself, from one file.
#pragma once

#include <vector>

#include "isa/kernels.h"

namespace dynamoe_cpu {

// How an instruction set suits this processor: not at all, if it is asked for by name, or as a choice of "auto".
enum class Fit { none, by_name, automatic };

// One of them, registered for good when it is made: a constant at the end of the file that defines its kernels.
struct Isa {
  // The higher `rank`, the better; `fit` asks this processor. Throws std::logic_error where the name is taken or a tile
  // has too many rows.
  Isa(const char* name, int rank, Fit (*fit)(), const Kernels& kernels);
  Isa(const Isa&) = delete;
  Isa& operator=(const Isa&) = delete;

  const char* const name;
  const int rank;
  Fit (*const fit)();
  const bool usable;  // on this processor
  const Kernels kernels;
};

// All of them, the best first, whether or not this processor has them.
const std::vector<const Isa*>& isas();

// The place in `isas()` of a named one, or for "auto" of the best; -1 if this processor has none of that name.
int64_t find_isa(const char* name);

}  // namespace dynamoe_cpu
