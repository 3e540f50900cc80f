"""One command for a machine with a GPU: are the kernels right, and how fast are they?

    python benchmarks/gpu_check.py              # at most 8 minutes; writes a dated file to benchmarks/results
    python benchmarks/gpu_check.py --rehearse   # the same steps on small shapes in Triton's interpreter, no GPU needed

Needs torch ≥ 2.11, triton ≥ 3.6, transformers and this checkout, which need not be installed. Correctness comes first:
every backend, dtype, routing rule, cache format and edge shape against the oracles, determinism, and replay from a CUDA
graph, bfloat16 first. Then whole decode steps are captured, compared with eager ones and timed, attention over long
contexts is timed for every cache format, every shape is tuned, and the tables are measured. Compiling takes most of the
first part, which gets at most half of the time; what was left out is in the results. A failure is reported at the end
and makes the exit status 1.
"""

import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it while it is imported

import moe_layer
import torch
import triton
from benchmark import command_line, write
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.support import DTYPES, EXPERTS, REFUSED, ROUTERS
from dynamoe.kernels.api.types import ExpertWeights, Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.select import select_backend
from dynamoe.kernels.torch.backend import TorchBackend
from dynamoe.kernels.triton.backend import TritonBackend
from dynamoe.kernels.triton.tune import tune_experts
from gpu_attention import check_attention, expect, measure_caches
from gpu_decode import measure_decode
from gpu_quantised import check_quantised

GOALS = ((8192, "TFLOP/s", 550.0), (1, "share", 0.50), (8, "share", 0.75), (32, "share", 0.85), (256, "share", 0.85))


@dataclass
class Report:
    """What goes into the results file."""

    device: str
    rehearsal: bool
    date: str
    versions: dict[str, str]
    correct: dict[str, bool] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    measurements: list[dict] = field(default_factory=list)
    decode: list[dict] = field(default_factory=list)
    attention: list[dict] = field(default_factory=list)
    goals: list[str] = field(default_factory=list)


def pack(
    backend: TorchBackend, e: int, d: int, f: int, biases: bool = False
) -> tuple[ExpertWeights, tuple[torch.Tensor | None, ...]]:
    """Random experts, packed and as float32 tensors of the same (rounded) values."""

    def normal(*sizes: int, scale: float) -> torch.Tensor:
        return (torch.randn(*sizes, device=backend.device) * scale).to(backend.dtype)

    parts = [normal(e, f, d, scale=d**-0.5), normal(e, f, d, scale=d**-0.5), normal(e, d, f, scale=f**-0.5)]
    more = [normal(e, f, scale=0.5), normal(e, f, scale=0.5), normal(e, d, scale=0.5)] if biases else []
    return backend.pack_experts(*parts, "silu", *more), tuple(t.float() for t in (*parts, *more))


def check_experts(backend: TorchBackend, small: bool, until: float) -> str | None:
    """Edge shapes, and both sides of every change of path, against the oracle; twice, bit by bit.

    Returns: where it stopped, when ``until`` (of the monotonic clock) came first.
    """
    shapes = [(4, 2, 48, 40), (3, 3, 72, 104), (9, 1, 32, 32), (14, 12, 576, 96), (128, 8, 2048, 768)]
    shapes += [(32, 8, 1024, 512)]
    counts = [1, 2, 8, 33, 100, 257, 1025]
    if small:
        shapes, counts = shapes[:1], [1, 20]
    for e, k, d, f in shapes:
        weights, plain = pack(backend, e, d, f, biases=e == 3)
        for tokens in counts:
            if time.monotonic() > until:
                return f"experts from {e}/{k}/{d}/{f}, {tokens} rows on"
            x_TD = torch.randn(tokens, d, device=backend.device).to(backend.dtype)
            spec = RouterSpec(num_experts=e, top_k=k, renormalize=True)
            routing = backend.route(torch.randn(tokens, e, device=backend.device), spec)
            counted = Routing(
                expert_ids_TK=routing.expert_ids_TK,
                weights_TK=routing.weights_TK,
                counts_T=torch.randint(0, k + 1, (tokens,), dtype=torch.int32, device=backend.device),
            )
            one = Routing(
                expert_ids_TK=torch.full_like(routing.expert_ids_TK, e - 1)[:, :1].contiguous(),
                weights_TK=routing.weights_TK[:, :1].contiguous(),
            )
            for name, case in (("all", routing), ("counted", counted), ("one expert", one)):
                out_TD = backend.experts(x_TD, weights, case)
                expected_TD = reference.experts(x_TD.float(), *plain[:3], case, "silu", *plain[3:])
                if name != "counted" or expected_TD.any():
                    expect(out_TD, expected_TD, backend.dtype, f"experts {e}/{k}/{d}/{f}, {tokens} rows, {name}")
                assert torch.equal(out_TD, backend.experts(x_TD, weights, case)), "two runs differ"
    return None


