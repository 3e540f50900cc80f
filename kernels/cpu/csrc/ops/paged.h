// Where rows live in a paged cache, from tensors. Whatever becomes an address is checked here, once per call: one
// comparison or two per row, sequence and page.
#pragma once

#include <algorithm>

#include "ops/tensors.h"

namespace dynamoe_cpu {

// Keys and values of one layer, of one shape and dtype.
inline void check_caches(const Tensor& keys, const Tensor& values) {
  TORCH_CHECK_VALUE(keys.dim() == 4 && values.sizes() == keys.sizes() && values.scalar_type() == keys.scalar_type(),
                    "keys and values must be of one shape and type, not ", keys.sizes(), " of ", keys.scalar_type(),
                    " and ", values.sizes(), " of ", values.scalar_type());
  size_of(keys.size(2), "the page size of keys");
}

struct RowPlaces {
  const int64_t *positions, *slots;
};

// `keys` are those of any layer.
inline RowPlaces row_places(int64_t rows, const Tensor& positions, const Tensor& slots, const Tensor& cos_sin,
                            const Tensor& keys) {
  TORCH_CHECK_VALUE(cos_sin.dim() == 2 && cos_sin.size(1) % 2 == 0,
                    "cos_sin must be a matrix with an even number of columns, not of shape ", cos_sin.sizes());
  TORCH_CHECK_VALUE(positions.numel() == rows && slots.numel() == rows,
                    "positions and slots must have one entry per row");
  const RowPlaces places{contiguous_data<int64_t>(positions, at::kLong, "positions"),
                         contiguous_data<int64_t>(slots, at::kLong, "slots")};
  const int64_t angles = cos_sin.size(0), tokens = keys.size(0) * keys.size(2);
  for (int64_t t = 0; t < rows; ++t) {
    TORCH_CHECK_INDEX(0 <= places.positions[t] && places.positions[t] < angles, "position ", places.positions[t],
                      " is not in the rotary table of ", angles);
    TORCH_CHECK_INDEX(0 <= places.slots[t] && places.slots[t] < tokens, "slot ", places.slots[t],
                      " is not in the cache");
  }
  return places;
}

struct SequencePlaces {
  const int32_t *query_start, *context_len, *block_table;
  int64_t table_stride, sequences;
};

// Pages that no row sees, because they lie behind its `window` (0: none), may be any number.
inline SequencePlaces sequence_places(int64_t rows, const Tensor& query_start, const Tensor& context_len,
                                      const Tensor& block_table, const Tensor& keys, int64_t window) {
  SequencePlaces places{};
  places.sequences = context_len.numel();
  places.context_len = data_of<int32_t>(context_len, at::kInt, places.sequences, "context_len");
  places.query_start = data_of<int32_t>(query_start, at::kInt, places.sequences + 1, "query_start");
  check_host(block_table, "block_table");
  TORCH_CHECK_VALUE(block_table.scalar_type() == at::kInt && block_table.dim() == 2 &&
                        block_table.size(0) == places.sequences &&
                        (block_table.stride(1) == 1 || block_table.size(1) == 1),
                    "block_table must be an int32 matrix with a contiguous row for each of ", places.sequences,
                    " sequences, not ", block_table.scalar_type(), " of shape ", block_table.sizes());
  places.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  places.table_stride = block_table.stride(0);
  const int64_t page_size = keys.size(2), pages = keys.size(0), room = block_table.size(1) * page_size;
  TORCH_CHECK_VALUE(places.query_start[0] == 0 && places.query_start[places.sequences] == rows,
                    "query_start must go from 0 to the ", rows, " rows, not from ", places.query_start[0], " to ",
                    places.query_start[places.sequences]);
  for (int64_t s = 0; s < places.sequences; ++s) {
    const int64_t queries = int64_t{places.query_start[s + 1]} - places.query_start[s], context = places.context_len[s];
    TORCH_CHECK_VALUE(queries >= 0, "query_start falls at sequence ", s);
    TORCH_CHECK_VALUE(queries <= context && context <= room, "context_len ", context, " of sequence ", s,
                      " must be in ", queries, " … ", room, ": its rows and what block_table has room for");
    if (!queries) continue;
    const int64_t first = window ? std::max<int64_t>(0, context - queries - window + 1) : 0;
    const int32_t* table = places.block_table + s * places.table_stride;
    for (int64_t page = first / page_size; page < ceil_div(context, page_size); ++page)
      TORCH_CHECK_VALUE(0 <= table[page] && table[page] < pages, "block_table holds page ", table[page],
                        " of sequence ", s, "; the cache has ", pages);
  }
  return places;
}

}  // namespace dynamoe_cpu
