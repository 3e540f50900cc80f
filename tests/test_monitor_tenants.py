"""One tenant's requests revoke a contract for that tenant alone, whatever it sends."""

from __future__ import annotations

import itertools
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from dynamoe.dynamic.contract import monitor_store
from dynamoe.dynamic.contract.certificate import Certificate, HeldOut, Scope
from dynamoe.dynamic.contract.e_process import EProcess
from dynamoe.dynamic.contract.monitor import MonitorConfig, RiskMonitor
from dynamoe.dynamic.contract.monitor_store import OTHERS, MonitorStore
from dynamoe.serve.contracts import tenant

ALPHA, DELTA = 0.02, 0.05
CERTIFICATE = Certificate(
    alpha=ALPHA,
    delta=DELTA,
    requests=400,
    method="wsr",
    loss="made up",
    scope=Scope(max_tokens=64, prompts="of a test"),
    exit_thresholds={4: 0.9},
    held_out=HeldOut(requests=100, mean_loss=0.01, low=0.01, high=0.01, layers_executed=0.9),
    created="2026-01-31",
    deployment={"weights": "9f2c"},
)
NUMBERS = itertools.count()


def opened(file: Path, share: float = 0.1) -> RiskMonitor:
    monitor = RiskMonitor(file, MonitorConfig(share=1.0, tenant_share=share))
    monitor.register(CERTIFICATE)
    return monitor


def served(monitor: RiskMonitor, whose: str, loss: float) -> bool:
    """Whether a request ran under the certificate; then its loss is counted."""
    request_id = str(next(NUMBERS))
    if not monitor.admit(request_id, CERTIFICATE.id, whose):
        assert monitor.is_reverted(CERTIFICATE.id, whose)
        return False
    assert monitor.finished(request_id, [1], [[2]])
    assert monitor.record_loss(request_id, loss)
    return True


def test_who_repeats_a_bad_prompt_loses_the_contract_and_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = opened(tmp_path / "monitor.db")
    honest = np.random.default_rng(0).beta(0.5, 35, 600)  # a mean of 1.4 %
    asked = {whose: sum(served(monitor, whose, loss) for loss in honest[:20]) for whose in map(str, range(15))}
    assert set(asked.values()) == {20}
    bad = 0
    while served(monitor, "bad", 0.5):
        bad += 1
        assert bad < 20
    assert bad == picks_until_it_fires(0.5)
    assert f"certificate {CERTIFICATE.id} has fired for bad" in caplog.text
    for turn, loss in enumerate(honest):
        assert served(monitor, str(turn % 15), float(loss))
        served(monitor, "bad", 0.5)
    state = monitor.state(CERTIFICATE.id)
    assert not state.process.fired
    assert (state.bets.tenants, state.bets.reverted, state.bets.fired_at) == (16, 1, bad)
    assert not monitor.is_reverted(CERTIFICATE.id, "new")
    monitor.close()
    monitor = opened(tmp_path / "monitor.db")  # for good
    assert [monitor.is_reverted(CERTIFICATE.id, whose) for whose in ("bad", "3", "new")] == [True, False, False]
    fired = monitor.fired_bet(CERTIFICATE.id, "bad")
    assert fired is not None
    assert (fired.count, fired.mean) == (bad, 0.5)
    monitor.close()


def picks_until_it_fires(loss: float) -> int:
    bet = EProcess.start(ALPHA, DELTA)
    while not bet.fired:
        bet = bet.observe(loss)
    return bet.count


def test_a_drift_of_all_tenants_reverts_for_everybody(tmp_path: Path) -> None:
    monitor = opened(tmp_path / "monitor.db")
    turns = 0
    while served(monitor, str(turns % 40), 0.06):
        turns += 1
        assert turns < 2000
    state = monitor.state(CERTIFICATE.id)
    assert state.process.fired
    assert state.bets.reverted == 0  # no tenant alone has seen enough
    assert monitor.is_reverted(CERTIFICATE.id, "somebody new")
    monitor.close()


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_no_tenant_has_more_than_its_share_of_the_pooled_bet(tmp_path: Path, share: float) -> None:
    store = MonitorStore(tmp_path / "monitor.db", tenant_share=share)
    store.register("c", ALPHA, DELTA)
    generator = np.random.default_rng(1)
    pooled: list[str] = []
    for number in range(600):
        whose = "loud" if generator.random() < 0.7 else str(generator.integers(30))
        store.pick(str(number), "c", whose)
        store.finish(str(number), monitor_store.Served(prompt_tokens=[1], served_tokens=[[2]]))
        before = store.process("c").count
        counted = store.count_loss(str(number), 0.0)
        assert counted is not None
        pooled += [whose] * (counted.pooled.count - before)
        assert pooled.count("loud") <= max(1, share * len(pooled))
    assert len(pooled) == store.process("c").count > 100
    assert store.totals("c").losses == 600
    store.close()


def test_there_is_an_end_to_tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_store, "MOST_TENANTS", 5)
    monitor = opened(tmp_path / "monitor.db")
    for number in range(50):
        served(monitor, f"address {number}", 0.5 if number >= 5 else 0.0)
    state = monitor.state(CERTIFICATE.id)
    assert state.bets.tenants == 6  # and all others together
    assert monitor.fired_bet(CERTIFICATE.id, "address 77") is not None
    assert monitor.fired_bet(CERTIFICATE.id, "address 3") is None
    assert not state.process.fired
    monitor.close()


def test_a_file_of_the_format_before_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "monitor.db"
    store = MonitorStore(file)
    store.register("c", ALPHA, DELTA)
    store.pick("a", "c")
    store.finish("a", monitor_store.Served(prompt_tokens=[1], served_tokens=[[2]]))
    store.close()
    old = sqlite3.connect(file)
    for statement in ("DROP TABLE bets", "ALTER TABLE picks DROP COLUMN tenant", "PRAGMA user_version = 1"):
        old.execute(statement)
    old.close()
    store = MonitorStore(file)
    counted = store.count_loss("a", 0.25)
    assert counted is not None
    assert counted.pooled == counted.own == EProcess.start(ALPHA, DELTA).observe(0.25)
    assert store.totals("c").tenants == 1
    assert counted.tenant != OTHERS
    store.close()


@pytest.mark.parametrize(
    ("key_id", "host", "found"),
    [
        ("0f3a", "10.0.0.1", "key 0f3a"),
        (None, "10.0.0.1", "address 10.0.0.1"),
        (None, "2001:db8:1:2:3:4:5:6", "address 2001:db8:1:2::"),
        (None, None, "local"),
    ],
)
def test_whose_a_request_is(key_id: str | None, host: str | None, found: str) -> None:
    assert tenant(key_id, host) == found
