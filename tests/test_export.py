"""Exported policies return what the saved policy returns."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch

from fastppo import Config, Trainer, load_policy
from fastppo.errors import CheckpointError, ConfigError
from fastppo.evaluation.export import export


class Spaces(gym.Env):
    """Random observations, and a given action space."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 1.0, False, False, {}


gym.register("Starts-v0", lambda: Spaces(gym.spaces.MultiDiscrete([3, 4], start=[5, -2])), max_episode_steps=9)
gym.register("Bits-v0", lambda: Spaces(gym.spaces.MultiBinary((2, 2))), max_episode_steps=9)
BASE = Config(n_envs=2, n_steps=32, total_timesteps=256, compile="off", threads=1, record_ratios=0)
RUNS = {
    "discrete": {"env_id": "CartPole-v1", "normalize_obs": True},
    "box": {"env_id": "Pendulum-v1", "normalize_obs": True, "learning_rate": 0.1},
    "rescaled": {"env_id": "Pendulum-v1", "rescale_actions": True, "learning_rate": 0.1},
    "index": {"env_id": "FrozenLake-v1"},
    "starts": {"env_id": "Starts-v0"},
    "bits": {"env_id": "Bits-v0"},
    "image": {"env_id": "fastppo/Catch-v0", "n_steps": 8, "total_timesteps": 32},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    Trainer(dataclasses.replace(BASE, run_dir=folder, **RUNS[request.param])).run()
    saved = load_policy(folder)
    env = gym.make(RUNS[request.param]["env_id"])
    env.observation_space.seed(0)
    obs = np.stack([np.asarray(env.observation_space.sample()) for _ in range(64)])
    env.close()
    if obs.dtype.kind == "f":
        obs = np.clip(obs, -50, 50)
    rows = torch.as_tensor(obs).to(saved.spec.obs.dtype)
    with torch.no_grad():
        params, values, _ = saved.policy(rows)
    return folder, rows, saved.predict(obs)[0], params.numpy(), values.numpy()


def agree(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_onnx_returns_the_same_for_any_batch_size(run, tmp_path):
    import onnxruntime

    folder, rows, *expected = run
    path = export(folder, tmp_path / "policy.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_outputs()] == ["actions", "params", "values"]
    for n in (64, 1, 7):
        agree(session.run(None, {"obs": rows[:n].numpy()}), [x[:n] for x in expected])


def test_pt2_returns_the_same_for_any_batch_size(run, tmp_path):
    folder, rows, *expected = run
    path = export(folder, None, "pt2")
    assert path == folder / "policy.pt2"
    module = torch.export.load(path).module()
    for n in (64, 1, 7):
        agree([x.detach().numpy() for x in module(rows[:n])], [x[:n] for x in expected])


def test_box_actions_are_within_bounds(run):
    _, _, actions, params, _ = run
    if params.shape[1] == 2 and actions.dtype == np.float32:  # Pendulum
        assert np.abs(actions).max() <= 2


def test_a_network_that_cant_be_traced_is_refused_and_leaves_no_file(tmp_path):
    class Branches(torch.nn.Linear):
        def forward(self, x):
            out = super().forward(x * 2 if x.sum() > 0 else x)
            return out[:, :2], out[:, 2]

    Trainer(dataclasses.replace(BASE, run_dir=tmp_path / "run"), policy=Branches(4, 3)).run()
    with pytest.raises(ConfigError, match="this network can't be traced"):
        export(tmp_path / "run", None, "pt2", Branches(4, 3))
    assert not list((tmp_path / "run").glob("*policy*"))


def test_a_missing_model_or_folder_is_refused(tmp_path, run):
    with pytest.raises(CheckpointError, match="holds no saved model"):
        export(tmp_path, None, "pt2")
    with pytest.raises(ConfigError, match="can't be written"):
        export(run[0], tmp_path / "no" / "policy.pt2", "pt2")
