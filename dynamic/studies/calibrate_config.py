"""What ``dynamoe calibrate`` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...kernels.api.ranges import check_ranges
from ..contract.bounds import BOUNDS
from ..contract.calibration_runs import SHORTEST
from ..contract.setting_path import PROBABILITIES
from ..engine.sampling_params import GREEDY_EPSILON
from ..model.load_config import LoadConfig
from ..parallel.config import ParallelConfig

_COSTS = ("bytes", "seconds")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(LoadConfig):
    """``dynamoe calibrate``.

    Arguments:
        model: a local directory, a Hub id, or the name of a shipped model: ``default``, ``tiny``.
        prompts: JSON lines with ``prompt``, ``messages`` or ``prompt_token_ids``; null takes the prompts
            beside the model.
        output: directory of the run; the same command resumes an interrupted run. ``certificates/`` in it is for
            servers, ``report.json`` has the loss and the saved work of every setting.
        alphas: levels of risk to certify.
        delta: probability that a calibration is wrong, for each level.
        method: bound of the test: ``wsr``, ``hoeffding_bentkus`` or ``exact_binomial``.
        requests: prompts that choose the settings; at a risk of R a level needs about ln(1 / delta) / (alpha - R).
        test_requests: further prompts that measure the chosen settings.
        max_tokens: longest output, at least 8. A level is proved for outputs cut at every length from 8 on; what a
            request asks for beyond the longest runs exactly.
        temperature: of the requests, and the one that the certificates hold for; 0 is greedy.
        probabilities: of models with exits, the path: the same calibrated probability at every exit, from the safest to
            the boldest; empty runs all layers.
        keeps: ``expert_keep`` beside each of them, not rising (it needs ``dynamoe experts``); empty uses all experts.
            Without exits they are a path by themselves.
        experts_per_token: caps on a token's experts in a layer, from the safest to the boldest.
        quantization, kv_cache_dtype: as for serve; several values, ``[none,int8]``, calibrate each of these precisions.
        reference: dtype or quantization of the original model that losses are measured against, with a cache of its own
            dtype; null takes the first of quantization and kv_cache_dtype.
        pilot_requests: further prompts that are tried with every combination of precisions, probabilities, keeps and
            caps, make the path (of no two settings one both cheaper and better) and are never used again. null: a fifth
            of requests where more than one of these varies and nothing else orders them, else 0.
        cost: what a pilot compares: ``bytes`` of weights and cache that an output token reads, or ``seconds`` of one.
        measure_experts: where no contributions lie beside the model, measure them first, as ``dynamoe experts`` does.
        logits_processors: as engine.logits_processors of a server that the certificates are for.
        threads: CPU threads; null leaves torch's own choice.
        parallel: the processes that share the model; certificates hold for these.

    Raises:
        ValueError: naming the key and the value that is out of range.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"output", "prompts"})

    model: str = "tiny"
    prompts: str | None = None
    output: str = "runs/calibration"
    alphas: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    delta: float = 0.05
    method: str = "wsr"
    requests: int = 1000
    test_requests: int = 500
    max_tokens: int = 64
    temperature: float = 0.0
    quantization: Any = "none"
    kv_cache_dtype: Any = "auto"
    reference: str | None = None
    probabilities: tuple[float, ...] = field(default=PROBABILITIES)
    keeps: tuple[float, ...] = ()
    experts_per_token: tuple[int, ...] = ()
    pilot_requests: int | None = None
    cost: str = "bytes"
    measure_experts: bool = False
    logits_processors: tuple[str, ...] = ()
    threads: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alphas", "probabilities", "keeps", "experts_per_token", "logits_processors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("quantization", "kv_cache_dtype"):
            values = getattr(self, name)
            values = (values,) if isinstance(values, str) else tuple(values or ())
            if not values or len(set(values)) < len(values) or not all(isinstance(value, str) for value in values):
                raise ValueError(f"{name} must be one precision or a list of different ones, not {list(values)}")
            object.__setattr__(self, name, values)
        check_ranges(self, "alphas", "delta", above=0, below=1)
        check_ranges(self, "probabilities", least=0, most=1)
        check_ranges(self, "keeps", above=0, most=1)
        if not self.alphas:
            raise ValueError("alphas is empty: there is no level to certify")
        if self.method not in BOUNDS:
            raise ValueError(f"method must be one of {', '.join(BOUNDS)}, not {self.method!r}")
        if not (self.temperature == 0 or GREEDY_EPSILON <= self.temperature <= 100):
            raise ValueError(f"temperature must be 0 or between {GREEDY_EPSILON} and 100, not {self.temperature}")
        if self.cost not in _COSTS:
            raise ValueError(f"cost must be one of {', '.join(_COSTS)}, not {self.cost!r}")
        check_ranges(self, "requests", "test_requests", "threads", "experts_per_token", least=1)
        check_ranges(self, "pilot_requests", least=0)
        if self.measure_experts and self.parallel.size > 1:
            raise ValueError(f"measure_experts=true runs in one process, not in {self.parallel.size}")
        check_ranges(self, "max_tokens", least=SHORTEST)
