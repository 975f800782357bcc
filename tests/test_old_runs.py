"""Run folders written by earlier versions can be evaluated, resumed, reported and compared."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastppo import Config, Trainer, evaluate, load_policy, resume
from fastppo.cli import main
from fastppo.resume_run import continue_run
from fastppo.runs.open_run import read_config
from tests.worlds import short

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
CARTPOLE, PENDULUM = "run-b1fbf20-cartpole", "run-b1fbf20-pendulum"


@pytest.fixture(params=sorted(EXPECTED))
def name(request):
    return request.param


@pytest.fixture
def run(name, tmp_path):
    return shutil.copytree(FIXTURES / name, tmp_path / name)


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_fixture_has_expected_results():
    assert sorted(path.name for path in FIXTURES.glob("run-*")) == sorted(EXPECTED)


def test_the_policy_gives_the_recorded_outputs(name, run):
    expected = EXPECTED[name]
    obs = np.array(expected["obs"], np.float32)
    saved = load_policy(run)
    with torch.no_grad():
        params, values = saved.policy.network(saved.policy.encoder(torch.as_tensor(obs)))
    np.testing.assert_allclose(params, expected["params"], atol=1e-6)
    np.testing.assert_allclose(values, expected["values"], atol=1e-6)
    np.testing.assert_allclose(saved.predict(obs)[0], expected["actions"], atol=1e-6)
    np.testing.assert_allclose(saved.predict(obs[0])[0], expected["actions"][0], atol=1e-6)
    sampled = load_policy(run, seed=3).predict(obs, deterministic=False)[0]
    np.testing.assert_allclose(sampled, expected["sampled"], atol=1e-6)


def test_a_checkpoint_can_be_evaluated(name, run):
    last = max((run / "checkpoints").iterdir())
    np.testing.assert_array_equal(
        load_policy(last).predict(EXPECTED[name]["obs"])[0], load_policy(run).predict(EXPECTED[name]["obs"])[0]
    )
    assert len(evaluate(last, 2).returns) == 2


def test_evaluate_plays_the_recorded_episodes(name, run):
    played = evaluate(run, 3, seed=1)
    assert list(played.returns) == pytest.approx(EXPECTED[name]["returns"], rel=1e-4)


def test_resume_trains_to_a_larger_total(name, run):
    before = rows_of(run)
    trainer = resume(run, total_timesteps=128 * 14)
    assert any("resumed" in note and "exact" in note for note in trainer.notes)
    result = trainer.run()
    assert (result.ended, result.global_step, result.iterations) == ("finished", 128 * 14, 14)
    rows = rows_of(run)
    assert [row["global_step"] for row in rows] == [128 * i for i in range(1, 15)]
    assert rows[:6] == before
    assert json.loads((run / "result.json").read_text())["ended"] == "finished"
    assert (run / "checkpoints" / f"step-{128 * 14:012d}").is_dir()


def test_resume_auto_continues_it_with_the_same_command(name, run):
    config = dataclasses.replace(read_config(run), action_masks="auto", total_timesteps=128 * 14)
    trainer = continue_run(config, run)
    assert any("resumed" in note and "exact" in note for note in trainer.notes)
    assert trainer.run().global_step == 128 * 14


def test_a_row_of_the_resumed_run_counts_its_own_episodes_only(name, run):
    """The first row's mean return is weighted by the episodes since the checkpoint, not since the start."""
    trainer = resume(run)
    before = trainer.metrics.episodes.count
    assert before > 0
    assert trainer.logger.interval.state_dict()["episodes"] == before
    next(loop := trainer.iterations())
    loop.close()


def test_resume_continues_the_environments_and_the_optimiser(name, run):
    """The next iteration has the losses and episodes recorded from the old version's own resume."""
    expected = EXPECTED[name]["resumed"]
    stats = next(iter(resume(run).iterations()))
    assert (stats.iteration, stats.global_step) == (expected["iteration"], expected["global_step"])
    assert stats.episodes == expected["episodes"]
    losses = {tag: value for tag, value in expected.items() if "/" in tag}
    assert {tag: stats.scalars[tag] for tag in losses} == pytest.approx(losses, rel=1e-3, abs=1e-5)


def test_a_new_run_can_start_from_the_policy(name, run, tmp_path):
    sizes = {"n_envs": 2, "n_steps": 8, "n_minibatches": 1, "total_timesteps": 16, "hidden_sizes": (8, 8)}
    stored = json.loads((run / "config.json").read_text())
    same = {key: stored[key] for key in ("env_id", "env_kwargs", "normalize_obs", "normalize_rewards")}
    trainer = Trainer(
        Config(**same, **sizes, compile="off", learning_rate=0.0, init_from=run, run_dir=tmp_path / "new")
    )
    trainer.run()
    old, new = (load_policy(folder).policy.network for folder in (run, tmp_path / "new"))
    for a, b in zip(old.parameters(), new.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_commands_read_an_old_run(name, run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(run), "-o", str(page)]) == 0
    assert name in page.read_text()
    assert main(["eval", str(run), "--episodes", "2"]) == 0
    assert "2 episodes, greedy: return " in " ".join(capsys.readouterr().out.split())
    assert main(["resume", str(run)]) == 0
    assert json.loads((run / "result.json").read_text())["global_step"] == 128 * 12


def test_two_old_runs_can_be_compared(tmp_path, capsys):
    runs = [shutil.copytree(FIXTURES / name, tmp_path / name) for name in (CARTPOLE, PENDULUM)]
    assert main(["diff", *map(str, runs)]) == 0
    text = capsys.readouterr().out
    assert "env_id" in text
    assert "Pendulum-v1" in text
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "-o", str(page)]) == 0
    assert PENDULUM in page.read_text()


def test_a_run_that_knew_no_masks_goes_on_without_them(tmp_path, monkeypatch):
    all_settings = Config.to_dict
    with monkeypatch.context() as earlier:
        earlier.setattr(Config, "to_dict", lambda c: {k: v for k, v in all_settings(c).items() if k != "action_masks"})
        Trainer(short(tmp_path, env_id="Taxi-v4", action_masks="off", eval_max_steps=5)).run()
    assert "action_masks" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert evaluate(tmp_path / "run", 1).cut == 1, "the episode is too long, but its policy plays"
    trainer = resume(tmp_path / "run", total_timesteps=96)
    assert not trainer.spec.obs.has_mask
    assert trainer.run().global_step == 96
