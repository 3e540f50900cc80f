"""Compiles every kernel for GPUs that are not there and reports registers, shared memory, spills and instructions.

``python -m dynamoe.kernels.triton.aot --target sm_90 --shape qwen3-30b-a3b`` prints a table and fails on a spill, or on
a prefill product without tensor-core instructions. Configurations are the cost model's own, for the listed device.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

import triton
from triton import knobs
from triton.compiler import CompiledKernel

from ..api.formats import FP8_PER_GROUP, GROUPS, INT8_PER_GROUP, UNQUANTIZED, ActivationScheme
from ..api.kv_codes import KV_DTYPES
from ..api.router_spec import RouterSpec
from ..api.support import ROUTERS
from ..api.types import Routing
from .device import LISTED
from .experts import ACTIVATIONS, ExpertsCall
from .launch import Launch, cdiv
from .norm import RopeCall
from .paged_attention import AttentionCall
from .quantized_layers import LinearCall, QuantExpertsCall
from .router import RouteCall
from .shapes import Steps, WarmUpShape, meta
from .states import ConvolutionCall, RecurrenceCall, ScanCall
from .stored_weight import StoredWeight, WeightKind
from .tuning import TuningCache
from .variants import Planner, variants
from .warmup import OPERATIONS, layer_launches


def _shape(
    e: int,
    k: int,
    d: int,
    f: int,
    heads: tuple[int, int, int] = (16, 4, 128),
    window: int | None = None,
    attends: Mapping[str, Any] | None = None,
    **rule: object,
) -> WarmUpShape:
    return WarmUpShape(
        hidden_size=d,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        page_size=16,
        max_tokens=8192,
        max_context=4096,
        max_sequences=64,
        router=RouterSpec(num_experts=e, top_k=k, **rule),  # type: ignore[arg-type]
        expert_size=f,
        activation="silu",
        probes=((1, False, False, False), (8, True, True, True)),
        window=window,
        **(attends or {}),
    )


SHAPES = {
    "default": _shape(14, 12, 576, 96, (9, 3, 64)),
    "granite-1b-a400m": _shape(32, 8, 1024, 512, (16, 8, 64), softmax_after_topk=True),
    "olmoe": _shape(64, 8, 2048, 1024, (16, 16, 128)),
    "qwen3-30b-a3b": _shape(128, 8, 2048, 768, (32, 4, 128), renormalize=True),
    "mixtral": _shape(8, 2, 4096, 14336, (32, 8, 128), window=4096, renormalize=True),
    "deepseek-v3": _shape(
        256, 8, 7168, 2048, (16, 16, 128), score="sigmoid", selection_bias=True, num_groups=8, top_groups=4,
        group_score="top2_sum", renormalize=True, scale=2.5,
    ),
    "longcat": _shape(768, 12, 6144, 2048, (16, 16, 128), zero_experts=256, selection_bias=True, scale=6.0),
}  # fmt: skip
HEADS = {  # attention of these alone
    "gemma2": _shape(14, 12, 576, 96, (16, 8, 256), 4096, {"softcap": 50.0}),
    "gemma4, global": _shape(14, 12, 576, 96, (16, 4, 512)),
    "deepseek, latents": _shape(14, 12, 576, 96, (128, 1, 576), attends={"latent": 512}),
    "deepseek-lite, latents": _shape(14, 12, 576, 96, (16, 1, 576), attends={"latent": 512}),
    "gpt-oss": _shape(14, 12, 576, 96, (64, 8, 64), 128, {"sinks": True}),
}
CODED = ("gemma4, global", "deepseek, latents", "deepseek-lite, latents")  # which have caches of int8 besides
TOKENS = (1, 8, 64, 512, 8192)
ATTENTION = "attention"  # in place of a shape: wide heads, latents, capped scores, sinks
CACHES = "caches"  # in place of a shape: keys and values in 8 bits, on the attention of every shape
QUANTISED = "quantised"  # in place of a shape: every format of weights, on one layer
STATES = "states"  # in place of a shape: recurrences and convolutions of some models
AS_THEY_ARE = (  # kinds of weights that unrounded rows meet
    WeightKind("int8", 0),
    WeightKind("int8", 32),
    WeightKind("int4", 64),
    WeightKind("mxfp4", 32),
    WeightKind("int4", 32, offsets=True),
    WeightKind("int4", 32, 256, offsets=True),
    WeightKind("int5", 32, 256, offsets=True),
    WeightKind("int6", 16, 256),
    WeightKind("fp8", 128),
)
VARIANTS = "variants"  # in place of a shape: every routing rule, activation and kind of bias, on one layer
NAMES = (*SHAPES, VARIANTS, ATTENTION, CACHES, QUANTISED, STATES)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a compiler made of one launch. ``spills`` is bytes of memory per thread that registers spilled to."""

    kernel: str
    target: str
    tokens: int
    blocks: str
    registers: int
    shared: int
    spills: int
    tensor_core: str
    prefill: bool  # a product over tiles of 64 rows or more

    @property
    def complaint(self) -> str | None:
        """What is wrong with it, if anything."""
        if self.spills:
            return f"{self.kernel} for {self.target} at {self.tokens} tokens ({self.blocks}) spills {self.spills} bytes"
        if self.shared > (most := LISTED[self.target].shared_bytes):
            return f"{self.kernel} for {self.target} takes {self.shared} bytes of shared memory, of which it has {most}"
        wanted = "wgmma" if self.target == "sm_90" else "mma" if self.target.startswith("sm_") else "mfma"
        if self.prefill and self.tensor_core != wanted:
            return f"{self.kernel} for {self.target} uses {self.tensor_core or 'no tensor cores'}, not {wanted}"
        return None


