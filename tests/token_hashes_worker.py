"""Runs one group of ``token_hashes.py`` in this process; under a launcher, in all of its processes.

``python token_hashes_worker.py GROUP.json ANSWER.json`` reads loads (``token_hashes_runs.Load``) and writes a hash per
run. ``--checkpoint FAMILY FOLDER`` makes a random checkpoint instead. Of dynamoe it imports the public names only.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from token_hashes_runs import FAMILIES, Load

TEXT = (
    "To install the package, unpack the archive and run the configure script, which looks for a compiler and for the "
    "libraries that are needed. A mixture of experts holds many feed-forward layers, of which a router chooses a few "
    "for every token. The list of files is sorted by name unless an option says otherwise; a line that begins with a "
    "hash sign is a comment and is ignored. When the server receives a signal it finishes the requests that are under "
    "way, closes its sockets and ends with the exit code 0. Numbers are written in base ten: 1, 2, 3, 5, 8, 13, 21. "
)
PROMPTS = ["The", "To install the package,", TEXT[:180], f"{TEXT} In other words,"]
CROWD = [TEXT[start : start + length] for start, length in enumerate((9, 300, 40, 420, 120, 220, 16, 360))]
QUESTIONS = ["What is the capital of France?", "Write one sentence about the sea."]
EXITS = {4: 0.75, 8: 0.75, 12: 0.75}  # of tiny


def launcher(processes: int) -> list[str]:
    """Arguments of the interpreter that start so many processes on the loopback interface; none for one."""
    if processes == 1:
        return []
    start = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [*start, "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]


def sha256(value: object) -> str:
    """Of a value as JSON, in which floats are written as ``repr`` writes them."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def hashes(tokens: object, logprobs: object, details: object, facts: dict[str, Any]) -> dict[str, Any]:
    """The entry of a run: what was chosen, how likely it was, whatever else the answer says, and facts to read."""
    return {"tokens": sha256(tokens), "logprobs": sha256(logprobs), "details": sha256(details), **facts}


def greedy(**settings: Any) -> Any:
    """Sampling parameters with three log-probabilities per token."""
    from dynamoe import SamplingParams

    common = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "logprobs": 3}
    return SamplingParams(**{**common, **settings})


