"""Which backend computes what, where: the table behind ``docs/support-matrix.md``.

``python -m dynamoe.kernels.api.support`` prints the page. A test runs every cell that this machine can run and compares
what really happened with what is declared here. Cells of a GPU stay *unverified* until ``benchmarks/gpu_check.py`` left
a results file that says it computed them correctly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .formats import FP8, INT4, INT8, Format
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


_BASE: dict[str, Any] = {"num_experts": 8, "top_k": 2}
# rule: (spec, families, outcome per backend with a routing kernel of its own)
ROUTERS: dict[str, tuple[RouterSpec, str, dict[str, str]]] = {
    "softmax": (RouterSpec(**_BASE), "OLMoE, Qwen2-MoE, Jamba", {"cpu": KERNELS, "triton": KERNELS}),
    "softmax, renormalised": (
        RouterSpec(**_BASE, renormalize=True),
        "Mixtral, Qwen3-MoE, MiniMax, HunYuan",
        {"cpu": KERNELS, "triton": KERNELS},
    ),
    "p-norm": (
        RouterSpec(**_BASE, renormalize=True, norm_p=2.0), "DBRX", {"cpu": TORCH, "triton": KERNELS}
    ),
    "top-k, then softmax": (
        RouterSpec(**_BASE, softmax_after_topk=True),
        "GPT-OSS, Granite, JetMoe, Aria",
        {"cpu": KERNELS, "triton": KERNELS},
    ),
    "softmax, groups by best, scaled": (
        RouterSpec(**_BASE, num_groups=4, top_groups=2, scale=2.0), "DeepSeek-V2", {"cpu": TORCH, "triton": KERNELS}
    ),
    "sigmoid, bias, groups by best two": (
        RouterSpec(
            **_BASE, score="sigmoid", selection_bias=True, num_groups=4, top_groups=2, group_score="top2_sum",
            renormalize=True, norm_epsilon=1e-20, scale=2.5,
        ),
        "DeepSeek-V3, GLM-4.5, Dots, Solar, EXAONE, Nemotron-H",
        {"cpu": TORCH, "triton": KERNELS},
    ),
    "sigmoid, bias": (
        RouterSpec(**_BASE, score="sigmoid", selection_bias=True, renormalize=True),
        "MiniMax-M2, LFM2, MiMo, AFMoE",
        {"cpu": TORCH, "triton": KERNELS},
    ),
    "softmax, bias, norm floor": (
        RouterSpec(**_BASE, selection_bias=True, renormalize=True, norm_floor=1e-12),
        "Ernie 4.5",
        {"cpu": TORCH, "triton": KERNELS},
    ),
    "softmax, bias, zero experts": (
        RouterSpec(**_BASE, selection_bias=True, zero_experts=3), "LongCat-Flash", {"cpu": TORCH, "triton": KERNELS}
    ),
    "sigmoid, weight on the input": (
        RouterSpec(**_BASE, score="sigmoid", weight_on_input=True), "Llama 4", {"cpu": TORCH, "triton": KERNELS}
    ),
    "sparsemixer": (
        RouterSpec(**_BASE, score="sparsemixer", jitter=0.01), "Phi-3.5-MoE", {"cpu": TORCH, "triton": KERNELS}
    ),
    "sqrt-softplus, bias": (
        RouterSpec(**_BASE, score="sqrt_softplus", selection_bias=True, renormalize=True),
        "DeepSeek-V4",
        {"cpu": TORCH, "triton": KERNELS},
    ),
    "experts by token id": (
        RouterSpec(**_BASE, score="sqrt_softplus", forced_experts=True, renormalize=True),
        "DeepSeek-V4, first layers",
        {"cpu": TORCH, "triton": KERNELS},
    ),
    "softmax, scale per expert": (
        RouterSpec(**_BASE, renormalize=True, expert_scale=True), "Gemma 4", {"cpu": TORCH, "triton": KERNELS}
    ),
    "capacity": (
        RouterSpec(**_BASE, capacity=3, renormalize=True), "Switch, NLLB", {"cpu": TORCH, "triton": TORCH}
    ),
}  # fmt: skip

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
    lines = [_HEAD, "| backend | device | float32 | bfloat16 | float16 |", "|---|---|---|---|---|"]
    for row in EXPERTS:
        cells = []
        for dtype, outcome in zip(DTYPES, row.outcomes, strict=True):
            if outcome == REFUSED or row.device == "cpu":
                cells.append(outcome)
            else:
                where = seen.get(f"{row.backend}/{dtype}")
                cells.append(f"{outcome} ({where})" if where else f"{outcome}, *unverified*")
        lines.append(f"| {row.backend} | {row.label} | {' | '.join(cells)} |")
    lines += [
        "",
        "Activations SiLU, GELU and tanh-GELU, biases, expert counts per row, zero experts and weights on the input",
        "work on every backend. On `triton`, weights whose rows are strided run on torch; on `grouped_mm` so do",
        "biases and rows that are no multiple of 16 bytes; on `megablocks` so do biases and views of wider weights.",
        "",
        "## Routing rules",
        "",
        "| rule | families | torch, grouped_mm, megablocks | cpu | triton |",
        "|---|---|---|---|---|",
    ]
    gpu = "" if any(cell.startswith("triton/") for cell in seen) else "; on a GPU *unverified*"
    for rule, (_, families, outcomes) in ROUTERS.items():
        triton = outcomes["triton"] + (gpu if outcomes["triton"] == KERNELS else "")
        lines.append(f"| {rule} | {families} | {TORCH} | {outcomes['cpu']} | {triton} |")
    lines += [
        "",
        "## Quantised weights",
        "",
        "Dense layers and experts alike. torch dequantises whole weights for each product: right, and slow.",
        "On `triton` rounded rows meet weights in tensor cores for int8, and for e4m3 where a GPU has them (sm_89 and",
        "later; others multiply its numbers in float16). Rows as they are meet weights widened to the model's dtype.",
        "",
        "| weights | torch, grouped_mm, megablocks | cpu | triton |",
        "|---|---|---|---|",
    ]
    for weights, outcomes in QUANTISED.items():
        triton = outcomes["triton"] + (gpu if outcomes["triton"] == KERNELS else "")
        lines.append(f"| {weights} | {TORCH} | {outcomes['cpu']} | {triton} |")
    lines += [
        "",
        "## Keys and values",
        "",
        "Rotation, cache write and attention over pages; `triton` in float32 runs its attention on torch, except",
        "interpreted.",
        "",
        "| `kv_cache_dtype=` | torch, grouped_mm, megablocks | cpu | triton |",
        "|---|---|---|---|",
    ]
    for kept, outcomes in CACHES.items():
        lines.append(f"| `{kept}` | {TORCH} | {outcomes['cpu']} | {outcomes['triton']}{gpu} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
