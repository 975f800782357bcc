"""Each test in a process of its own (`tests/forked.py`), which `scripts/test-gpu` uses."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks._forked import ForkedProcess
from tests import PATIENCE

ROOT = Path(__file__).parents[1]
TESTS = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest

HERE = Path(__file__).parent
module = []  # what a test leaves behind is gone with its process


@pytest.fixture(scope="module", autouse=True)
def resource():
    yield
    (HERE / "torn-down").open("a").write("x")


def test_passes(record_property):
    module.append(1)
    record_property("gpu", "some card")


def test_fails():
    print("before the failure")
    assert module == [1]


def test_skips():
    pytest.skip("no such card")


def test_dies():
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_hangs():
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (HERE / "started").write_text(str(started.pid))
    time.sleep(60)


def test_exits():
    os._exit(0)


@pytest.fixture
def broken():
    raise RuntimeError("no fixture")


def test_has_no_fixture(broken):
    pass


def test_sees_the_results_so_far():
    found = json.loads((HERE / "results.json").read_text())
    assert found["status"] == "running"
    assert len(found["tests"]) == 7
"""


def run(tmp_path, *arguments, text=TESTS):
    (tmp_path / "test_odd.py").write_text(text)
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "tests.forked", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), "--results", str(results), *arguments, str(tmp_path / "test_odd.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done, json.loads(results.read_text())


def test_each_test_fails_alone_and_the_results_are_written_after_each(tmp_path):
    done, found = run(tmp_path, "--test-seconds", "2")
    rows = {row["test"].rpartition("::")[2]: row for row in found["tests"]}
    assert {name: row["result"] for name, row in rows.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_dies": "failed",
        "test_hangs": "failed",
        "test_exits": "failed",
        "test_has_no_fixture": "error",
        "test_sees_the_results_so_far": "passed",
    }
    assert (found["passed"], found["failed"], found["skipped"], found["error"]) == (2, 4, 1, 1)
    assert found["status"] == done.returncode == 1
    assert "assert [] == [1]" in rows["test_fails"]["why"]
    assert rows["test_skips"]["why"] == "Skipped: no such card"
    assert rows["test_dies"]["why"] == "died by SIGKILL\nlast words"
    assert rows["test_hangs"]["why"].startswith("killed after 2 s")
    assert rows["test_exits"]["why"].startswith("ended without a report")
    assert "no fixture" in rows["test_has_no_fixture"]["why"]
    assert rows["test_passes"]["gpu"] == "some card"
    assert "before the failure" in done.stdout
    assert "died by SIGKILL" in done.stdout
    assert (tmp_path / "torn-down").read_text() == "x" * 5, "each process tears down what it has set up"
    started = int((tmp_path / "started").read_text())
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE


def test_tests_can_be_chosen_and_stopped_as_pytest_does(tmp_path):
    done, found = run(tmp_path, "-k", "passes or fails or skips", "-x")
    assert [row["result"] for row in found["tests"]] == ["passed", "failed"]
    assert "2 deselected" not in done.stdout  # 5 are
    assert "5 deselected" in done.stdout


def test_tests_without_time_left_are_listed(tmp_path):
    text = "import time\n" + "".join(f"def test_{k}():\n    time.sleep({s})\n" for k, s in enumerate((0, 60, 0, 0)))
    begin = time.monotonic()
    done, found = run(tmp_path, "--all-seconds", "1", text=text)
    assert [row["result"] for row in found["tests"]] == ["passed", "failed", "not run", "not run"]
    assert done.returncode != 0
    assert time.monotonic() - begin < 50


def test_several_tests_run_at_once(tmp_path):
    meet = """
import time
from pathlib import Path


def meet(mine, other):
    (Path(__file__).parent / mine).touch()
    while not (Path(__file__).parent / other).exists():
        time.sleep(0.01)


def test_one():
    meet("one", "two")


def test_two():
    meet("two", "one")
"""
    _, found = run(tmp_path, "--at-once", "2", "--test-seconds", "20", text=meet)
    assert [row["result"] for row in found["tests"]] == ["passed"] * 2


def test_a_module_that_does_not_import_is_an_error(tmp_path):
    done, found = run(tmp_path, text="import no_such_module\n")
    (row,) = found["tests"]
    assert row["result"] == "error"
    assert "no_such_module" in row["why"]
    assert done.returncode == found["status"] != 0


def test_a_process_sends_what_it_has_before_it_fails():
    def work(send):
        send({"row": 1})
        print("about to fail")
        raise ValueError("no memory")

    with contextlib.closing(ForkedProcess(work, 30)) as process:
        while not process.poll():
            time.sleep(0.01)
        assert process.messages() == [{"row": 1}]
        assert process.messages() == []
        assert process.failure == "ended with status 1"
        assert process.printed.startswith("about to fail")
        assert process.printed.endswith("ValueError: no memory")
