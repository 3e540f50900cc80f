"""Prometheus metrics, under vLLM's names so that existing dashboards work; additional ones begin with ``dynamoe:``.

The engine's totals are read from its latest statistics on each ``/metrics`` request; times are measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..dynamic.engine.outputs import RequestDelta
from ..dynamic.model.counters import Exchange, ExpertTraffic
from .compute_usage import executed
from .contract_metrics import ContractCollector, family

if TYPE_CHECKING:
    from .bridge import EngineBridge
    from .contracts import ContractManager
    from .gate import Gate
    from .submission import RequestTimes

LABELS = ("model_name", "engine")
_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0)
_BETWEEN_TOKENS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class ServerMetrics:
    """All metrics of one server, in a separate registry.

    Arguments:
        model_name: value of the ``model_name`` label.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._counting = False
        self._labels = {"model_name": model_name, "engine": "0"}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(name, text, LABELS, buckets=buckets, registry=self.registry)
            return metric.labels(**self._labels)

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN
        )
        self._between = histogram("vllm:inter_token_latency_seconds", "From one token to the next.", _BETWEEN_TOKENS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY)
        self._queue = histogram("vllm:request_queue_time_seconds", "Waiting to be scheduled.", _LATENCY)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From scheduling to the first token.", _LATENCY)
        self._decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.", _LATENCY)
        self._prompt_length = histogram("vllm:request_prompt_tokens", "Tokens in a prompt.", _LENGTHS)
        self._output_length = histogram("vllm:request_generation_tokens", "Tokens generated for a prompt.", _LENGTHS)
        self._finished = Counter(
            "vllm:request_success", "Finished completions.", (*LABELS, "finished_reason"), registry=self.registry
        )
        for reason in ("stop", "length", "abort"):
            self._finished.labels(**self._labels, finished_reason=reason)
        self._contracts = Counter(
            "dynamoe:prompts", "Finished prompts by certificate.", (*LABELS, "certificate"), registry=self.registry
        )
        self._depths = Counter(
            "dynamoe:read_out_tokens",
            "Tokens by the number of layers before the exit head that chose them; the last one is the LM head.",
            (*LABELS, "layers"),
            registry=self.registry,
        )
        self._http = Counter(
            "dynamoe:http_requests", "Finished HTTP requests.", ("method", "route", "status"), registry=self.registry
        )

    def observe_engine(self, bridge: EngineBridge, gate: Gate) -> None:
        """Start counting and report the engine's and the gate's state; requests before this call were warm-up."""
        self._counting = True
        self.registry.register(_EngineCollector(bridge, gate, self._labels))

    def observe_contracts(self, contracts: ContractManager) -> None:
        """Report the monitor's state as of its last refresh."""
        self.registry.register(ContractCollector(contracts, self._labels))

    def on_delta(self, times: RequestTimes, delta: RequestDelta, made_at: float) -> None:
        """Record what one step did for one prompt."""
        if not self._counting:
            return
        tokens = sum(len(completion.token_ids) for completion in delta.completions)
        for completion in delta.completions:
            for layers in completion.layers:
                self._depths.labels(**self._labels, layers=str(layers)).inc()
        if tokens:
            if times.first_token is None:
                times.first_token = made_at
                self._first_token.observe(made_at - times.arrival)
            elif times.last_token is not None:
                self._between.observe(made_at - times.last_token)
            times.last_token = made_at
            times.generation_tokens += tokens
        if delta.queue_seconds is not None:
            times.queue_seconds = delta.queue_seconds
        for completion in delta.completions:
            if completion.finish_reason is not None:
                self._finished.labels(**self._labels, finished_reason=completion.finish_reason).inc()
        if delta.finished:
            certificate = delta.contract.certificate if delta.contract is not None else None
            self._contracts.labels(**self._labels, certificate=certificate or "exact").inc()
            self._on_finished(times, made_at)

    def on_abort(self, prompts: int) -> None:
        """Record aborted prompts."""
        self._finished.labels(**self._labels, finished_reason="abort").inc(prompts)

    def on_http(self, method: str, route: str, status: int) -> None:
        """Record a finished HTTP request. ``route`` is the route's pattern, since clients choose paths freely."""
        known = method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE") else "other"
        self._http.labels(method=known, route=route, status=str(status)).inc()

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _on_finished(self, times: RequestTimes, made_at: float) -> None:
        self._whole.observe(made_at - times.arrival)
        self._prompt_length.observe(times.prompt_tokens)
        self._output_length.observe(times.generation_tokens)
        if times.queue_seconds is not None:
            self._queue.observe(times.queue_seconds)
        if times.first_token is not None and times.last_token is not None:
            self._prefill.observe(max(0.0, times.first_token - times.arrival - (times.queue_seconds or 0.0)))
            self._decode.observe(times.last_token - times.first_token)


