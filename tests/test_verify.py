"""verify-env: results for correct environments and for broken ones."""

import functools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from fastppo.analysis.verify_env import verify_env
from fastppo.cli import main
from fastppo.envs.make_envs import Reading
from fastppo.errors import ConfigError
from tests.envs.trees import scene
from tests.envs.worlds import Counter
from tests.faults.test_resume import fastppo
from tests.faults.worlds import Dice, FaultEnv, Gravity, Reusing


def results(**kwargs):
    """Results by name; of several with one name the last."""
    return {result.name: result for result in verify_env("", {}, 60, **kwargs)}


def test_cartpole_passes_every_check():
    done = fastppo("verify-env", "--steps", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "declares NEXT_STEP, and the step after an episode only resets",
        "resume           exact",
        "us per step",
    ):
        assert line in done.stdout
    assert done.stdout.count("same results as sync") == 2
    assert "this environment passes all checks" in done.stdout


def test_unseeded_randomness_is_reported():
    found = results(make_env=Dice)
    assert found["seeds"].state == "note"
    assert "two environments with one seed differ: obs at step 0" in found["seeds"].value
    assert found["pool"].value == "differs from sync: environment 0, step 0, obs"
    assert found["resume"].value.startswith("restart")


def test_the_first_difference_is_reported_by_environment_step_and_key():
    found = results(make_env=Gravity)
    assert found["async"].value == found["pool"].value == "differs from sync: environment 0, step 3, reward"
    assert found["async"].state == found["pool"].state == "bad", "seeding works in one process"


@pytest.mark.parametrize(
    ("kind", "name", "message", "state"),
    [
        ("wide obs", "dtype", "observation of float64 at step 5; its space has float32", "note"),
        ("one number", "shape", r"observation of shape (1,) at step 5; its space has (2,)", "bad"),
        ("nan obs", "numbers", "observation is not finite at step 5", "bad"),
        ("nan reward", "numbers", "reward nan at step 4", "bad"),
        ("no reward", "reward", "reward None at step 4; it must be a number", "bad"),
        ("reward array", "reward", "reward array([1.]) at step 4; it must be a number", "bad"),
        ("done as int", "terminated", "terminated 1 (int) at step 4; it must be a bool", "bad"),
        ("outside", "space", "1 of 60 observations lie outside observation_space", "note"),
    ],
)
def test_violations_are_reported(kind, name, message, state):
    found = results(make_env=lambda: FaultEnv(kind=kind, at_step=5))
    assert (found[name].value, found[name].state) == (message, state)


def test_a_reused_observation_array_is_reported():
    assert results(make_env=Reusing)["memory"].state == "note"


class Liar(gym.vector.VectorEnv):
    """Declares same-step autoreset, and returns the next observation as final_obs."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs=1, mode=None, **_):
        self.num_envs, self.t = num_envs, 0
        self.metadata = {"autoreset_mode": mode} if mode else self.metadata
        self.single_observation_space = spaces.Box(-9, 9, (2,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        return np.zeros((self.num_envs, 2), np.float32), {}

    def step(self, actions):
        self.t += 1
        done = np.full(self.num_envs, self.t % 5 == 0)
        obs = np.full((self.num_envs, 2), self.t % 5, np.float32)
        infos = {"final_obs": obs.copy(), "_final_obs": done} if done.any() else {}
        return obs, np.ones(self.num_envs), done, np.zeros_like(done), infos


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (None, "declares SAME_STEP, but final_obs equals the next observation"),
        (gym.vector.AutoresetMode.NEXT_STEP, "declares NEXT_STEP, but behaves differently at the end of an episode"),
    ],
)
def test_a_vector_version_that_breaks_its_declared_autoreset_mode(mode, message, monkeypatch):
    gym.register("Liar-v0", entry_point=Counter, vector_entry_point=lambda **kwargs: Liar(mode=mode, **kwargs))
    try:
        found = {result.name: result for result in verify_env("Liar-v0", {}, 20)}
    finally:
        del gym.registry["Liar-v0"]
    assert (found["native"].value, found["native"].state) == (message, "bad")


def test_a_vector_environment_is_rejected():
    with pytest.raises(ConfigError, match="needs one that returns a single one"):
        results(make_env=lambda: gym.make_vec("CartPole-v1", 2))


def test_invalid_numbers_of_steps_are_rejected():
    for command in (["verify-env", "--steps", "0"], ["verify-resume", "--iterations", "1"]):
        done = fastppo(*command)
        assert done.returncode == 2
        assert done.stderr.startswith("ConfigError: ")


@pytest.mark.parametrize("masks", ["key", "method", "info"])
def test_dicts_and_masks_are_described_and_their_masks_kept(masks):
    """The environment refuses forbidden actions."""
    found = results(
        make_env=functools.partial(scene, masks), reading=Reading(("place", "direction", "camera"), ("pair/1",))
    )
    assert found["environment"].value == (
        "Scene: camera: image (37, 37, 1) + direction: discrete () + place: vector (3,) + pair/1: vector () for the "
        "critic + mask of 4 actions, discrete"
    ).replace("Scene", type(scene(masks)).__name__)
    assert {name for name, result in found.items() if result.state != "ok"} == set(), found
    assert "same results as sync" in found["async"].value


def test_a_native_version_with_masks_is_checked():
    found = {x.name: x for x in verify_env("fastppo-tests/Scene-v0", {}, 30)}
    assert found["native"].value == "declares SAME_STEP, and final_obs holds the last observations"
    assert found["native"].state == "ok"


def test_verify_env_takes_keys(capsys):
    command = "verify-env --steps 20 --env-id tests.envs.trees:fastppo-tests/Scene-v0 --obs-keys place"
    assert main(command.split()) == 0
    assert "place: vector (3,) + mask of 4 actions, discrete" in capsys.readouterr().out
    assert main([*command.split(), "--action-masks", "off"]) == 1, "the environment refuses forbidden actions"
    said = capsys.readouterr()
    assert "place: vector (3,), discrete" in said.out
    assert "Traceback" not in said.out + said.err
    assert main(["verify-env", "--env-id", "CartPole-v1", "--obs-keys", "place"]) == 2
    assert "obs_keys need observations with keys, but these are one Box" in capsys.readouterr().err
