"""Certificates: what a file must be, what they cover, what they are valid for, and which one a request gets."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.contract.certificate import (
    Certificate,
    HeldOut,
    OutdatedCertificate,
    RequestFacts,
    Scope,
    differences,
    load_certificate,
    save_certificate,
)
from dynamoe.dynamic.contract.resolve import Contracts

GREEDY = RequestFacts(greedy=True, temperature=0.0, max_tokens=64, adjusted=False)
DEPLOYMENT = {"weights": "9f2c", "quantization": "none", "dtype": "bfloat16", "kernel_version": 3, "kv_evicted": False}


def certificate(alpha: float = 0.05, delta: float = 0.1, **changes: Any) -> Certificate:
    fields: dict[str, Any] = {
        "requests": 400,
        "method": "wsr",
        "loss": "token disagreement, greedy",
        "scope": Scope(max_tokens=64, prompts="manual pages, held out"),
        "exit_thresholds": {8: 0.95, 4: 0.9},
        "held_out": HeldOut(requests=100, mean_loss=0.02, low=0.01, high=0.03, layers_executed=0.9),
        "created": "2026-01-31",
        "deployment": DEPLOYMENT,
    }
    return Certificate(alpha=alpha, delta=delta, **(fields | changes))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    written = certificate(expert_budget={"top_p": 0.9, "min_experts": 2, "rule": "contribution"})
    save_certificate(written, tmp_path / "c.json")
    read = load_certificate(tmp_path / "c.json")
    assert read == written
    assert read.id == written.id
    assert read.exit_thresholds == {4: 0.9, 8: 0.95}
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]
    save_certificate(certificate(alpha=0.02), tmp_path / "c.json")
    assert load_certificate(tmp_path / "c.json").alpha == 0.02


def test_the_id_is_that_of_the_content() -> None:
    first = certificate()
    assert first.id == certificate(exit_thresholds={4: 0.9, 8: 0.95}).id  # the order of entries says nothing
    others = [
        replace(first, alpha=0.04),
        replace(first, created="2026-02-01"),
        replace(first, exit_thresholds={4: 0.9}),
        replace(first, scope=replace(first.scope, max_tokens=65)),
        replace(first, held_out=replace(first.held_out, requests=101)),
        replace(first, deployment=DEPLOYMENT | {"dtype": "float32"}),
    ]
    assert len({first.id, *(other.id for other in others)}) == 7


def test_nothing_in_it_can_be_changed() -> None:
    deployment = dict(DEPLOYMENT)
    made = certificate(deployment=deployment)
    deployment["dtype"] = "float32"
    assert made.deployment["dtype"] == "bfloat16"
    with pytest.raises(FrozenInstanceError):
        made.alpha = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        made.exit_thresholds[4] = 0.1  # type: ignore[index]


def spoil(text: str, how: str) -> bytes:
    content = json.loads(text)
    if how == "cut short":
        return text[: len(text) // 2].encode()
    if how == "not text":
        return b"\xff\xfe\x00" + text.encode()
    if how == "a list":
        return b"[]"
    if how == "no format":
        del content["format"]
    if how == "format 3":
        content["format"] = 3
    if how == "no alpha":
        del content["alpha"]
    if how == "no scope":
        del content["scope"]
    if how == "more":
        content["colour"] = "red"
    if how == "text for a number":
        content["delta"] = "0.1"
    if how == "scope is a number":
        content["scope"] = 3
    if how == "thresholds are a list":
        content["exit_thresholds"] = [0.9]
    if how == "edited":
        content["alpha"] = 0.01
    if how == "deep":
        return b"[" * 100_000
    if how == "half a request":
        content["requests"] = 1.5
    if how == "half a token":
        content["scope"]["max_tokens"] = 64.5
    if how == "not a number":
        content["held_out"]["token_loss"] = float("nan")
    if how == "true":
        content["format"] = True
    if how == "nonsense":
        content["alpha"] = 2.0
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", "is not JSON, or was cut short"),
        ("not text", "is not text"),
        ("a list", "is not a certificate: it has no format number"),
        ("no format", "is not a certificate: it has no format number"),
        ("format 3", "has format 3; this version reads 2"),
        ("no alpha", "is damaged: .*alpha"),
        ("no scope", "has no field 'scope'"),
        ("more", "is damaged: .*colour"),
        ("text for a number", "is damaged"),
        ("scope is a number", "is damaged"),
        ("thresholds are a list", "is damaged"),
        ("edited", "was changed: it names the id [0-9a-f]{16}, its content has"),
        ("deep", "is not JSON, or was cut short: maximum recursion"),
        ("half a request", "is damaged: requests must be a whole number, at least 1, not 1.5"),
        ("half a token", "is damaged: max_tokens must be a whole number, at least 0, not 64.5"),
        ("not a number", "is damaged: Out of range float"),
        ("true", "has format True; this version reads 2"),
        ("nonsense", "is damaged: alpha must be between 0 and 1, not 2.0"),
    ],
)
def test_a_file_that_is_no_certificate_is_refused_by_name(tmp_path: Path, how: str, message: str) -> None:
    file = tmp_path / "c.json"
    save_certificate(certificate(), file)
    file.write_bytes(spoil(file.read_text(), how))
    with pytest.raises(ValueError, match=message) as caught:
        load_certificate(file)
    assert str(file) in str(caught.value)


def test_every_beginning_of_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    save_certificate(certificate(), file)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            load_certificate(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        load_certificate(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha must be between 0 and 1, not 0.0"),
        ({"delta": float("nan")}, "delta must be between 0 and 1, not nan"),
        ({"requests": 0}, "requests must be at least 1, not 0"),
        ({"method": "clt"}, "unknown method 'clt'; known: hoeffding_bentkus, exact_binomial, wsr"),
        ({"loss": ""}, "loss must say"),
        ({"exit_thresholds": {4: 1.5}}, "not 4 to 1.5"),
        ({"exit_thresholds": {0: 0.5}}, "not 0 to 0.5"),
        ({"deployment": {}}, "deployment must name"),
        ({"deployment": {"dtype": None}}, r"deployment\['dtype'\] must be text or a finite number, not None"),
        ({"expert_budget": {"top_p": float("inf")}}, r"expert_budget\['top_p'\] must be text or a finite number"),
        ({"created": "yesterday"}, "yesterday"),
    ],
)
def test_nonsense_in_a_certificate_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certificate(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scope(max_tokens=7, prompts="x"), "at most max_tokens=7, not 8"),
        (lambda: Scope(max_tokens=9, min_tokens=0, prompts="x"), "at least 1 and at most max_tokens=9, not 0"),
        (lambda: Scope(max_tokens=9, prompts=""), "prompts must say"),
        (lambda: Scope(max_tokens=9, prompts="x", lowest_temperature=0.5), "not 0.5 to 0.0"),
        (lambda: HeldOut(requests=0, mean_loss=0, low=0, high=0, layers_executed=1), "at least 1, not 0"),
        (lambda: HeldOut(requests=1, mean_loss=0.5, low=0.6, high=1, layers_executed=1), "0.5 in 0.6 … 1"),
        (lambda: HeldOut(requests=1, mean_loss=0, low=0, high=0, layers_executed=0), "layers_executed must"),
    ],
)
def test_nonsense_in_its_parts_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_differences_name_what_differs() -> None:
    assert differences(DEPLOYMENT, dict(reversed(DEPLOYMENT.items()))) == []
    running = {k: v for k, v in DEPLOYMENT.items() if k != "weights"} | {"dtype": "float32", "device": "cpu"}
    assert differences(DEPLOYMENT, running) == [
        "device: 'cpu' runs, the certificate does not name it",
        "dtype: certified for 'bfloat16', 'float32' runs",
        "weights: certified for '9f2c', unknown of what runs",
    ]


SAMPLED = Scope(max_tokens=64, prompts="x", lowest_temperature=0.5, highest_temperature=1.0)


@pytest.mark.parametrize(
    ("scope", "facts", "message"),
    [
        (Scope(max_tokens=64, prompts="x"), {}, None),
        (Scope(max_tokens=64, prompts="x"), {"temperature": 1e-6}, None),  # greedy, though not quite 0
        (Scope(max_tokens=64, prompts="x"), {"greedy": False, "temperature": 0.7}, "greedy requests only"),
        (Scope(max_tokens=64, prompts="x"), {"max_tokens": 65}, None),  # it goes on exactly behind the 64th
        (Scope(max_tokens=64, prompts="x"), {"max_tokens": 8}, None),
        (Scope(max_tokens=64, prompts="x"), {"max_tokens": 7}, "max_tokens from 8 on, not max_tokens=7"),
        (Scope(max_tokens=64, prompts="x"), {"stops": True}, "not at stop strings or tokens"),
        (Scope(max_tokens=64, prompts="x"), {"adjusted": True}, "penalties"),
        (Scope(max_tokens=64, prompts="x"), {"ignore_eos": True}, "with ignore_eos they go on past it"),
        (Scope(max_tokens=64, prompts="x", ignore_eos=True), {"ignore_eos": True}, None),
        (SAMPLED, {"greedy": False, "temperature": 0.5}, None),
        (SAMPLED, {"greedy": False, "temperature": 1.0}, None),
        (SAMPLED, {"greedy": False, "temperature": 1.1}, "temperatures 0.5 to 1, not 1.1"),
        (SAMPLED, {}, "temperatures 0.5 to 1, not 0"),
    ],
)
def test_scope(scope: Scope, facts: dict[str, Any], message: str | None) -> None:
    refusal = certificate(scope=scope).refusal(replace(GREEDY, **facts))
    if message is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert message in refusal


LEVELS = [(0.01, 0.05), (0.02, 0.05), (0.02, 0.1), (0.05, 0.01), (0.05, 0.2)]


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ((0.02, 0.05), (0.02, 0.05)),  # there is one
        ((0.02, 0.07), (0.02, 0.05)),  # alpha equal, delta stricter
        ((0.03, 0.05), (0.02, 0.05)),  # the other way round
        ((0.04, 0.5), (0.02, 0.1)),  # two of one alpha: the larger delta
        ((0.9, 0.9), (0.05, 0.2)),
        ((0.9, 0.1), (0.05, 0.01)),  # the largest alpha goes first, however strict its delta
        ((0.05, 0.005), None),  # no delta as small
        ((0.005, 0.5), None),  # no alpha as small
    ],
)
def test_which_certificate_a_request_gets(asked: tuple[float, float], given: tuple[float, float] | None) -> None:
    contracts = Contracts(certificate(*levels) for levels in LEVELS)
    resolution = contracts.resolve(*asked, GREEDY)
    if given is None:
        assert resolution.certificate is None
        assert "no certificate is as strict as" in resolution.reason
        assert "(0.01, 0.05)" in resolution.reason
        return
    assert resolution.certificate is not None
    assert (resolution.certificate.alpha, resolution.certificate.delta) == given
    assert resolution.certificate.id in resolution.reason
    assert resolution.reason.endswith("as asked" if asked == given else "that was asked for")


def test_a_stricter_certificate_serves_when_the_nearest_does_not_cover_the_request() -> None:
    short, long = certificate(0.05), certificate(0.02, scope=Scope(max_tokens=512, prompts="x"))
    contracts = Contracts([short, long])
    assert contracts.resolve(0.05, 0.1, GREEDY).certificate is short
    assert contracts.resolve(0.05, 0.1, replace(GREEDY, max_tokens=512)).certificate is long
    assert contracts.resolve(0.05, 0.1, replace(GREEDY, max_tokens=1024)).certificate is short  # for its beginning
    resolution = contracts.resolve(0.05, 0.1, replace(GREEDY, max_tokens=4))
    assert resolution.certificate is None
    for refused in (short, long):
        assert f"certificate {refused.id}: it covers max_tokens from 8 on" in resolution.reason


def test_a_certificate_of_an_earlier_format_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    save_certificate(certificate(), file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    with pytest.raises(OutdatedCertificate, match=r"format 1, which binds neither .* `dynamoe calibrate model="):
        load_certificate(file)


def test_one_level_may_have_a_certificate_for_greedy_requests_and_one_for_sampling() -> None:
    greedy, sampled = certificate(), certificate(scope=SAMPLED)
    contracts = Contracts([sampled, greedy])
    assert contracts.resolve(0.05, 0.1, GREEDY).certificate is greedy
    drawn = replace(GREEDY, greedy=False, temperature=0.8)
    assert contracts.resolve(0.05, 0.1, drawn).certificate is sampled
    with pytest.raises(ValueError, match=r"are both for alpha=0\.05, delta=0\.1 at temperature 0\.5"):
        Contracts([sampled, certificate(scope=replace(SAMPLED, max_tokens=65))])


def test_no_certificates_mean_exact() -> None:
    resolution = Contracts().resolve(0.05, 0.1, GREEDY)
    assert resolution.certificate is None
    assert resolution.reason.endswith("there is none")


@pytest.mark.parametrize("levels", [(0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (0.1, float("nan"))])
def test_levels_outside_the_unit_interval_are_refused(levels: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        Contracts().resolve(*levels, GREEDY)
