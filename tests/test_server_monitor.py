"""Contracts that are watched while they are served: real servers, full runs in their idle time, what comes of them."""

from __future__ import annotations

import json
import re
import resource
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.contract.served_loss import disagreements, losses
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from forks import run_processes

MAX_TOKENS = 12
RECKLESS, CAREFUL = 0.0, 1.0  # probability from which on a token leaves
USER, OPERATOR = {"authorization": "Bearer user"}, {"authorization": "Bearer operator"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", progress=False)


@pytest.fixture(scope="module")
def running(llm: LLM) -> Mapping[str, Any]:
    return deployment(llm.model, llm.engine.runner.exits)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (resolve_model("tiny") / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:200]]


@dataclass
class Client:
    """Asks one server for completions under a contract."""

    server: Any
    alpha: float

    def ask(self, prompt: str, **fields: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": MAX_TOKENS, "quality": {"alpha": self.alpha}}
        answer = httpx.post(f"{self.server.url}/v1/completions", json=body | fields, headers=USER, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def compute(self, prompt: str, **fields: Any) -> dict[str, Any]:
        return self.ask(prompt, **fields)["usage"]["compute"]

    def contracts(self) -> dict[str, Any]:
        return httpx.get(f"{self.server.url}/v1/contracts", headers=USER, timeout=60).json()

    def card(self) -> dict[str, Any]:
        (card,) = self.contracts()["data"]
        return card

    def metrics(self, certificate: str) -> dict[str, float]:
        text = httpx.get(f"{self.server.url}/metrics", headers=OPERATOR, timeout=60).text
        line = rf'^dynamoe:contract_(\w+){{certificate="{certificate}".*}} (\S+)$'
        return {name: float(value) for name, value in re.findall(line, text, re.M)}

    def settled(self) -> dict[str, Any]:
        """What the monitor says once nothing runs and no pick waits for its full run."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            card = self.card()
            if not card["monitor"]["running"] + card["monitor"]["pending"]:
                return card
            time.sleep(0.02)
        raise AssertionError(f"picks are left waiting: {card}")


def options(certificates: Path, file: Path, share: float = 1) -> list[str]:
    quality = [f"quality.certificates={json.dumps(str(certificates))}", f"quality.monitor.file={json.dumps(str(file))}"]
    return [*quality, f"quality.monitor.share={share}"]


def test_a_planted_drift_ends_the_contract_for_good_and_a_new_certificate_brings_it_back(
    start_server: Any,
    certify: Any,
    running: Mapping[str, Any],
    prompts: list[str],
    llm: LLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))
    directory = tmp_path / "certificates"
    drifted = certify(directory, running, 0.01, RECKLESS)
    arguments = ["server.api_keys=[user,other]", "server.admin_key=operator", "quality.monitor.share=1"]
    arguments.append(f"quality.certificates={json.dumps(str(directory))}")
    client = Client(start_server(resolve_model("tiny"), *arguments), 0.01)
    assert (client.card()["state"], client.card()["monitor"]["fires_at"]) == ("watched", 20)

    asked = 0
    while client.card()["state"] == "watched":
        assert asked < 200
        compute = client.compute(prompts[asked])
        asked += 1
        assert compute["certificates"] == [drifted.id]
        client.settled()
    card = client.card()
    assert card["state"] == "reverted"
    assert card["monitor"]["fired_at_loss"] == card["monitor"]["losses"] == card["monitor"]["picks"] == asked
    assert card["monitor"]["wealth"] >= 20

    # The very loss of the calibration.
    spends = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, quality=None, exit_thresholds={4: RECKLESS})
    outputs = llm.generate(prompts[:asked], spends, use_tqdm=False)
    assert card["monitor"]["realised_risk"] == pytest.approx(disagreements(llm.model.decoder, outputs).mean())
    assert card["monitor"]["realised_risk"] > 0.1

    def runs_exactly() -> None:
        answer = client.ask(prompts[200 - 1])
        assert answer["choices"] == client.ask(prompts[200 - 1], quality="exact")["choices"]
        compute = answer["usage"]["compute"]
        assert (compute["quality"], compute["certificates"], compute["layers_per_token"]) == ("exact", [], 16)
        assert f"certificate {drifted.id} is reverted" in compute["reason"]
        assert "a new certificate is needed" in compute["reason"]

    runs_exactly()
    body = {"prompt": prompts[0], "temperature": 0, "max_tokens": MAX_TOKENS, "quality": {"alpha": 0.01}, "n": 1}
    others = httpx.post(
        f"{client.server.url}/v1/completions", json=body, headers={"authorization": "Bearer other"}, timeout=60
    ).json()
    assert others["usage"]["compute"]["certificates"] == [drifted.id]  # whose own requests have done no harm yet
    client.settled()
    card = client.card()
    assert (card["state"], card["monitor"]["tenants"], card["monitor"]["reverted_tenants"]) == ("watched", 2, 1)
    assert not card["monitor"]["everybody"]
    client.server.logged(f"certificate {drifted.id} has fired for key")
    metrics = client.metrics(drifted.id)
    assert (metrics["armed"], metrics["fired"], metrics["offered"]) == (1, 1, 1)
    assert metrics["reverted_tenants"] == 1
    assert metrics["picks_total"] == metrics["losses_total"] == asked + 1
    assert (metrics["picks_pending"], metrics["picks_interrupted_total"]) == (0, 0)
    assert metrics["realised_risk"] == card["monitor"]["realised_risk"]
    assert metrics["wealth"] == card["monitor"]["wealth"]

    assert client.server.stop() == 0
    (file,) = (tmp_path / "home" / "monitor").glob("*.db")  # of this model at this address
    assert file.stat().st_mode & 0o777 == 0o600
    address = f"server.port={client.server.url.rpartition(':')[2]}"
    client = Client(start_server(resolve_model("tiny"), *arguments, address), 0.01)
    assert client.card() == card
    client.server.logged(f"certificate {drifted.id} has fired before")
    runs_exactly()
    replace_while_serving(client, certify, running, directory, drifted, prompts)


def replace_while_serving(
    client: Client, certify: Any, running: Mapping[str, Any], directory: Path, drifted: Any, prompts: list[str]
) -> None:
    """New certificates while requests come and go: bad ones change nothing, a good one takes the place of the old."""
    url = f"{client.server.url}/v1/contracts/reload"
    before = client.contracts()
    assert httpx.post(url, json={}, headers=USER, timeout=60).status_code == 403
    (directory / "broken.json").write_text('{"format": 1')
    answer = httpx.post(url, json={}, headers=OPERATOR, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "bad_certificates")
    assert "broken.json" in answer.json()["error"]["message"]
    (directory / "broken.json").unlink()
    renewed = certify(directory, running, 0.01, CAREFUL)
    answer = httpx.post(url, json={}, headers=OPERATOR, timeout=60)  # two of one level
    assert answer.status_code == 409
    assert drifted.id in answer.json()["error"]["message"]
    assert client.contracts() == before

    stop, certificates = threading.Event(), []

    def keep_asking() -> None:
        while not stop.is_set():
            certificates.extend(client.compute(prompts[0])["certificates"])

    others = threading.Thread(target=keep_asking)
    others.start()
    (directory / f"{drifted.id}.json").unlink()
    elsewhere = certify(directory, {**running, "dtype": "float32"}, 0.02, CAREFUL)
    answer = httpx.post(url, json={}, headers=OPERATOR, timeout=60)
    assert answer.status_code == 200
    (card,) = answer.json()["data"]
    assert (card["id"], card["state"], card["monitor"]["wealth"]) == (renewed.id, "watched", 1)
    (refused,) = answer.json()["refused"]
    assert elsewhere.id in refused
    assert "dtype" in refused
    assert client.compute(prompts[1])["certificates"] == [renewed.id]
    stop.set()
    others.join()
    assert set(certificates) <= {renewed.id}
    settled = client.settled()["monitor"]
    assert settled["losses"] == settled["picks"] > 0
    assert client.metrics(drifted.id)["fired"] == 1  # still watched: its picks are not forgotten
    assert "offered" not in client.metrics(drifted.id)


@pytest.fixture(scope="module")
def watched(
    start_server: Any, certify: Any, running: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Client:
    """A server with a short queue and one certificate, all of whose requests are picked, and which nothing fires."""
    root = tmp_path_factory.mktemp("watched")
    certify(root / "certificates", running, 0.9, RECKLESS)
    arguments = [*options(root / "certificates", root / "monitor.db"), "engine.max_waiting=8"]
    return Client(start_server(resolve_model("tiny"), *arguments), 0.9)


def test_a_request_whose_client_leaves_is_judged_by_what_it_got(watched: Client, prompts: list[str]) -> None:
    before = watched.settled()["monitor"]
    body = {"prompt": prompts[0], "temperature": 0, "max_tokens": 64, "quality": {"alpha": 0.9}, "stream": True}
    body["prompt"] = [body["prompt"]] * 4
    with httpx.stream("POST", f"{watched.server.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    watched.server.logged("client_gone")
    after = watched.settled()["monitor"]
    assert after["picks"] - before["picks"] == 4
    assert after["losses"] - before["losses"] + after["interrupted"] - before["interrupted"] == 4
    assert after["losses"] > before["losses"]


def test_what_the_engine_refuses_is_no_pick(watched: Client, prompts: list[str]) -> None:
    before = watched.settled()["monitor"]
    body = {"prompt": prompts[:16], "max_tokens": 4, "quality": {"alpha": 0.9}, "temperature": 0}
    answer = httpx.post(f"{watched.server.url}/v1/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "engine_overloaded")
    watched.compute(prompts[0])
    after = watched.settled()["monitor"]
    assert after["picks"] - before["picks"] == after["losses"] - before["losses"] == 1
    assert after["interrupted"] == before["interrupted"]


def test_a_failing_disk_costs_savings_and_no_answer(watched: Client, prompts: list[str]) -> None:
    process = watched.server.process.pid
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    certified = watched.compute(prompts[0])
    assert certified["quality"] == "bounded"
    watched.settled()
    try:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (16384, hard))  # the monitor's log is longer than that
        failing = watched.compute(prompts[0])
        assert failing["quality"] == "exact"
        assert "the monitor's disk fails" in failing["reason"]
        assert watched.compute(prompts[1])["quality"] == "exact"
        assert httpx.get(f"{watched.server.url}/health", timeout=60).status_code == 200
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))
    assert watched.compute(prompts[0])["certificates"] == certified["certificates"]
    monitor = watched.settled()["monitor"]
    assert monitor["losses"] + monitor["interrupted"] == monitor["picks"]


def test_a_file_in_use_is_said_in_one_line(watched: Client, tmp_path: Path) -> None:
    same = watched.server.process.args[7:9]
    code, error = run_processes(["-m", "dynamoe", "serve", "model=tiny", "server.port=0", *same], 1, tmp_path)
    assert code == 2
    assert "monitor.db is in use" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_without_a_share_nothing_is_picked_and_no_file_made(
    start_server: Any, certify: Callable[..., Any], running: Mapping[str, Any], prompts: list[str], tmp_path: Path
) -> None:
    certify(tmp_path / "certificates", running, 0.3, RECKLESS)
    arguments = options(tmp_path / "certificates", tmp_path / "none" / "monitor.db", share=0)
    client = Client(start_server(resolve_model("tiny"), *arguments), 0.3)
    assert client.compute(prompts[0])["quality"] == "bounded"
    assert (client.card()["state"], client.card()["monitor"]) == ("unwatched", None)
    assert not (tmp_path / "none").exists()


def test_requests_that_sample_are_watched_by_their_distributions(
    start_server: Any,
    certify: Callable[..., Any],
    running: Mapping[str, Any],
    prompts: list[str],
    llm: LLM,
    tmp_path: Path,
) -> None:
    certify(tmp_path / "certificates", running, 0.5, RECKLESS, lowest_temperature=0.8, highest_temperature=0.8)
    client = Client(
        start_server(resolve_model("tiny"), *options(tmp_path / "certificates", tmp_path / "monitor.db")), 0.5
    )
    assert "covers temperatures 0.8 to 0.8, not 0" in client.compute(prompts[0])["reason"]
    for seed in range(6):
        compute = client.compute(prompts[seed], temperature=0.8, seed=seed, n=1 + seed % 2)
        assert compute["quality"] == "bounded"
    assert client.settled()["monitor"]["losses"] == 6
    spends = [
        SamplingParams(
            temperature=0.8,
            seed=seed,
            n=1 + seed % 2,
            max_tokens=MAX_TOKENS,
            quality=None,
            exit_thresholds={4: RECKLESS},
            keep_states=True,
        )
        for seed in range(6)
    ]
    outputs = llm.generate(prompts[:6], spends, use_tqdm=False)
    expected = losses(llm.model.decoder, outputs, 0.8).mean()
    assert client.card()["monitor"]["realised_risk"] == pytest.approx(expected)
    assert expected > 0.1
