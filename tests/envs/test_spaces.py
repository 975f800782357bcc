"""Observation and action spaces as specs."""

import json

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo.errors import EnvError
from fastppo.spaces import ActionSpec, ObsSpec

OBS = {
    "float32": (spaces.Box(-1, 1, (3,), np.float32), "vector", torch.float32),
    "float64": (spaces.Box(-1, 1, (2, 3), np.float64), "vector", torch.float32),
    "image": (spaces.Box(0, 255, (84, 96, 3), np.uint8), "image", torch.uint8),
    "grey": (spaces.Box(0, 255, (84, 96), np.uint8), "image", torch.uint8),
    "stacked": (spaces.Box(0, 255, (4, 84, 96), np.uint8), "image", torch.uint8),
    "bytes": (spaces.Box(0, 255, (128,), np.uint8), "vector", torch.float32),
    "discrete": (spaces.Discrete(7, start=2), "discrete", torch.int64),
    "multidiscrete": (spaces.MultiDiscrete([2, 3]), "discrete", torch.int64),
    "multibinary": (spaces.MultiBinary(5), "vector", torch.float32),
}
ACTIONS = {
    "discrete": spaces.Discrete(4),
    "discrete from -1": spaces.Discrete(3, start=-1),
    "multidiscrete": spaces.MultiDiscrete([2, 5]),
    "multidiscrete from": spaces.MultiDiscrete([2, 5], start=[1, -3]),
    "multidiscrete 2d": spaces.MultiDiscrete([[2, 5], [3, 4]]),
    "multibinary": spaces.MultiBinary(3),
    "multibinary 2d": spaces.MultiBinary((2, 3)),
    "box": spaces.Box(-2, 2, (1,), np.float32),
    "box 2d float64": spaces.Box(np.array([[-1, 0.0]]), np.array([[1, 0.5]]), dtype=np.float64),
    "box unbounded": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "box half bounded": spaces.Box(np.array([0, -np.inf], np.float32), np.array([np.inf, 1], np.float32)),
    "box scalar": spaces.Box(-1, 1, (), np.float32),
}


@pytest.mark.parametrize("name", OBS)
def test_an_observation_space_gives_its_kind_dtype_and_shape(name):
    space, kind, dtype = OBS[name]
    spec = ObsSpec.from_space(space)
    assert (spec.leaf.kind, spec.dtype) == (kind, dtype)
    sample = np.asarray(space.sample())
    assert spec.shape == sample.shape
    assert ObsSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_image_channels_may_come_first_last_or_be_absent():
    sizes = {name: ObsSpec.from_space(OBS[name][0]).leaf.image_size for name in ("image", "grey", "stacked")}
    assert sizes == {"image": (3, 84, 96), "grey": (1, 84, 96), "stacked": (4, 84, 96)}


@pytest.mark.parametrize("name", ACTIONS)
def test_sampled_actions_lie_in_the_action_space(name):
    space = ACTIONS[name]
    spec = ActionSpec.from_space(space)
    dist = spec.distribution
    noise = torch.empty(500, dist.noise_size)
    dist.fill_noise(noise, torch.Generator().manual_seed(0))
    actions = dist.sample(3 * torch.ones(500, dist.n_params), noise)
    out = spec.to_env(actions.numpy())
    assert out.dtype == space.dtype
    assert all(space.contains(np.asarray(a) if isinstance(space, spaces.Box) else a) for a in out)
    if space.shape == () and hasattr(space, "n"):
        assert set(spec.to_env(np.arange(space.n)).tolist()) == set(range(space.start, space.start + space.n))
    assert ActionSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec


def test_box_actions_are_clipped_for_the_environment_only():
    spec = ActionSpec.from_space(spaces.Box(-2, 2, (1,), np.float32))
    raw = torch.tensor([[5.0], [-7.0], [1.5]])
    assert spec.to_env(raw.numpy()).tolist() == [[2], [-2], [1.5]]
    assert raw.tolist() == [[5], [-7], [1.5]]


@pytest.mark.parametrize(
    "space", [spaces.Dict(a=spaces.Discrete(2)), spaces.Tuple((spaces.Discrete(2),)), spaces.Text(3)]
)
def test_unsupported_spaces_are_refused_with_a_remedy(space):
    with pytest.raises(EnvError, match="FlattenObservation"):
        ObsSpec.from_space(space)
    with pytest.raises(EnvError, match="ActionWrapper"):
        ActionSpec.from_space(space)


def test_an_integer_box_is_refused_as_an_action_space():
    with pytest.raises(EnvError, match="MultiDiscrete"):
        ActionSpec.from_space(spaces.Box(0, 9, (2,), np.int64))