def launches_of(name: str, planner: Planner, dtype: torch.dtype) -> Iterator[tuple[int, Launch]]:
    """The launches of one of ``NAMES`` over some numbers of tokens, with the number that they are for."""
    if name == QUANTISED:
        yield from quantised_launches(dtype, planner)
        return
    if name == STATES:
        yield from state_launches(planner)
        return
    shapes, counts, operations = [SHAPES.get(name, SHAPES["granite-1b-a400m"])], TOKENS, OPERATIONS
    if name == VARIANTS:
        specs = [spec for spec, _, _ in ROUTERS.values() if not spec.drops]
        shapes = [replace(shapes[0], biased=True), *(replace(shapes[0], router=spec) for spec in specs)]
        shapes += [replace(shapes[0], activation=name, biased=True) for name in ACTIVATIONS]
        counts, operations = (1, 64, 2048), (RouteCall, ExpertsCall)
    elif name == ATTENTION:
        coded = [replace(HEADS[name], kv_dtype=torch.int8) for name in CODED]
        shapes, operations = [*HEADS.values(), *coded], (RopeCall, AttentionCall)
    elif name == CACHES:
        kinds = [kept for kept in KV_DTYPES.values() if kept is not None]
        shapes = [replace(shape, kv_dtype=kept) for shape in SHAPES.values() for kept in kinds]
        counts, operations = (1, 64, 8192), (RopeCall, AttentionCall)
    for shape in shapes:
        for tokens in counts:
            for launch in layer_launches(shape, Steps.of(tokens, shape), dtype, planner, operations):
                yield tokens, launch


def quantised_launches(dtype: torch.dtype, planner: Planner) -> Iterator[tuple[int, Launch]]:
    """Dense products and mixtures with every format, for few rows and for many, with the number of rows."""
    formats = [(kind, UNQUANTIZED) for kind in AS_THEY_ARE]
    formats += [(WeightKind("int8", 0), INT8_PER_GROUP), *((WeightKind("fp8", g), FP8_PER_GROUP) for g in (128, 0))]
    for group, offsets in product(GROUPS, (False, True)):
        formats.append((WeightKind("int4", group, offsets=offsets), ActivationScheme("int8", group)))
    for kind, scheme in formats:
        for rows in (8, 2048):
            x_TI = meta(rows, 1024, dtype=dtype)
            linear = planner.plan(LinearCall(x_TI, meta_weight(kind, 512, 1024), None, scheme, dtype))[1]
            mixture = planner.plan(quantised_experts(kind, scheme, x_TI, (8, 2, 512)))[1]
            yield from ((rows, launch) for launch in (*linear, *mixture))


def meta_weight(kind: WeightKind, outputs: int, inputs: int, *experts: int) -> StoredWeight:
    """A weight without storage, of one layer or of several experts."""
    scales = torch.uint8 if kind.format == "mxfp4" else torch.float32
    if kind.outer_group:
        scales = torch.uint8 if kind.offsets else torch.int8
    own = meta(*experts, outputs, cdiv(inputs, kind.group) if kind.group else 1, dtype=scales)
    halves = meta(*experts, outputs, cdiv(inputs, kind.outer_group), dtype=torch.float16) if kind.outer_group else None
    codes = meta(*experts, outputs, cdiv(inputs * kind.bits, 8), dtype=torch.uint8)
    offsets, above = (own, halves) if kind.offsets else (None, None)
    return StoredWeight(kind.format, codes, own, offsets, kind.group, outputs, inputs, halves, above, kind.outer_group)


def quantised_experts(
    kind: WeightKind, scheme: ActivationScheme, x_TD: torch.Tensor, sizes: tuple[int, int, int]
) -> QuantExpertsCall:
    """A mixture without storage; ``sizes``: experts, choices, width of an expert."""
    (num_experts, top_k, width), (rows, hidden) = sizes, x_TD.shape
    up, down = meta_weight(kind, width, hidden, num_experts), meta_weight(kind, hidden, width, num_experts)
    routing = Routing(expert_ids_TK=meta(rows, top_k, dtype=torch.int32), weights_TK=meta(rows, top_k))
    ticket = meta(1, dtype=torch.int32)
    return QuantExpertsCall(x_TD, up, up, down, (None, None, None), scheme, routing, "silu", ticket)


