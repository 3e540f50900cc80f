"""Do the shipped certificates hold on requests that no calibration saw, at every length of the output?

``python benchmarks/outside_prompts.py result.json`` serves requests at the setting of each certificate that is valid
here, judges every token, and cuts the outputs at 8, 16, 64 tokens and the longest that is certified. The requests are
prompts of the model's own file that the calibration left over, and beginnings of the docstrings of Python's standard
library, which are another kind of text: a certificate says nothing of these, they show how far it carries. Losses are
shares of tokens; a level is broken where the mean over requests lies above alpha with 97.5 % confidence.
"""

import argparse
import importlib
import inspect
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dynamoe
import numpy as np
from dynamoe import LLM
from dynamoe.dynamic.contract.calibration_runs import Measured, measure, prompts_hash
from dynamoe.dynamic.contract.certificate import Certificate
from dynamoe.dynamic.contract.intervals import mean
from dynamoe.dynamic.contract.setting_path import Setting
from dynamoe.dynamic.model.machine import processor
from dynamoe.dynamic.studies.requests import draw
from dynamoe.dynamic.text.prompt_file import read_prompts
from dynamoe.dynamic.train.held_out import PROMPTS_FILE

LENGTHS = (8, 16, 64)
MODULES = (
    *("argparse", "asyncio.events", "asyncio.streams", "calendar", "collections", "concurrent.futures", "configparser"),
    *("csv", "datetime", "decimal", "difflib", "doctest", "email.message", "enum", "fractions", "functools", "heapq"),
    *("http.client", "http.server", "imaplib", "inspect", "ipaddress", "json", "logging", "mailbox", "optparse", "os"),
    *("pathlib", "pickle", "random", "shutil", "smtplib", "socket", "sqlite3", "ssl", "statistics", "string"),
    *("subprocess", "tarfile", "tempfile", "textwrap", "threading", "traceback", "typing", "unittest.case"),
    *("urllib.request", "uuid", "xml.dom.minidom", "zipfile"),
)
SHORTEST_TEXT = 120  # characters


def left_over(llm: LLM, certificate: Certificate, count: int) -> list[list[int]]:
    """Prompts beside the model that the calibration did not draw.

    Raises:
        ValueError: when the calibration's prompts cannot be told from the others.
    """
    distinct = [
        list(p) for p in dict.fromkeys(map(tuple, read_prompts(llm.model.path / PROMPTS_FILE, llm.model.tokenizer)))
    ]
    for used in range(certificate.requests + 1, len(distinct) + 1):
        if prompts_hash(drawn := draw(distinct, used, 0, PROMPTS_FILE)) == certificate.scope.prompts_hash:
            known = set(map(tuple, drawn))
            return [prompt for prompt in distinct if tuple(prompt) not in known][:count]
    raise ValueError(f"certificate {certificate.id} was calibrated on other prompts than those beside the model")


def docstrings(llm: LLM, count: int) -> list[list[int]]:
    """Beginnings of docstrings of the standard library, 12 to 60 tokens of each."""
    texts: dict[str, None] = {}
    for module in map(importlib.import_module, MODULES):
        for thing in vars(module).values():
            for member in (thing, *(vars(thing).values() if inspect.isclass(thing) else ())):
                text = inspect.getdoc(member) if inspect.isclass(member) or inspect.isroutine(member) else None
                if text and len(text) >= SHORTEST_TEXT:
                    texts[text] = None
    rng = np.random.default_rng(0)
    ids = [llm.model.tokenizer.encode(text) for text in texts]
    cut = [tokens[: rng.integers(12, 61)] for tokens in ids]
    return draw([list(p) for p in dict.fromkeys(map(tuple, cut))], min(count, len(cut)), 0, "the standard library")


def by_length(found: Measured, alpha: float, longest: int) -> dict[str, Any]:
    """Mean loss of the outputs cut at each length, with its 95 % interval."""
    entry: dict[str, Any] = {}
    for length in sorted({*LENGTHS, longest}):
        losses = found.losses_NT[:, :length].astype(np.float64)
        estimate = mean(np.nanmean(losses, axis=1))
        entry[str(length)] = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
        entry[str(length)]["broken"] = estimate.low > alpha
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="auto", help="as model.backend: cpu:avx512vnni and others")
    parser.add_argument("--requests", type=int, default=400, help="of each kind, at most")
    options = parser.parse_args()
    llm = LLM(options.model, backend=options.backend, max_num_seqs=64)
    catalog = llm.certificates.read()
    contracts = catalog.contracts.certificates
    if not contracts:
        parser.error(f"no certificate is valid for {options.model} here: {'; '.join(catalog.refused)}")
    result: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "version": dynamoe.__version__,
        "levels": {},
    }
    kinds = {"left over by the calibration": left_over(llm, contracts[0], options.requests)}
    kinds["docstrings of the standard library"] = docstrings(llm, options.requests)
    for certificate in contracts:
        longest = certificate.scope.max_tokens
        setting = Setting(exit_thresholds=dict(certificate.exit_thresholds), **certificate.expert_budget)
        level = result["levels"].setdefault(f"{certificate.alpha:g}", {})
        for kind, prompts in kinds.items():
            fitting = [prompt for prompt in prompts if len(prompt) + longest <= llm.engine.max_model_len]
            with tempfile.TemporaryDirectory() as folder:
                found = measure(llm, fitting, setting, longest, Path(folder) / "measured.json")
            level[kind] = {"requests": len(fitting), **by_length(found, certificate.alpha, longest)}
            shown = "  ".join(f"{n}: {e['mean']:.4f}" for n, e in level[kind].items() if n != "requests")
            print(f"alpha={certificate.alpha:g}, {len(fitting)} {kind}: {shown}")
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}; broken: {broken(result) or 'none'}")


def broken(result: dict[str, Any]) -> list[str]:
    """Levels that do not hold, with kind and length."""
    return [
        f"{alpha} at {length}, {kind}"
        for alpha, kinds in result["levels"].items()
        for kind, entry in kinds.items()
        for length, found in entry.items()
        if length != "requests" and found["broken"]
    ]


if __name__ == "__main__":
    main()
