"""``dynamoe evaluate``: the loss of a setting against the full model, its executed work, its speed.

Requests are served greedily and judged by the code that calibrates contracts. Texts are forced through the same engine
for perplexity and divergence. Both run at the setting, on the engine's real path.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from ...kernels.api.disk import check_writable
from ...kernels.api.ranges import check_ranges
from ..contract.intervals import Estimate, mean, ratio
from ..convert.load_model import load_model
from ..convert.model_config import SharedModelConfig
from ..engine.config import EngineConfig
from ..llm import LLM
from ..model.decoder import Decoder
from ..model.machine import use_threads
from .forced import Forced, ForcingEngine, force
from .records import provenance
from .requests import draw, forced_texts, read_requests, requests_from
from .served import Served, serve_in_turns
from .setting import StudiedQuality, by_router_weight, find_keep, resolve

_SEARCHED = 16  # texts that an expert_keep is looked for on


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The full model that is compared with: all layers, all experts that its routers choose.

    Arguments:
        model: null takes the model that is measured; another one must have the same vocabulary.
        dtype: null takes the measured one's.
        experts_per_token: as moe.experts_per_token; null takes the checkpoint's own number.
        quantization, kv_cache_dtype: as ``dynamoe serve`` takes them; null takes the measured one's.
    """

    model: str | None = None
    dtype: str | None = None
    experts_per_token: int | None = None
    quantization: str | None = "none"
    kv_cache_dtype: str | None = "auto"

    def __post_init__(self) -> None:
        check_ranges(self, "experts_per_token", where="reference.", least=1)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SharedModelConfig):
    """``dynamoe evaluate``.

    Arguments:
        prompts: requests to serve: JSON lines as for dynamoe calibrate, or running text that gets cut into pieces; null
            takes the held-out prompts beside the model, else held-out pages of Python's language reference.
        text: what perplexity and divergence are measured on, a file of the same kinds; null takes the prompts.
        requests: how many prompts are served.
        texts: how many texts are forced; 0 leaves perplexity and divergence out.
        max_tokens: longest output.
        context_tokens: tokens of a text in front of the first that is predicted.
        seed: chooses prompts and texts.
        timing_groups: the requests are served in so many groups, the full model and the setting in turns; the groups
            give the interval of the throughput.
        json: file for the result.
        threads: CPU threads; null leaves torch's own choice.

    Raises:
        ValueError: naming the key and the value that is out of range.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"prompts", "text", "json"})

    model: str = "tiny"
    prompts: str | None = None
    text: str | None = None
    requests: int = 200
    texts: int = 200
    max_tokens: int = 64
    context_tokens: int = 16
    seed: int = 0
    timing_groups: int = 8
    json: str | None = None
    threads: int | None = None
    quality: StudiedQuality = field(default_factory=StudiedQuality)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_num_seqs=8, enable_prefix_caching=False))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "requests", "max_tokens", "context_tokens", "timing_groups", "threads", least=1)
        check_ranges(self, "texts", least=0)
        if self.parallel.size > 1 and self.quality.expert_rule == "router_weight":
            raise ValueError("quality.expert_rule=router_weight is measured in one process only")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured.

    Arguments:
        metrics: by name, in the order of the table; what cannot be measured is not there.
        by_request: what pairs of settings are compared by: losses of requests, sums of texts.
        setting: what the requests spent, and what is promised about it.
        source: where requests and texts came from, and how many there were.
        provenance: revision, versions, machine, hashes.
    """

    metrics: dict[str, Estimate]
    by_request: dict[str, list[float]]
    setting: dict[str, Any]
    source: dict[str, Any]
    provenance: dict[str, Any]

    def as_json(self, config: Any) -> dict[str, Any]:
        """The whole record of a run with this configuration."""
        return {"config": asdict(config), **asdict(self)}


def evaluate(config: EvaluateConfig) -> None:
    """Run the command.

    Raises:
        ValueError: for a setting, a model or a file that cannot be used.
    """
    file = None if config.json is None else Path(config.json).expanduser()
    if file is not None:
        check_writable(file)
    result = run(config)
    if file is not None:
        file.write_text(json.dumps(result.as_json(config), indent=1) + "\n")
    print(table(result))


def run(config: EvaluateConfig, *, progress: bool = True) -> Evaluation:
    """Measure one setting.

    Arguments:
        progress: show bars.

    Raises:
        ValueError: for a setting, a model or a file that cannot be used.
    """
    use_threads(config.threads)
    llm = LLM.from_config(
        config.model,
        config,
        config.engine,
        progress=progress,
        experts_per_token=config.moe.experts_per_token,
        certificates=None if config.quality.uncertified else config.quality.certificates,
        parallel=config.parallel,
    )
    reference = _reference(config, llm, progress)
    source, prompts, texts = _requests(config, llm)
    if config.quality.expert_rule == "router_weight":
        by_router_weight(llm.model.decoder)
    engine = ForcingEngine(llm.model, config.engine)
    quality = config.quality
    if quality.expert_share is not None:
        quality = _with_keep(config, llm, engine, reference, texts)
    setting = resolve(quality, llm, config.max_tokens)
    unlimited = config.quality.expert_keep is None and config.quality.expert_share is None
    with tqdm(total=len(prompts) + len(texts), desc="requests", unit="request", disable=not progress or None) as bar:
        served = serve_in_turns(llm, reference, prompts, setting.params, config.timing_groups, bar.update)
        context = config.context_tokens
        forced = force(engine, reference, texts, context, setting.params, bar.update) if texts else None
    return Evaluation(
        metrics=_metrics(served, forced),
        by_request=_by_request(served, forced),
        setting=setting.facts() | ({} if unlimited else {"expert_rule": config.quality.expert_rule}),
        source=source,
        provenance=provenance(llm),
    )


