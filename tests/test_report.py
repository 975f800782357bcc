"""Reports: run data, pages, diffs, and the problems of damaged runs."""

import dataclasses
import io
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastppo import Config, Trainer
from fastppo.analysis.diff import difference
from fastppo.analysis.report import report
from fastppo.analysis.run_data import downsample, read_run, read_runs
from fastppo.analysis.update_section import advantages_by_lambda
from fastppo.errors import CheckpointError, ConfigError
from fastppo.functional.diagnostics import clip_fraction
from fastppo.monitoring.health_rules import HealthFinding, Rule, RunTraits
from fastppo.monitoring.run_logger import RunLogger
from fastppo.monitoring.stats import Stats
from fastppo.monitoring.update_samples import ROWS, read_samples, spread_rows

SMALL = Config(n_envs=2, n_steps=32, total_timesteps=64 * 12, compile="off", threads=1, record_ratios=4, target_kl=0.1)


def train(folder, **changes):
    trainer = Trainer(dataclasses.replace(SMALL, run_dir=folder, **changes))
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one setting, and another setting."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        train(folder / f"seed{seed}", seed=seed)
    train(folder / "other", n_envs=4, n_steps=16)
    return folder


def test_run_data_holds_every_figure_of_every_iteration(runs):
    r = read_run(runs / "seed1")
    lines = [json.loads(line) for line in (runs / "seed1" / "metrics.jsonl").read_text().splitlines()]
    assert len(r) == 12
    assert r.column("global_step").tolist() == [64 * (i + 1) for i in range(12)]
    assert r.column("losses/approx_kl").tolist() == [line["losses/approx_kl"] for line in lines]
    assert np.isnan(r.column("never")).all()
    # every episode is there: fewer than 32 end in an iteration
    assert len(r.returns) == r.column("episodes")[-1]
    assert r.return_axes["episodes"].tolist() == list(range(1, len(r.returns) + 1))
    assert (np.diff(r.return_axes["global_step"]) > 0).all()
    mean = np.mean(r.returns[-100:])
    assert math.isclose(r.column("mean_return")[-1], mean, rel_tol=1e-5)


def test_sampled_ratios_start_at_one_and_agree_with_the_clip_fraction(tmp_path):
    trainer = train(
        tmp_path / "run", n_minibatches=1, update_epochs=3, anneal_lr=False, learning_rate=1e-2, target_kl=None
    )
    samples = read_samples(tmp_path / "run" / "samples")
    assert [s.iteration for s in samples] == [1, 5, 9]
    r = read_run(tmp_path / "run")
    for s in samples:
        assert s.ratios.shape == (4, 64)
        assert s.first_ratio_error < 1e-5
        # with one minibatch, an epoch measures the clip fraction before its step
        c = torch.tensor(s.coefs["clip_coef"])
        before = [clip_fraction(torch.as_tensor(row).log(), c).item() for row in s.ratios[:3]]
        assert math.isclose(r.column("losses/clipfrac")[s.iteration - 1], np.mean(before), abs_tol=0.011)
        assert abs(s.advantages.mean()) < 1e-5
        assert abs(s.advantages.std() - 1) < 1e-4
    assert trainer.result is not None


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 2**24 + 3, 2**31 + 1])
def test_sampled_rows_lie_in_the_rollout_and_reach_its_end(n):
    rows = spread_rows(n, ROWS, torch.device("cpu"))
    assert len(rows) == min(n, ROWS)
    assert (rows[0], rows[-1]) == (0, n - 1)
    assert (rows.diff() > 0).all()


def test_sampling_changes_no_number(tmp_path):
    figures = []
    for every in (0, 1):
        trainer = train(tmp_path / str(every), record_ratios=every, log_histograms=bool(every))
        figures.append(trainer.update.parameters.vector)
    assert torch.equal(*figures)
    assert not (tmp_path / "0" / "samples").exists()


