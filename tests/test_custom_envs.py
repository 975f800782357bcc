"""Environments of the user's own: their names, action bounds, and observations that can't be encoded."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo import SimulatorEnv, Trainer, evaluate, load_policy, resume
from fastppo.envs.env_info import EnvInfo
from fastppo.envs.make_envs import inspect_env, make_vec_env
from fastppo.errors import ConfigError, EnvError
from fastppo.profiles import CLEANRL
from fastppo.spaces.leaves import ObsLeaf
from fastppo.spaces.observations import ObsSpec
from tests.envs.worlds import Counter
from tests.worlds import Spaces, short, step

FAR = spaces.Box(np.array([-2000, 5], np.float32), np.array([2000, 6], np.float32))
VECTOR = spaces.Box(-1, 1, (3,), np.float32)


def far_env():
    """The reward is the sum of the action; an action outside its bounds is an error."""
    return Spaces(VECTOR, FAR)


def far_vector(num_envs, **_):
    return SyncVectorEnv([far_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


gym.register("fastppo-tests/Far-v0", far_env, vector_entry_point=far_vector)


class FarSimulator:
    num_envs = 2

    def reset(self):
        return torch.zeros(2, 3)

    def step(self, actions):
        over = torch.zeros(2, dtype=torch.bool)
        return torch.zeros(2, 3), actions.sum(1), over, over, {}


# Name: arguments of inspect_env, vectorization
WAYS = {
    "sync": (("", {}, far_env), "sync"),
    "async": (("", {}, far_env), "async"),
    "pool": (("", {}, far_env), "pool"),
    "native": (("fastppo-tests/Far-v0", {}), "native"),
    "vector": (("", {}, lambda: far_vector(2)), "sync"),
    "simulator": (("", {}, lambda: SimulatorEnv(FarSimulator(), VECTOR, FAR)), "sync"),
}


@pytest.mark.parametrize("name", WAYS)
def test_rescaled_actions_reach_the_environments_of_every_backend(name):
    arguments, vectorization = WAYS[name]
    env = make_vec_env(inspect_env(*arguments, rescale_actions=True), 2, vectorization, n_workers=1)
    try:
        env.reset(np.arange(2))
        rewards = step(env, torch.tensor([[0.5, -1.0], [3.0, 0.0]])).rewards
    finally:
        env.close()
    assert rewards.tolist() == [1000 + 5, 2000 + 5.5]


@pytest.mark.filterwarnings("ignore:.*precision lowered")
@pytest.mark.parametrize("vectorization", ["tensor", "envpool"])
def test_rescaled_actions_are_those_of_the_environments_own_scale(vectorization):
    if vectorization == "envpool":
        pytest.importorskip("envpool")
    transitions = []
    for rescale, action in ((True, 0.5), (False, 1.0)):
        env_info = inspect_env("Pendulum-v1", {}, rescale_actions=rescale)
        env = make_vec_env(env_info, 2, vectorization, seed=1)
        env.reset(np.arange(2))
        transitions.append(step(env, torch.full((2, 1), action)))
        env.close()
    assert torch.equal(transitions[0].obs, transitions[1].obs)
    assert torch.equal(transitions[0].rewards, transitions[1].rewards)


def test_a_run_with_rescaled_actions_is_evaluated_resumed_and_used(tmp_path):
    config = short(tmp_path, rescale_actions=True, eval_every=16, eval_episodes=2)
    for stats in Trainer(config, make_env=far_env).iterations():
        assert 0.1 < stats.scalars["charts/clipped_actions"] < 0.6, "a third of N(0, 1) lies outside [-1, 1]"
    saved = load_policy(tmp_path / "run")
    obs = np.array([[0.1, 0.2, 0.3]], np.float32)
    mode = saved.policy.act(torch.from_numpy(obs), None).actions.numpy()
    np.testing.assert_allclose(saved.predict(obs)[0], np.clip(mode, -1, 1) * [2000, 0.5] + [0, 5.5], rtol=1e-5)
    assert len(evaluate(tmp_path / "run", 2, make_env=far_env).returns) == 2
    again = resume(tmp_path / "run", total_timesteps=64, make_env=far_env)
    assert (again.config.rescale_actions, again.run().ended) == (True, "finished")


def test_bounds_far_from_the_policy_are_noted_and_rescaling_is_refused_without_bounds(tmp_path):
    trainer = Trainer(short(tmp_path), make_env=far_env)
    assert any("use --rescale-actions" in note for note in trainer.notes)
    trainer.env.close()
    with pytest.raises(ConfigError, match="rescale_actions needs Box actions"):
        Trainer(short(tmp_path, rescale_actions=True))


@pytest.mark.parametrize("own_vector", [False, True])
def test_an_environment_of_ones_own_has_its_own_name_and_no_profile(tmp_path, own_vector):
    def make_env():
        return SyncVectorEnv([Counter] * 2, autoreset_mode=AutoresetMode.SAME_STEP) if own_vector else Counter()

    trainer = Trainer(short(tmp_path, profile="tuned"), make_env=make_env)
    assert "profile tuned: no measured setting for Counter; CleanRL's defaults are used." in trainer.notes
    assert (trainer.config.env_id, trainer.config.gamma) == ("Counter", CLEANRL["discrete"]["gamma"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["env_id"] == "Counter"
    trainer.run()
    if not own_vector:
        assert resume(tmp_path / "run", total_timesteps=64, make_env=make_env).run().ended == "finished"


def test_a_wrapped_or_vectorised_environment_keeps_its_registered_id():
    def make_vector():
        return SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.SAME_STEP)

    def make_wrapped():
        return gym.wrappers.TimeAwareObservation(gym.make("CartPole-v1"))

    for make in (make_vector, make_wrapped, lambda: gym.make_vec("CartPole-v1", 2)):
        assert inspect_env("Pendulum-v1", {}, make).name == "CartPole-v1"


def test_a_run_that_saved_the_default_name_is_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(EnvInfo, "from_id", True)
        Trainer(short(tmp_path), make_env=Counter).run()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["env_id"] == "CartPole-v1"
    trainer = resume(tmp_path / "run", total_timesteps=64, make_env=Counter)
    assert trainer.config.env_id == "Counter"
    assert trainer.run().ended == "finished"


def test_a_run_that_read_its_board_as_an_image_is_evaluated_and_resumed(tmp_path, monkeypatch):
    def make_env():
        return Spaces(spaces.Box(0, 2, (4, 7), np.uint8), spaces.Discrete(3))

    with monkeypatch.context() as earlier:
        earlier.setattr(ObsLeaf, "from_space", lambda space: ObsLeaf("image", (4, 7), "uint8"))
        Trainer(short(tmp_path), make_env=make_env).run()
    assert len(evaluate(tmp_path / "run", 2, make_env=make_env).returns) == 2
    trainer = resume(tmp_path / "run", total_timesteps=64, make_env=make_env)
    assert trainer.spec.obs == trainer.env.obs_spec == ObsSpec.single("image", (4, 7), "uint8")
    assert trainer.run().ended == "finished"


@pytest.mark.parametrize(
    ("space", "kind", "network"),
    [
        (spaces.Box(0, 2, (4, 7), np.uint8), "vector", "mlp"),
        (spaces.Box(0, 255, (2, 40, 40, 1), np.uint8), "image", "cnn"),
        (spaces.Box(0, 1, (40, 40, 1), np.float32), "image", "cnn"),
        (spaces.Box(0, 255, (40, 40), np.int64), "image", "cnn"),
    ],
    ids=["board", "stack", "floats", "integers"],
)
def test_training_on_boards_and_images(tmp_path, space, kind, network):
    trainer = Trainer(short(tmp_path), make_env=lambda: Spaces(space, spaces.Discrete(2)))
    assert (trainer.spec.obs.leaf.kind, trainer.config.network) == (kind, network)
    assert any(note.startswith("observations: ") and "is read as" in note for note in trainer.notes)
    assert trainer.run().ended == "finished"


class Stray(gym.Env):
    """Observations of Discrete(16) that are 17 where `where` says so: in "reset", "step" or the "final" one."""

    observation_space, action_space = spaces.Discrete(16), spaces.Discrete(2)

    def __init__(self, where):
        self.where = where

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return 17 if self.where == "reset" else 0, {}

    def step(self, action):
        self.steps += 1
        stray = self.steps == 3 and self.where in ("step", "final")
        return 17 if stray else 1, 0.0, False, stray and self.where == "final", {}


@pytest.mark.parametrize("where", ["reset", "step", "final"])
def test_a_discrete_observation_outside_its_space_names_environment_step_value_and_space(tmp_path, where):
    step = "reset" if where == "reset" else "step 3"
    message = rf"environment 0 returned observation 17 in {step}, outside its observation_space Discrete\(16\)"
    with pytest.raises(EnvError, match=message):
        Trainer(short(tmp_path), make_env=lambda: Stray(where)).run()


def test_discrete_observations_outside_their_space_are_refused_everywhere(tmp_path):
    class Straying(FarSimulator):
        def reset(self):
            return torch.tensor([0, 16])

    env = SimulatorEnv(Straying(), spaces.Discrete(16), FAR)
    with pytest.raises(EnvError, match=r"environment 1 returned observation 16 in reset, outside .*Discrete\(16\)"):
        env.reset(np.arange(2))
    Trainer(short(tmp_path), make_env=lambda: Stray("nowhere")).run()
    with pytest.raises(ValueError, match=r"row 1 of obs is 16, outside .*Discrete\(16\)"):
        load_policy(tmp_path / "run").predict([3, 16])
