"""The live monitor: each step once, whatever is repeated or restarted; who fires stays reverted; nobody else's file."""

from __future__ import annotations

import base64
import sqlite3
import stat
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dynamoe.dynamic.contract.certificate import Certificate, HeldOut, Scope
from dynamoe.dynamic.contract.e_process import EProcess
from dynamoe.dynamic.contract.monitor import MonitorConfig, RiskMonitor
from forks import run_processes
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

ALL = MonitorConfig(share=1.0, tenant_share=1.0)


def certificate(alpha: float = 0.05, delta: float = 0.05, created: str = "2026-01-31") -> Certificate:
    return Certificate(
        alpha=alpha,
        delta=delta,
        requests=400,
        method="wsr",
        loss="token disagreement, greedy",
        scope=Scope(max_tokens=64, prompts="manual pages"),
        exit_thresholds={4: 0.9},
        held_out=HeldOut(requests=100, mean_loss=0.02, low=0.01, high=0.03, layers_executed=0.9),
        created=created,
        deployment={"weights": "9f2c"},
    )


FIRST, SECOND = certificate(), certificate(created="2026-02-01")


def serve(monitor: RiskMonitor, request_id: str, loss: float, watched: Certificate = FIRST) -> None:
    """A picked request's whole way."""
    assert monitor.admit(request_id, watched.id)
    assert monitor.finished(request_id, [1, 2], [[3]])
    assert monitor.record_loss(request_id, loss)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "monitor.db"


def opened(file: Path, config: MonitorConfig = ALL, *certificates: Certificate) -> RiskMonitor:
    monitor = RiskMonitor(file, config)
    for watched in certificates or (FIRST,):
        monitor.register(watched)
    return monitor


def test_a_request_from_the_coin_to_the_bet(file: Path) -> None:
    monitor = opened(file)
    assert monitor.next_pending() is None
    assert monitor.admit("a", FIRST.id)
    assert monitor.admit("b", FIRST.id)
    assert monitor.finished("b", [5, 6], [[7, 8], [9]])
    assert monitor.finished("a", [1], [[2]])
    pending = monitor.next_pending()
    assert pending is not None
    assert (pending.request_id, pending.certificate_id) == ("a", FIRST.id)  # the oldest pick, not the first to finish
    assert monitor.record_loss("a", 0.25)
    pending = monitor.next_pending()
    assert pending is not None
    assert (pending.request_id, pending.prompt_tokens, pending.served_tokens) == ("b", [5, 6], [[7, 8], [9]])
    state = monitor.state(FIRST.id)
    assert (state.picks.running, state.picks.pending, state.picks.interrupted) == (0, 1, 0)
    assert state.process == EProcess.start(0.05, 0.05).observe(0.25)
    monitor.close()


def test_steps_taken_again_change_nothing(file: Path) -> None:
    monitor = opened(file)
    serve(monitor, "a", 0.25)
    before = monitor.state(FIRST.id)
    assert monitor.admit("a", FIRST.id)  # picked once, picked for good
    assert not monitor.finished("a", [1], [[2]])
    assert not monitor.record_loss("a", 1.0)
    assert monitor.state(FIRST.id) == before
    assert not monitor.finished("never seen", [1], [[2]])
    assert not monitor.record_loss("never seen", 1.0)
    monitor.close()


def test_the_coin_is_fair_seeded_and_new_after_a_restart(tmp_path: Path) -> None:
    throws: list[list[bool]] = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c"), (1, "a")):  # the last one opens the first file again
        monitor = opened(tmp_path / name, MonitorConfig(share=0.2, seed=seed))
        throws.append([monitor.admit(f"{len(throws)}-{i}", FIRST.id) for i in range(400)])
        monitor.close()
    assert throws[0] == throws[1]
    assert len({tuple(run) for run in throws}) == 3
    assert all(50 <= sum(run) <= 110 for run in throws)  # 80 ± 8 expected
    monitor = opened(tmp_path / "d", MonitorConfig(share=0.0))
    assert not any(monitor.admit(str(i), FIRST.id) for i in range(100))
    monitor.close()