class _EngineCollector(Collector):
    """Reads the engine's latest statistics. Totals begin at zero with the first user's request."""

    def __init__(self, bridge: EngineBridge, gate: Gate, labels: dict[str, str]) -> None:
        self._bridge = bridge
        self._gate = gate
        self._labels = labels
        self._baseline = bridge.stats

    def collect(self) -> Iterator[Metric]:
        stats, start = self._bridge.stats, self._baseline
        gauges = {
            "vllm:num_requests_running": ("Sequences in the running batch.", stats.num_running),
            "vllm:num_requests_waiting": ("Sequences waiting to be scheduled.", stats.num_waiting),
            "vllm:kv_cache_usage_perc": ("Share of the cache's pages in use, 0 to 1.", stats.kv_usage),
            "dynamoe:kv_pages_free": ("Pages of the cache that are free.", stats.free_pages),
            "dynamoe:kv_pages_total": ("Pages of the cache.", stats.total_pages),
            "dynamoe:state_bytes": ("Bytes of recurrent states, beside the cache's pages.", stats.state_bytes),
            "dynamoe:open_prompts": ("Prompts that are waiting or running in the engine.", self._bridge.num_open),
            "dynamoe:open_http_requests": ("Admitted HTTP requests in flight.", self._gate.num_open),
            "dynamoe:engine_healthy": ("1 while the engine can take requests.", int(self._bridge.failure() is None)),
            "dynamoe:draining": ("1 while the server is shutting down.", int(self._gate.draining)),
        }
        for name, (text, value) in gauges.items():
            yield family(GaugeMetricFamily, name, text, self._labels, {(): value})
        groups = {("all" if group.window is None else str(group.window),): group for group in stats.cache_groups}
        text = "Bytes of the cache's pages, by the window of the layers that have them."
        total = {window: group.total for window, group in groups.items()}
        yield family(GaugeMetricFamily, "dynamoe:kv_group_bytes", text, self._labels, total, "window")
        text = "Of these bytes, those of pages that sequences hold."
        held = {window: group.held for window, group in groups.items()}
        yield family(GaugeMetricFamily, "dynamoe:kv_group_bytes_held", text, self._labels, held, "window")
        counters = {
            "vllm:prompt_tokens": ("Prompt tokens read.", "prompt_tokens"),
            "vllm:generation_tokens": ("Tokens generated.", "generation_tokens"),
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prefix_cache_queries"),
            "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_cache_hits"),
            "vllm:num_preemptions": ("Sequences preempted because pages ran out.", "preemptions"),
            "dynamoe:projected_rows": (
                "Rows times layers that were skipped, with KV propagation.",
                "projected_rows",
            ),
            "dynamoe:skipped_experts": ("Rows times experts that budgets skipped.", "skipped_experts"),
        }
        for name, (text, attribute) in counters.items():
            count = getattr(stats, attribute) - getattr(start, attribute)
            yield family(CounterMetricFamily, name, text, self._labels, {(): count})
        spec = self._bridge.engine.model.spec
        before = executed(spec, [start.compute])
        for name, total in executed(spec, [stats.compute]).items():
            text = f"Sum of usage.compute.{name}, aborted requests included."
            yield family(CounterMetricFamily, f"dynamoe:{name}", text, self._labels, {(): total - before[name]})
        segments, first = {}, 1
        for layers, rows, earlier in zip(stats.segment_layers, stats.segment_rows, start.segment_rows, strict=True):
            segments[(f"{first}-{first + layers - 1}",)] = rows - earlier
            first += layers
        text = "Rows launched through the layers between two exits; layers counts from 1."
        yield family(CounterMetricFamily, "dynamoe:segment_rows", text, self._labels, segments, "layers")
        if stats.exchange is not None:
            yield from self._exchange(stats.exchange)
        if stats.expert_traffic is not None:
            yield from self._expert_traffic(stats.expert_traffic)

    def _expert_traffic(self, traffic: ExpertTraffic) -> Iterator[Metric]:
        """Of a model whose experts are not all in memory."""
        texts = {
            "uses": "Experts that steps have used, each once for a step.",
            "hits": "Of these, those that were in memory from earlier steps.",
            "early": "Of these, those that were read ahead.",
            "reads": "Experts that were read from the disk.",
            "read_bytes": "Bytes of these.",
        }
        for name, text in texts.items():
            yield family(
                CounterMetricFamily, f"dynamoe:expert_{name}", text, self._labels, {(): getattr(traffic, name)}
            )

    def _exchange(self, exchange: Exchange) -> Iterator[Metric]:
        """Of several processes: bytes that rank 0 received, and the load of each expert rank."""
        text = "Bytes that rank 0 received from other ranks, by purpose."
        received = {(purpose,): count for purpose, count in exchange.received.items()}
        yield family(CounterMetricFamily, "dynamoe:parallel_received_bytes", text, self._labels, received, "purpose")
        text = "Rows times experts that each expert-parallel rank ran, in the layers of the first stage."
        experts = {(str(rank),): rows for rank, rows in enumerate(exchange.expert_rows)}
        yield family(CounterMetricFamily, "dynamoe:parallel_expert_rows", text, self._labels, experts, "expert_rank")
        text = "Experts that were brought to another expert-parallel rank."
        moves = {(): exchange.expert_moves}
        yield family(CounterMetricFamily, "dynamoe:parallel_expert_moves", text, self._labels, moves)
        if exchange.imbalance is not None:
            text = "The most loaded expert-parallel rank's rows times experts over the mean, in the last window."
            even = {(): exchange.imbalance}
            yield family(GaugeMetricFamily, "dynamoe:parallel_expert_imbalance", text, self._labels, even)
