"""fastppo study: plan, runs, resume after kill -9, estimates, recommendation."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from fastppo.analysis.study import (
    Candidate,
    Estimate,
    begin_study,
    choose_jobs,
    plan_study,
    recommend,
    summarize,
)
from fastppo.analysis.training_processes import run_each
from fastppo.config import Config
from fastppo.errors import ConfigError
from tests import PATIENCE, wait_until

BASE = Config(target_return=20.0, total_timesteps=4096, compile="off", threads=1, record_ratios=0)


def test_n_steps_follow_from_the_batch_and_every_seed_has_a_folder(tmp_path):
    plan = plan_study(BASE, (4, 16, 4), 2, "batch", tmp_path)
    assert [(c.n_envs, c.n_steps, c.seed) for c in plan.configs] == [(4, 128, 1), (4, 128, 2), (16, 32, 1), (16, 32, 2)]
    assert plan.configs[2].run_dir == tmp_path / "runs" / "n16-seed1"
    assert plan.target == 20
    plan = plan_study(BASE, (4, 16), 1, "n_steps", tmp_path)
    assert [(c.n_envs, c.n_steps) for c in plan.configs] == [(4, 128), (16, 128)]


def test_the_reward_threshold_is_a_target(tmp_path):
    base = dataclasses.replace(BASE, target_return="threshold")
    assert plan_study(base, (4,), 1, "batch", tmp_path).target == 475
    with pytest.raises(ConfigError, match="Pendulum-v1 has no reward threshold: use --target-return NUMBER"):
        plan_study(dataclasses.replace(base, env_id="Pendulum-v1"), (4,), 1, "batch", tmp_path)


@pytest.mark.parametrize(
    ("n_envs", "seeds", "text"),
    [
        ((5,), 1, "common batch of 512, which is n_envs 4 x n_steps 128; use 2, 4, 8,"),
        ((512,), 1, None),
    ],
)
def test_mistakes_are_found_before_any_run(tmp_path, n_envs, seeds, text):
    if text is None:
        assert plan_study(BASE, n_envs, seeds, "batch", tmp_path).configs[0].n_steps == 1
        return
    with pytest.raises(ConfigError, match=text):
        plan_study(BASE, n_envs, seeds, "batch", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_jobs_do_not_share_cores(monkeypatch, tmp_path):
    def jobs(cores, n_envs=4, hold="batch", **changes):
        for module in ("analysis.study", "analysis.training_processes", "envs.pool"):
            monkeypatch.setattr(f"fastppo.{module}.usable_cores", lambda: cores)
        monkeypatch.setattr("fastppo.runtime.threads.CORES", cores)
        return choose_jobs(plan_study(dataclasses.replace(BASE, **changes), (n_envs,), 1, hold, tmp_path))

    assert jobs(8) == 4
    assert jobs(8, threads=3) == 2
    assert jobs(8, vectorization="pool") == 1
    assert jobs(16, vectorization="pool") == 3  # one worker for each of the four environments, and a thread
    assert jobs(8, vectorization="pool", workers=3) == 2
    assert jobs(8, vectorization="auto") == 1
    assert jobs(1) == 1
    # minibatches of 8,192 rows take all threads
    assert jobs(8, n_envs=256, hold="n_steps", threads=None, total_timesteps=10**6) == 1


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_an_interval_has_its_nominal_coverage(n):
    rng = np.random.default_rng(0)
    found = [Estimate.of(row.tolist()) for row in rng.normal(10, 2, (2000, n))]
    assert all(e.low <= e.mean <= e.high for e in found)
    assert abs(np.mean([e.low <= 10 <= e.high for e in found]) - 0.95) < 0.015


def test_an_estimate_of_few_values():
    assert math.isnan(Estimate.of([]).mean)
    assert (Estimate.of([3.0]).mean, math.isnan(Estimate.of([3.0]).low)) == (3.0, True)
    assert Estimate.of([3.0] * 4) == Estimate(3.0, 3.0, 3.0)
    assert Estimate.of([1.0, 9.0]).low == 0.0, "times are positive"


def candidate(n, reached, of, seconds, steps, spread=0.05, sps=1000.0, failed=0):
    def around(mean):
        return Estimate(mean, mean * (1 - spread), mean * (1 + spread)) if reached else Estimate.of([])

    failures = dict.fromkeys(range(failed), "out of memory")
    return Candidate(n, 8, [None] * of, failures, reached, around(steps), around(seconds), around(10), sps)


def test_the_recommendation_follows_from_the_estimates():
    a, b, c = (
        candidate(4, 5, 5, 20, 50_000),
        candidate(16, 5, 5, 10, 60_000),
        candidate(64, 5, 5, 15, 90_000, sps=9000.0),
    )
    text = recommend([a, b, c], 475)
    assert text.startswith("Use n_envs 16: 5 of 5 seeds reached 475, in 10.0 (9.5-10.5) s.")
    assert "n_envs 4 needs the fewest environment steps: 50,000 (" in text
    assert "n_envs 64 has the highest speed, 9,000 steps/s" in text
    assert "significant" not in text
    # reliability comes before speed
    text = recommend([a, candidate(64, 3, 5, 1, 1000)], 475)
    assert text.startswith("Use n_envs 4")
    assert "Less reliable: n_envs 64 (3 of 5)" in text
    # failed seeds count as tried
    text = recommend([candidate(4, 1, 1, 1, 1000, failed=4), candidate(16, 4, 5, 10, 60_000)], 475)
    assert text.startswith("Use n_envs 16: 4 of 5")
    assert "Less reliable: n_envs 4 (1 of 5)" in text
    assert "The difference to n_envs 4 is not significant; run more seeds." in recommend(
        [candidate(4, 5, 5, 10.4, 10), b], 475
    )
    assert recommend([candidate(4, 0, 5, 0, 0)], 475).startswith("No run reached 475")


def test_a_killed_study_continues_and_repeats_nothing(tmp_path):
    folder = tmp_path / "study"
    command = [sys.executable, "-m", "fastppo", "study", "--n-envs", "4", "8", "--seeds", "1", "--run-dir", str(folder)]
    command += ["--target-return", "100000", "--total-timesteps", "8192", "--compile", "off", "--jobs", "1"]
    results = [folder / "runs" / f"n{n}-seed{s}" / "result.json" for n in (4, 8) for s in (1,)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(results[0].exists)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert not alive
    assert not results[1].exists(), "runs end with the study"
    times = [path.stat().st_mtime_ns for path in results if path.exists()]
    assert len(times) >= 1

    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert f"2 runs, {len(times)} of them complete; 1 at a time" in done.stdout
    assert [path.stat().st_mtime_ns for path in results[: len(times)]] == times
    assert "No run reached 100000" in " ".join(done.stdout.split())
    found = json.loads((folder / "study.json").read_text())
    assert [(s["n_envs"], s["n_steps"], s["reached"], len(s["runs"])) for s in found["settings"]] == [
        (4, 128, 0, 1),
        (8, 64, 0, 1),
    ]
    assert all(
        run["ended"] == "finished" and run["global_step"] == 8192 for s in found["settings"] for run in s["runs"]
    )
    assert "n_envs by time to a return of 100000" in (folder / "study.html").read_text()


def test_a_folder_holds_one_study(tmp_path):
    plan = plan_study(BASE, (4,), 1, "batch", tmp_path / "study")
    begin_study(plan, BASE, tmp_path / "study")
    begin_study(plan, BASE, tmp_path / "study")  # continues it
    other = dataclasses.replace(BASE, target_return=30.0, learning_rate=0.1)
    with pytest.raises(ConfigError, match="target_return was 20, is 30; learning_rate was none, is 0.1"):
        begin_study(plan_study(other, (4,), 1, "batch", tmp_path / "study"), other, tmp_path / "study")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        begin_study(plan, BASE, tmp_path / "run")
    with pytest.raises(ConfigError, match="is a file, or lies in one"):
        begin_study(plan, BASE, tmp_path / "run" / "config.json" / "x")


def test_a_run_killed_before_its_result_is_not_trained_again(tmp_path):
    plan = plan_study(dataclasses.replace(BASE, target_return=1e5, total_timesteps=1024), (4,), 1, "batch", tmp_path)
    assert [error for _, error in run_each(plan.configs, 1)] == [None]
    run = tmp_path / "runs" / "n4-seed1"
    before, rows = json.loads((run / "result.json").read_text()), (run / "metrics.jsonl").read_text()
    (run / "result.json").unlink()
    assert [error for _, error in run_each(plan.configs, 1)] == [None]
    after = json.loads((run / "result.json").read_text())
    for name in ("mean_return", "episodes", "global_step", "iterations", "ended"):
        assert after[name] == before[name], name
    assert before["seconds"] <= after["seconds"] + 1.0
    assert [row for row in rows.splitlines() if "charts" in row] == [
        row for row in (run / "metrics.jsonl").read_text().splitlines() if "charts" in row
    ]


def test_runs_end_at_the_target_and_failures_are_reported(tmp_path):
    plan = plan_study(BASE, (4,), 2, "batch", tmp_path)
    broken = dataclasses.replace(plan.configs[1], env_id="CartPol-v1")
    plan = dataclasses.replace(plan, configs=[plan.configs[0], broken])
    ended = list(run_each(plan.configs, 2))
    errors = {config.seed: error for config, error in ended}
    assert errors[1] is None
    assert "did you mean CartPole-v1?" in errors[2]
    (found,) = summarize(plan, {broken.run_dir: errors[2]})
    assert (found.reached, list(found.failures)) == (1, [2])
    result = json.loads((Path(plan.configs[0].run_dir) / "result.json").read_text())
    assert found.steps.mean == result["global_step"] < 4096
    assert found.seconds.mean == result["seconds"]


def test_ctrl_c_leaves_resumable_runs(tmp_path):
    folder = tmp_path / "study"
    command = [sys.executable, "-m", "fastppo", "study", "--n-envs", "4", "--seeds", "1", "--run-dir", str(folder)]
    command += ["--target-return", "100000", "--total-timesteps", "10000000", "--compile", "off"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    figures = folder / "runs" / "n4-seed1" / "metrics.jsonl"
    wait_until(lambda: figures.exists() and figures.stat().st_size > 2000)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert b"Traceback" not in said
    assert any((folder / "runs" / "n4-seed1" / "checkpoints").glob("step-*"))
