"""A pytest plugin that runs each test in a forked process of its own, and writes the results after each.

    python -m pytest -s -p tests.forked --results FILE ...

A test that crashes, hangs or spoils the GPU fails alone. Other arguments are pytest's. It imports no torch itself, and
no collected module may initialise CUDA: a fixture may, as it runs in the process of its test.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from benchmarks._forked import ForkedProcess

_WHY = 2000  # characters of a reason


def pytest_addoption(parser):
    group = parser.getgroup("forked")
    group.addoption("--results", type=Path, required=True, help="JSON file for the results, written after each test")
    group.addoption("--test-seconds", type=float, default=120.0, help="time limit of a test")
    group.addoption("--all-seconds", type=float, default=3600.0, help="time limit of all tests")
    group.addoption("--at-once", type=int, default=1, help="tests that run at the same time")


class Results:
    """The results so far, in a file."""

    def __init__(self, path: Path) -> None:
        """Begin `path` without results."""
        self._path, self._rows = path, []
        self.write("running")

    def add(self, test: str, result: str, seconds: float = 0.0, why: str = "", **more: Any) -> None:
        """Add one test."""
        self._rows.append({"test": test, "result": result, "seconds": round(seconds, 2), "why": why[-_WHY:], **more})
        self.write("running")

    def write(self, status: str | int) -> None:
        """Write the file."""
        counts = Counter(row["result"] for row in self._rows)
        self._path.write_text(json.dumps({"status": status, **counts, "tests": self._rows}, indent=1) + "\n")


_RESULTS = pytest.StashKey[Results]()


def pytest_configure(config):
    config.stash[_RESULTS] = Results(config.option.results)


@pytest.hookimpl
def pytest_collectreport(report):
    if report.failed:
        _collected_badly.append((report.nodeid, report.longreprtext))


_collected_badly: list[tuple[str, str]] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    results, option = session.config.stash[_RESULTS], session.config.option
    for name, why in _collected_badly:
        results.add(name, "error", why=why)
    if _collected_badly and not option.continue_on_collection_errors:
        raise session.Interrupted(f"{len(_collected_badly)} errors during collection")
    if option.collectonly:
        return True
    end = time.monotonic() + option.all_seconds
    waiting, running = deque(session.items), list[tuple[pytest.Item, ForkedProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < option.at_once and time.monotonic() < end:
                item = waiting.popleft()
                limit = min(option.test_seconds, end - time.monotonic())
                running.append((item, ForkedProcess(lambda send, item=item: _run(item, send), limit)))
            for item, process in [pair for pair in running if pair[1].poll()]:
                running.remove((item, process))
                with contextlib.closing(process):
                    _report(item, process, results)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if waiting and not running and time.monotonic() >= end:
                for item in waiting:
                    results.add(item.nodeid, "not run", why="no time was left")
                raise session.Failed(f"no time was left for {len(waiting)} tests")
            time.sleep(0.01)
    finally:
        for _, process in running:
            process.close()
    return True


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[_RESULTS].write(int(exitstatus))


def _run(item, send):
    for report in runtestprotocol(item, log=False, nextitem=None):
        send(item.config.hook.pytest_report_to_serializable(config=item.config, report=report))


def _report(item, process, results):
    """Pass the reports of a test that has ended to pytest, and add its result."""
    hook = item.config.hook
    reports = [hook.pytest_report_from_serializable(config=item.config, data=data) for data in process.messages()]
    if process.failure is not None or not reports:
        why = f"{process.failure or 'ended without a report'}\n{process.printed}"
        reports.append(pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call"))
    elif process.printed:
        reports[-1].sections.append(("printed", process.printed))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    bad = next((report for report in reports if report.failed), None)
    skipped = next((report for report in reports if report.skipped), None)
    properties = dict(reports[-1].user_properties)
    if bad is not None:
        result = "failed" if bad.when == "call" else "error"
        results.add(item.nodeid, result, process.seconds, bad.longreprtext, **properties)
    elif skipped is not None:
        results.add(item.nodeid, "skipped", process.seconds, str(skipped.longrepr[2]), **properties)
    else:
        results.add(item.nodeid, "passed", process.seconds, **properties)
