// What every instruction set's file needs before it opens its namespace.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "isa/registry.h"
#include "isa/x86.h"
#include "quant/scales.h"

#define SIMD_FN TARGET static inline __attribute__((always_inline))