def test_a_certificate_that_fired_stays_reverted_until_another_one_comes(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor, number = opened(file), 0
    while not monitor.is_reverted(FIRST.id):
        serve(monitor, str(number), 1.0)
        number += 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"certificate {FIRST.id} has fired: {number} monitored requests" in caplog.text
    assert not monitor.admit("later", FIRST.id)
    monitor.close()

    monitor = RiskMonitor(file, ALL)
    assert not monitor.register(FIRST)
    assert monitor.is_reverted(FIRST.id)
    assert monitor.register(SECOND)
    assert not monitor.is_reverted(SECOND.id)
    assert monitor.is_reverted(FIRST.id)
    assert monitor.admit("later", SECOND.id)
    assert monitor.state(SECOND.id).process.count == 0
    monitor.close()


def test_what_was_running_when_the_process_ended_is_marked(file: Path) -> None:
    monitor = opened(file)
    for request_id in ("a", "b", "c"):
        monitor.admit(request_id, FIRST.id)
    monitor.finished("b", [1], [[2]])
    monitor.close()
    monitor = opened(file)
    picks = monitor.state(FIRST.id).picks
    assert (picks.running, picks.pending, picks.interrupted) == (0, 1, 2)
    with pytest.raises(ValueError, match="request 'a' is interrupted: it has no output and can have no loss"):
        monitor.record_loss("a", 0.0)
    assert monitor.admit("a", FIRST.id)  # its caller tries again
    assert monitor.finished("a", [1], [[2]])
    pending = monitor.next_pending()
    assert pending is not None
    assert pending.request_id == "a"
    assert monitor.state(FIRST.id).picks.interrupted == 1
    monitor.close()


def test_a_request_that_served_nothing_counts_as_interrupted(file: Path) -> None:
    monitor = opened(file)
    monitor.admit("a", FIRST.id)
    assert monitor.finished("a", [1], [[], []])
    assert monitor.next_pending() is None
    assert monitor.state(FIRST.id).picks.interrupted == 1
    monitor.close()


def test_picks_of_a_certificate_that_is_not_armed_wait(file: Path) -> None:
    """It belongs to a deployment that does not run: this one's model would judge them wrongly."""
    monitor = opened(file, ALL, FIRST, SECOND)
    monitor.admit("a", FIRST.id)
    monitor.finished("a", [1], [[2]])
    monitor.close()
    monitor = opened(file, ALL, SECOND)
    assert monitor.next_pending() is None
    assert monitor.state(FIRST.id).picks.pending == 1
    monitor.register(FIRST)
    pending = monitor.next_pending()
    assert pending is not None
    assert pending.request_id == "a"
    monitor.close()


def test_the_file_does_not_grow_with_the_requests(file: Path) -> None:
    monitor = opened(file, MonitorConfig(share=1.0, keep=5))
    assert monitor.admit("waits", FIRST.id)
    assert monitor.finished("waits", [1], [[2]])
    for number in range(50):
        serve(monitor, f"r{number}", 0.0)
    assert monitor.state(FIRST.id).picks.pending == 1  # never forgotten, however old
    monitor.close()
    connection = sqlite3.connect(file)
    rows = connection.execute("SELECT request, state, prompt FROM picks ORDER BY number").fetchall()
    connection.close()
    assert rows == [("waits", "pending", "[1]"), *((f"r{number}", "counted", None) for number in range(45, 50))]


def test_the_file_is_private_and_has_one_owner(file: Path) -> None:
    monitor = opened(file)
    serve(monitor, "a", 0.0)
    assert [stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()] == [0o600, 0o600]
    with pytest.raises(ValueError, match=r"monitor\.db is in use"):
        RiskMonitor(file)
    # That attempt, in the process that holds the locks, has not let go of them.
    code = (
        "import sys; from pathlib import Path; from dynamoe.dynamic.contract.monitor import RiskMonitor; "
        "RiskMonitor(Path(sys.argv[1]))"
    )
    _, said = run_processes(["-c", code, str(file)], 1, file.parent)
    assert "monitor.db is in use" in said
    serve(monitor, "b", 0.0)
    monitor.close()
    opened(file).close()


def make_other_database(file: Path, statement: str) -> None:
    connection = sqlite3.connect(file)
    connection.execute(statement)
    connection.close()


def test_other_files_are_refused_and_left_as_they_are(file: Path) -> None:
    file.write_text("no database at all, only text " * 100)
    with pytest.raises(ValueError, match=r"monitor\.db cannot be used: file is not a database"):
        RiskMonitor(file)
    file.unlink()
    make_other_database(file, "CREATE TABLE recipes (name TEXT)")
    content = file.read_bytes()
    with pytest.raises(ValueError, match=r"monitor\.db is the database of another program"):
        RiskMonitor(file)
    assert file.read_bytes() == content
    file.unlink()
    opened(file).close()
    make_other_database(file, "PRAGMA user_version = 7")
    with pytest.raises(ValueError, match=r"monitor\.db has format 7; this version reads 2"):
        RiskMonitor(file)
    with pytest.raises(ValueError, match="cannot be opened"):
        RiskMonitor(file.parent / "nowhere" / "monitor.db")


def drawn(temperature: str = "1.0", states: int = 16) -> str:
    """Sets an output of two tokens that were drawn."""
    text = base64.b64encode(bytes(states)).decode()
    served = f'{{"tokens":[[3],[4]],"temperature":{temperature},"states":"{text}"}}'
    return f"UPDATE picks SET served = '{served}' WHERE state = 'pending'"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DROP TABLE bets", "cannot be used: no such table: bets"),
        ("DELETE FROM openings", "is damaged: it does not say how often it was opened"),
        ("UPDATE certificates SET process = '{'", "is damaged: '{' is not the state of a bet"),
        ("UPDATE bets SET process = 'null'", "is damaged: 'null' is not the state of a bet"),
        ("UPDATE picks SET prompt = '[1' WHERE state = 'pending'", "is damaged: Expecting"),
        (
            "UPDATE picks SET prompt = '[1.5]' WHERE state = 'pending'",
            "is damaged: an output holds no tokens, or something",
        ),
        ("UPDATE picks SET served = '[]' WHERE state = 'pending'", "is damaged: an output holds no tokens"),
        ("UPDATE picks SET served = NULL WHERE state = 'pending'", "is damaged: the JSON object must be"),
        ("UPDATE picks SET served = '{}' WHERE state = 'pending'", "is damaged: 'temperature'"),
        (drawn(temperature='"1"'), "is damaged: the temperature of an output is '1'"),
        (drawn(temperature="0"), "is damaged: the temperature of an output is 0"),
        (drawn(temperature="NaN"), "is damaged: the temperature of an output is nan"),
        (drawn(temperature="true"), "is damaged: the temperature of an output is True"),
        (drawn(states=12), "is damaged: an output of 2 tokens has 12 bytes of states"),
        (drawn(states=0), "is damaged: an output of 2 tokens has 0 bytes of states"),
        (f"UPDATE picks SET served = '{'[' * 100_000}' WHERE state = 'pending'", "is damaged: maximum recursion"),
    ],
)
def test_content_that_would_stop_the_bets_is_refused_at_the_start(file: Path, statement: str, message: str) -> None:
    monitor = opened(file)
    serve(monitor, "a", 0.0)
    assert monitor.admit("b", FIRST.id)
    assert monitor.finished("b", [1, 2], [[3]])
    monitor.close()
    opened(file).close()
    connection = sqlite3.connect(file, isolation_level=None)
    assert connection.execute(statement).rowcount != 0
    connection.close()
    with pytest.raises(ValueError, match=rf"monitor\.db {message}"):
        RiskMonitor(file)


