"""It learns. Seeds run side by side, one thread each, so that two cores are used and the bits repeat."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Config, Trainer, evaluate
from tests.worlds import Bandit, BrightSide, short


def train(config):
    return Trainer(config).run()


def over_seeds(tmp_path, seeds, **settings):
    configs = [Config(seed=s, threads=1, run_dir=tmp_path / str(s), preset="tuned", **settings) for s in seeds]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(train, configs))


def test_cartpole_is_solved_within_100k_steps_on_4_of_5_seeds(tmp_path):
    results = over_seeds(tmp_path, range(1, 6), env_id="CartPole-v1", target_return="threshold")
    solved = [r for r in results if r.ended == "target" and r.mean_return >= 475 and r.global_step <= 100_000]
    assert len(solved) >= 4, [(r.global_step, r.mean_return) for r in results]
    assert evaluate(solved[0].run_dir, 10).mean > 450


def test_a_tensor_environment_is_learned_as_gymnasiums_is(tmp_path):
    settings = {"env_id": "CartPole-v1", "vectorization": "tensor", "target_return": "threshold"}
    results = over_seeds(tmp_path, range(1, 3), **settings)
    assert all(r.ended == "target" and r.mean_return >= 475 for r in results), [r.global_step for r in results]
    assert evaluate(results[0].run_dir, 10).mean > 450, "on Gymnasium's own environment"


def test_pendulum_passes_minus_300_within_300k_steps_on_2_of_3_seeds(tmp_path):
    results = over_seeds(tmp_path, range(1, 4), env_id="Pendulum-v1", target_return=-300.0, total_timesteps=300_000)
    solved = [r for r in results if r.ended == "target" and r.global_step <= 300_000]
    assert len(solved) >= 2, [(r.global_step, r.mean_return) for r in results]


BANDITS = {
    "Discrete(start=3)": (spaces.Discrete(4, start=3), 5),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4]), [2, 1]),
    "MultiBinary": (spaces.MultiBinary(4), [1, 0, 0, 1]),
}


@pytest.mark.parametrize("name", BANDITS)
def test_one_step_bandits(tmp_path, name):
    space, secret = BANDITS[name]
    settings = {"n_envs": 8, "n_steps": 16, "total_timesteps": 10_000, "learning_rate": 1e-2, "n_minibatches": 4}
    settings |= {"anneal_lr": False, "value_clip": "off"}
    result = Trainer(short(tmp_path, **settings), make_env=lambda: Bandit(space, secret)).run()
    assert result.mean_return > 0.95
    assert evaluate(result.run_dir, 5, make_env=lambda: Bandit(space, secret)).mean == 1


def test_a_small_image_environment_by_the_cnn(tmp_path):
    settings = {"n_envs": 8, "n_steps": 32, "total_timesteps": 4_096, "learning_rate": 1e-3, "n_minibatches": 4}
    trainer = Trainer(short(tmp_path, **settings), make_env=BrightSide)
    assert trainer.config.network == "cnn"
    assert trainer.rollout.obs.dtype == torch.uint8
    assert trainer.run().mean_return > 0.95
    policy = trainer.policy
    dark, light = np.zeros((36, 36, 1), np.uint8), np.zeros((36, 36, 1), np.uint8)
    dark[:, :18], light[:, 18:] = 255, 255
    assert policy.act(torch.as_tensor(np.stack([dark, light])), None).actions.tolist() == [0, 1]
