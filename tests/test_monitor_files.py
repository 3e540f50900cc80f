"""The monitor's files: nothing of a prompt stays once its loss is counted; as many files as servers at once."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from pathlib import Path

import pytest
from dynamoe.dynamic.contract.monitor_files import KEEP_DAYS, open_first, remove_stale
from dynamoe.dynamic.contract.monitor_records import Draws, Served
from dynamoe.dynamic.contract.monitor_store import MonitorInUse, MonitorStore
from dynamoe.serve.contracts import default_monitor_file

PROMPT = [123457 + 7 * number for number in range(2000)]  # several pages
OUTPUT = Served(
    prompt_tokens=PROMPT, served_tokens=[[98765, 98764]], draws=Draws(temperature=1.0, states=b"SECRETSTATE" * 1000)
)
MARKS = (b"123464,123471", b"98765,98764", b"U0VDUkVUU1RBVEVTRUNSRVRTVEFUR")


def kept(folder: Path) -> list[str]:
    """Marks that any file of a folder holds."""
    return sorted(
        f"{path.name}: {mark.decode()}" for path in folder.iterdir() for mark in MARKS if mark in path.read_bytes()
    )


@pytest.fixture
def store(tmp_path: Path) -> MonitorStore:
    return registered(tmp_path / "monitor.db")


def registered(file: Path) -> MonitorStore:
    store = MonitorStore(file)
    store.register("c", 0.05, 0.05)
    return store


def finish(store: MonitorStore, request: str) -> None:
    store.pick(request, "c")
    assert store.finish(request, OUTPUT)


def test_nothing_of_a_prompt_is_in_any_file_once_its_loss_is_counted(store: MonitorStore, tmp_path: Path) -> None:
    finish(store, "one")
    assert len(kept(tmp_path)) == len(MARKS), "it waits for its loss"
    store.count_loss("one", 0.0)
    assert kept(tmp_path) == []
    for request in ("two", "three"):
        finish(store, request)
    store.count_loss("two", 1.0)
    assert kept(tmp_path), "one still waits"
    store.count_loss("three", 0.5)
    assert kept(tmp_path) == []
    store.close()
    assert kept(tmp_path) == []


def test_what_an_older_version_has_left_goes_when_the_file_is_opened(store: MonitorStore, tmp_path: Path) -> None:
    finish(store, "one")
    store.close()
    with sqlite3.connect(tmp_path / "monitor.db") as old:  # as that version wrote it
        old.execute("PRAGMA journal_mode = WAL")
        old.execute("PRAGMA secure_delete = OFF")
        old.execute("UPDATE picks SET state = 'counted', prompt = NULL, served = NULL")
    old.close()
    assert kept(tmp_path)
    opened = MonitorStore(tmp_path / "monitor.db")
    assert kept(tmp_path) == []
    assert opened.pick_state("one") == "counted"
    opened.close()


def test_a_killed_process_leaves_no_more_than_what_waits(store: MonitorStore, tmp_path: Path) -> None:
    finish(store, "one")
    store.count_loss("one", 0.0)
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in tmp_path.glob("monitor.db*"):  # what is there if the process ends now
        (copies / path.name).write_bytes(path.read_bytes())
    assert kept(copies) == []
    again = MonitorStore(copies / "monitor.db")
    assert again.process("c").count == 1
    again.close()


def test_servers_of_a_model_share_files_whatever_their_addresses(tmp_path: Path) -> None:
    file = tmp_path / "model-0a.db"
    first = open_first(file, MonitorStore)
    second = open_first(file, MonitorStore)
    third = open_first(file, MonitorStore)
    assert names(tmp_path) == ["model-0a-1.db", "model-0a-2.db", "model-0a.db"]
    with pytest.raises(MonitorInUse):
        MonitorStore(file)
    second.close()
    assert open_first(file, lambda path: (MonitorStore(path).close(), path.name)[1]) == "model-0a-1.db"
    for store in (first, third):
        store.close()
    for _ in range(20):
        open_first(file, MonitorStore).close()
    assert names(tmp_path) == ["model-0a-1.db", "model-0a-2.db", "model-0a.db"]
    file.write_bytes(b"not a database" * 99)
    with pytest.raises(ValueError, match=r"model-0a\.db cannot be used"):  # no other file takes its place in silence
        open_first(file, MonitorStore)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.db"))


def test_the_default_file_is_that_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path))
    model, other = tmp_path / "a" / "model", tmp_path / "b" / "model"
    assert default_monitor_file(model) == default_monitor_file(tmp_path / "a" / "x" / ".." / "model")
    assert default_monitor_file(model) != default_monitor_file(other)
    assert default_monitor_file(model).parent == tmp_path / "monitor"


def test_files_that_nobody_uses_are_removed_unless_a_certificate_has_fired(tmp_path: Path) -> None:
    for name in ("recent", "old", "held", "fired", "tenant"):
        store = registered(tmp_path / f"{name}.db")
        if name == "fired":
            for number in range(300):
                finish(store, str(number))
                store.count_loss(str(number), 1.0)
            assert store.process("c").fired
        store.close()
    with sqlite3.connect(tmp_path / "tenant.db") as own:
        own.execute("INSERT INTO bets VALUES ('c', 'key a', '{}', 0, 1, 1.0, 9.0, 7)")
    own.close()
    (tmp_path / "foreign.db").write_text("somebody else's")
    (tmp_path / "old.db-wal").touch()
    long_ago = time.time() - (KEEP_DAYS + 1) * 86400
    for path in tmp_path.iterdir():
        if path.stem != "recent":
            os.utime(path, (long_ago, long_ago))
    held = sqlite3.connect(tmp_path / "held.db", isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    assert [path.name for path in remove_stale(tmp_path)] == ["old.db"]
    held.close()
    assert names(tmp_path) == ["fired.db", "foreign.db", "held.db", "recent.db", "tenant.db"]
    assert not (tmp_path / "old.db-wal").exists()
    assert [path.name for path in remove_stale(tmp_path)] == ["held.db"]


def test_the_stored_prompt_is_the_one_that_is_looked_for() -> None:
    assert MARKS[0] in json.dumps(PROMPT, separators=(",", ":")).encode()