def check_routing(backend: TorchBackend, small: bool) -> None:
    """Every rule at several sizes against the oracle."""
    device = backend.device
    for rule, (spec, _, _) in ROUTERS.items():
        for tokens in (3, 20) if small else (1, 7, 300, 1024, 1025, 5000):
            logits_TE = torch.randn(tokens, spec.num_experts, device=device)
            given = {}
            if spec.selection_bias:
                given["selection_bias_E"] = torch.randn(spec.num_experts, device=device)
            if spec.expert_scale:
                given["expert_scale_E"] = torch.rand(spec.num_experts, device=device)
            if spec.forced_experts:
                given["forced_ids_TK"] = torch.tensor([[1, 3]] * tokens, device=device)
            ours, oracle = backend.route(logits_TE, spec, **given), reference.route(logits_TE, spec, **given)
            # Scores one rounding apart may swap two experts: what counts is the weight of every expert.
            for routing in (ours, oracle):
                routing.weights_TK.nan_to_num_(nan=1e9)
            dense = [
                torch.zeros(tokens, spec.num_experts, device=device).scatter_add_(
                    1, r.expert_ids_TK.long(), r.weights_TK
                )
                for r in (ours, oracle)
            ]
            wrong = ((dense[0] - dense[1]).abs().amax(-1) > 1e-4).float().mean().item()
            assert wrong < 2e-3, f"routing rule {rule!r} at {tokens} rows: {wrong:.1%} of the rows differ"


def check_graph(backend: TorchBackend) -> None:
    """A captured layer replayed on new inputs equals the layer called directly."""
    weights, _ = pack(backend, 64, 512, 256)
    spec = RouterSpec(num_experts=64, top_k=4)
    for tokens in (1, 48, 1500):
        x_TD = torch.randn(tokens, 512, device=backend.device).to(backend.dtype)
        logits_TE = torch.randn(tokens, 64, device=backend.device)
        held: dict[str, torch.Tensor] = {}

        def layer(x_TD=x_TD, logits_TE=logits_TE, held=held) -> None:  # fixed for this turn
            held["out"] = backend.experts(x_TD, weights, backend.route(logits_TE, spec))

        replay = moe_layer.captured(layer, backend.device)
        assert replay is not None, "the layer could not be captured"
        for _ in range(3):
            x_TD.normal_()
            logits_TE.normal_()
            replay()
            replayed = held["out"].clone()
            assert torch.equal(replayed, backend.experts(x_TD, weights, backend.route(logits_TE, spec))), (
                "replay differs"
            )


def correctness(report: Report, device: torch.device, small: bool, until: float) -> None:
    """Run every check on every cell of the support matrix that this device has; note what failed or was left out."""
    torch.backends.cuda.matmul.allow_tf32 = False
    # The dtype and the backend that requests would use come first, should time run out.
    rows = sorted(EXPERTS, key=lambda row: row.backend != "triton")
    for dtype_name in sorted(DTYPES, key=lambda name: name != "bfloat16"):
        for row in rows:
            elsewhere = row.device != device.type or (row.interpreted and device.type == "cuda")
            if elsewhere or row.outcomes[DTYPES.index(dtype_name)] == REFUSED:
                continue
            dtype, cell = getattr(torch, dtype_name), f"{row.backend}/{dtype_name}"
            try:
                backend = select_backend(device, dtype, row.backend)
            except (ValueError, RuntimeError) as error:
                print(f"{cell}: not here ({error})")
                continue
            checks: list[Callable[[], Any]] = []
            if isinstance(backend, TritonBackend) and device.type == "cuda" and dtype != torch.float32:
                checks.append(lambda b=backend: check_graph(b))
            if row.backend in ("triton", "cpu"):
                checks += [lambda b=backend: check_attention(b, small), lambda b=backend: check_routing(b, small)]
            checks.append(lambda b=backend: check_experts(b, small, until))
            if isinstance(backend, TritonBackend) and dtype == torch.bfloat16:
                checks.append(lambda b=backend: check_quantised(b, small, until))
            run_checks(cell, checks, report, until)


