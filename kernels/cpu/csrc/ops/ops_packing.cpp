// Torch operators that make quantised weights and bring them into blocks: tensors are checked here, and only here.
#include "quant/packing.h"
#include "quant/quant_tensors.h"
#include "quant/rounding.h"

namespace dynamoe_cpu {
namespace {

// `codes` are (rows, bytes), of experts (E, rows, bytes); with two, gates and ups of gated blocks. With two levels scales
// and offsets are codes of 8 bits, the outer ones float16. There are scales for the rows that fill up an expert's blocks.
Tensor pack_quant_op(int64_t isa, at::TensorList codes, const Tensor& scales, const OptionalTensor& offsets,
                     const OptionalTensor& outer_scales, const OptionalTensor& outer_offsets, at::IntArrayRef numbers) {
  const QuantLayout layout = quant_layout(numbers);
  TORCH_CHECK_VALUE((codes.size() == 1 || codes.size() == 2) && codes[0].dim() >= 2 && codes[0].dim() <= 3 &&
                        codes.front().sizes() == codes.back().sizes(),
                    "codes must be one or two tensors of one shape, of 2 or 3 dimensions");
  const auto sizes = codes[0].sizes();
  CodeRows rows{{}, sizes.size() == 3 ? sizes[0] : 1, sizes[sizes.size() - 2], sizes.back()};
  rows.with_sign = layout.format == Format::int8 && codes[0].scalar_type() == at::kChar;
  for (size_t part = 0; part < codes.size(); ++part)
    rows.codes[part] = reinterpret_cast<const uint8_t*>(
        rows.with_sign ? static_cast<const void*>(contiguous_data<int8_t>(codes[part], at::kChar, "codes"))
                       : contiguous_data<uint8_t>(codes[part], at::kByte, "codes"));
  const auto fits = [&](const OptionalTensor& t, bool wanted, int64_t each) {
    return t.has_value() == wanted && (!t || t->numel() == layout.outputs * each);
  };
  const bool two = layout.two_level(), whole = sizes.size() == 2 && codes.size() == 1;
  const int64_t groups = layout.groups(), sections = ceil_div(layout.inputs, kOuterInputs);
  const int64_t outputs = whole ? rows.rows : rows.experts * rows.blocks() * kBlockOutputs;
  TORCH_CHECK_VALUE(outputs == layout.outputs && rows.row_bytes == ceil_div(layout.inputs * layout.bits(), 8) &&
                        fits(scales, true, groups) && fits(offsets, layout.has_offsets(), groups) &&
                        fits(outer_scales, two, sections) && fits(outer_offsets, two && layout.has_offsets(), sections),
                    "codes of shape ", sizes, " and scales of shape ", scales.sizes(), " do not fit ", layout.outputs,
                    " outputs and ", layout.inputs, " inputs");
  const auto bytes = [](const OptionalTensor& t) {
    return t ? contiguous_data<uint8_t>(*t, at::kByte, "codes of scales") : nullptr;
  };
  const auto halves = [](const OptionalTensor& t) {
    return t ? reinterpret_cast<const uint16_t*>(contiguous_data<at::Half>(*t, at::kHalf, "outer scales")) : nullptr;
  };
  GroupValues values{};
  if (two)
    values = {nullptr, nullptr, bytes(scales), bytes(offsets), halves(outer_scales), halves(outer_offsets)};
  else
    values = {floats(scales, "scales"), floats(offsets, "offsets")};
  Tensor packed = allocate(layout.blocks() * layout.block_bytes() / 4);
  pack_quant(context_of(isa), layout, rows, values, static_cast<char*>(packed.data_ptr()));
  return packed;
}

// A weight (O, I) or (E, O, I) rounded as kernels/api/rounding.py does it: its codes, as uint8, its scales, its zero points
// if it is int4 and not symmetric, else nothing, and whether all of it was finite. A group of 0 is all inputs.
std::tuple<Tensor, Tensor, Tensor, bool> round_weight_op(const Tensor& weight, int64_t format, int64_t group,
                                                         int64_t block_outputs, bool symmetric) {
  check_host(weight, "weight");
  const at::ScalarType type = weight.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                    "weight must be float32, bfloat16 or float16, not ", type);
  const int64_t dim = weight.dim();
  TORCH_CHECK_VALUE((dim == 2 || dim == 3) && weight.numel() && (weight.stride(-1) == 1 || weight.size(-1) == 1),
                    "weight must be (O, I) or (E, O, I) with contiguous inputs, not of shape ", weight.sizes(),
                    " and strides ", weight.strides());
  RoundCall call{};
  call.format = enum_of(format, Format::fp8, "format");
  const bool nibbles = call.format == Format::int4, blocks = call.format == Format::fp8 && group > 0;
  TORCH_CHECK_VALUE((group == 0 ? !nibbles : group % 8 == 0 && 0 < group && group <= 512) &&
                        block_outputs == (blocks ? group : 1),
                    "no weight of format ", format, " has scales of ", block_outputs, " outputs and ", group, " inputs");
  call.weight = weight.data_ptr();
  call.source = type == at::kFloat ? Source::fp32 : type == at::kHalf ? Source::fp16 : Source::bf16;
  call.experts = dim == 3 ? size_of(weight.size(0), "experts") : 1;
  call.outputs = size_of(weight.size(-2), "outputs");
  call.inputs = size_of(weight.size(-1), "inputs");
  call.expert_stride = dim == 3 ? weight.stride(0) : 0;
  call.output_stride = weight.stride(-2);
  call.group = group;
  call.block_outputs = block_outputs;
  call.symmetric = symmetric;
  const auto made = [&](int64_t rows, int64_t columns, at::ScalarType kind) {
    const auto options = weight.options().dtype(kind);
    return dim == 3 ? at::empty({call.experts, rows, columns}, options) : at::empty({rows, columns}, options);
  };
  Tensor codes = made(call.outputs, call.row_bytes(), at::kByte);
  Tensor scales = made(call.blocks(), call.groups(), at::kFloat);
  Tensor zeros = nibbles && !symmetric ? made(call.blocks(), call.groups(), at::kByte) : at::empty({0}, at::kByte);
  call.codes = codes.data_ptr<uint8_t>();
  call.scales = scales.data_ptr<float>();
  call.zeros = zeros.numel() ? zeros.data_ptr<uint8_t>() : nullptr;
  const bool finite = round_weight(at::get_num_threads(), call);
  return {codes, scales, zeros, finite};
}

// (rows, pieces, bytes) as (rows, bytes of all pieces); see `pack_halves`.
Tensor pack_halves_op(const Tensor& bytes, int64_t run) {
  check_host(bytes, "bytes");
  TORCH_CHECK_VALUE(bytes.scalar_type() == at::kByte && bytes.dim() == 3 && bytes.stride(2) == 1 && bytes.numel() &&
                        run > 0 && run % 2 == 0 && bytes.size(2) % run == 0,
                    "bytes must be uint8 of whole runs of ", run, " bytes, not ", bytes.scalar_type(), " of shape ",
                    bytes.sizes(), " and strides ", bytes.strides());
  Tensor out = at::empty({bytes.size(0), bytes.size(1) * bytes.size(2)}, bytes.options());
  pack_halves(at::get_num_threads(), {bytes.data_ptr<uint8_t>(), bytes.size(0), bytes.stride(0), bytes.size(1),
                                      bytes.stride(1), bytes.size(2), run, out.data_ptr<uint8_t>()});
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynamoe_cpu, m) {
  m.def(
      "pack_quant(int isa, Tensor[] codes, Tensor scales, Tensor? offsets, Tensor? outer_scales, Tensor? outer_offsets, "
      "int[] layout) -> Tensor",
      &pack_quant_op);
  m.def(
      "round_weight(Tensor weight, int format, int group, int block_outputs, bool symmetric) -> (Tensor, Tensor, Tensor, "
      "bool)",
      &round_weight_op);
  m.def("pack_halves(Tensor bytes, int run) -> Tensor", &pack_halves_op);
}

}  // namespace dynamoe_cpu
