"""Observation and action spaces as specs."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Trainer
from fastppo.errors import ConfigError, EnvError
from fastppo.spaces.actions import ActionSpec, ToEnv
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import PackedSpace, leaves_of
from tests.worlds import short

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


# Space: kind, dtype in storage, divisor, (C, H, W) of an image
READINGS = {
    "pixels": (spaces.Box(0, 255, (84, 84, 3), np.uint8), "image", torch.uint8, 255, (3, 84, 84)),
    "small pixels": (spaces.Box(0, 255, (8, 8, 4), np.uint8), "image", torch.uint8, 255, (4, 8, 8)),
    "board": (spaces.Box(0, 2, (4, 7), np.uint8), "vector", torch.float32, 2, None),
    "planes": (spaces.Box(0, 1, (8, 8, 4), np.uint8), "vector", torch.float32, 1, None),
    "classes": (spaces.Box(0, 12, (64, 64), np.uint8), "image", torch.uint8, 12, (1, 64, 64)),
    "counts": (spaces.Box(0, 9, (5,), np.uint8), "vector", torch.float32, 9, None),
    "bytes": (spaces.Box(0, 255, (128,), np.uint8), "vector", torch.float32, 1, None),
    "stack, channels last": (spaces.Box(0, 255, (4, 84, 96, 3), np.uint8), "image", torch.uint8, 255, (12, 84, 96)),
    "stack, channels first": (spaces.Box(0, 255, (4, 3, 84, 96), np.uint8), "image", torch.uint8, 255, (12, 84, 96)),
    "stack last": (spaces.Box(0, 255, (84, 96, 3, 4), np.uint8), "image", torch.uint8, 255, (12, 84, 96)),
    "float pixels": (spaces.Box(0, 1, (3, 84, 84), np.float32), "image", torch.float32, 1, (3, 84, 84)),
    "float64 to 255": (spaces.Box(0, 255, (84, 84), np.float64), "image", torch.float32, 255, (1, 84, 84)),
    "float stack": (spaces.Box(-1, 1, (2, 40, 40, 3), np.float32), "image", torch.float32, 1, (6, 40, 40)),
    "int64 pixels": (spaces.Box(0, 255, (40, 40, 3), np.int64), "image", torch.uint8, 255, (3, 40, 40)),
    "table of floats": (spaces.Box(-np.inf, np.inf, (50, 40), np.float32), "vector", torch.float32, 1, None),
    "small floats": (spaces.Box(0, 1, (8, 8), np.float32), "vector", torch.float32, 1, None),
    "small integers": (spaces.Box(0, 5, (8, 8), np.int8), "vector", torch.float32, 1, None),
}


@pytest.mark.parametrize("name", READINGS)
def test_a_box_reads_as_an_image_by_dtype_bounds_and_shape(name):
    space, kind, dtype, divisor, size = READINGS[name]
    spec = ObsSpec.from_space(space)
    assert (spec.leaf.kind, spec.dtype, spec.leaf.divisor) == (kind, dtype, divisor)
    assert size is None or spec.leaf.image_size == size
    assert ObsSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_note_tells_how_integers_and_images_are_read():
    def note(name):
        return ObsSpec.from_space(READINGS[name][0]).leaf.note

    assert (
        note("pixels")
        == "observations: uint8 (84, 84, 3) is read as an image with 3 channels of 84x84, divided by 255."
    )
    assert "a stack of images, folded into 12 channels of 84x96" in note("stack, channels last")
    assert "codes and not pixels, give the space their largest value" in note("small pixels")
    assert note("board") == "observations: uint8 (4, 7) is read as a vector, divided by 2, the high of its space."
    assert "a vector, not scaled" in note("bytes")
    assert note("table of floats") is None
    assert ObsSpec.from_space(spaces.Discrete(3)).leaf.note is None


def test_images_of_five_dimensions_are_refused():
    with pytest.raises(EnvError, match=r"\(2, 4, 84, 84, 3\) look like images.*ReshapeObservation"):
        ObsSpec.from_space(spaces.Box(0, 255, (2, 4, 84, 84, 3), np.uint8))
    assert ObsSpec.from_space(spaces.Box(0, 255, (2,) * 5, np.uint8)).leaf.kind == "vector"


def test_observations_keep_the_reading_of_an_earlier_version():
    board = ObsSpec.from_space(spaces.Box(0, 2, (4, 7), np.uint8))
    earlier = ObsSpec.single("image", (4, 7), "uint8")
    assert board.read_as(earlier) == earlier
    assert board.read_as(ObsSpec.single("image", (7, 4), "uint8")) == board
    assert board.read_as(ObsSpec.single("image", (4, 7), "int8")) == board


def test_discrete_observations_outside_their_space_are_found():
    leaf = ObsSpec.from_space(spaces.Discrete(4, start=-1)).leaf
    assert leaf.outside(np.array([-1, 0, 2])) is None
    assert leaf.outside(np.array([0, 3])) == (1, "3", "Discrete(4, start=-1)")
    assert leaf.outside(np.array([-2]))[0] == 0
    leaf = ObsSpec.from_space(spaces.MultiDiscrete([[2, 5], [3, 4]])).leaf
    assert leaf.outside(np.array([[[1, 4], [2, 3]]])) is None
    row, value, space = leaf.outside(np.array([[[1, 4], [2, 3]], [[0, 5], [0, 0]]]))
    assert (row, value, space.startswith("MultiDiscrete")) == (1, "[[0, 5], [0, 0]]", True)


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


FAR = spaces.Box(np.array([-2000, 5], np.float32), np.array([2000, 6], np.float32))


def test_rescaled_actions_reach_the_bounds_of_the_space():
    spec = ActionSpec.from_space(FAR).rescaled()
    assert ActionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    actions = np.array([[-1, -1], [0, 0], [0.5, 0.5], [1, 1], [7, -7]], np.float32)
    expected = [[-2000, 5], [0, 5.5], [1000, 5.75], [2000, 6], [2000, 5]]
    out = spec.to_env(actions)
    assert (out.tolist(), out.dtype) == (expected, np.float32)
    low, high = spec.bounds(torch.device("cpu"))
    assert (low.tolist(), high.tolist()) == ([-1, -1], [1, 1])


@pytest.mark.parametrize("name", [*ACTIONS, "rescaled"])
def test_tensors_are_converted_to_the_environments_actions_as_arrays_are(name):
    spec = ActionSpec.from_space(FAR).rescaled() if name == "rescaled" else ActionSpec.from_space(ACTIONS[name])
    dist = spec.distribution
    noise = torch.empty(100, dist.noise_size)
    dist.fill_noise(noise, torch.Generator().manual_seed(0))
    actions = dist.sample(torch.ones(100, dist.n_params), noise)
    converted = ToEnv(spec)(actions).numpy().reshape(100, *spec.shape)
    np.testing.assert_allclose(converted, spec.to_env(actions.numpy()), rtol=1e-6)


def test_actions_without_finite_bounds_cannot_be_rescaled():
    for name, message in (
        ("discrete", "needs Box actions, but the action space is discrete"),
        ("box unbounded", "component 0 of the action space has -inf to inf"),
        ("box half bounded", "component 0 of the action space has 0 to inf"),
    ):
        with pytest.raises(ConfigError, match=message):
            ActionSpec.from_space(ACTIONS[name]).rescaled()
    with pytest.raises(ConfigError, match="finite bounds"):
        ActionSpec.from_space(spaces.Box(-3e38, 3e38, (1,), np.float32)).rescaled()


def test_a_note_names_action_bounds_far_from_the_scale_of_the_policy():
    note = ActionSpec.from_space(FAR).note
    assert "component 0 has bounds -2000 to 2000" in note
    assert "--rescale-actions, or gymnasium.wrappers.RescaleAction" in note
    assert ActionSpec.from_space(FAR).rescaled().note is None
    for low, high, noted in ((-2, 2, 0), (-0.4, 0.4, 0), (0, 1, 0), (-1e-3, 1e-3, 1), (5, 6, 1), (-3e38, 3e38, 0)):
        assert bool(ActionSpec.from_space(spaces.Box(low, high, (1,), np.float32)).note) == noted
    assert all(ActionSpec.from_space(space).note is None for space in ACTIONS.values())


class Unflattenable(spaces.Space):
    pass


@pytest.mark.parametrize(
    "space",
    [spaces.Sequence(spaces.Discrete(2)), spaces.Dict(a=spaces.Sequence(spaces.Discrete(2))), Unflattenable((2,))],
)
def test_flattening_is_not_advised_for_spaces_that_cannot_be_flattened(space):
    with pytest.raises(EnvError, match="no fixed length.*TransformObservation") as refused:
        ObsSpec.from_space(space)
    assert "FlattenObservation" not in str(refused.value)


def test_unsupported_observations_are_refused_with_a_remedy():
    with pytest.raises(EnvError, match="FlattenObservation"):
        ObsSpec.from_space(spaces.Text(3))


@pytest.mark.parametrize(
    "space", [spaces.Dict(a=spaces.Discrete(2)), spaces.Tuple((spaces.Discrete(2),)), spaces.Text(3)]
)
def test_unsupported_actions_are_refused_with_a_remedy(space):
    with pytest.raises(EnvError, match="ActionWrapper"):
        ActionSpec.from_space(space)


def test_an_integer_box_is_refused_as_an_action_space():
    with pytest.raises(EnvError, match="MultiDiscrete"):
        ActionSpec.from_space(spaces.Box(0, 9, (2,), np.int64))


EMPTY = spaces.Box(0, 1, (0,))


@pytest.mark.parametrize("space", [EMPTY, spaces.Box(0, 255, (0, 84, 3), np.uint8)], ids=["vector", "image"])
def test_an_observation_space_without_numbers_is_refused(space):
    with pytest.raises(EnvError, match=r"observation space Box.* gives the policy no numbers"):
        ObsSpec.from_space(space)


def test_an_empty_array_beside_others_is_no_harm():
    parts = {"empty": EMPTY, "full": spaces.Box(0, 1, (2,))}
    assert ObsSpec.from_space(_packed(parts)).features == 2
    with pytest.raises(EnvError, match=r"observation space Dict.* gives the policy no numbers"):
        ObsSpec.from_space(_packed({"empty": EMPTY}))


def _packed(parts):
    space = spaces.Dict(parts)
    return PackedSpace(leaves_of(space, (), (), None), space)


def test_an_action_space_without_numbers_is_refused():
    with pytest.raises(EnvError, match=r"action space Box.* holds no numbers"):
        ActionSpec.from_space(EMPTY)


class Empty(gym.Env):
    observation_space, action_space = EMPTY, spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(0, np.float32), {}

    def step(self, action):
        return np.zeros(0, np.float32), 0.0, False, False, {}


def test_a_space_without_numbers_leaves_no_run_folder(tmp_path):
    with pytest.raises(EnvError, match="no numbers"):
        Trainer(short(tmp_path), make_env=Empty)
    assert not (tmp_path / "run").exists()