def state_launches(planner: Planner) -> Iterator[tuple[int, Launch]]:
    """Of Qwen3-Next, Kimi Linear, Jamba, Granite's hybrids and LFM2, for decodes and a prompt, with the rows."""
    for rows, sequences in ((8, 8), (2048, 1)):
        batch = replace(
            SHAPES["olmoe"].batch(sequences, rows // sequences, 4096),
            state_slots_S=meta(sequences, dtype=torch.int64),
            kept_slots_S=meta(sequences, dtype=torch.int64),
        )
        decays = ((16, 32, 128, 128, True, ()), (32, 32, 128, 128, True, (128,)), (1, 48, 128, 64, False, ()))
        for groups, heads, keys, values, delta_rule, channels in decays:
            q_TGC, v_THV, step_TH = meta(rows, groups, keys), meta(rows, heads, values), meta(rows, heads)
            inputs = (q_TGC, q_TGC, v_THV, meta(rows, heads, *channels), step_TH, meta(64, heads, keys, values))
            yield from ((rows, launch) for launch in planner.plan(RecurrenceCall(*inputs, batch, delta_rule))[1])
        q_TC, v_TX, rate_CX = meta(rows, 16), meta(rows, 8192), meta(16, 8192)
        scan = ScanCall(q_TC, q_TC, v_TX, v_TX, rate_CX, meta(64, 16, 8192), batch)
        yield from ((rows, launch) for launch in planner.plan(scan)[1])
        convolutions = ((4, 8192, False, "silu"), (4, 3328, True, "silu"), (3, 2048, False, "none"))
        for taps, channels, biased, activation in convolutions:
            parts = meta(rows, channels), meta(taps, channels), meta(channels) if biased else None
            call = ConvolutionCall(*parts, meta(64, taps - 1, channels), batch, activation)
            yield from ((rows, launch) for launch in planner.plan(call)[1])


def inspect(launch: Launch, target: str, tokens: int) -> Report:
    """Compile a launch for a listed target."""
    compiled = launch.compile(LISTED[target].target)
    products = [kernel for variant in variants() for kernel in variant.products]
    registers, spills = _resources(compiled)
    flags = [word for name, word in (("SWAP", "left"), ("TMA", "tma")) if launch.constexprs.get(name)]
    blocks = [
        f"{k[6:].lower()}{launch.constexprs[k]}" for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if k in launch.constexprs
    ]
    return Report(
        kernel=launch.name,
        target=target,
        tokens=tokens,
        blocks=" ".join([*blocks, f"w{launch.num_warps} s{launch.num_stages}", *flags]),
        registers=registers,
        shared=compiled.metadata.shared,
        spills=spills,
        tensor_core=_tensor_core(compiled),
        prefill=launch.kernel in products and launch.constexprs.get("BLOCK_M", 0) >= 64,
    )


def _resources(compiled: CompiledKernel) -> tuple[int, int]:
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
    text = compiled.asm["amdgcn"]
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\b", text)}
    # Scalar registers spill into lanes of vector registers; only what reaches memory costs.
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"] + numbers["vgpr_spill_count"]


def _tensor_core(compiled: CompiledKernel) -> str:
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    found = [
        name for name, mark in (("wgmma", "wgmma.mma_async"), ("mma", "mma.sync"), ("mfma", "v_mfma")) if mark in text
    ]
    return found[0] if found else ""


def reports(
    target: str, shape: str, dtype: torch.dtype = torch.bfloat16, kernels: tuple[str, ...] = ()
) -> Iterator[Report]:
    """Compile what a layer of ``shape`` launches on ``target``; all kernels, or those named."""
    if knobs.runtime.interpret:
        raise ValueError("Triton is in interpreter mode (TRITON_INTERPRET=1): nothing can be compiled")
    planner, seen = Planner(LISTED[target], TuningCache("nobody's")), set()
    for tokens, launch in launches_of(shape, planner, dtype):
        if launch.variant() not in seen and (not kernels or launch.name in kernels):
            seen.add(launch.variant())
            yield inspect(launch, target, tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=[*LISTED, "all"], default="all")
    parser.add_argument("--shape", choices=[*NAMES, "all"], default="all")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--kernel", nargs="*", default=(), help="only these")
    options = parser.parse_args()
    complaints = []
    print(f"Triton {triton.__version__}, {options.dtype}")
    print(f"{'target':7} {'shape':17} {'tokens':>6} {'kernel':22} {'configuration':27} regs shared spills tensor cores")
    for target in LISTED if options.target == "all" else [options.target]:
        for shape in NAMES if options.shape == "all" else [options.shape]:
            for r in reports(target, shape, getattr(torch, options.dtype), tuple(options.kernel)):
                line = f"{target:7} {shape:17} {r.tokens:6} {r.kernel:22} {r.blocks:27} {r.registers:4} {r.shared:6}"
                print(f"{line} {r.spills:6} {r.tensor_core}", flush=True)
                complaints += [r.complaint] if r.complaint else []
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
