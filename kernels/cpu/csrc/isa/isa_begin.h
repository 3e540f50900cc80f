// What every instruction set's file needs before it opens its namespace.
#pragma once

#include <cmath>
#include <limits>

#include "quant/scales.h"

#define SIMD_FN TARGET static inline __attribute__((always_inline))

// The table that an instruction set's file ends with; the kernels come from the headers it included.
#define KERNEL_TABLE(variable, name, bf16_panel_cell_bytes, run_bf16, quant_table, score_keys)    \
  extern const Kernels variable = {                                                              \
      name,                                                                                      \
      {{kTileRows, 1, 4, pack_fp32, run_float<1>}, {kTileRows, 2, bf16_panel_cell_bytes, pack_bf16, run_bf16}}, \
      quant_table,                                                                               \
      transpose_cells,                                                                           \
      store,                                                                                     \
      gated_rows,                                                                                \
      gated,                                                                                     \
      scaled_add,                                                                                \
      score_keys,                                                                                \
      weigh_values,                                                                              \
      dots,                                                                                      \
      add,                                                                                       \
      convert,                                                                                   \
      widen,                                                                                     \
      encode_head,                                                                               \
      decode_head,                                                                               \
      rms_norm,                                                                                  \
      rope,                                                                                      \
      softmax_step,                                                                              \
      softmax_merge,                                                                             \
  }
