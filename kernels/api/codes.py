"""Codes of quantised weights: how wide they are, how they lie in bytes, which numbers they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A code stands for a whole number, for a value of an 8-bit float, or for an entry of a table.

    Arguments:
        bits: of a code, 1 … 8. Codes of fewer than 8 bits follow each other from the lowest bit of a byte up, and every
            row begins with a new byte.
        dtype: of the tensor that holds them: uint8, or int8 or an 8-bit float where codes are numbers of that dtype.
        zero: the number that stands for 0 in weights without zero points.
        table: what the codes 0 … 2^bits - 1 stand for; None: themselves.

    Raises:
        ValueError: for a number of bits, a dtype or a table that do not go together.
    """

    bits: int = 8
    dtype: torch.dtype = torch.uint8
    zero: int = 0
    table: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.dtype.itemsize != 1 or (self.bits < 8 and self.dtype != torch.uint8):
            raise ValueError(f"codes have 1 … 8 bits in uint8, or 8 bits, not {self.bits} in {self.dtype}")
        if self.table is not None and (self.dtype != torch.uint8 or len(self.table) != 1 << self.bits):
            raise ValueError(f"codes of {self.bits} bits in {self.dtype} take no table of {len(self.table)} entries")

    @property
    def centred(self) -> bool:
        """Whether the code in the middle of all stands for 0."""
        return self.zero == (1 << self.bits - 1 if self.dtype == torch.uint8 else 0)

    def row_bytes(self, inputs: int) -> int:
        """Bytes that the codes of so many inputs take."""
        return -(-inputs * self.bits // 8)

    def unsigned(self, data: torch.Tensor, inputs: int) -> torch.Tensor:
        """Bytes (…, X) as codes 0 … 2^bits - 1, uint8 (…, I): int8 with 128 added, the bits of 8-bit floats."""
        if self.dtype == torch.int8:
            return data.view(torch.uint8) ^ 128
        return unpack(data.view(torch.uint8), self.bits)[..., :inputs]

    def numbers(self, data: torch.Tensor, inputs: int) -> torch.Tensor:
        """Bytes (…, X) as what their codes stand for, float32 (…, I)."""
        if self.dtype != torch.uint8:
            return data.float()
        codes = self.unsigned(data, inputs)
        return codes.float() if self.table is None else self._table(data.device)[codes.int()]

    def _table(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.table, dtype=torch.float32, device=device)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`unsigned`: codes (…, I), uint8, as the tensor that holds them."""
        return (codes ^ 128).view(torch.int8) if self.dtype == torch.int8 else pack(codes, self.bits).view(self.dtype)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as uint8, (…, I), one after the other from the lowest bit of a byte up: (…, ⌈I · bits / 8⌉)."""
    if bits == 8:
        return codes
    if bits == 4:
        return pack_int4(codes)
    count, size = _unit(bits)
    codes_XN = F.pad(codes, (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count))
    bytes_XB = codes.new_zeros(*codes_XN.shape[:-1], size)
    for n in range(count):
        byte, shift = divmod(n * bits, 8)
        bytes_XB[..., byte] |= codes_XN[..., n] << shift
        if shift + bits > 8:
            bytes_XB[..., byte + 1] |= codes_XN[..., n] >> 8 - shift
    return bytes_XB.flatten(-2)[..., : -(-codes.shape[-1] * bits // 8)]


def unpack(data: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack`: bytes (…, X) as ⌊8 X / bits⌋ codes, the last of which may lie behind the row."""
    if bits == 8:
        return data
    if bits == 4:
        return unpack_int4(data)
    count, size = _unit(bits)
    bytes_XB = F.pad(data, (0, -data.shape[-1] % size)).unflatten(-1, (-1, size))
    codes_XN = data.new_empty(*bytes_XB.shape[:-1], count)
    for n in range(count):
        byte, shift = divmod(n * bits, 8)
        code = bytes_XB[..., byte] >> shift
        if shift + bits > 8:
            code |= bytes_XB[..., byte + 1] << 8 - shift
        codes_XN[..., n] = code & (1 << bits) - 1
    return codes_XN.flatten(-2)[..., : data.shape[-1] * 8 // bits]


def _unit(bits: int) -> tuple[int, int]:
    """How many codes fill how many bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 … 15 as uint8, (…, I), two to a byte, the even input in the low nibble: (…, ⌈I / 2⌉)."""
    even = F.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def nibbles(bytes_OBX: torch.Tensor, run: int) -> torch.Tensor:
    """Codes (O, B, 2 X): of each run of bytes all low nibbles, then all high ones."""
    bytes_OBNR = bytes_OBX.unflatten(-1, (-1, run))
    return torch.stack((bytes_OBNR & 15, bytes_OBNR >> 4), -2).flatten(-3)


def unpack_int4(data: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack_int4`: bytes (…, X) as codes (…, 2 X)."""
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)