def run_checks(cell: str, checks: list[Callable[[], Any]], report: Report, until: float) -> None:
    """Run all checks even if one fails, because time on a GPU is rare and every failure is to be reported."""
    begin, fine = time.monotonic(), True
    if begin > until:
        report.left_out.append(cell)
        return
    for check in checks:
        torch.manual_seed(1)
        try:
            if stopped := check():
                report.left_out.append(f"{cell}: {stopped}")
        except Exception as error:  # whatever it is belongs into the report
            fine = False
            where = traceback.extract_tb(error.__traceback__)[-1]
            report.failures.append(
                f"{cell}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            )
            print(report.failures[-1], file=sys.stderr)
    report.correct[cell] = fine
    print(f"{cell}: {'correct' if fine else 'WRONG'} ({time.monotonic() - begin:.0f} s)", flush=True)


def decoding(report: Report, device: torch.device, small: bool, until: float) -> None:
    """Capture decode steps; a wait for the device or other bits than the eager step's are failures."""
    try:
        measured, left_out = measure_decode(device, small, until)
        report.decode += measured
        report.left_out += left_out
    except Exception as error:  # the rest is measured all the same
        report.failures.append(f"captured decode: {type(error).__name__}: {error}")
        print(report.failures[-1], file=sys.stderr)


def long_contexts(report: Report, device: torch.device, small: bool) -> None:
    """Time attention for every format of keys and values; what fails is reported like a wrong result."""
    try:
        report.attention += measure_caches(TritonBackend(device, torch.bfloat16), small)
    except Exception as error:  # the tables are measured all the same
        report.failures.append(f"attention over long contexts: {type(error).__name__}: {error}")
        print(report.failures[-1], file=sys.stderr)


def tables(report: Report, device: torch.device, small: bool, deadline: float, tune: bool) -> None:
    """Tune and measure the layer of every shape while there is time; the shape with goals first."""
    limits = moe_layer.measure_limits(device, torch.bfloat16)
    report.limits = asdict(limits)
    print(f"limits: {limits.bandwidth / 1e9:.0f} GB/s (copy), {limits.flops / 1e12:.2f} TFLOP/s (bf16 product)")
    moe_layer.print_header()
    names = ["tiny"] if small else ["qwen3-30b-a3b", "granite-1b-a400m", "olmoe", "mixtral"]
    counts = (1, 16) if small else (1, 8, 32, 256, 1024, 4096, 8192, 2, 4, 16, 64, 128, 16384)
    for number, name in enumerate(names):
        share = time.monotonic() + (deadline - time.monotonic()) / (len(names) - number)
        shape = moe_layer.SHAPES[name]

        def prepare(weights: moe_layer.Weights, top_k: int = shape.top_k, until: float = share) -> None:
            if tune and device.type == "cuda":
                tune_shape(weights, top_k, counts[:7], device, until)

        measured = moe_layer.run_shape(
            name,
            counts,
            device,
            torch.bfloat16,
            limits,
            repetitions=3 if small else 20,
            deadline=share,
            prepare=prepare,
        )
        report.measurements += [asdict(m) for m in measured]
    if not small:
        judge(report)


def tune_shape(
    weights: moe_layer.Weights, top_k: int, counts: tuple[int, ...], device: torch.device, until: float
) -> None:
    """Tune for as many token counts as half of the shape's time allows; later backends find the results on disk."""
    backend = select_backend(device, torch.bfloat16, "triton")
    assert isinstance(backend, TritonBackend)
    packed = backend.pack_experts(weights.gate_EFD, weights.up_EFD, weights.down_EDF, "silu")
    half = time.monotonic() + (until - time.monotonic()) / 2
    for tokens in counts:
        if time.monotonic() < half:
            tune_experts(backend.planner, packed.data, top_k, "silu", [tokens], backend._ticket(), candidates=6)


def judge(report: Report) -> None:
    """Compare with the goals, on the shape of Qwen3-30B-A3B."""
    ours = {m["tokens"]: m for m in report.measurements if m["name"] == "triton" and m["shape"] == "qwen3-30b-a3b"}
    for tokens, unit, goal in GOALS:
        if tokens not in ours:
            report.goals.append(f"{tokens} tokens: not measured")
            continue
        m = ours[tokens]
        value = (
            m["flops_per_second"] / 1e12 if unit == "TFLOP/s" else m["bytes_per_second"] / report.limits["bandwidth"]
        )
        verdict = "reached" if value >= goal else "missed"
        report.goals.append(f"{tokens} tokens: {value:.2f} {unit}, goal {goal:.2f}: {verdict}")
        rivals = [m for m in report.measurements if m["tokens"] == tokens and m["shape"] == "qwen3-30b-a3b"]
        best = min(rivals, key=lambda m: m["seconds"])
        report.goals.append(f"{tokens} tokens: fastest is {best['name']} ({best['seconds'] * 1e6:.0f} µs)")
    print("\n".join(report.goals))


def main() -> int:
    parser = command_line(__doc__, output=True)
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing new is started after this time")
    parser.add_argument("--no-tune", action="store_true", help="measure the cost model's own choices")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU here; --rehearse goes through the steps without one")
    device = torch.device("cpu" if options.rehearse else "cuda")
    now = datetime.datetime.now(datetime.UTC)
    report = Report(
        device="CPU" if options.rehearse else torch.cuda.get_device_name(),
        rehearsal=options.rehearse,
        date=now.isoformat(timespec="seconds"),
        versions={"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]},
    )
    print(f"{report.device}, {report.versions}")
    seconds = options.minutes * 60 - 20
    deadline = time.monotonic() + seconds
    correctness(report, device, options.rehearse, time.monotonic() + (seconds if options.rehearse else seconds / 2))
    decoding(report, device, options.rehearse, time.monotonic() + (seconds if options.rehearse else seconds / 6))
    long_contexts(report, device, options.rehearse)
    tables(report, device, options.rehearse, deadline, not options.no_tune)
    slug = "".join(c if c.isalnum() else "-" for c in report.device).lower()
    path = options.output / f"gpu_check-{now:%Y-%m-%d-%H%M}-{slug}.json"
    write(path, asdict(report))
    print(f"results: {path}")
    for left_out in report.left_out:
        print(f"not checked for lack of time: {left_out}")
    for failure in report.failures:
        print(f"FAILED {failure}")
    return 1 if report.failures or not report.correct else 0


if __name__ == "__main__":
    sys.exit(main())