def test_nonsense_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"share must be between 0 and 1, not 1\.5"):
        MonitorConfig(share=1.5)
    with pytest.raises(ValueError, match="keep must be at least 1, not 0"):
        RiskMonitor(file, MonitorConfig(keep=0))
    monitor = opened(file)
    for call in (monitor.is_reverted, lambda unknown: monitor.admit("a", unknown)):
        with pytest.raises(ValueError, match=f"certificate '{SECOND.id}' is not registered"):
            call(SECOND.id)
    with pytest.raises(ValueError, match=f"certificate '{SECOND.id}' is not monitored"):
        monitor.state(SECOND.id)
    monitor.admit("a", FIRST.id)
    with pytest.raises(ValueError, match="request 'a' is running: it has no output"):
        monitor.record_loss("a", 0.1)
    monitor.finished("a", [1], [[2]])
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        monitor.record_loss("a", 1.5)
    assert monitor.state(FIRST.id).picks.pending == 1  # nothing was lost over it
    monitor.close()


def test_threads(file: Path) -> None:
    """Ten threads admit and finish; two race to count each loss."""
    monitor = opened(file)
    counted, lock = [], threading.Lock()

    def run(number: int) -> None:
        for step in range(10):
            request_id = f"{number}-{step}"
            assert monitor.admit(request_id, FIRST.id)
            assert monitor.finished(request_id, [1], [[2]])
            if (pending := monitor.next_pending()) and monitor.record_loss(pending.request_id, 0.01):
                with lock:
                    counted.append(pending.request_id)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(run, range(10)))
    state = monitor.state(FIRST.id)
    assert len(set(counted)) == len(counted) == state.process.count
    assert state.process.count + state.picks.pending == 100
    monitor.close()


