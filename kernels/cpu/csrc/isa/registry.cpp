#include "isa/registry.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dynamoe_cpu {

namespace {

// Made at the first use: files register in any order before anything else runs.
std::vector<const Isa*>& registered() {
  static std::vector<const Isa*> all;
  return all;
}

}  // namespace

Isa::Isa(const char* name, int rank, Fit (*fit)(), const Kernels& kernels)
    : name(name), rank(rank), fit(fit), usable(fit() != Fit::none), kernels(kernels) {
  auto& all = registered();
  for (const Isa* other : all)
    if (!std::strcmp(name, other->name)) throw std::logic_error(std::string("two instruction sets are called ") + name);
  const auto [one, two] = kernels.quant.tile_rows;
  for (int rows : {kernels.gemm[0].tile_rows, kernels.gemm[1].tile_rows, one, two})
    if (rows < 1 || rows > kMostTileRows)
      throw std::logic_error(std::string("tiles of ") + name + " have " + std::to_string(rows) + " rows");
  all.insert(std::find_if(all.begin(), all.end(), [&](const Isa* other) { return other->rank < rank; }), this);
}

const std::vector<const Isa*>& isas() { return registered(); }

int64_t find_isa(const char* name) {
  const bool any = !std::strcmp(name, "auto");
  const auto& all = isas();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Isa* isa) {
    return any ? isa->fit() == Fit::automatic : !std::strcmp(name, isa->name) && isa->usable;
  });
  return found == all.end() ? -1 : found - all.begin();
}

}  // namespace dynamoe_cpu
