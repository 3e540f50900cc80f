"""Which backend computes what, where: the table behind ``docs/support-matrix.md``.

``python -m dynamoe.kernels.api.support`` prints the page. A test runs every cell that this machine can run and compares
what really happened with what is declared here. Cells of a GPU stay *unverified* until ``benchmarks/gpu_check.py`` left
a results file that says it computed them correctly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .formats import FP8, INT4, INT8, MXFP4, Q4_K, Q5_K, Q6_K, Format
from .router_spec import RouterSpec

KERNELS, TORCH, REFUSED = "kernels", "torch", "refused"
DTYPES = ("float32", "bfloat16", "float16")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Experts on one backend and device: what happens for each of ``DTYPES``.

    Arguments:
        interpreted: the device stands for Triton's interpreter.
    """

    backend: str
    device: str
    outcomes: tuple[str, str, str]
    interpreted: bool = False

    @property
    def label(self) -> str:
        return "CPU, interpreted" if self.interpreted else self.device.upper().replace("CUDA", "GPU")


EXPERTS = (
    Row(backend="torch", device="cpu", outcomes=(KERNELS, KERNELS, KERNELS)),
    Row(backend="torch", device="cuda", outcomes=(KERNELS, KERNELS, KERNELS)),
    Row(backend="cpu", device="cpu", outcomes=(KERNELS, KERNELS, REFUSED)),
    Row(backend="cpu", device="cuda", outcomes=(REFUSED, REFUSED, REFUSED)),
    Row(backend="triton", device="cpu", outcomes=(KERNELS, KERNELS, KERNELS), interpreted=True),
    Row(backend="triton", device="cuda", outcomes=(TORCH, KERNELS, KERNELS)),
    Row(backend="grouped_mm", device="cpu", outcomes=(KERNELS, KERNELS, KERNELS)),
    Row(backend="grouped_mm", device="cuda", outcomes=(TORCH, KERNELS, TORCH)),
    Row(backend="megablocks", device="cpu", outcomes=(REFUSED, REFUSED, REFUSED)),
    Row(backend="megablocks", device="cuda", outcomes=(REFUSED, KERNELS, REFUSED)),
)


def quantised_outcomes(weights: Format) -> dict[str, str]:
    """What happens to weights of a format, per backend that has kernels for some. Without any the ``cpu`` backend
    dequantises them while loading, ``triton`` for each product."""
    return {"cpu": KERNELS if weights.cpu is not None else TORCH, "triton": KERNELS if weights.triton else TORCH}


def _rule(families: str, **fields: Any) -> tuple[RouterSpec, str, dict[str, str]]:
    """A rule with these fields, who uses it, and what happens to it per backend with a routing kernel of its own."""
    spec = RouterSpec(num_experts=8, top_k=2, **fields)
    return spec, families, {"cpu": KERNELS if spec.is_regular else TORCH, "triton": TORCH if spec.drops else KERNELS}


ROUTERS: dict[str, tuple[RouterSpec, str, dict[str, str]]] = {
    "softmax": _rule("OLMoE, Qwen2-MoE, Jamba"),
    "softmax, renormalised": _rule("Mixtral, Qwen3-MoE, MiniMax, HunYuan", renormalize=True),
    "p-norm": _rule("DBRX", renormalize=True, norm_p=2.0),
    "top-k, then softmax": _rule("GPT-OSS, Granite, JetMoe, Aria, Cohere 2", softmax_after_topk=True),
    "softmax, groups by best, scaled": _rule("DeepSeek-V2", num_groups=4, top_groups=2, scale=2.0),
    "sigmoid, bias, groups by best two": _rule(
        "DeepSeek-V3, GLM-4.5, Dots, Solar, EXAONE, Nemotron-H",
        score="sigmoid",
        selection_bias=True,
        num_groups=4,
        top_groups=2,
        group_score="top2_sum",
        renormalize=True,
        norm_epsilon=1e-20,
        scale=2.5,
    ),
    "sigmoid, bias": _rule("MiniMax-M2, LFM2, MiMo, AFMoE", score="sigmoid", selection_bias=True, renormalize=True),
    "softmax, bias, norm floor": _rule("Ernie 4.5", selection_bias=True, renormalize=True, norm_floor=1e-12),
    "softmax, bias, zero experts": _rule("LongCat-Flash", selection_bias=True, zero_experts=3),
    "sigmoid, weight on the input": _rule("Llama 4", score="sigmoid", weight_on_input=True),
    "sparsemixer": _rule("Phi-3.5-MoE", score="sparsemixer", jitter=0.01),
    "sqrt-softplus, bias": _rule("DeepSeek-V4", score="sqrt_softplus", selection_bias=True, renormalize=True),
    "experts by token id": _rule(
        "DeepSeek-V4, first layers", score="sqrt_softplus", forced_experts=True, renormalize=True
    ),
    "softmax, scale per expert": _rule("Gemma 4", renormalize=True, expert_scale=True),
    "capacity": _rule("Switch, NLLB", capacity=3, renormalize=True),
}

# How weights are quantised: outcome per backend; the others are torch's.
QUANTISED: dict[str, dict[str, str]] = {
    label: quantised_outcomes(weights)
    for label, weights in (
        ("int8", INT8),
        ("int8, groups of 32, 64, 128", INT8),
        ("int8, rows rounded to int8 (w8a8)", INT8),
        ("int4, groups of 32, 64, 128, symmetric or not", INT4),
        ("int4, rows rounded to int8 (w4a8)", INT4),
        ("fp8 e4m3, a scale per output", FP8),
        ("fp8 e4m3, 128 x 128 blocks, rows rounded", FP8),
        ("mxfp4", MXFP4),
        ("q4_k", Q4_K),
        ("q5_k", Q5_K),
        ("q6_k", Q6_K),
    )
}

