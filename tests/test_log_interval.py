"""`--log-every`: rows of several iterations, across resumes, evaluations and health checks."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from fastppo import Config, Trainer, resume
from fastppo.analysis.run_data import read_run
from fastppo.analysis.verify_resume import TIMED, run_hashes
from fastppo.monitoring.history import History
from fastppo.monitoring.log_interval import LogInterval
from fastppo.monitoring.stats import Stats
from fastppo.runs.checkpoint import list_checkpoints

SMALL = Config(n_envs=2, n_steps=32, total_timesteps=64 * 12, compile="off", threads=1, record_ratios=0)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(folder, **changes):
    trainer = Trainer(dataclasses.replace(SMALL, run_dir=folder, **changes))
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """Rows of one run logged at each iteration, and at every fifth."""
    folder = tmp_path_factory.mktemp("runs")
    for k in (1, 5):
        train(folder / str(k), log_every=k)
    return folder


def test_a_row_holds_means_over_its_iterations_and_all_of_its_episodes(every):
    ones, fives = rows_of(every / "1"), rows_of(every / "5")
    assert [row["iteration"] for row in fives] == [5, 10, 12]
    before = 0
    for row in fives:
        part = ones[before : row["iteration"]]
        for tag in ("losses/entropy", "losses/approx_kl", "losses/grad_norm"):
            assert row[tag] == pytest.approx(np.mean([one[tag] for one in part]))
        for tag in ("global_step", "episodes", "mean_return", "charts/learning_rate", "charts/mean_return"):
            assert row[tag] == part[-1][tag]
        returns = [x for one in part for x in one["returns"]]
        assert row["returns"] == returns[-32:]
        assert len(returns) <= 32
        assert row["charts/episodic_return"] == pytest.approx(np.mean(returns), rel=1e-5)
        before = row["iteration"]


def test_tensorboard_has_an_event_per_row_and_training_is_unchanged(every):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(every / "5")).Reload()
    assert [event.step for event in found.Scalars("losses/entropy")] == [320, 640, 768]
    a, b = (run_hashes(every / k) for k in ("1", "5"))
    names = [name for name in a if not name.startswith("figures")]
    assert [a[name] for name in names] == [b[name] for name in names]


def lose_the_last_save(run):
    """Leave a run as a kill after its eighth iteration would: saved two iterations earlier."""
    for checkpoint in list_checkpoints(run):
        if int(checkpoint.name[5:]) > 64 * 6:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_completes_the_open_row(every, tmp_path, killed):
    run = tmp_path / "run"
    trainer = Trainer(dataclasses.replace(SMALL, run_dir=run, log_every=5, checkpoint_every=64))
    for stats in trainer.iterations():
        if stats.iteration == 8:
            break
    assert [row["iteration"] for row in rows_of(run)] == [5, 8]
    if killed:
        lose_the_last_save(run)
    resumed = resume(run)
    for stats in resumed.iterations():
        assert resumed.logger.health.history.iterations == stats.iteration
    plain = [
        [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows_of(folder)]
        for folder in (every / "5", run)
    ]
    assert plain[0] == plain[1]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run)).Reload()
    assert [event.step for event in found.Scalars("losses/entropy")] == [320, 640, 768]


@pytest.mark.parametrize("killed", [False, True])
def test_a_resume_keeps_the_own_figures_of_the_open_row(tmp_path, killed):
    run = tmp_path / "run"
    trainer = Trainer(dataclasses.replace(SMALL, run_dir=run, log_every=5, checkpoint_every=64))
    for stats in trainer.iterations():
        trainer.log("custom/x", stats.iteration)
        if stats.iteration == 8:
            break
    if killed:
        lose_the_last_save(run)
    resumed = resume(run)
    for stats in resumed.iterations():
        resumed.log("custom/x", stats.iteration)
    own = [(row["global_step"], row["custom/x"]) for row in rows_of(run) if "custom/x" in row]
    assert own == [(64 * k, k) for k in range(1, 13)]
    assert read_run(run).column("custom/x").tolist() == [5, 10, 12], "of the row's iteration, not of a later one"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload().Scalars("custom/x")
    assert [(event.step, event.value) for event in events] == own


def test_every_figure_measured_in_an_iteration_is_averaged():
    interval = LogInterval(2)
    tags = ("action_range", "clipped_actions", "masked_actions", "obs_outside_space", "reward_per_step")
    interval.add(stats(1, **{f"charts/{tag}": 1.0 for tag in tags}))
    row = interval.add(stats(2, **{f"charts/{tag}": 2.0 for tag in tags}))
    assert row.scalars == {f"charts/{tag}": 1.5 for tag in tags}


def test_an_evaluation_ends_the_row_at_its_own_step(tmp_path):
    train(tmp_path / "run", log_every=5, eval_every=64 * 7, eval_episodes=1)
    rows = rows_of(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [5, 7, 10, 12]
    assert ["eval/return_mean" in row for row in rows] == [False, True, False, False]


def stats(iteration, episodes=0, **scalars):
    return Stats(iteration, 100, iteration, 100, 1.0, episodes, 1.0, 1.0, 0.0, "", scalars)


def test_a_nan_in_one_iteration_shows_in_its_row():
    interval = LogInterval(3)
    for i, loss in enumerate((1.0, float("nan"), 2.0)):
        row = interval.add(stats(i + 1, **{"losses/policy_loss": loss}))
    assert np.isnan(row.scalars["losses/policy_loss"])


def test_a_row_without_episodes_has_no_episode_figures():
    interval = LogInterval(2)
    interval.add(stats(1, 1, **{"charts/episodic_return": 4.0}))
    row = interval.add(stats(2, 4, **{"charts/episodic_return": 8.0}))
    assert row.scalars == {"charts/episodic_return": 7.0}  # (1 x 4 + 3 x 8) / 4
    interval.add(stats(3, 4))
    assert interval.add(stats(4, 4)).scalars == {}


def test_a_history_of_rows_equals_one_of_their_iterations():
    rows, ones = History(points=4), History(points=4)
    for value, times in ((1.0, 1), (2.0, 5), (np.nan, 2), (7.0, 12)):
        rows.add({"a": value}, times)
        for _ in range(times):
            ones.add({"a": value})
    assert (rows.stride, rows.iterations) == (ones.stride, ones.iterations)
    np.testing.assert_allclose(rows["a"], ones["a"])
    assert rows.first("a").tolist() == ones.first("a").tolist()
