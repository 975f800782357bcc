"""Learning tests. Two seeds train in parallel with one thread each, which uses two cores and stays deterministic."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Config, Trainer, evaluate
from fastppo.envs.pool_process import prepare_fork_server
from tests.worlds import Bandit, BrightSide, short


def train(config):
    return Trainer(config).run()


def train_seeds(tmp_path, seeds, enough, solved, **settings):
    """Train seeds in order, two at a time, until `enough` results are `solved`; return all results."""
    configs = [Config(seed=s, threads=1, run_dir=tmp_path / str(s), profile="tuned", **settings) for s in seeds]
    results = []
    prepare_fork_server()  # the fork server of this process also serves the tests of signals
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool:
        while configs and sum(map(solved, results)) < enough:
            results += pool.map(train, configs[:2])
            del configs[:2]
    return results


def test_cartpole_is_solved_within_100k_steps_on_4_of_5_seeds(tmp_path):
    def solved(result):
        return result.ended == "target" and result.mean_return >= 475 and result.global_step <= 100_000

    settings = {"env_id": "CartPole-v1", "target_return": "threshold"}
    results = train_seeds(tmp_path, range(1, 6), 4, solved, **settings)
    assert sum(map(solved, results)) >= 4, [(r.global_step, r.mean_return) for r in results]
    assert evaluate(next(filter(solved, results)).run_dir, 10).mean > 450


@pytest.mark.slow
def test_a_policy_trained_on_the_tensor_cartpole_solves_gymnasiums_cartpole(tmp_path):
    def solved(result):
        return result.ended == "target" and result.mean_return >= 475

    settings = {"env_id": "CartPole-v1", "vectorization": "tensor", "target_return": "threshold"}
    results = train_seeds(tmp_path, range(1, 3), 2, solved, **settings)
    assert all(map(solved, results)), [r.global_step for r in results]
    assert evaluate(results[0].run_dir, 10).mean > 450, "the policy must also solve Gymnasium's environment"


@pytest.mark.slow
def test_pendulum_reaches_minus_300_within_300k_steps_on_2_of_3_seeds(tmp_path):
    def solved(result):
        return result.ended == "target" and result.global_step <= 300_000

    settings = {"env_id": "Pendulum-v1", "target_return": -300.0, "total_timesteps": 300_000}
    results = train_seeds(tmp_path, range(1, 4), 2, solved, **settings)
    assert sum(map(solved, results)) >= 2, [(r.global_step, r.mean_return) for r in results]


BANDITS = {
    "Discrete(start=3)": (spaces.Discrete(4, start=3), 5),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4]), [2, 1]),
    "MultiBinary": (spaces.MultiBinary(4), [1, 0, 0, 1]),
}


@pytest.mark.parametrize("name", BANDITS)
def test_a_one_step_bandit_is_solved(tmp_path, name):
    space, secret = BANDITS[name]
    settings = {"n_envs": 8, "n_steps": 16, "total_timesteps": 10_000, "learning_rate": 1e-2, "n_minibatches": 4}
    settings |= {"anneal_lr": False, "value_clip": "off"}
    result = Trainer(short(tmp_path, **settings), make_env=lambda: Bandit(space, secret)).run()
    assert result.mean_return > 0.95
    assert evaluate(result.run_dir, 5, make_env=lambda: Bandit(space, secret)).mean == 1


def test_the_cnn_solves_a_small_image_environment(tmp_path):
    settings = {"n_envs": 8, "n_steps": 32, "total_timesteps": 4_096, "learning_rate": 1e-3, "n_minibatches": 4}
    trainer = Trainer(short(tmp_path, **settings), make_env=BrightSide)
    assert trainer.config.network == "cnn"
    assert trainer.rollout.obs.dtype == torch.uint8
    assert trainer.run().mean_return > 0.95
    policy = trainer.policy
    dark, light = np.zeros((36, 36, 1), np.uint8), np.zeros((36, 36, 1), np.uint8)
    dark[:, :18], light[:, 18:] = 255, 255
    assert policy.act(torch.as_tensor(np.stack([dark, light])), None).actions.tolist() == [0, 1]
