"""Rollout collection: alignment of rows, bootstrap values, filler rows, time limits, devices."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from fastppo import Trainer
from fastppo.envs.gymnasium_vector import GymnasiumVecEnv
from fastppo.envs.vec_env import Transitions, env_seeds
from fastppo.functional.gae import Trajectory, gae_loop
from fastppo.policies.encoder import Encoder
from fastppo.policies.policy_spec import PolicySpec
from fastppo.ppo.acting_copy import ActingCopy
from fastppo.ppo.collector import Collector
from fastppo.ppo.rollout import Rollout
from fastppo.runtime.clock import Clock
from fastppo.spaces.observations import ObsSpec
from tests.envs.worlds import Counter
from tests.worlds import short, step

CPU = torch.device("cpu")


class Identifiable(nn.Module):
    """A network with V(s) = 10 * step + 100 * episode, which exposes a value in the wrong row, and equal logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return torch.zeros(len(x), 2) + self.weight, 10 * x[:, 0] + 100 * x[:, 1] + self.weight


def roll(mode, ends, n_steps, n=1, rollouts=1):
    """Collect several rollouts; return a copy of the storage after each, and the network."""
    env = GymnasiumVecEnv(SyncVectorEnv([lambda: Counter(ends)] * n, autoreset_mode=mode))
    spec = PolicySpec(env.obs_spec, env.action_spec, "custom", (), "", False, False, 10.0)
    network = Identifiable()
    policy = spec.build(network)
    rollout = Rollout.allocate(n_steps, env, policy, CPU)
    rollout.obs[-1].copy_(env.reset(env_seeds(np.random.SeedSequence(0), env.n_envs)))
    network.calls.clear()
    out = []
    collect = Collector(env, policy, rollout, torch.Generator().manual_seed(0), Clock())
    for _ in range(rollouts):
        collect()
        out.append({name: x.clone() for name, x in rollout.tensors().items()})
    return out, network


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_rows_are_aligned_and_next_values_are_of_true_successors(mode):
    (r, second), _ = roll(mode, ((3, True), (2, False), (9, True)), 7, rollouts=2)
    # episode 0: three steps, time limit; episode 1: two steps, termination; episode 2 continues
    assert r["obs"][:, 0].tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [0, 2], [1, 2], [2, 2]]
    assert r["values"][:, 0].tolist() == [0, 10, 20, 100, 110, 200, 210]
    torch.testing.assert_close(r["rewards"][:, 0], torch.tensor([1.1, 1.2, 1.3, 1.1, 1.2, 1.1, 1.2]))
    assert r["truncated"][:, 0].tolist() == [False, False, True, False, False, False, False]
    assert r["terminated"][:, 0].tolist() == [False, False, False, False, True, False, False]
    # row 2 reaches a time limit: V of its final observation (3, 0), not of the next episode's first
    assert r["next_values"][:, 0].tolist() == [10, 20, 30, 110, 200, 210, 220]
    assert second["obs"][0, 0].tolist() == [2, 2], "the next rollout starts where this one ends"
    assert second["values"][0, 0] == 220


def test_next_step_autoreset_stores_a_filler_row_after_each_episode():
    (r,), _ = roll(AutoresetMode.NEXT_STEP, ((3, True), (2, False), (9, True)), 9)
    assert r["obs"][:, 0].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [0, 1], [1, 1], [2, 1], [0, 2], [1, 2], [2, 2]]
    assert r["valid"][:, 0].tolist() == [True, True, True, False, True, True, False, True, True]
    assert r["next_values"][2, 0] == 30, "the filler row holds the final observation of the episode"


@pytest.mark.parametrize(
    "ends",
    [((3, True), (2, False), (4, True), (1, True), (1, False)), ((5, False),), ((1, True),), ((2, True), (30, True))],
)
def test_next_step_autoreset_without_filler_rows_equals_same_step(ends):
    steps = 40
    (same,), _ = roll(AutoresetMode.SAME_STEP, ends, steps, n=2)
    (next_,), _ = roll(AutoresetMode.NEXT_STEP, ends, 2 * steps, n=2)
    gamma, gae_lambda = torch.tensor(0.9), torch.tensor(0.8)
    for r in (same, next_):
        trajectory = Trajectory(*(r[name] for name in Trajectory._fields))
        r["advantages"], r["returns"] = gae_loop(trajectory, gamma, gae_lambda)
    for n in range(2):
        keep = next_["valid"][:, n]
        # skip the last episodes: the two rollouts end at different steps of them
        last = int(same["done"][:, n].nonzero().max()) + 1
        for name in ("obs", "values", "rewards", "terminated", "truncated", "next_values", "advantages", "returns"):
            a, b = same[name][:steps, n][:last], next_[name][: 2 * steps, n][keep][:last]
            if name == "next_values":  # unused after a termination, so any value is valid
                real = same["terminated"][:last, n]
                a, b = a[~real], b[~real]
            assert torch.equal(a, b), name


