// The table of what the headers in front have made of Vec. Included last of them by each instruction set's file, which then
// puts its own kernels in the place of some.
#pragma once

static Kernels common_kernels() {
  Kernels kernels{};
  kernels.gemm[0] = {kTileRows, 1, 1, word_offset<4>, pack_fp32, append_fp32, run_float<1>};
  kernels.gemm[1] = {kTileRows, 2, 2, word_offset<4>, pack_widened, append_widened, run_float<2>};
  kernels.quant = kQuant;
  kernels.transpose_words = transpose_words;
  kernels.store = store;
  kernels.gated_rows = gated_rows;
  kernels.scaled_add = scaled_add;
  kernels.weigh_values = weigh_values;
  kernels.dots = dots;
  kernels.add = add;
  kernels.convert = convert;
  kernels.widen = widen;
  kernels.encode_head = encode_head;
  kernels.decode_head = decode_head;
  kernels.rms_norm = rms_norm;
  kernels.rope = rope;
  kernels.cap_scores = cap_scores;
  kernels.softmax_step = softmax_step;
  kernels.softmax_merge = softmax_merge;
  kernels.convolve = convolve;
  kernels.multiply = multiply;
  kernels.unit_length = unit_length;
  kernels.recur = recur;
  kernels.scan = scan;
  return kernels;
}
