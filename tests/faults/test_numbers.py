"""Non-finite gradients are skipped, counted, and dumped for a replay. Rows N of the README here."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Trainer
from fastppo.analysis.nan_replay import replay
from fastppo.errors import CheckpointError, EnvError
from fastppo.runs.checkpoint import newest_checkpoint
from tests.faults.test_resume import fastppo
from tests.worlds import short


class Huge(gym.Env):
    """From its step `at` on, finite rewards whose squares overflow."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, at=20, size=3e38):
        self.at, self.size, self.life = at, size, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(2, np.float32), {}

    def step(self, action):
        self.life += 1
        reward = self.size if self.life >= self.at else 1.0
        return self.np_random.random(2, np.float32), reward, self.life % 7 == 0, False, {}


@pytest.mark.parametrize("compiled", [False, True])
def test_n1_skipped_minibatches_are_counted_and_end_the_run_at_max_skipped(tmp_path, compiled):
    trainer = Trainer(short(tmp_path, max_skipped=6, total_timesteps=320, compile="off"), make_env=Huge)
    if compiled:
        trainer.update.compile(trainer.rollout.batch(), trainer.learner.coefs)
    seen = []
    with pytest.raises(
        EnvError, match=r"\d+ minibatches in a row had a gradient that is not finite.*fastppo replay"
    ) as e:
        for stats in trainer.iterations():
            seen.append(stats.scalars["losses/skipped_minibatches"])
            last = trainer.update.parameters.vector.clone()
    assert seen == [0, 0, 4]  # 16 clean steps, 3 more and then huge ones; the next four make eight in a row
    assert torch.equal(trainer.update.parameters.vector, last)
    assert trainer.update.parameters.vector.isfinite().all()
    folder = str(e.value).rpartition(" ")[2]
    found = replay(folder)
    assert (found.epoch, found.minibatch) == (1, 1)
    assert found.first_bad is not None
    names = [finding.name for finding in found.tensors]
    first = names.index(found.first_bad.name)
    assert names.index("batch: values") < first <= names.index("loss")
    assert all(finding.bad == 0 for finding in found.tensors[:first])
    done = fastppo("replay", folder)
    assert done.returncode == 1
    assert f"first not finite: {found.first_bad.name}" in done.stdout
    newest_checkpoint(tmp_path / "run") if (tmp_path / "run" / "checkpoints").exists() else None


def test_n1_a_short_streak_does_not_end_the_run(tmp_path):
    class Once(Huge):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, (self.size if self.life == self.at else 1.0), *rest

    trainer = Trainer(short(tmp_path, max_skipped=5, total_timesteps=160), make_env=Once)
    skipped = [stats.scalars["losses/skipped_minibatches"] for stats in trainer.iterations()]
    assert 0 < sum(skipped) <= 4
    assert trainer.result.ended == "finished"


def test_n1_one_transfer_from_the_device_per_iteration(tmp_path, monkeypatch):
    trainer = Trainer(short(tmp_path, max_skipped=3, env_id="CartPole-v1", target_kl=None, record_ratios=0))
    transfers = []
    before = torch.Tensor.numpy
    monkeypatch.setattr(
        torch.Tensor, "numpy", lambda self, **kw: (transfers.append(1) if kw else None, before(self, **kw))[1]
    )
    for _ in trainer.iterations():
        transfers.append("iteration")
    text = "".join("i" if transfer == "iteration" else "." for transfer in transfers)
    assert set(text.strip("i").split("i")) <= {"."}, text


def test_the_replay_of_a_finite_dump_finds_nothing(tmp_path):
    from fastppo.runs.nan_dump import save_nan_dump

    trainer = Trainer(short(tmp_path, env_id="CartPole-v1"))
    trainer.run()
    folder = tmp_path / "capsule"
    save_nan_dump(
        folder,
        trainer.spec,
        trainer._run.models.saved(),
        trainer.rollout.batch(),
        trainer.learner.coefs,
        update=trainer.update,
        metadata={},
    )
    assert replay(folder).first_bad is None
    done = fastppo("replay", folder)
    assert done.returncode == 0
    assert "all tensors of all 4 minibatches are finite on the CPU" in done.stdout


@pytest.mark.parametrize("name", ["capsule.json", "batch.safetensors", "model.json"])
def test_a_damaged_dump_is_refused_with_a_message(tmp_path, name):
    trainer = Trainer(short(tmp_path, max_skipped=2), make_env=lambda: Huge(at=1))
    with pytest.raises(EnvError) as e:
        trainer.run()
    folder = tmp_path / "run" / "capsule-0-000000"
    assert str(e.value).endswith(str(folder))
    metadata = json.loads((folder / "capsule.json").read_text())
    assert metadata["iteration"] == 1
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError):
        replay(folder)


def test_n6_returns_beyond_2_to_the_24_are_exact(tmp_path):
    trainer = Trainer(short(tmp_path, normalize_rewards=True), make_env=lambda: Huge(at=1, size=2.0**26 + 4))
    trainer.run()
    assert trainer.metrics.episodes.mean_return % 4 == 0
    assert trainer.metrics.episodes.mean_return > 2**26