class Model(RuleBasedStateMachine):
    """The file against dictionaries: any steps in any order, on any ids, with restarts in between."""

    KEEP = 4

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name, "monitor.db")
        self.picks: dict[str, tuple[int, str, str]] = {}  # request → number, certificate, state
        self.bets = {c.id: EProcess.start(c.alpha, c.delta) for c in (FIRST, SECOND)}
        self.interrupted = {FIRST.id: 0, SECOND.id: 0}
        self.newest = 0
        self.open()

    def open(self) -> None:
        self.monitor = opened(self.file, MonitorConfig(share=0.7, keep=self.KEEP, tenant_share=1.0), FIRST, SECOND)

    def move(self, request_id: str, state: str) -> None:
        number, watched, before = self.picks[request_id]
        self.interrupted[watched] += (state == "interrupted") - (before == "interrupted")
        self.picks[request_id] = (number, watched, state)
        if state in ("interrupted", "counted"):
            last = self.newest - self.KEEP
            done = [r for r, (n, _, s) in self.picks.items() if n <= last and s in ("counted", "interrupted")]
            for forgotten in done:
                del self.picks[forgotten]

    ids = st.sampled_from([str(number) for number in range(12)])

    @rule(request_id=ids, watched=st.sampled_from([FIRST, SECOND]))
    def admit(self, request_id: str, watched: Certificate) -> None:
        picked = self.monitor.admit(request_id, watched.id)
        if request_id in self.picks:
            assert picked
            if self.picks[request_id][2] == "interrupted":
                self.move(request_id, "running")
        elif picked:
            assert not self.bets[watched.id].fired
            self.newest += 1
            self.picks[request_id] = (self.newest, watched.id, "running")

    @rule(request_id=ids, served=st.lists(st.lists(st.integers(0, 99), max_size=2), min_size=1, max_size=2))
    def finish(self, request_id: str, served: list[list[int]]) -> None:
        running = request_id in self.picks and self.picks[request_id][2] == "running"
        assert self.monitor.finished(request_id, [1], served) == running
        if running:
            self.move(request_id, "pending" if any(served) else "interrupted")

    @rule(request_id=ids, loss=st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    def record(self, request_id: str, loss: float) -> None:
        _, watched, state = self.picks.get(request_id, (0, "", "counted"))
        if state in ("running", "interrupted"):
            with pytest.raises(ValueError, match="can have no loss"):
                self.monitor.record_loss(request_id, loss)
            return
        assert self.monitor.record_loss(request_id, loss) == (state == "pending")
        if state == "pending":
            self.bets[watched] = self.bets[watched].observe(loss)
            self.move(request_id, "counted")

    @rule()
    def restart(self) -> None:
        self.monitor.close()
        self.open()
        for request_id in [r for r, (_, _, state) in self.picks.items() if state == "running"]:
            self.move(request_id, "interrupted")

    @invariant()
    def agrees(self) -> None:
        states = [(watched, state) for _, watched, state in self.picks.values()]
        for watched, process in self.bets.items():
            found = self.monitor.state(watched)
            assert found.process == process
            assert found.picks.running == states.count((watched, "running"))
            assert found.picks.pending == states.count((watched, "pending"))
            assert found.picks.interrupted == self.interrupted[watched]
            assert self.monitor.is_reverted(watched) == process.fired
        oldest = min(((n, r) for r, (n, _, state) in self.picks.items() if state == "pending"), default=None)
        pending = self.monitor.next_pending()
        assert (pending and pending.request_id) == (oldest and oldest[1])

    def teardown(self) -> None:
        self.monitor.close()
        self.folder.cleanup()


Model.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None, derandomize=True)
test_any_order_of_steps = Model.TestCase


def test_a_pick_is_taken_back_only_while_its_request_has_not_ended(file: Path) -> None:
    monitor = opened(file)
    assert monitor.admit("a", FIRST.id)
    assert monitor.withdraw("a")
    assert not monitor.withdraw("a")
    assert not monitor.finished("a", [1], [[2]])
    assert monitor.admit("b", FIRST.id)
    assert monitor.finished("b", [1], [[2]])
    assert not monitor.withdraw("b")
    assert not monitor.withdraw("never picked")
    state = monitor.state(FIRST.id)
    assert (state.picks.running, state.picks.pending, state.picks.interrupted) == (0, 1, 0)
    monitor.close()
