"""A stop in the middle of a rollout that would take long: its steps are discarded, and the resumed run is the same."""

import dataclasses
import os
import signal

import pytest

from fastppo import Trainer, resume
from fastppo.analysis.verify_resume import run_hashes
from fastppo.runs.checkpoint import list_checkpoints
from tests.envs.worlds import Counter
from tests.worlds import short


class Hooked(Counter):
    """A Counter that calls `hook` with the number of all steps so far, of all environments."""

    steps_taken, hook = 0, staticmethod(lambda _: None)

    def step(self, action):
        Hooked.steps_taken += 1
        Hooked.hook(Hooked.steps_taken)
        return super().step(action)


@pytest.fixture
def at_step(monkeypatch):
    """Call a function at a step; every rollout counts as long."""
    monkeypatch.setattr("fastppo.trainer.LONG_ITERATION", 0.0)
    monkeypatch.setattr("fastppo.runs.checkpoint_writer.LONG_ITERATION", 0.0)
    monkeypatch.setattr(Hooked, "hook", Hooked.hook)

    def set_hook(step, do):
        Hooked.steps_taken = 0
        Hooked.hook = staticmethod(lambda taken: do() if taken == step else None)

    return set_hook


@pytest.mark.parametrize("step", [5, 21, 37], ids=["in the first rollout", "in the second", "in the third"])
def test_a_run_stopped_within_a_rollout_resumes_as_if_it_had_not_been(tmp_path, at_step, step):
    config = short(tmp_path, compile="off", exact_resume=True, threads=1)
    Trainer(dataclasses.replace(config, run_dir=tmp_path / "whole"), make_env=Hooked).run()
    trainer = Trainer(config, make_env=Hooked)
    at_step(step, trainer.request_stop)
    result = trainer.run()
    assert result.ended == "interrupted"
    assert result.global_step == step // 16 * 16
    assert Hooked.steps_taken <= step + 2, "it stops between two steps"
    assert resume(config.run_dir, make_env=Hooked).run().ended == "finished"
    assert run_hashes(config.run_dir) == run_hashes(tmp_path / "whole")


def test_the_first_signal_stops_within_a_rollout_and_a_short_one_is_completed(tmp_path, at_step, monkeypatch):
    config = short(tmp_path, compile="off")
    trainer = Trainer(config, make_env=Hooked)
    at_step(21, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.run().global_step == 16
    monkeypatch.setattr("fastppo.trainer.LONG_ITERATION", 60.0)
    trainer = Trainer(dataclasses.replace(config, run_dir=tmp_path / "patient"), make_env=Hooked)
    at_step(21, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.run().global_step == 32


def test_without_a_checkpoint_exact_resume_completes_the_rollout_and_others_restart_their_environments(
    tmp_path, at_step
):
    config = short(tmp_path, compile="off", checkpoint_minutes=0.0)
    for exact, step in ((True, 32), (False, 16)):
        run_dir = tmp_path / str(exact)
        trainer = Trainer(dataclasses.replace(config, run_dir=run_dir, exact_resume=exact), make_env=Hooked)
        at_step(21, trainer.request_stop)
        assert trainer.run().global_step == step
        assert [path.name for path in list_checkpoints(run_dir)] == [f"step-{step:012d}"]
    at_step(0, lambda: None)
    assert any("start new episodes" in note for note in resume(tmp_path / "False", make_env=Hooked).notes)


def test_a_run_stopped_before_its_first_iteration_can_be_resumed(tmp_path):
    config = short(tmp_path, compile="off")
    trainer = Trainer(config, make_env=Hooked)
    trainer.request_stop()
    assert trainer.run().iterations == 0
    resumed = resume(config.run_dir, make_env=Hooked)
    assert any("before the first iteration" in note for note in resumed.notes)
    assert resumed.run().ended == "finished"
