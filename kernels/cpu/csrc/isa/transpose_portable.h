// Words of rows, transposed one by one.
#pragma once

TARGET static void transpose_full_words(uint32_t* dst, int dst_stride, const void* const* rows, int num_rows,
                                        int words) {
  for (int r = 0; r < num_rows; ++r) {
    const char* row = static_cast<const char*>(rows[r]);
    for (int c = 0; c < words; ++c) {
      uint32_t word = 0;
      if (row) std::memcpy(&word, row + 4 * c, 4);
      dst[static_cast<ptrdiff_t>(c) * dst_stride + r] = word;
    }
  }
}