# What keys and values are kept in: outcome per backend; the others are torch's.
CACHES: dict[str, dict[str, str]] = {
    "auto": {"cpu": KERNELS, "triton": KERNELS},
    "int8": {"cpu": KERNELS, "triton": KERNELS},
    "fp8": {"cpu": REFUSED, "triton": KERNELS},
}

_HEAD = """# Support matrix

Generated by `python -m dynamoe.kernels.api.support`; a test runs every cell that its machine can run and fails when
this page says something else. Do not edit it by hand.

- **kernels**: the backend's own operation.
- **torch**: computed by torch's own operations; where the backend's kernels cover other cases, one log line per reason
  says so. Never an error inside a request.
- **refused**: a clear error when the backend is chosen, before anything is served. `auto` never chooses such a backend.
- *unverified*: written and tested as far as a machine without that GPU allows (Triton's interpreter, compilation ahead
  of time), but nobody has run it there. `benchmarks/gpu_check.py` runs it and leaves a dated file in
  `benchmarks/results/`.

## Experts
"""


def verified_on_gpu(results: Path = RESULTS) -> dict[str, str]:
    """``backend/dtype`` → device and date, from the results files that ``gpu_check`` left; the newest one counts."""
    found = {}
    for path in sorted(results.glob("gpu_check-*.json")):
        report = json.loads(path.read_text())
        for cell, correct in report["correct"].items():
            if correct and not report["rehearsal"]:
                found[cell] = f"{report['device']}, {report['date'][:10]}"
    return found


def render(results: Path = RESULTS) -> str:
    """The page as Markdown."""
    seen = verified_on_gpu(results)
    experts = []
    for row in EXPERTS:
        cells = []
        for dtype, outcome in zip(DTYPES, row.outcomes, strict=True):
            if outcome == REFUSED or row.device == "cpu":
                cells.append(outcome)
            else:
                where = seen.get(f"{row.backend}/{dtype}")
                cells.append(f"{outcome} ({where})" if where else f"{outcome}, *unverified*")
        experts.append((row.backend, row.label, *cells))
    gpu = "" if any(cell.startswith("triton/") for cell in seen) else "; on a GPU *unverified*"

    def by_backend(outcomes: dict[str, str]) -> tuple[str, str, str]:
        return TORCH, outcomes["cpu"], outcomes["triton"] + (gpu if outcomes["triton"] == KERNELS else "")

    backends = ("torch, grouped_mm, megablocks", "cpu", "triton")
    lines = [
        _HEAD,
        *_table(("backend", "device", *DTYPES), *experts),
        "",
        "Activations SiLU, GELU, tanh-GELU and gpt-oss's clamped SwiGLU, biases, expert counts per row, zero experts",
        "and weights on the input work on every backend. On `grouped_mm`, biases and rows that are no multiple of 16",
        "bytes run on torch; on `megablocks` so do biases and views of wider weights.",
        "",
        "## Routing rules",
        "",
        *_table(("rule", "families", *backends), *((r, f, *by_backend(o)) for r, (_, f, o) in ROUTERS.items())),
        "",
        "## Quantised weights",
        "",
        "Dense layers and experts alike. torch dequantises whole weights for each product: right, and slow.",
        "On `triton` rounded rows meet weights in tensor cores for int8, and for e4m3 where a GPU has them (sm_89 and",
        "later; others multiply its numbers in float16). Rows as they are meet weights widened to the model's dtype.",
        "GGUF's Q8_0 is int8 in groups of 32.",
        "",
        *_table(("weights", *backends), *((weights, *by_backend(o)) for weights, o in QUANTISED.items())),
        "",
        "Of layers whose parts are in different formats, quantised projections are one call on CPUs. Other projections",
        "run part by part with each format's kernels, experts one after the other.",
        "",
        "## Keys and values",
        "",
        "Rotation, cache write and attention over pages, with windows, sinks and capped scores; `triton` in float32",
        "runs its attention on torch, except interpreted, and that over heads of more than 512 channels always. Of",
        "latent attention `triton` takes latents of up to 512 channels with keys of up to 64 behind them. Its cache in",
        "int8 is read as it is (by `triton` if the channels are even) and becomes floating on torch; fp8 is refused.",
        "",
        *_table(("`kv_cache_dtype=`", *backends), *((f"`{kept}`", *by_backend(o)) for kept, o in CACHES.items())),
        "",
        "## States",
        "",
        "Recurrences with a decay for each head or for each channel, selective scans (Mamba1) and short convolutions",
        "of [layers that keep states](checkpoints.md#layers-that-keep-states) have kernels on `cpu`, whose threads",
        "share out sequences and heads, and on `triton`, whose programs share out columns too; a sequence's rows run",
        "one after the other. The other backends run them on torch's operations.",
        "On a GPU they are *unverified*, and compile when they first run.",
    ]
    return "\n".join(lines) + "\n"


def _table(*rows: Sequence[str]) -> list[str]:
    titles, *others = (f"| {' | '.join(row)} |" for row in rows)
    return [titles, "|---" * len(rows[0]) + "|", *others]


if __name__ == "__main__":
    print(render(), end="")
