"""Values that are not finite: what an environment returns is named, what the rules of PPO allow does no harm."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from fastppo import Trainer
from fastppo.errors import EnvError
from fastppo.functional.distributions import Bernoulli, Categorical, MultiCategorical
from tests.worlds import short


class Walk(gym.Env):
    """Episodes of four steps. Numbers that are not finite where a test asks for them."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, last=0.0, terminated=False):
        self.last, self.terminated = last, terminated

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.random(2, np.float32), {}

    def step(self, action):
        self.t += 1
        obs = self.np_random.random(2, np.float32)
        if self.t == 4:
            obs[0] += self.last
        end = self.t == 4
        return obs, 1.0, end and self.terminated, end and not self.terminated, {}


def vector(**kwargs):
    return lambda: SyncVectorEnv([lambda: Walk(**kwargs)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("backend", ["sync", "vector", "normalised"])
def test_n6_a_last_observation_at_a_time_limit_that_is_not_finite_is_named(tmp_path, backend, value):
    config = short(tmp_path, vectorization="sync", normalize_obs=backend == "normalised")
    make = vector(last=value) if backend == "vector" else lambda: Walk(last=value)
    where = "a last observation that is not finite, at a time limit, at step 4 of its run"
    with pytest.raises(EnvError, match=rf"environment 0 returned {where}"):
        Trainer(config, make_env=make).run()


def test_n6_a_last_observation_of_a_terminated_episode_is_not_read(tmp_path):
    result = Trainer(short(tmp_path), make_env=lambda: Walk(last=np.nan, terminated=True)).run()
    assert result.ended == "finished"


class Fillers(SyncVectorEnv):
    """With next-step autoreset; the rewards of the steps that only reset are `filler`."""

    def __init__(self, filler):
        super().__init__([Walk] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
        self.filler, self.ended = filler, np.zeros(2, bool)

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = super().step(actions)
        rewards = np.where(self.ended, self.filler, rewards)
        self.ended = terminated | truncated
        return obs, rewards, terminated, truncated, infos


@pytest.mark.parametrize("changes", [{}, {"normalize_rewards": True}, {"sign_rewards": True}])
def test_n6_the_reward_of_a_filler_row_reaches_nothing(tmp_path, changes):
    found = []
    for k, filler in enumerate((0.0, np.nan, 1e38)):
        trainer = Trainer(
            short(tmp_path / str(k), total_timesteps=96, **changes), make_env=lambda filler=filler: Fillers(filler)
        )
        result = trainer.run()
        found.append((trainer.update.parameters.vector.clone(), result.mean_return))
    assert all(torch.equal(found[0][0], x) and found[0][1] == mean for x, mean in found[1:])


class HandMasked(nn.Module):
    """A network that forbids actions by -inf, as people do by hand: the last one always, the first if x[0] > 0.5."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = nn.Linear(2, 3), nn.Linear(2, 1)

    def forward(self, x):
        first = x[:, :1] > 0.5
        forbidden = torch.cat((first, torch.zeros_like(first), torch.ones_like(first)), 1)
        return self.actor(x).masked_fill(forbidden, -torch.inf), self.critic(x).squeeze(-1)


@pytest.mark.parametrize("compile", ["off", "on", "graph"])
def test_a_network_may_forbid_actions_by_minus_infinity(tmp_path, compile):
    torch.manual_seed(0)
    config = short(tmp_path, total_timesteps=320, compile=compile, ent_coef=0.01, target_kl=0.5)
    trainer = Trainer(config, make_env=Walk, policy=HandMasked())
    for stats in trainer.iterations():
        assert stats.scalars["losses/skipped_minibatches"] == 0
        assert np.isfinite([stats.scalars[f"losses/{name}"] for name in ("entropy", "exact_kl", "approx_kl")]).all()
        assert 0 < stats.scalars["losses/entropy"] < np.log(2)
        assert not (trainer.rollout.actions == 2).any()


FORBIDDEN = [
    (Categorical(4), [0.3, -torch.inf, 1.0, -torch.inf], [0.3, 1.0]),
    (MultiCategorical((2, 3)), [-torch.inf, 0.5, 0.1, -torch.inf, 0.7], None),
    (Bernoulli(3), [-torch.inf, 0.4, torch.inf], [0.4]),
]


@pytest.mark.parametrize(("dist", "logits", "allowed"), FORBIDDEN, ids=lambda x: type(x).__name__)
def test_forbidden_actions_count_for_nothing(dist, logits, allowed):
    params = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    entropy = dist.entropy(params)
    kl = dist.kl(params, params + torch.where(params.isfinite(), 0.5, 0.0).cumsum(-1))
    noise = torch.empty(1000, dist.noise_size, dtype=torch.float64)
    dist.fill_noise(noise, torch.Generator().manual_seed(0))
    actions = dist.sample(params.detach().expand(1000, -1), noise)
    logp = dist.log_prob(params.expand(1000, -1), actions)
    (entropy.sum() + kl.sum() + logp.sum()).backward()
    assert kl.isfinite().all()
    assert (kl >= 0).all()
    assert logp.isfinite().all()
    assert params.grad.isfinite().all()
    assert (params.grad[~params.isfinite()] == 0).all()
    if allowed is not None:
        plain = type(dist)(len(allowed))
        torch.testing.assert_close(entropy, plain.entropy(torch.tensor([allowed], dtype=torch.float64)))
    else:
        parts = [Categorical(2).entropy(torch.tensor([0.1, 0.7], dtype=torch.float64)), torch.tensor(0.0)]
        torch.testing.assert_close(entropy[0], sum(parts))
