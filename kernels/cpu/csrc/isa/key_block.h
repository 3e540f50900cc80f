// Where the keys and values of 64 positions lie in a paged cache.
#pragma once

#include <algorithm>

#include "ops/operators.h"

namespace dynamoe_cpu {

// Rows of one head: 64 keys, then 64 values. Only positions begin … end - 1 may be seen by any row of the task; for the
// others, whose pages may be gone or not yet written, the nearest of these stands in, so that all may be read.
struct KeyRows {
  const void* rows[2 * kKeyBlock];
  int begin, end;
  const void* const* keys() const { return rows; }
  const void* const* values() const { return rows + kKeyBlock; }
};

struct KeyBlock {
  int begin = 0, end = 0;
  const char* keys[kKeyBlock];  // of head 0
  const char* values[kKeyBlock];

  bool empty() const { return begin >= end; }

  // The block from position `start` on, of which the task sees positions low … high - 1.
  void locate(const AttentionCall& call, int64_t sequence, int64_t start, int64_t low, int64_t high) {
    begin = static_cast<int>(std::clamp<int64_t>(low - start, 0, kKeyBlock));
    end = static_cast<int>(std::clamp<int64_t>(high - start, 0, kKeyBlock));
    if (empty()) return;
    const int32_t* table = call.block_table + sequence * call.block_table_stride;
    const int64_t key_step = call.keys.token_stride * element_bytes(call.keys.dtype);
    const int64_t value_step = call.values.token_stride * element_bytes(call.values.dtype);
    int64_t page = (start + begin) / call.page_size, offset = (start + begin) % call.page_size;
    for (int i = begin; i < end; ++page, offset = 0) {
      const char* key = static_cast<const char*>(call.keys.at(table[page], 0, offset));
      const char* value = static_cast<const char*>(call.values.at(table[page], 0, offset));
      const int stop = static_cast<int>(std::min<int64_t>(end, i + call.page_size - offset));
      for (; i < stop; ++i, key += key_step, value += value_step) {
        keys[i] = key;
        values[i] = value;
      }
    }
    for (int i = 0; i < begin; ++i) {
      keys[i] = keys[begin];
      values[i] = values[begin];
    }
    for (int i = end; i < kKeyBlock; ++i) {
      keys[i] = keys[end - 1];
      values[i] = values[end - 1];
    }
  }

  void rows_of(const AttentionCall& call, int64_t head, KeyRows& out) const {
    const int64_t key_bytes = head * call.keys.head_stride * element_bytes(call.keys.dtype);
    const int64_t value_bytes = head * call.values.head_stride * element_bytes(call.values.dtype);
    for (int i = 0; i < kKeyBlock; ++i) {
      out.rows[i] = keys[i] + key_bytes;
      out.rows[kKeyBlock + i] = values[i] + value_bytes;
    }
    out.begin = begin;
    out.end = end;
  }
};

}  // namespace dynamoe_cpu
