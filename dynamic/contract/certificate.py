"""A certificate: what a calibration proved about one setting, for which requests, and on which deployment.

With probability 1 - delta over the calibration's requests, the risk of the setting is at most alpha, as long as the
running deployment is the calibrated one (:func:`differences`) and covers the request (:meth:`Certificate.refusal`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import MappingProxyType

from ...kernels.api.disk import read_regular
from ...kernels.api.ranges import check_ranges
from .bounds import BOUNDS, check_levels

LOSSES = "losses"  # folder beside certificates
_FORMAT = 2
Scalar = str | int | float | bool
# Fields that came later are left out where they say nothing, so that earlier certificates keep their ids.
_LATER: dict[str, object] = {
    "ignore_eos": False,
    "experts_executed": None,
    "weight_bytes_read": None,
    "tokens_per_second": None,
    "full_tokens_per_second": None,
}


@dataclass(frozen=True, kw_only=True)
class RequestFacts:
    """What decides whether a certificate covers a request.

    Arguments:
        greedy: every token is the most likely one.
        temperature: of the sampling; ignored for a greedy request.
        max_tokens: its longest possible output, in tokens; never open-ended.
        stops: its output may end at strings or tokens of the caller's.
        adjusted: the model's distribution is changed or truncated: penalties, biases, top-p, top-k, min-p.
        ignore_eos: its output goes on past the model's end of text.
        constrained: its output must have a form, so that a grammar masks the model's distribution. The loss of such a
            request would be the one of the masked distribution.
    """

    greedy: bool
    temperature: float
    max_tokens: int
    stops: bool = False
    ignore_eos: bool = False
    adjusted: bool
    constrained: bool = False


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The requests that a certificate covers: their outputs end at ``max_tokens`` or at the model's end of text; with
    ``ignore_eos`` at ``max_tokens`` alone.

    Arguments:
        lowest_temperature, highest_temperature: both 0: greedy requests only.
        min_tokens: smallest ``max_tokens`` of a request.
        max_tokens: longest output, in tokens; what a request asks for beyond it runs exactly.
        prompts: source of the calibration's prompts, in words; prompts_hash: of their token ids.
        ignore_eos: whether the level was proved for outputs that go on past the end of text too: with every token there
            counted as lost, since none was seen.
    """

    lowest_temperature: float = 0.0
    highest_temperature: float = 0.0
    min_tokens: int = 8
    max_tokens: int
    prompts: str
    prompts_hash: str = ""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lowest_temperature <= self.highest_temperature < math.inf:
            raise ValueError(
                f"temperatures must be a range from 0 on, not {self.lowest_temperature} to {self.highest_temperature}"
            )
        check_ranges(self, "min_tokens", "max_tokens", least=0)
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens must be at least 1 and at most max_tokens={self.max_tokens}, not {self.min_tokens}"
            )
        if not self.prompts:
            raise ValueError("prompts must say where the calibration's prompts came from")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The setting on requests that were not used to choose or calibrate it.

    Arguments:
        requests: how many.
        mean_loss, low, high: mean over requests and its 95 % interval.
        layers_executed: share of the layers that were launched for decoded tokens.
        worst_length: where all outputs must be cut for the mean loss to be largest, in tokens; worst_length_loss: that.
        token_loss: mean over all tokens: long outputs count more.
        worst_cut_loss: mean over requests of each one's largest loss, cut at its own worst length. Reported, not
            certified.
        experts_executed: share of these layers' experts that was launched.
        weight_bytes_read: bytes of weights that an output token read, as a share of those of the full model in the
            precision that losses are measured against.
        tokens_per_second, full_tokens_per_second: when it was calibrated, several requests at once with their prompts
            cached: at the setting, and of that full model.
    """

    requests: int
    mean_loss: float
    low: float
    high: float
    layers_executed: float
    worst_length: int | None = None
    worst_length_loss: float | None = None
    token_loss: float | None = None
    worst_cut_loss: float | None = None
    experts_executed: float | None = None
    weight_bytes_read: float | None = None
    tokens_per_second: float | None = None
    full_tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ValueError(f"requests must be at least 1, not {self.requests}")
        if not 0 <= self.low <= self.mean_loss <= self.high <= 1:
            raise ValueError(
                f"mean_loss and its interval must lie between 0 and 1, not {self.mean_loss} in {self.low} … {self.high}"
            )
        if not 0 < self.layers_executed <= 1:
            raise ValueError(f"layers_executed must be in (0, 1], not {self.layers_executed}")

    @property
    def speed(self) -> float | None:
        """How many times as fast as the full model, if that was measured."""
        if self.tokens_per_second is None or self.full_tokens_per_second is None:
            return None
        return self.tokens_per_second / self.full_tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was proved, how, for whom, and on what.

    Arguments:
        alpha, delta: with probability 1 - delta the risk is at most alpha.
        requests: number of calibration requests.
        method: name of the bound in :data:`bounds.BOUNDS`.
        loss: what is measured per request, in words.
        scope: the requests that it covers.
        exit_thresholds: layers in front of an exit → calibrated probability from which on a row exits there.
        expert_budget: fields of the expert budget; empty: all experts.
        held_out: the setting on other requests.
        created: ISO date.
        deployment: names → hashes and values of everything that the losses depend on: weights, quantisation, dtype,
            format and eviction of keys and values, probes, KV propagation, batching rule, device kind; the model's
            specification, what the kernels compute, the model's own logits.
        reference: likewise of the original model that the losses are measured against, if it is not this deployment
            with all its layers and experts: the same weights in another precision.
        evidence: SHA-256 of the files of losses, in the path's order up to this setting; ``losses/`` beside the
            certificate holds each under that name.

    Raises:
        ValueError: naming the field and the invalid value.
    """

    alpha: float
    delta: float
    requests: int
    method: str
    loss: str
    scope: Scope
    exit_thresholds: Mapping[int, float]
    expert_budget: Mapping[str, Scalar] = field(default_factory=dict)
    held_out: HeldOut
    created: str
    deployment: Mapping[str, Scalar]
    reference: Mapping[str, Scalar] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        thresholds = {int(layer): float(probability) for layer, probability in self.exit_thresholds.items()}
        object.__setattr__(self, "exit_thresholds", MappingProxyType(thresholds))
        object.__setattr__(self, "expert_budget", MappingProxyType(dict(self.expert_budget)))
        object.__setattr__(self, "deployment", MappingProxyType(dict(self.deployment)))
        object.__setattr__(self, "reference", MappingProxyType(dict(self.reference)))
        object.__setattr__(self, "evidence", tuple(self.evidence))
        self._check()

    def _check(self) -> None:
        check_levels(alpha=self.alpha, delta=self.delta)
        check_ranges(self, "requests", least=1)
        if self.method not in BOUNDS:
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join(BOUNDS)}")
        if not self.loss:
            raise ValueError("loss must say what is measured")
        for layer, probability in self.exit_thresholds.items():
            if layer < 1 or not 0 <= probability <= 1:
                raise ValueError(f"exit_thresholds must map layers to probabilities, not {layer} to {probability}")
        if not self.deployment:
            raise ValueError("deployment must name what the certificate is valid for")
        for name in ("expert_budget", "deployment", "reference"):
            for key, value in getattr(self, name).items():
                if not isinstance(key, str) or not isinstance(value, Scalar) or not _finite(value):
                    raise ValueError(f"{name}[{key!r}] must be text or a finite number, not {value!r}")
        date.fromisoformat(self.created)

    @property
    def original(self) -> str:
        """What the losses are measured against, in words."""
        if not self.reference:
            return "all layers and experts of what runs"
        bits = ("quantisation", "dtype", "keys_and_values")
        said = (f"{name} {self.reference[name]}" for name in bits if name in self.reference)
        return f"the original model ({', '.join(said)})"

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of its content."""
        text = json.dumps(_content(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def refusal(self, facts: RequestFacts) -> str | None:
        """Why it does not cover such a request; None if it does."""
        scope = self.scope
        temperature = 0.0 if facts.greedy else facts.temperature
        if not facts.greedy and scope.highest_temperature == 0:
            return f"it covers greedy requests only, not temperature {facts.temperature:g}"
        if not scope.lowest_temperature <= temperature <= scope.highest_temperature:
            return (
                f"it covers temperatures {scope.lowest_temperature:g} to {scope.highest_temperature:g}, not"
                f" {temperature:g}"
            )
        if facts.max_tokens < scope.min_tokens:
            return f"it covers max_tokens from {scope.min_tokens} on, not max_tokens={facts.max_tokens}"
        if facts.stops:
            return (
                "it covers outputs that end at max_tokens or at the model's end of text, not at stop strings or tokens"
            )
        if facts.ignore_eos and not scope.ignore_eos:
            return (
                "it covers outputs that may end at the model's end of text; with ignore_eos they go on past it, where"
                " no losses were measured"
            )
        if self.reference and facts.max_tokens > scope.max_tokens:
            return (
                f"it covers max_tokens up to {scope.max_tokens}, not max_tokens={facts.max_tokens}: what follows cannot"
                f" run on {self.original}, which is not loaded"
            )
        if facts.constrained:
            return "it covers the model's own distribution, and no losses were measured on one that a grammar masks"
        if facts.adjusted:
            return "it covers the model's own scores, without penalties, biases or cuts"
        return None


class OutdatedCertificate(ValueError):
    """A certificate in a format that says less than is needed to know whether it holds."""


def differences(certified: Mapping[str, Scalar], running: Mapping[str, Scalar]) -> list[str]:
    """Differences between the certified and the running deployment, one sentence per name; a name that only one of them
    has counts as a difference."""
    found = []
    for name in sorted({*certified, *running}):
        if name not in running:
            found.append(f"{name}: certified for {certified[name]!r}, unknown of what runs")
        elif name not in certified:
            found.append(f"{name}: {running[name]!r} runs, the certificate does not name it")
        elif certified[name] != running[name]:
            found.append(f"{name}: certified for {certified[name]!r}, {running[name]!r} runs")
    return found


def save_certificate(certificate: Certificate, file: Path) -> None:
    """Write a certificate as JSON, atomically."""
    content = {"format": _FORMAT, "id": certificate.id, **_content(certificate)}
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def load_certificate(file: Path) -> Certificate:
    """Read a certificate.

    Raises:
        ValueError: naming the file and what is wrong with it: unreadable, not JSON or truncated, another format, a
            missing, unknown or invalid field, content that does not match the id.
        OutdatedCertificate: for one of an earlier format.
    """
    try:
        content = json.loads(read_regular(file).decode())
    except OSError as error:
        raise ValueError(f"certificate {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"certificate {file} is not text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"certificate {file} is not JSON, or was cut short: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{file} is not a certificate: it has no format number")
    if type(content["format"]) is int and content["format"] < _FORMAT:
        raise OutdatedCertificate(
            f"certificate {file} has format {content['format']}, which binds neither the model's configuration nor what"
            " the kernels compute; make a new one with `dynamoe calibrate model=… output=…`"
        )
    if content["format"] != _FORMAT:
        raise ValueError(f"certificate {file} has format {content['format']!r}; this version reads {_FORMAT}")
    try:
        certificate, named = _certificate(content), content["id"]
        own_id = certificate.id
    except KeyError as error:
        raise ValueError(f"certificate {file} has no field {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"certificate {file} is damaged: {error}") from error
    if named != own_id:
        raise ValueError(f"certificate {file} was changed: it names the id {named}, its content has {own_id}")
    return certificate


def _content(certificate: Certificate) -> dict:
    """All fields but the id, as JSON values."""
    fields = {name: getattr(certificate, name) for name in certificate.__dataclass_fields__}
    content = {
        **fields,
        "scope": _said(certificate.scope),
        "exit_thresholds": {str(layer): value for layer, value in sorted(certificate.exit_thresholds.items())},
        "expert_budget": dict(certificate.expert_budget),
        "held_out": _said(certificate.held_out),
        "deployment": dict(certificate.deployment),
        "reference": dict(certificate.reference),
        "evidence": list(certificate.evidence),
    }
    return {name: value for name, value in content.items() if value or name not in ("reference", "evidence")}


def _said(part: Scope | HeldOut) -> dict:
    return {name: value for name, value in vars(part).items() if name not in _LATER or value != _LATER[name]}


def _certificate(content: dict) -> Certificate:
    fields = {name: value for name, value in content.items() if name not in ("format", "id")}
    return Certificate(**{**fields, "scope": Scope(**fields["scope"]), "held_out": HeldOut(**fields["held_out"])})


def _finite(value: Scalar) -> bool:
    return isinstance(value, str) or math.isfinite(value)
