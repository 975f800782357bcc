"""Cores shared with other processes: how many are free, and how long threads spin."""

import json
import os
import subprocess
import sys

import pytest

from fastppo import Config, Trainer
from fastppo.runtime.sharing import CpuTimes, cpu_times, free_cores

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Fake cores 0 to 3; return a function that sets the clocks and the seconds that each core was busy."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "proc").mkdir()

    def at(wall, own, *busy):
        monkeypatch.setattr("time.monotonic", lambda: wall)
        monkeypatch.setattr("os.times", lambda: (own, 0.0, 0.0, 0.0, wall))
        # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
        lines = [f"cpu{k} {int(x * TICKS)} 0 0 999999 888888 0 0 777777 666666 0" for k, x in enumerate(busy)]
        (tmp_path / "proc" / "stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 0", *lines, "ctxt 123"]) + "\n")
        return cpu_times(tmp_path)

    return at


@pytest.mark.parametrize(
    ("own", "busy", "free"),
    [
        (2.0, (2.0, 0.0, 0.0, 0.0), 4),
        (2.0, (2.0, 2.0, 0.0, 0.0), 3),
        (2.0, (2.0, 0.3, 0.3, 0.0), 4),
        (1.0, (2.0, 2.0, 2.0, 2.0), 1),
        (0.0, (2.0, 2.0, 2.0, 2.0, 2.0, 2.0), 1),
    ],
    ids=["our own use", "one other process", "little bustle", "a full machine", "cores of others do not count"],
)
def test_cores_that_others_use_are_not_free(machine, tmp_path, own, busy, free):
    start = machine(100.0, 0.0, *(0.0 for _ in busy))
    machine(102.0, own, *busy)
    assert free_cores(start, tmp_path) == free


def test_an_old_reading_gives_way_to_a_new_one(machine, tmp_path, monkeypatch):
    start = machine(100.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    machine(1000.0, 0.0, 900.0, 900.0, 900.0, 0.0)  # others were busy for an hour
    monkeypatch.setattr("time.sleep", lambda seconds: machine(1000.0 + seconds, 0.0, 900.0, 900.0, 900.0, 0.0))
    assert free_cores(start, tmp_path) == 4, "and are at rest now"


def test_a_recent_reading_is_given_time(machine, tmp_path, monkeypatch):
    start = machine(100.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    machine(100.01, 0.0, 0.0, 0.0, 0.0, 0.0)
    monkeypatch.setattr("time.sleep", lambda _: machine(100.5, 0.0, 0.5, 0.5, 0.0, 0.0))
    assert free_cores(start, tmp_path) == 2


def test_without_proc_stat_all_cores_are_free(machine, tmp_path):
    assert cpu_times(tmp_path / "none") is None
    assert free_cores(None, tmp_path) == 4
    assert free_cores(CpuTimes(0.0, 0.0, 0.0), tmp_path / "none") == 4


def test_the_clocks_of_this_machine_are_read():
    before = cpu_times()
    sum(range(3_000_000))
    after = cpu_times()
    assert after.wall > before.wall
    assert after.own > before.own
    assert after.busy >= before.busy


def python(code, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("first", "variables", "spins", "bounded"),
    [
        ("import fastppo", {}, "10000", True),
        ("import fastppo", {"GOMP_SPINCOUNT": "7"}, "7", True),
        ("import fastppo", {"OMP_WAIT_POLICY": "PASSIVE"}, None, True),
        ("import torch, fastppo", {}, "10000", False),
        ("import torch, fastppo", {"GOMP_SPINCOUNT": "7"}, "7", True),
    ],
)
def test_the_spinning_of_waiting_threads_is_bounded_before_torch_is_loaded(first, variables, spins, bounded):
    code = (
        f"{first}\nimport json, os\nfrom fastppo.runtime.sharing import spinning_is_bounded\n"
        "print(json.dumps([os.environ.get('GOMP_SPINCOUNT'), spinning_is_bounded()]))"
    )
    assert python(code, **variables) == [spins, bounded]


@pytest.mark.parametrize(("free", "threads"), [(4, 4), (3, 3), (1, 1)])
def test_a_run_takes_no_more_threads_than_there_are_free_cores(tmp_path, monkeypatch, free, threads):
    monkeypatch.setattr("fastppo.builders.run.choose_threads", lambda work, in_c: 4)
    monkeypatch.setattr("fastppo.builders.run.free_cores", lambda since: free)
    config = Config(n_envs=2, n_steps=8, total_timesteps=16, run_dir=tmp_path / "run", compile="off")
    trainer = Trainer(config)
    trainer.run()
    assert trainer.config.threads == threads
    said = [note for note in trainer.notes if "other processes" in note]
    assert len(said) == (threads < 4)
    assert all("--threads 4" in note for note in said)


def test_threads_that_the_user_chose_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("fastppo.builders.run.free_cores", lambda since: 1)
    config = Config(n_envs=2, n_steps=8, total_timesteps=16, run_dir=tmp_path / "run", compile="off", threads=2)
    trainer = Trainer(config)
    trainer.run()
    assert trainer.config.threads == 2
