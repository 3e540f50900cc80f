"""Rotary position embedding: which frequencies a model rotates with, and the table of their cosines and sines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")

MOST_CHANNELS = 65536  # of a head: a mistake beyond


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """How positions turn into angles (Su et al. 2021), and how the range of positions was stretched.

    Arguments:
        head_dim: channels that are rotated, even; 0: positions do not matter to the layer.
        unrotated: channels of a head that are not, even; see :func:`rotary_order`.
        theta: base of the frequencies.
        rope_type: ``default``; ``linear`` (position interpolation); ``dynamic`` (NTK-aware: equals ``default`` up to
            the trained length, and longer contexts are not served); ``llama3``; ``yarn`` (Peng et al. 2023);
            ``longrope`` (a divisor for each frequency); ``proportional`` (only the fastest channel pairs turn).
        factor: how far the range is stretched.
        original_max_position: trained length, for ``llama3`` and ``yarn``.
        low_freq_factor, high_freq_factor: ``llama3``.
        beta_fast, beta_slow, attention_factor, truncate: ``yarn``. The attention factor multiplies cosine and sine.
        factors: ``longrope``: one for every channel pair, fastest first.
        pairs: ``proportional``: channel pairs that turn.
        longest: ``longrope``: contexts that are longer rotate with other factors, and are not served; 0: none do.

    Raises:
        ValueError: naming the value that makes no sense.
    """

    head_dim: int
    unrotated: int = 0
    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    longest: int = 0
    pairs: int = 0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, not {self.rope_type!r}")
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, not {self.head_dim}")
        if self.unrotated % 2:
            raise ValueError(f"rotary embedding cannot leave out an odd number of channels, {self.unrotated}")
        if self.theta <= 1:
            raise ValueError(f"rope_theta must be greater than 1, not {self.theta}")
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} of the rotary embedding must be positive, not {getattr(self, name)}")
        if self.rope_type in ("llama3", "yarn") and self.original_max_position < 1:
            raise ValueError(f"rope_type {self.rope_type!r} needs original_max_position_embeddings")
        if len(self.factors) != (self.head_dim // 2 if self.rope_type == "longrope" else 0):
            raise ValueError(
                f"rope_type {self.rope_type!r} with {self.head_dim} channels cannot have {len(self.factors)} factors"
            )
        if any(factor <= 0 for factor in self.factors):
            raise ValueError(f"factors of the rotary embedding must be positive, not {min(self.factors)}")


def rotary_order(channels: int, rotated: int, interleaved: bool) -> tuple[int, ...]:
    """How the channels of a head are kept, so that one rotation of the two halves of a head serves all layouts.

    Each half has its part of the pairs that are rotated first, then half of the channels that are not.

    Arguments:
        channels: of a head, as checkpoints have them.
        rotated: how many of them are, from the first on.
        interleaved: channels 2 i and 2 i + 1 make a pair; otherwise i and i + rotated / 2.

    Returns: the channel that comes to each place; empty where all stay.

    Raises:
        ValueError: for more channels than any head has.
    """
    if rotated == channels and not interleaved:
        return ()
    if channels > MOST_CHANNELS:
        raise ValueError(f"head_dim must be at most {MOST_CHANNELS}, not {channels}")
    pairs, rest = rotated // 2, range(rotated, channels)
    one, other = (range(0, rotated, 2), range(1, rotated, 2)) if interleaved else (range(pairs), range(pairs, rotated))
    order = (*one, *rest[: len(rest) // 2], *other, *rest[len(rest) // 2 :])
    return () if order == tuple(range(channels)) else order


def frequencies(spec: RopeSpec) -> torch.Tensor:
    """Radians per position of every channel pair: float32, (C/2,), fastest first."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    plain = 1.0 / spec.theta**exponents
    if spec.rope_type == "proportional":
        return plain * (torch.arange(len(plain)) < spec.pairs) / spec.factor
    if spec.rope_type == "linear":
        return plain / spec.factor
    if spec.rope_type == "longrope":
        return 1.0 / (torch.tensor(spec.factors) * spec.theta**exponents)
    if spec.rope_type == "llama3":
        return _llama3(plain, spec)
    if spec.rope_type == "yarn":
        stretched = 1.0 / (spec.factor * spec.theta**exponents)
        kept = 1.0 - _yarn_ramp(spec)
        return stretched * (1.0 - kept) + plain * kept
    return plain


def _llama3(plain: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Llama 3.1: short waves stay, long waves are stretched, those in between are blended; Llama 4 has none between."""
    waves_per_context = spec.original_max_position * plain / (2 * math.pi)
    above, width = waves_per_context - spec.low_freq_factor, spec.high_freq_factor - spec.low_freq_factor
    blend = (above / width).clamp(0.0, 1.0) if width else (above >= 0).float()
    return (1.0 - blend) * plain / spec.factor + blend * plain


def _yarn_ramp(spec: RopeSpec) -> torch.Tensor:
    """0 where a channel pair keeps its frequency, 1 where it is stretched, linear in between."""

    def pair_with(rotations: float) -> float:
        per_rotation = math.log(spec.original_max_position / (rotations * 2 * math.pi))
        return spec.head_dim * per_rotation / (2 * math.log(spec.theta))

    low, high = pair_with(spec.beta_fast), pair_with(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(spec.head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """The factor that YaRN recommends where the configuration names none; 0 is a multiplier that is not given."""
    if mscale and mscale_all_dim:
        return _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    return _yarn_scale(factor, 1.0)


def yarn_score_factor(factor: float, mscale_all_dim: float) -> float:
    """What DeepSeek's models multiply the scores with beside."""
    return _yarn_scale(factor, mscale_all_dim) ** 2


def _yarn_scale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def rope_table(spec: RopeSpec, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Cosines, then sines, of positions ``0 … length - 1``: float32, (L, C). Channels that are not rotated have exactly
    1 and 0."""
    positions_L = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions_L, frequencies(spec))
    kept = torch.ones(length, spec.unrotated // 2, dtype=torch.float32)
    cosines, sines = (part * spec.attention_factor for part in (angles.cos(), angles.sin()))
    return torch.cat((cosines, kept, sines, torch.zeros_like(kept)), -1).to(device)