def table(result: Evaluation) -> str:
    """Setting and metrics as text, one line each."""
    setting = {name: value for name, value in result.setting.items() if value not in (None, {}, False)}
    lines = [f"{name}: {value}" for name, value in {**setting, **result.source}.items()]
    width = max(map(len, result.metrics))
    lines += ["", f"{'':{width}}  {'value':>10}  95 % interval over requests"]
    for name, found in result.metrics.items():
        lines.append(f"{name:{width}}  {found.value:10.4f}  {found.low:.4f} … {found.high:.4f}")
    return "\n".join(lines)


def _reference(config: EvaluateConfig, llm: LLM, progress: bool) -> Decoder:
    """The model that is compared with; the measured one itself where nothing else is asked for."""
    wanted = config.reference
    same = wanted.model in (None, config.model) and wanted.dtype in (None, config.dtype)
    same = same and wanted.quantization in (None, config.quantization)
    same = same and wanted.kv_cache_dtype in (None, config.kv_cache_dtype)
    if same and wanted.experts_per_token == config.moe.experts_per_token:
        return llm.model.decoder
    if config.parallel.size > 1:
        raise ValueError("several processes hold one model: with parallel.*, set reference.* as the measured model is")
    model = load_model(
        wanted.model or config.model,
        config,
        progress=progress,
        experts_per_token=wanted.experts_per_token,
        dtype=wanted.dtype or config.dtype,
        quantization=config.quantization if wanted.quantization is None else wanted.quantization,
        kv_cache_dtype=wanted.kv_cache_dtype or config.kv_cache_dtype,
    )
    if model.spec.vocab_size != llm.model.spec.vocab_size:
        raise ValueError(
            f"reference.model={wanted.model} has a vocabulary of {model.spec.vocab_size} tokens, {config.model} one of"
            f" {llm.model.spec.vocab_size}: their distributions cannot be compared"
        )
    return model.decoder


def _requests(config: EvaluateConfig, llm: LLM) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
    model = llm.model
    where, prompts = requests_from(config.prompts, model)
    about, texts = where, prompts
    if config.text is not None:
        file = Path(config.text).expanduser()
        about, texts = file.name, read_requests(file, model, config.context_tokens + config.max_tokens)
    limit = llm.engine.max_model_len - config.max_tokens
    chosen = draw(prompts, config.requests, config.seed, where)
    if longest := max((len(prompt) for prompt in chosen if len(prompt) > limit), default=0):
        raise ValueError(f"a prompt of {where} has {longest} tokens; with max_tokens, {limit} fit")
    forced: list[list[int]] = []
    if config.texts:
        eos = frozenset(model.spec.eos_token_ids)
        drawn = draw(texts, config.texts, config.seed, about)
        forced = forced_texts(drawn, config.context_tokens, config.max_tokens, eos)
    short = config.texts - len(forced)  # no longer than their context
    source = {"prompts": where, "requests": len(chosen), "text": about, "texts": len(forced), "texts_too_short": short}
    return source, chosen, forced


def _with_keep(
    config: EvaluateConfig, llm: LLM, engine: ForcingEngine, reference: Decoder, texts: Sequence[list[int]]
) -> StudiedQuality:
    """The quality with the ``expert_keep`` that executes the wanted share of the experts."""
    wanted, few = config.quality.expert_share, texts[:_SEARCHED]
    assert wanted is not None
    if not few:
        raise ValueError("quality.expert_share looks for its expert_keep on texts: texts must be at least 1")

    def executed(keep: float) -> float:
        params = resolve(replace(config.quality, expert_share=None, expert_keep=keep), llm, config.max_tokens).params
        computes = force(engine, reference, few, config.context_tokens, params).computes
        full = sum(c.full_expert_rows - config.context_tokens * sum(c.segment_experts) for c in computes)
        return 1 - sum(c.skipped_experts for c in computes) / full

    return replace(config.quality, expert_share=None, expert_keep=find_keep(executed, wanted))


def _metrics(served: Served, forced: Forced | None) -> dict[str, Estimate]:
    found = {"agreement": mean(1 - served.losses_N)}
    if forced is not None:
        found |= {
            "forced_agreement": mean(1 - forced.differ_N / forced.tokens_N),
            "kl": ratio(forced.kl_N, forced.tokens_N),
            "perplexity": ratio(forced.nll_N, forced.tokens_N, np.exp),
            "reference_perplexity": ratio(forced.reference_nll_N, forced.tokens_N, np.exp),
            "perplexity_ratio": ratio(forced.nll_N - forced.reference_nll_N, forced.tokens_N, np.exp),
        }
    return found | served.executed | served.throughput


def _by_request(served: Served, forced: Forced | None) -> dict[str, list[float]]:
    found = {"agreement": 1 - served.losses_N}
    if forced is not None:
        found |= {
            "forced_agreement": 1 - forced.differ_N / forced.tokens_N,
            "kl": forced.kl_N / forced.tokens_N,
            "nll": forced.nll_N / forced.tokens_N,
        }
    return {name: values.tolist() for name, values in found.items()}
