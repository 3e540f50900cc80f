"""``dynamoe certificate``: looks at certificates, verifies them, compares them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..contract import verify_certificate
from ..contract.catalog import CERTIFICATES
from ..contract.certificate import Certificate, load_certificate
from ..convert.model_store import SHIPPED_MODELS, resolve_model
from ..engine.config import EngineConfig
from ..llm import LLM
from ..model.load_config import LoadConfig
from .commands import CERTIFICATE_ACTIONS

SCHEMA = Path(verify_certificate.__file__).with_name("certificate.schema.json")

USAGE = """usage: dynamoe certificate list PATH…
       dynamoe certificate show CERTIFICATE
       dynamoe certificate verify PATH… [model=MODEL quantization=… kv_cache_dtype=… dtype=… backend=…]
       dynamoe certificate diff CERTIFICATE CERTIFICATE
       dynamoe certificate deployment model=MODEL [quantization=… …]
       dynamoe certificate schema

PATH is a certificate, a directory of them, or the name of a shipped model. `verify` derives the proof again from the
losses that are stored beside a certificate; with a model it also compares what would run. `deployment` prints what
would run, for the stand-alone script `dynamic/contract/verify_certificate.py`, which needs numpy alone. `schema` prints
the JSON schema of certificates."""


def certificate(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns: the exit code: 1 where a certificate is refused, 2 where one has no losses to be verified by.

    Raises:
        ValueError: for arguments or files that cannot be used.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    action, *rest = arguments
    if action not in CERTIFICATE_ACTIONS:
        close = difflib.get_close_matches(action, CERTIFICATE_ACTIONS, n=1)
        meant = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(CERTIFICATE_ACTIONS)}"
        raise ValueError(f"there is no action {action!r}{meant}")
    names = [argument for argument in rest if "=" not in argument]
    settings = dict(argument.split("=", 1) for argument in rest if "=" in argument)
    if settings and action not in ("verify", "deployment"):
        raise ValueError(f"{action} takes no settings, not {', '.join(settings)}")
    if action == "schema":
        print(SCHEMA.read_text(), end="")
        return 0
    if action == "deployment":
        print(json.dumps(_running(settings), indent=1))
        return 0
    found = [file for name in names for file in _files(name)]
    if not found or (action == "show" and len(found) != 1) or (action == "diff" and len(found) != 2):
        wanted = {"show": "one certificate", "diff": "two certificates"}.get(action, "a certificate or a directory")
        raise ValueError(f"{action} takes {wanted}, not {len(found)} of them")
    if action == "verify":
        return _verify(found, _running(settings) if settings else None)
    read = [load_certificate(file) for file in found]
    if action == "show":
        print(_described(read[0]))
    elif action == "diff":
        print("\n".join(_differences(*read)) or "nothing differs")
    else:
        print("\n".join(_line(one) for one in read))
    return 0


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if not path.exists() and name in SHIPPED_MODELS:
        path = resolve_model(name, progress=False) / CERTIFICATES
    if path.is_dir():
        return sorted(path.glob("*.json"))
    if not path.is_file():
        raise ValueError(f"no such file or directory: {path}")
    return [path]


def _running(settings: dict[str, str]) -> dict[str, Any]:
    """What would run, as a deployment."""
    known = [field.name for field in fields(LoadConfig) if field.type == "str"]
    for name in settings.keys() - {"model", *known}:
        close = difflib.get_close_matches(name, ["model", *known], n=1)
        meant = f"; did you mean {close[0]}?" if close else f"; there are model, {', '.join(known)}"
        raise ValueError(f"there is no key {name}{meant}")
    if "model" not in settings:
        raise ValueError("model=MODEL is needed to say what would run")
    load = LoadConfig(**{name: value for name, value in settings.items() if name != "model"})  # type: ignore[arg-type]
    llm = LLM.from_config(settings["model"], load, EngineConfig(max_num_seqs=1), progress=False)
    return dict(llm.certificates.running)


def _verify(found: Sequence[Path], running: dict[str, Any] | None) -> int:
    codes = []
    for file in found:
        read = load_certificate(file)
        wrong, evidence = verify_certificate.problems(file, running)
        codes.append(1 if wrong else 0 if evidence else 2)
        word = ("verified", "refused", "unproven: no losses are stored with it")[codes[-1]]
        print(f"{read.id} {file}: {word}", *wrong, sep="\n  ")
    return 1 if 1 in codes else max(codes)


def _line(one: Certificate) -> str:
    speed = "" if one.held_out.speed is None else f", {one.held_out.speed:.2f} times as fast"
    return (
        f"{one.id}  alpha={one.alpha:g} delta={one.delta:g}  {_setting(one)}  {one.deployment.get('quantisation')},"
        f" {one.deployment.get('backend')}  loss {one.held_out.mean_loss:.2%} on {one.held_out.requests} other requests"
        f"{speed}"
    )


def _setting(one: Certificate) -> str:
    parts = [f"exits {dict(one.exit_thresholds)}"] if one.exit_thresholds else []
    parts += [f"{name}={value}" for name, value in one.expert_budget.items()]
    return ", ".join(parts) or "all layers and experts"


def _described(one: Certificate) -> str:
    scope, held_out = one.scope, one.held_out
    lines = [
        f"certificate {one.id}, made {one.created}",
        f"promise: with probability {1 - one.delta:g} the risk is at most {one.alpha:g}, against {one.original}",
        f"loss: {one.loss}",
        f"setting: {_setting(one)}",
        f"requests: temperature {scope.lowest_temperature:g} to {scope.highest_temperature:g}, max_tokens from"
        f" {scope.min_tokens} on, covered up to {scope.max_tokens}; ignore_eos {'too' if scope.ignore_eos else 'not'};"
        f" prompts: {scope.prompts}",
        f"proved by {one.method} on {one.requests} requests; losses stored: {len(one.evidence)} settings",
        f"on {held_out.requests} other requests: loss {held_out.mean_loss:.2%} ({held_out.low:.2%} …"
        f" {held_out.high:.2%})",
        f"spends: {held_out.layers_executed:.1%} of the layers",
    ]
    if held_out.experts_executed is not None and held_out.weight_bytes_read is not None:
        lines[-1] += (
            f", {held_out.experts_executed:.1%} of their experts, {held_out.weight_bytes_read:.1%} of the bytes"
        )
    if held_out.speed is not None:
        lines.append(f"speed: {held_out.speed:.2f} times the full model's, {held_out.tokens_per_second:.1f} tokens/s")
    return "\n".join([*lines, "deployment:", *(f"  {name}: {value}" for name, value in one.deployment.items())])


def _differences(first: Certificate, second: Certificate) -> list[str]:
    lines = []
    for name in first.__dataclass_fields__:
        ours, theirs = getattr(first, name), getattr(second, name)
        if name in ("scope", "held_out"):
            ours, theirs = vars(ours), vars(theirs)
        if name in ("deployment", "reference", "scope", "held_out"):
            both = sorted({*ours, *theirs})
            lines += [
                f"{name}.{key}: {ours.get(key)!r} / {theirs.get(key)!r}"
                for key in both
                if ours.get(key) != theirs.get(key)
            ]
        elif ours != theirs:
            lines.append(f"{name}: {_plain(ours)} / {_plain(theirs)}")
    return lines


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value
