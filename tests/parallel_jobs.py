"""Runs a model in several processes and in one, for tests; and one rank's share of a model without the others."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dynamoe.dynamic.model.spec import ModelSpec
from dynamoe.dynamic.parallel.config import ParallelConfig
from dynamoe.dynamic.parallel.context import ParallelContext
from dynamoe.dynamic.parallel.shards import Shard
from forks import run_processes

SCRIPT = Path(__file__).with_name("parallel_run.py")
PATIENCE = 240.0  # seconds, where a machine is busy with other things: nothing here waits for a process that hangs


def run_job(folder: Path, processes: int, *, script: Path = SCRIPT, **job: Any) -> dict[str, Any]:
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"thresholds": {}, "budget": {}, **job}))
    command = [str(script), str(folder / "job.json"), str(folder / "answer.json")]
    code, output = run_processes(command, processes, folder)
    assert code == 0, output
    return json.loads((folder / "answer.json").read_text())


def compare(
    folder: Path,
    model: str,
    sizes: dict[str, Any],
    extra: dict[str, Any] | None = None,
    **job: Any,
) -> dict[str, Any]:
    """Greedy tokens and launched rows of several processes against those of one; extra arguments are for both."""
    extra = extra or {}
    arguments = {"parallel": {**sizes, "timeout": PATIENCE}}
    processes = prod(sizes.values())
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run_job, folder / "one", 1, model=model, arguments=extra, **job)
        several = pool.submit(run_job, folder / "several", processes, model=model, arguments=arguments | extra, **job)
        alone, together = one.result(), several.result()
    assert together["tokens"] == alone["tokens"]
    if not together["preemptions"] + together["cached_tokens"]:  # which differ from those of one KV shard
        assert together["rows"] == alone["rows"]
    # Certificates of one process are refused by several: sums run in another order.
    assert "processes" not in alone["deployment"]
    assert together["deployment"]["processes"] == str(ParallelConfig(**sizes))
    return together


def shard_of(spec: ModelSpec, tensor: int, expert: int, rank: int) -> Shard:
    """Of one rank, without the others."""
    expert_rank, tensor_rank = divmod(rank, tensor)
    context = SimpleNamespace(
        config=ParallelConfig(tensor=tensor, expert=expert),
        rank=rank,
        kv_shard=expert_rank,
        tensor_rank=tensor_rank,
        expert_rank=expert_rank,
        stage=0,
        tensor_group=None,
    )
    return Shard(spec, cast(ParallelContext, context))
