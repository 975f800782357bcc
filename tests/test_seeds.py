"""`fastppo train --seeds`: statistics over seeds, runs, continuing, files."""

import json
import os
import signal
import statistics
import subprocess
import sys

import numpy as np
import pytest

from fastppo.analysis.seeds import Interval, bootstrap, choose_jobs, interquartile_mean, mean, plan_seeds
from fastppo.cli import main
from fastppo.config import Config
from fastppo.runs.run_dir import RunLock
from tests import PATIENCE, wait_until

TINY = ["--n-envs", "4", "--n-steps", "32", "--compile", "off", "--threads", "1", "--record-ratios", "0"]


@pytest.mark.parametrize("n", range(1, 14))
def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end(n):
    values = np.random.default_rng(n).normal(size=n)
    kept = sorted(values.tolist())
    for _ in range(int(0.25 * n)):
        kept.remove(min(kept))
        kept.remove(max(kept))
    assert interquartile_mean(values) == pytest.approx(statistics.fmean(kept))
    several = np.stack([values, -values, values[::-1] + 1])
    assert interquartile_mean(several) == pytest.approx([float(interquartile_mean(row)) for row in several])


def test_the_bootstrap_of_a_share_is_a_binomial():
    """The mean of n draws from k ones and n - k zeros is binomial(n, k / n) / n; its quantiles are known."""
    assert bootstrap(mean, [0.0] * 5 + [1.0] * 5) == Interval(0.5, 0.2, 0.8)
    assert bootstrap(mean, [0.0] * 16 + [1.0] * 4) == Interval(0.2, 0.05, 0.4)
    assert bootstrap(interquartile_mean, [7.0] * 6) == Interval(7.0, 7.0, 7.0)


def test_the_stratified_bootstrap_draws_each_sample_from_itself():
    def difference(x, y):
        return mean(y) - mean(x)

    assert bootstrap(difference, [0.0] * 3, [5.0] * 4) == Interval(5.0, 5.0, 5.0), "no value changes its sample"
    found = bootstrap(difference, [0.0] * 5 + [1.0] * 5, [2.0])
    assert (found.value, str(found)) == (1.5, "1.5"), "one of the samples has a single value"
    halves = [0.0] * 5 + [1.0] * 5  # 97.5 % of the differences of two binomials (10, 0.5) are at most 4
    assert bootstrap(difference, halves, halves) == Interval(0.0, -0.4, 0.4)


def test_intervals_of_many_seeds_cover_the_mean():
    rng = np.random.default_rng(0)
    found = [bootstrap(mean, row.tolist()) for row in rng.normal(-300, 20, (200, 20))]
    assert 0.88 <= np.mean([e.low <= -300 <= e.high for e in found]) <= 0.98
    outliers = [bootstrap(interquartile_mean, [*row, 1e6]) for row in rng.normal(0, 1, (20, 19)).tolist()]
    assert all(abs(e.value) < 1 for e in outliers), "one outlier moves it little"


def test_few_values_have_no_interval():
    assert str(bootstrap(mean, [])) == "-"
    assert str(bootstrap(mean, [1234.56])) == "1,234.6"
    assert str(bootstrap(mean, [-2.0, -1.0])) == "-1.5 (-2.0 to -1.0)"


def test_seeds_follow_each_other_and_share_the_cores(tmp_path, monkeypatch):
    base = Config(seed=5, n_envs=4, threads=1)
    assert [(c.seed, c.run_dir.name, c.resume) for c in plan_seeds(base, 2, tmp_path)] == [
        (5, "seed5", "auto"),
        (6, "seed6", "auto"),
    ]
    for module in ("analysis.seeds", "analysis.training_processes", "envs.pool"):
        monkeypatch.setattr(f"fastppo.{module}.usable_cores", lambda: 8)
    assert choose_jobs(base, 8) == 4, "a core for torch and one for the environments each"
    assert choose_jobs(base, 3) == 3
    assert choose_jobs(Config(vectorization="pool", n_envs=4, threads=1), 8) == 1