def test_final_observations_are_valued_in_batches_of_one_size():
    (r,), network = roll(AutoresetMode.SAME_STEP, ((1, True),), 50, n=2)
    # each of the 100 rows reaches a time limit: its successor is (1, episode) with V = 10 + 100 * episode
    assert r["next_values"].tolist() == [[10 + 100 * t] * 2 for t in range(50)]
    assert set(network.calls) == {2, 32}
    assert network.calls.count(32) == 4


def test_blank_observations_are_valid_encoder_input():
    for start in (7, -9):
        spec = ObsSpec.from_space(spaces.MultiDiscrete([3, 4], start=[start, 0]))
        assert Encoder(spec)(spec.blank(2)).tolist() == [[1, 0, 0, 1, 0, 0, 0]] * 2


def test_a_termination_at_the_time_limit_does_not_bootstrap():
    class Both(Counter):
        def step(self, action):
            obs, reward, _, _, info = super().step(action)
            return obs, reward, self.steps == 2, self.steps == 2, info

    env = GymnasiumVecEnv(SyncVectorEnv([Both], autoreset_mode=AutoresetMode.SAME_STEP))
    env.reset(env_seeds(np.random.SeedSequence(0), env.n_envs))
    step(env, torch.zeros(1, dtype=torch.int64))
    out = step(env, torch.zeros(1, dtype=torch.int64))
    assert out.terminated.all()
    assert out.truncated.all()
    assert not list(out.with_final_obs)


def test_the_storage_keeps_its_addresses(tmp_path):
    trainer = Trainer(short(tmp_path, env_id="Pendulum-v1", total_timesteps=80))
    storage = trainer.rollout.tensors() | {"parameters": trainer.update.parameters.vector}
    places = {name: x.data_ptr() for name, x in storage.items()}
    seen = []
    for _ in trainer.iterations():
        now = trainer.rollout.tensors() | {"parameters": trainer.update.parameters.vector}
        assert {name: x.data_ptr() for name, x in now.items()} == places
        seen.append(now["rewards"].sum().item())
    assert len(set(seen)) == 5


def train(tmp_path, name, env_id, change, **settings):
    """Apply `change` to a trainer, train briefly, and return its parameters, logged scalars and observations."""
    defaults = {"n_envs": 4, "n_steps": 16, "total_timesteps": 4 * 16 * 4, "env_id": env_id, "learning_rate": 1e-3}
    trainer = Trainer(short(tmp_path, run_dir=tmp_path / name, compile="off", **(defaults | settings)))
    change(trainer)
    logged = [
        {k: v for k, v in s.scalars.items() if k.startswith(("losses", "charts/ep"))} for s in trainer.iterations()
    ]
    return trainer.update.parameters.vector, logged, trainer.rollout.obs.clone()


def staged(trainer):
    r = trainer.rollout
    trainer.env.attach(Transitions(r.obs, r.actions, r.rewards, r.terminated, r.truncated, r.valid), staged=True)


def handed_over(trainer):
    """Act with a second policy and storage, as a trainer does that learns on a GPU and acts on the CPU."""
    acting = copy.deepcopy(trainer.policy)
    with torch.no_grad():
        for parameter in acting.parameters():
            parameter.fill_(torch.nan)  # to be overwritten with the trainer's parameters
    here = Rollout.allocate(len(trainer.rollout.rewards), trainer.env, acting, CPU)
    here.obs[-1].copy_(trainer.rollout.obs[-1])
    trainer.rollout.obs.fill_(torch.nan)
    acting_copy = ActingCopy(acting, here, trainer.policy, trainer.rollout)
    generator = trainer.collect._generator
    trainer.collect = Collector(trainer.env, acting, here, generator, trainer.clock, acting_copy=acting_copy)


@pytest.mark.parametrize("change", [staged, handed_over])
@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("CartPole-v1", {"env_kwargs": {"max_episode_steps": 7}}),
        ("Pendulum-v1", {"env_kwargs": {"max_episode_steps": 7}, "normalize_obs": True, "normalize_rewards": True}),
        ("CartPole-v1", {"vectorization": "native"}),
        ("CartPole-v1", {"vectorization": "pool", "half_batches": True}),
    ],
    ids=["time limit", "normalisers", "filler rows", "half batches"],
)
def test_transfer_to_another_device_is_bit_identical(tmp_path, change, env_id, settings):
    plain = train(tmp_path, "plain", env_id, lambda trainer: None, **settings)
    other = train(tmp_path, "other", env_id, change, **settings)
    assert torch.equal(plain[0], other[0])
    assert str(plain[1]) == str(other[1]), "compared as text because NaN != NaN"
    assert torch.equal(plain[2], other[2])