class Counting(torch.nn.Module):
    """Counts its calls and draws random numbers in them."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        out = self.body(x)
        return out[:, :2], out[:, 2]


def test_sampling_leaves_no_trace_in_a_custom_network(tmp_path):
    calls = []
    for every in (0, 1):
        config = dataclasses.replace(SMALL, run_dir=tmp_path / str(every), record_ratios=every, log_histograms=True)
        network = Counting()
        Trainer(config, policy=network).run()
        calls.append(network.calls.item())
    assert calls[0] == calls[1] > 0


def test_stats_hold_the_health_findings(tmp_path, monkeypatch):
    finding = HealthFinding("a name", "evidence.", "remedy.")
    rule = Rule("a name", 0.0, lambda *_: 1.0, "evidence.", "remedy.", after=1, patience=2)
    monkeypatch.setattr("fastppo.monitoring.health.RULES", (rule,))
    trainer = Trainer(dataclasses.replace(SMALL, run_dir=tmp_path / "run"))
    assert [stats.findings for stats in trainer.iterations()] == [[]] * 9 + [[finding]] * 3


def test_a_captured_update_is_sampled_too(tmp_path):
    settings = {"vectorization": "tensor", "compile": "graph", "n_steps": 8, "total_timesteps": 16 * 12}
    settings |= {"n_minibatches": 2, "update_epochs": 2}
    vectors = [train(tmp_path / str(k), record_ratios=k, **settings).update.parameters.vector for k in (0, 3)]
    assert torch.equal(*vectors)
    samples = read_samples(tmp_path / "3" / "samples")
    assert [s.iteration for s in samples] == [1, 4, 7, 10]
    assert all(s.first_ratio_error < 1e-5 for s in samples)


def test_the_lambda_of_the_run_gives_the_advantages_of_the_update(tmp_path):
    train(tmp_path / "run", env_id="Pendulum-v1", gae_lambda=0.8, normalize_rewards=True, n_steps=64)
    for s in read_samples(tmp_path / "run" / "samples"):
        found = advantages_by_lambda(s)
        np.testing.assert_allclose(found["lambda 0.8 (this run)"], s.trajectory["advantages"], rtol=1e-4, atol=1e-5)
        t = s.trajectory
        one_step = t["rewards"] + s.coefs["gamma"] * np.where(t["terminated"], 0, t["next_values"]) - t["values"]
        np.testing.assert_allclose(found["lambda 0"], one_step, rtol=1e-4, atol=1e-5)


def test_a_damaged_sample_is_skipped(runs, tmp_path):
    folder = tmp_path / "samples"
    shutil.copytree(runs / "seed1" / "samples", folder)
    first, second, third = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[:-5])
    second.write_bytes(b"")
    assert [s.iteration for s in read_samples(folder)] == [int(third.stem)]


def test_a_resumed_run_removes_samples_of_repeated_iterations(tmp_path):
    from fastppo import resume

    trainer = Trainer(dataclasses.replace(SMALL, run_dir=tmp_path / "run", record_ratios=1, checkpoint_every=64 * 4))
    for stats in trainer.iterations():
        if stats.iteration == 6:
            break
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(newest)  # as if the run had been killed before
    resumed = resume(tmp_path / "run")
    assert resumed.progress.iteration == 4
    assert next(resumed.iterations()).iteration == 5
    resumed.request_stop()
    assert [s.iteration for s in read_samples(tmp_path / "run" / "samples")] == [1, 2, 3, 4, 5]
    assert resumed.logger.health.history.iterations == 5


def test_downsample_takes_means_of_neighbours():
    values = np.arange(10.0)
    assert downsample(values, 5).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert downsample(values, 4).tolist() == [1, 4, 7, 9]
    assert downsample(np.array([1.0, math.nan, 3.0, math.nan]), 2).tolist() == [1, 3]
    assert np.isnan(downsample(np.array([math.nan, math.nan]), 1)).all()
    assert len(downsample(np.zeros(0))) == 0


def page_of(runs, tmp_path, *names):
    run_data = report([runs / name for name in names], tmp_path / "report.html")
    return run_data, (tmp_path / "report.html").read_text()


def test_a_page_is_self_contained_and_small(runs, tmp_path):
    _, page = page_of(runs, tmp_path, "seed1")
    assert len(page) < 10e6
    assert page.count('class="figure"') >= 14
    assert page.count("plotly.js v") == 1
    for remote in ('src="http', "src='http", '<link rel="stylesheet"'):
        assert remote not in page
    for text in ("Health", "Clip fraction", "time per iteration by phase", "learning_rate", "seed1"):
        assert text in page


def test_a_page_of_a_long_run_stays_small(runs, tmp_path):
    """10,000 iterations and 20 full samples of updates, as 80 million steps at n_envs 64 leave."""
    rng = np.random.default_rng(0)
    shutil.copytree(runs / "seed1", tmp_path / "run")

    def longer(lines):
        for i in range(10_000):
            noise = {tag: rng.random() for tag, x in lines[i % 12].items() if isinstance(x, float)}
            places = {"iteration": i + 1, "global_step": (i + 1) * 8192, "episodes": (i + 1) * 32, "seconds": i / 3}
            yield lines[i % 12] | noise | places | {"returns": rng.normal(300, 99, 32).tolist()}

    rewrite_metrics(tmp_path / "run", longer)
    shutil.rmtree(tmp_path / "run" / "samples")
    one = read_samples(runs / "seed1" / "samples")[0]
    trajectory = {name: rng.random(2048) for name in one.trajectory}
    for i in range(20):
        ratios, advantages = rng.normal(1, 0.1, (5, 512)), rng.normal(0, 1, 512)
        sample = dataclasses.replace(one, iteration=i * 500 + 1, ratios=ratios, advantages=advantages)
        dataclasses.replace(sample, trajectory=trajectory).write(tmp_path / "run" / "samples")
    run_data, page = page_of(tmp_path, tmp_path, "run")
    assert (len(run_data[0]), len(run_data[0].returns), len(run_data[0].samples)) == (10_000, 320_000, 20)
    assert len(page) < 10e6


def test_a_long_run_is_thinned_but_keeps_evaluations_damage_and_its_end(runs, tmp_path):
    rng = np.random.default_rng(0)
    shutil.copytree(runs / "seed1", tmp_path / "run")

    def longer(lines):
        lines = [{k: v for k, v in line.items() if v is not None} for line in lines]
        for i in range(5_000):
            places = {"iteration": i + 1, "global_step": (i + 1) * 64, "losses/clipfrac": 0.9 if i > 2_500 else 0.1}
            places |= {"losses/explained_variance": 0.9, "charts/episodic_return": i / 10 + rng.normal()}
            evaluation = {"eval/return_mean": 5.0, "eval/return_std": 1.0} if i == 1_234 else {}
            bad = {"losses/policy_loss": None} if i == 777 else {}
            yield lines[rng.integers(12)] | places | evaluation | bad

    rewrite_metrics(tmp_path / "run", longer)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[3_001] = lines[3_001][:-9]
    path.write_text("\n".join(lines) + "\n")
    thin, full = read_run(tmp_path / "run", max_rows=100), read_run(tmp_path / "run", max_rows=None)
    assert (thin.rows, full.rows, len(full)) == (4_999, 4_999, 4_999)
    assert 100 <= len(thin) <= 140
    assert thin.column("iteration")[-1] == 5_000
    assert np.nanmax(thin.column("eval/return_mean")) == 5.0
    assert thin.problems() == full.problems()
    assert "in 1 of 4,999 rows, first at step 49,792" in " ".join(thin.problems())
    # findings need no more than the thinned rows
    found = {r.first.name: r.first_step for r in thin.findings}
    expected = {r.first.name: r.first_step for r in full.findings}
    assert found.keys() == expected.keys()
    assert found["clip fraction high"] == pytest.approx(expected["clip fraction high"], rel=0.05)
    assert "drawn from" in thin.thinning
    assert full.thinning == ""
    report([tmp_path / "run"], tmp_path / "report.html")


def test_seeds_of_one_configuration_get_a_band(runs, tmp_path):
    _, page = page_of(runs, tmp_path, "seed1", "seed2", "other")
    assert page.count("mean of 2 seeds") >= 1
    assert "mean of 3 seeds" not in page


def test_runs_are_seeds_of_one_setting_if_they_are_equal_in_what_changes_results(runs):
    run = read_run(runs / "seed1")
    alike = {"seed": 7, "threads": 3, "strict_obs": True, "env_timeout": 5.0, "max_skipped": 9, "device": "cuda:0"}
    assert dataclasses.replace(run, config=run.config | alike).group_key == run.group_key
    for name in ("gamma", "hidden_sizes", "total_timesteps", "precision"):
        assert dataclasses.replace(run, config=run.config | {name: "another"}).group_key != run.group_key


def test_labels_are_escaped(runs, tmp_path):
    name = "<script>alert(1)<"
    shutil.copytree(runs / "seed1", tmp_path / name)
    report([tmp_path / name], tmp_path / "report.html")
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def rewrite_metrics(folder, change):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def no_episodes(lines):
    for line in lines:
        line |= {"episodes": 0, "mean_return": None, "returns": []}
        line.pop("charts/episodic_return", None)
    return lines


def nan_from_third(lines):
    for line in lines[2:]:
        line |= {tag: None for tag in line if tag.startswith("losses/")}
    return lines


DAMAGED = {
    "no episodes": (no_episodes, "No episode has ended"),
    "NaN": (nan_from_third, "NaN or infinite in 10 of 12 iterations, first at step 192"),
    "one update": (lambda lines: lines[:1], "Only one row was logged"),
    "nothing": (lambda lines: [], "No iteration was logged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_the_page_of_a_damaged_run_names_the_problem(runs, tmp_path, kind):
    change, text = DAMAGED[kind]
    shutil.copytree(runs / "seed1", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    rewrite_metrics(tmp_path / "run", change)
    for names in (("run",), ("run", "../" + str((runs / "seed2").relative_to(runs.parent)))):
        paths = [tmp_path / names[0], *(runs / "seed2" for _ in names[1:])]
        report(paths, tmp_path / "report.html")
        assert text in (tmp_path / "report.html").read_text()


def test_damaged_data_is_skipped_and_reported(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "seed1", run)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-100])
    r = read_run(run)
    assert len(r) == 11
    assert r.problems() == [
        "1 damaged lines of metrics.jsonl were skipped.",
        "metrics.jsonl is truncated: it ends at iteration 11 of 12.",
    ]
    (run / "run.json").write_text('{"action_size": "x", "notes": 5, "versions": []}')
    sample = next((run / "samples").iterdir())
    sample.write_bytes(b"")
    lines = path.read_text().splitlines()[:11]
    lines[3] = lines[3].replace('"returns": [', '"returns": 5, "x": [')
    lines[4] = lines[4].replace('"losses/entropy": ', '"losses/entropy": "abc", "y": ')
    path.write_text("\n".join([*lines, "[]", '{"iteration": 1e400}']) + "\n")
    r = read_run(run)
    assert len(r) == 11
    assert math.isnan(r.column("losses/entropy")[4])
    assert "1 damaged samples" in " ".join(r.problems())
    report([run], tmp_path / "report.html")


def test_runs_of_one_name_get_unique_labels(runs, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(runs / "seed1", tmp_path / place / "run")
    read = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [r.label for r in read] == ["a/run", "b/run"]
    report([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "report.html")
    assert '<option value="1">b/run</option>' in (tmp_path / "report.html").read_text()


def test_a_folder_that_is_not_a_run_is_rejected(tmp_path, runs):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="each run once"):
        report([runs / "seed1", runs / "seed1"], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="report: .* can't be written"):
        report([runs / "seed1"], tmp_path / "nowhere" / "report.html")


def test_diff_finds_the_first_different_figure(runs, tmp_path):
    a = read_run(runs / "seed1")
    same = difference(a, a)
    assert same.settings == same.surroundings == []
    assert "every logged figure is equal in all 12 common iterations" in same.numbers
    assert same.returns == "equal up to step 768"
    found = difference(a, read_run(runs / "seed2"))
    assert found.settings == [("seed", "1", "2")]
    assert "differ from iteration 1 on (step 64)" in found.numbers
    other = difference(a, read_run(runs / "other"))
    assert ("n_envs", "2", "4") in other.settings
    assert ("n_steps", "32", "16") in other.settings

    # the same run except one figure of the seventh iteration
    shutil.copytree(runs / "seed1", tmp_path / "run")

    def change(lines):
        lines[6]["losses/entropy"] += 1e-9
        return lines

    rewrite_metrics(tmp_path / "run", change)
    assert (
        "figures differ from iteration 7 on (step 448): losses/entropy"
        in difference(a, read_run(tmp_path / "run")).numbers
    )


def test_diff_finds_where_returns_diverge(runs):
    a = read_run(runs / "seed1")
    steps = np.linspace(1, 1000, 200)
    rising = dict(a.columns) | {"global_step": steps, "mean_return": steps}
    stuck = dict(a.columns) | {"global_step": steps, "mean_return": np.minimum(steps, 300)}
    a, b = (dataclasses.replace(a, columns=columns) for columns in (rising, stuck))
    text = difference(a, b).returns
    # a tenth of the range of 1000 is reached at step 400
    assert text.startswith("apart from step 40")
    assert "gap 700" in text


def test_a_run_is_passed_once(runs, tmp_path):
    with pytest.raises(ConfigError, match="got no run"):
        report([], tmp_path / "x.html")
    with pytest.raises(ConfigError, match=r"got .*seed1 twice"):
        report([runs / "seed1", runs / "seed2", runs / "seed1"], tmp_path / "x.html")


def test_a_report_gives_the_findings_that_the_terminal_printed(runs, tmp_path):
    """With the steps and the numbers of the terminal's line; a finding of a few iterations is in neither."""

    values = {"mean_return": 0.0, "episodes": 1, "seconds": 1.0, "sps": 1.0, "kl": 0.0, "stop": "", "scalars": {}}
    some_stats = Stats(iteration=1, n_iterations=640, global_step=128, total_timesteps=81_920, **values)

    def found(fractions):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(runs / "seed1", run)
        rows = [
            {"iteration": i + 1, "global_step": 128 * (i + 1), "episodes": i, "losses/clipfrac": fraction}
            for i, fraction in enumerate(fractions)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (read,) = read_runs([run])
        console = Console(record=True, width=500, file=io.StringIO())
        logger = RunLogger(console, RunTraits())
        logger.open(SimpleNamespace(write=lambda _: None, close=lambda: None))
        for row in rows:
            scalars = {tag: x for tag, x in row.items() if "/" in tag}
            logger.write(dataclasses.replace(some_stats, global_step=row["global_step"], scalars=scalars))
        printed = console.export_text()
        for record in read.findings:
            assert f"health at {record.first_step:,} steps: {record.first}" in printed
        assert printed.count("health at") == len(read.findings)
        return {record.first.name: record.description for record in read.findings}

    name = "clip fraction high"
    assert found([0.1] * 400 + [0.9] * 20 + [0.1] * 220) == {}
    assert found([0.1] * 200 + [0.9] * 300 + [0.1] * 140)[name].startswith("from step")
    assert " to the end. At step " in found([0.1] * 400 + [0.9] * 240)[name]