def cheap(**settings: Any) -> Any:
    """Of a request that may go without layers or experts."""
    return greedy(quality=None, **settings)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A model that one workload asks.

    Arguments:
        llm: an ``LLM``.
        salt: so that the workload finds none of another's prompts in the prefix cache.
    """

    llm: Any
    salt: str

    def generate(self, prompts: Sequence[str], params: Any) -> list[Any]:
        salted = [{"prompt": prompt, "cache_salt": self.salt} for prompt in prompts]
        return self.llm.generate(salted, params, use_tqdm=False)


Workload = Callable[[Asked], list[Any]]
WORKLOADS: dict[str, Workload] = {}


def workload(work: Workload) -> Workload:
    """Make a function known under its name."""
    WORKLOADS[work.__name__.replace("_", "-")] = work
    return work


@workload
def plain(asked: Asked) -> list[Any]:
    return asked.generate(PROMPTS, [greedy(prompt_logprobs=2), *[greedy()] * 3])


@workload
def short(asked: Asked) -> list[Any]:
    return asked.generate(PROMPTS[1:3], greedy(max_tokens=12))


@workload
def chat(asked: Asked) -> list[Any]:
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return asked.llm.chat(conversations, greedy(ignore_eos=False), use_tqdm=False)


@workload
def prefix(asked: Asked) -> list[Any]:
    """One after the other, so that each finds the beginning of the one before."""
    found = [output for end in ("", " First,", " Second,") for output in asked.generate([TEXT + end], greedy())]
    assert sum(output.num_cached_tokens for output in found) > 0, "nothing came from the prefix cache"
    return found


@workload
def options(asked: Asked) -> list[Any]:
    penalties = greedy(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, max_tokens=24)
    biased = greedy(logit_bias={300: 4.0, 17: -50.0}, min_tokens=4, ignore_eos=False, prompt_logprobs=0)
    stopped = greedy(stop=(" the", "\n"), include_stop_str_in_output=True, stop_token_ids=(40,))
    several = greedy(n=2, logprobs=0)
    return asked.generate(PROMPTS, [penalties, biased, stopped, several])


@workload
def exits(asked: Asked) -> list[Any]:
    found = asked.generate([*PROMPTS, *CROWD[:3]], cheap(exit_thresholds=EXITS))
    assert len({layers for output in found for choice in output.outputs for layers in choice.layers}) > 1, "no exit"
    return found


@workload
def experts(asked: Asked) -> list[Any]:
    budgets = [{"expert_keep": 0.6}, {"expert_keep": {2: 0.5, 9: 0.7}}, {"experts_per_token": 1}, {"expert_keep": 0.9}]
    return _saves_experts(asked.generate(PROMPTS, [cheap(**budget) for budget in budgets]))


@workload
def exits_and_experts(asked: Asked) -> list[Any]:
    return _saves_experts(asked.generate(PROMPTS, cheap(exit_thresholds=EXITS, expert_keep=0.6)))


@workload
def mixed(asked: Asked) -> list[Any]:
    """Requests of every kind in the same steps."""
    kinds = [greedy(), cheap(exit_thresholds=EXITS), cheap(expert_keep=0.6), cheap(exit_thresholds={8: 0.5}, n=2)]
    return _saves_experts(asked.generate(PROMPTS, kinds))


@workload
def contract(asked: Asked) -> list[Any]:
    found = asked.generate([*PROMPTS, *CROWD[:2]], [*[greedy(quality={"alpha": 0.05}, ignore_eos=False)] * 5, greedy()])
    reasons = [output.contract.reason for output in found[:-1] if output.contract.certificate is None]
    assert not reasons, f"no certificate: {reasons}"
    return found


@workload
def crowd(asked: Asked) -> list[Any]:
    return _computes_again(asked.generate(CROWD, greedy(max_tokens=32)))


@workload
def crowd_exits(asked: Asked) -> list[Any]:
    settings = [greedy(max_tokens=32), cheap(exit_thresholds=EXITS, expert_keep=0.8, max_tokens=32)] * (len(CROWD) // 2)
    return _computes_again(asked.generate(CROWD, settings))


def _saves_experts(found: list[Any]) -> list[Any]:
    assert any(output.compute.skipped_experts for output in found), "no expert was left out"
    return found


def _computes_again(found: list[Any]) -> list[Any]:
    """With nothing preempted, the last token of an output is never put in."""
    needed = sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 for output in found)
    assert sum(output.compute.segment_rows[0] for output in found) > needed, "nothing was preempted"
    return found


def entry(found: list[Any]) -> dict[str, Any]:
    """The hashes of some results."""

    def positions(places: list[Any] | None) -> list[Any]:
        return [
            place and [[token, found.logprob, found.rank, found.decoded_token] for token, found in place.items()]
            for place in places or []
        ]

    choices = [choice for output in found for choice in output.outputs]
    certificates = [output.contract and output.contract.certificate for output in found]
    computes = [output.compute for output in found]
    details = [
        [[choice.text, choice.finish_reason, choice.stop_reason, choice.layers, choice.experts] for choice in choices],
        [[output.prompt_token_ids, output.num_cached_tokens] for output in found],
        certificates,
        [[done.segment_rows, done.projected_rows, done.skipped_experts, done.tokens.weight_bytes] for done in computes],
    ]
    facts = {
        "generated": sum(len(choice.token_ids) for choice in choices),
        "cached": sum(output.num_cached_tokens for output in found),
        "layers": sum(sum(choice.layers) for choice in choices),
        "rows": sum(done.segment_rows[0] for done in computes),
        "text": choices[-1].text[:60],
    }
    logprobs = [positions(choice.logprobs) for choice in choices] + [positions(o.prompt_logprobs) for o in found]
    return hashes([list(choice.token_ids) for choice in choices], logprobs, details, facts)


def run_python(load: Load) -> dict[str, Any]:
    """The load's runs on one ``LLM``."""
    from dynamoe import LLM

    llm = LLM(load.model, progress=False, **load.settings)  # under a launcher it returns on rank 0 only
    return {
        f"{load.name}/{name}": attempt(lambda name=name: entry(WORKLOADS[name](Asked(llm=llm, salt=name))))
        for name in load.workloads
    }


def run_command(load: Load) -> dict[str, Any]:
    """What ``dynamoe generate`` prints."""
    settings = [f"{key}={value}" for key, value in load.settings.items()]
    settings += [f"model={json.dumps(load.model)}", "sampling.temperature=0", "sampling.max_tokens=24"]
    command = ["-m", "dynamoe", "generate", *settings, f"prompt={PROMPTS[1]}"]
    started = [sys.executable, *launcher(load.processes), *command]
    done = subprocess.run(started, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return {f"{load.name}/generate": hashes(done.stdout, None, None, {"text": done.stdout[:60]})}


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work gives, or an entry that says why it gave nothing."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def run(load: Load) -> dict[str, Any]:
    """All runs of a load."""
    from token_hashes_rest import run_server

    faces = {"python": run_python, "rest": run_server, "cli": run_command}
    whole = attempt(lambda: faces[load.how](load))
    if "error" in whole:
        return {f"{load.name}/{name}": whole for name in load.workloads}
    return whole


def make_checkpoint(family: str, folder: Path) -> None:
    """A random model with the tokenizer of ``tiny``; every part of it matters to its outputs."""
    import torch
    from dynamoe import LLM
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = LLM("tiny", progress=False).get_tokenizer().hf()
    settings = AutoConfig.for_model(family, **FAMILIES[family], vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.uniform_(0.4, 1.6, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.6, generator=generator)
            else:
                width = 1.0 if "embed_tokens" in name else math.sqrt(parameter.shape[-1]) / 1.6
                parameter.normal_(0.0, 1.0 / width, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("what", help="a file of loads; with --checkpoint, a family")
    parser.add_argument("target", type=Path, help="file for the hashes; with --checkpoint, a folder")
    options = parser.parse_args()
    if options.checkpoint:
        make_checkpoint(options.what, options.target)
        return
    found: dict[str, Any] = {}
    for settings in json.loads(Path(options.what).read_text()):
        load = Load(**{**settings, "workloads": tuple(settings["workloads"])})
        found |= run(load)
        gc.collect()  # the model before this one
        if os.environ.get("RANK", "0") == "0":  # written again and again, in case that a later load ends the process
            options.target.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
