"""Prometheus metrics of the live monitor, one line per certificate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..dynamic.contract.monitor import ContractState

if TYPE_CHECKING:
    from .contracts import ContractManager

_LARGEST_LOG = 700.0  # of a wealth that a float can hold


def family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    labels: Mapping[str, str],
    samples: Mapping[tuple[str, ...], float],
    *extra: str,
) -> Metric:
    """A metric with one sample for each tuple of values of the ``extra`` labels."""
    metric = kind(name, text, labels=(*labels, *extra))
    for values, sample in samples.items():
        metric.add_metric([*labels.values(), *values], sample)
    return metric


def picks(state: ContractState) -> int:
    """All requests that were ever sampled for the monitor under a certificate."""
    waiting = state.picks
    return state.bets.losses + waiting.running + waiting.pending + waiting.interrupted


def wealth(state: ContractState) -> float:
    """The largest wealth of its e-processes; one fires at 1 / delta."""
    return math.exp(min(state.bets.log_wealth, _LARGEST_LOG))


def fired(state: ContractState) -> bool:
    """Whether requests of everybody or of a tenant run exactly."""
    return state.process.fired or state.bets.reverted > 0


class ContractCollector(Collector):
    """Reports the states that the manager refreshed last.

    Arguments:
        contracts: manager whose monitor is reported.
        labels: common to all metrics.
    """

    def __init__(self, contracts: ContractManager, labels: dict[str, str]) -> None:
        self._contracts = contracts
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "armed": ("1 for a certificate that is registered with the monitor.", lambda _: 1),
            "fired": ("1 once requests of everybody, or of a tenant, run exactly.", lambda s: int(fired(s))),
            "reverted_tenants": ("Tenants whose own e-process has fired.", lambda s: s.bets.reverted),
            "picks_running": ("Sampled requests that have not ended.", lambda s: s.picks.running),
            "picks_pending": ("Sampled requests that wait for their full run.", lambda s: s.picks.pending),
            "realised_risk": ("Mean of the losses.", lambda s: math.nan if s.bets.mean is None else s.bets.mean),
            "wealth": ("Largest wealth of its e-processes, one of which fires at 1 / delta.", wealth),
        }
        counters = {
            "picks": ("Requests sampled for the monitor.", picks),
            "picks_interrupted": ("Sampled requests that never get a loss.", lambda s: s.picks.interrupted),
            "losses": ("Sampled requests whose losses are counted.", lambda s: s.bets.losses),
        }
        states = self._contracts.states
        for kind, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, read) in metrics.items():
                samples = {(certificate,): read(state) for certificate, state in states.items()}
                yield family(kind, f"dynamoe:contract_{name}", text, self._labels, samples, "certificate")
        valid = {(certificate.id,): 1 for certificate in self._contracts.catalog.contracts.certificates}
        text = "1 for a certificate in the catalog."
        yield family(GaugeMetricFamily, "dynamoe:contract_offered", text, self._labels, valid, "certificate")
