"""Prometheus metrics of the live monitor, one line per certificate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..dynamic.contract.monitor import ContractState

if TYPE_CHECKING:
    from .contracts import ContractDesk

_LARGEST_LOG = 700.0  # of a wealth that a float can hold


def picks(state: ContractState) -> int:
    """All requests that the coin ever picked under a certificate."""
    waiting = state.picks
    return state.process.count + waiting.running + waiting.pending + waiting.interrupted


def wealth(state: ContractState) -> float:
    """The gambler's wealth; the certificate fires at 1 / delta."""
    return math.exp(min(state.process.log_wealth, _LARGEST_LOG))


class ContractCollector(Collector):
    """Reads the states of the last look.

    Arguments:
        contracts: whose monitor is reported.
        labels: common to all metrics.
    """

    def __init__(self, contracts: ContractDesk, labels: dict[str, str]) -> None:
        self._contracts = contracts
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        names = (*self._labels, "certificate")
        offered = {certificate.id for certificate in self._contracts.catalog.contracts.certificates}
        states = self._contracts.states
        gauges = {
            "armed": ("1 for a certificate that the monitor watches.", lambda _: 1),
            "fired": ("1 once its requests run exactly.", lambda s: int(s.process.fired)),
            "picks_running": ("Picked requests that have not ended.", lambda s: s.picks.running),
            "picks_pending": ("Picked requests that wait for their full run.", lambda s: s.picks.pending),
            "realised_risk": ("Mean of the losses.", lambda s: math.nan if s.process.mean is None else s.process.mean),
            "wealth": ("Of the bet against it, which fires at 1 / delta.", wealth),
        }
        counters = {
            "picks": ("Requests that the coin picked.", picks),
            "picks_interrupted": ("Picked requests that never get a loss.", lambda s: s.picks.interrupted),
            "losses": ("Picked requests whose losses are counted.", lambda s: s.process.count),
        }
        for family, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, read) in metrics.items():
                metric = family(f"dynamoe:contract_{name}", text, labels=names)
                for certificate, state in states.items():
                    metric.add_metric([*self._labels.values(), certificate], read(state))
                yield metric
        metric = GaugeMetricFamily(
            "dynamoe:contract_offered", "1 for a certificate that is on offer now.", labels=names
        )
        for certificate in offered:
            metric.add_metric([*self._labels.values(), certificate], 1)
        yield metric
