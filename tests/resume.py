"""Long runs of the tests can be stopped and go on: with ``--resume``, what has passed is not run again.

What has passed is kept under ``.pytest_cache`` until a run gets to its end, and counts as long as no file of the
project has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from pathlib import Path

import pytest

_SUFFIXES = {".py", ".cpp", ".h", ".yaml", ".json", ".jinja", ".md", ".toml", ".txt"}
_FOLDERS = ("benchmarks", "conf", "docs", "dynamic", "examples", "exits", "kernels", "moe", "serve", "tests")


def digest_of(root: Path) -> str:
    """Of all files that tests depend on."""
    found = [*root.glob("*"), *(file for folder in _FOLDERS for file in (root / folder).rglob("*"))]
    digest = hashlib.sha256()
    for file in sorted(file for file in found if file.suffix in _SUFFIXES and file.is_file()):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Resume:
    """What passed in earlier runs, and a record of what passes in this one, which workers have not."""

    def __init__(self, passed: list[str], record: Path | None) -> None:
        self.passed = passed
        self._record = record
        self._failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
        yield  # others, which share the tests out, see all of them
        passed = set(self.passed)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: object) -> None:
        node.workerinput["passed"] = self.passed  # type: ignore[attr-defined]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        if self._record and report.when == "teardown" and report.nodeid not in self._failed:
            with self._record.open("a") as record:
                record.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self._record and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed:
            session.exitstatus = exitstatus = pytest.ExitCode.OK  # nothing was left to do
        if self._record and exitstatus == pytest.ExitCode.OK:
            self._record.unlink(missing_ok=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", action="store_true", help="skip what passed in a run that did not get to its end")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--resume"):
        return
    if (workerinput := getattr(config, "workerinput", None)) is not None:
        config.pluginmanager.register(Resume(workerinput["passed"], None))
        return
    shard = "-".join(str(config.getoption(name, None) or 1) for name in ("splits", "group"))
    record = config.rootpath / ".pytest_cache" / "passed" / f"{digest_of(config.rootpath)}-{shard}"
    record.parent.mkdir(parents=True, exist_ok=True)
    passed = record.read_text().splitlines() if record.is_file() else []
    config.pluginmanager.register(Resume(passed, record))
