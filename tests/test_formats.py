"""Quantised weights: what a code stands for, how far rounding may be off, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dynamoe.kernels.api import codes, format_join, formats, rounding
from dynamoe.kernels.api.formats import FP8, INT4, INT8, ActivationScheme
from dynamoe.kernels.api.quantized_weight import QuantizedWeight

# The default model's: hidden size 576, expert width 96; and odd ones.
SHAPES = [(7, 576), (3, 5, 96), (130, 300), (2, 33), (4, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_is_off_by_no_more_than_half_a_step(shape: tuple[int, ...]):
    weight = torch.randn(shape)
    weight[..., 0, :] = 0.0
    int8 = rounding.quantize_int8(weight)
    assert int8.shape == shape
    assert int8.nbytes == weight.numel() + 4 * weight[..., 0].numel()
    assert (int8.dequantize() - weight).abs().le(int8.scale * 0.50001).all()
    for group in formats.GROUPS:
        int8 = rounding.quantize_int8(weight, group=group)
        step = int8.scale.repeat_interleave(group, -1)[..., : shape[-1]]
        assert (int8.dequantize() - weight).abs().le(step * 0.50001).all()
        assert int8.nbytes == weight.numel() + 4 * int8.scale.numel()
        for symmetric in (True, False):
            int4 = rounding.quantize_int4(weight, group=group, symmetric=symmetric)
            step = int4.scale.repeat_interleave(group, -1)[..., : shape[-1]]
            assert int4.shape == shape
            assert int4.symmetric == symmetric
            # A symmetric range has no code for its upper end; rounding the zero point may move the ends by half a step,
            # and that of the scale, to eight bits, moves an end that lies so many steps away by up to a 256th of each.
            steps = 0.50001 + 7.5 / 256 if symmetric else 1.00001 + 15 / 256
            assert (int4.dequantize() - weight).abs().le(step * steps).all()
            assert not int4.dequantize()[..., 0, :].any()
    for block in (False, True):
        fp8 = rounding.quantize_fp8(weight, block=block)
        largest = fp8.per_output().scale.amax() * 448
        assert fp8.shape == shape
        # Three bits of mantissa; below the normal range steps of 2^-9 of the scale.
        assert (fp8.dequantize() - weight).abs().le(weight.abs() / 15.9 + largest / 448 * 2**-9).all()


def test_int4_codes_are_packed_low_nibble_first():
    weight = QuantizedWeight(
        format=INT4,
        data=torch.tensor([[0x21, 0x43, 0x0F]], dtype=torch.uint8),
        scale=torch.tensor([[2.0]], dtype=torch.float16),
        inputs=5,
        group=32,
    )
    assert weight.codes().tolist() == [[1, 2, 3, 4, 15]]
    assert weight.dequantize().tolist() == [[-14.0, -12.0, -10.0, -8.0, 14.0]]
    assert torch.equal(codes.pack_int4(weight.codes()), weight.data)
    with_offset = QuantizedWeight(
        format=INT4,
        data=weight.data,
        scale=weight.scale,
        inputs=5,
        group=32,
        offset=torch.tensor([[0.5]], dtype=torch.float16),
    )
    assert with_offset.dequantize().tolist() == [[2.5, 4.5, 6.5, 8.5, 30.5]]
    with_zero = QuantizedWeight(
        format=INT4, data=weight.data, scale=weight.scale, inputs=5, group=32, zero=torch.zeros(1, 1).byte()
    )
    assert with_zero.dequantize().tolist() == [[2.0, 4.0, 6.0, 8.0, 30.0]]
    assert torch.equal(with_zero.offsets(), torch.zeros(1, 1))


@pytest.mark.parametrize(
    "quantize",
    [
        rounding.quantize_int8,
        partial(rounding.quantize_int8, group=32),
        rounding.quantize_int4,
        rounding.quantize_fp8,
    ],
)
def test_parts_and_joins_are_those_of_the_matrix(quantize):
    stacked = quantize(torch.randn(3, 70, 96))
    full = stacked.dequantize()
    assert torch.equal(stacked.expert(1).dequantize(), full[1])
    assert torch.equal(stacked.rows(10, 30).dequantize(), full[:, 10:30])
    joined = format_join.concatenate([stacked.rows(0, 11), stacked.rows(11, 70)])
    assert torch.equal(joined.dequantize(), full)
    nothing = stacked.expert(0).take(torch.tensor([], dtype=torch.long))
    assert nothing.dequantize().shape == (0, 96)
    with pytest.raises(ValueError, match="holds no experts"):
        stacked.expert(0).expert(0)


def test_blocks_that_end_inside_a_joined_matrix_keep_their_scales():
    parts = [
        rounding.quantize_fp8(torch.randn(outputs, 300) * 10**n, block=True) for n, outputs in enumerate((96, 130))
    ]
    joined = format_join.concatenate(parts)
    assert joined.format == FP8
    assert joined.block_out == 1
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    with pytest.raises(ValueError, match="one format"):
        format_join.concatenate([rounding.quantize_int8(torch.ones(2, 4)), parts[0]])


def test_refusals_name_the_value():
    data = torch.zeros(2, 32, dtype=torch.uint8)
    scale = torch.ones(2, 1)
    for match, make in {
        "int4 groups have 32, 64, 128 inputs, not 48": lambda: rounding.quantize_int4(torch.ones(2, 4), group=48),
        "65 inputs take 33 bytes a row, not 32": lambda: QuantizedWeight(
            format=INT4, data=data, scale=scale, inputs=65, group=64
        ),
        "zero points must be 0 … 15, not 16": lambda: QuantizedWeight(
            format=INT4, data=data, scale=scale, inputs=64, group=64, zero=torch.full((2, 1), 16).byte()
        ),
        r"scales must be floating with shape \(2, 2\), not .*\(2, 1\)": lambda: QuantizedWeight(
            format=INT4, data=data, scale=scale, inputs=64, group=32
        ),
        "codes must be torch.int8 .* torch.uint8": lambda: QuantizedWeight(format=INT8, data=data, scale=scale),
        "not 64 by None": lambda: QuantizedWeight(
            format=FP8, data=data.view(torch.float8_e4m3fn), scale=scale, block_out=64
        ),
        "must be finite; 1 of 8": lambda: rounding.quantize_int8(torch.tensor([[1.0] * 7 + [float("nan")]])),
        "int8 groups have 32, 64, 128 inputs, not 16": lambda: rounding.quantize_int8(torch.ones(2, 4), group=16),
        "not torch.int64": lambda: rounding.quantize_fp8(torch.ones(2, 2, dtype=torch.long)),
        "not 'int8' by 48": lambda: ActivationScheme("int8", 48),
        "not 'fp8' by 64": lambda: ActivationScheme("fp8", 64),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()