def test_each_seed_is_the_run_that_train_makes_alone(tmp_path, capsys):
    folder, arguments = tmp_path / "seeds", ["train", *TINY, "--total-timesteps", "2048", "--seed", "5"]
    assert main([*arguments, "--seeds", "2", "--run-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "2 seeds; " in said
    assert "2 of 2: seed " in said
    assert main([*arguments, "--run-dir", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    results = [json.loads((folder / "runs" / f"seed{seed}" / "result.json").read_text()) for seed in (5, 6)]
    assert results[0]["mean_return"] == alone["mean_return"] != results[1]["mean_return"]

    found = json.loads((folder / "seeds.json").read_text())
    returns = [result["mean_return"] for result in results]
    assert found["seeds"] == [5, 6]
    assert found["mean"] == {
        "value": pytest.approx(statistics.fmean(returns)),
        "low": min(returns),
        "high": max(returns),
    }
    assert [run["mean_return"] for run in found["runs"]] == returns
    page = (folder / "seeds.html").read_text()
    assert "CartPole-v1: 2 seeds" in page
    assert 'id="returns"' in page

    # again, with one more: nothing is trained twice
    before = [(folder / "runs" / f"seed{seed}" / "result.json").stat().st_mtime_ns for seed in (5, 6)]
    capsys.readouterr()
    assert main([*arguments, "--seeds", "3", "--run-dir", str(folder), "--checkpoint-minutes", "7"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 seeds, 2 of them complete" in said
    assert "Mean return over 3 seeds: " in said
    assert "Fewer than five seeds: the intervals are too narrow." in said
    assert [(folder / "runs" / f"seed{seed}" / "result.json").stat().st_mtime_ns for seed in (5, 6)] == before
    assert (folder / "runs" / "seed7" / "result.json").exists()

    assert main([*arguments, "--seeds", "3", "--run-dir", str(folder), "--gamma", "0.5"]) == 2
    assert "holds a set of seeds with other settings: gamma was none, is 0.5." in capsys.readouterr().err
    assert main([*arguments, "--run-dir", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*arguments, "--seeds", "2", "--run-dir", str(tmp_path / "alone")]) == 2
    assert "is not empty and holds no set of seeds" in capsys.readouterr().err
    assert main(["study", "--run-dir", str(folder), "--n-envs", "4", "--target-return", "9"]) == 2
    assert "holds a set of seeds, not a study" in capsys.readouterr().err


def test_sigterm_leaves_resumable_runs_and_a_failed_seed_is_told(tmp_path, capsys):
    folder = tmp_path / "seeds"
    arguments = ["train", *TINY, "--total-timesteps", "60000", "--seeds", "2", "--run-dir", str(folder), "--jobs", "1"]
    process = subprocess.Popen([sys.executable, "-m", "fastppo", *arguments], stdout=subprocess.PIPE, process_group=0)
    metrics = folder / "runs" / "seed1" / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 2000)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM
    (saved,) = (folder / "runs" / "seed1" / "checkpoints").glob("step-*")
    assert json.loads((folder / "runs" / "seed1" / "result.json").read_text())["ended"] == "interrupted"

    (folder / "runs" / "seed2").mkdir(parents=True)
    (folder / "runs" / "seed2" / "thesis.tex").write_text("mine")
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "seed 2: " in said
    assert "is not empty" in said
    assert "One seed has a mean return, so there is no interval." in said
    steps = [json.loads(line)["global_step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert int(saved.name.removeprefix("step-")) in steps
    found = json.loads((folder / "seeds.json").read_text())
    assert list(found["failures"]) == ["2"]
    assert found["mean"]["low"] is None
    assert "Seed 2 failed: " in (folder / "seeds.html").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--seeds 0", "seeds=0 must be at least 1; nearest valid value: 1."),
        ("--seeds 2 --jobs 0", "jobs=0 must be at least 1"),
        ("--jobs 2", "jobs=2 needs --seeds, as a single run is one process; or leave it out."),
        ("--seeds 2 --env-id CartPol-v1", "did you mean CartPole-v1?"),
        ("--seeds 2 --total-timesteps 5", "total_timesteps=5 is less than one iteration"),
        (f"--seeds 2 --seed {2**63 - 1}", f"seed={2**63} must be at most {2**63 - 1}"),
        ("--seeds 2 --run-dir file", "run_dir=file is a file, or lies in one; name a new folder."),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["train", *wrong.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_has_one_process_at_a_time(tmp_path, capsys):
    lock = RunLock(tmp_path)
    assert main(["train", *TINY, "--total-timesteps", "1024", "--seeds", "2", "--run-dir", str(tmp_path)]) == 2
    assert f"{tmp_path} is in use by another trainer (pid " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    lock.release()


def test_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--seeds", "2"]) == 2
    assert "train --seeds starts processes of its own, one for each run; start it without torchrun." in (
        capsys.readouterr().err
    )
