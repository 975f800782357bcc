"""Episode statistics compared with a plain loop, over rollouts that split episodes at any step; measuring in C."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastppo.native import mlp as native
from fastppo.ppo.metrics import WINDOW, EpisodeStats, Metrics, count_rows
from fastppo.runtime.distributed import World
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec


def reference_episodes(rewards, done, valid):
    """Return (return, length) of each finished episode, ordered by time step and then by environment."""
    n = rewards.shape[1]
    total, length, out = np.zeros(n), np.zeros(n, int), []
    for t in range(len(rewards)):
        for i in range(n):
            if valid is not None and not valid[t, i]:
                continue
            total[i] += rewards[t, i]
            length[i] += 1
            if done[t, i]:
                out.append((total[i], int(length[i])))
                total[i], length[i] = 0.0, 0
    return out


@pytest.mark.parametrize("fillers", [False, True])
@pytest.mark.parametrize(
    ("shape", "often"), [((1, 1), 0.5), ((7, 3), 0.4), ((40, 5), 0.02), ((50, 9), 0.5), ((3, 200), 1.0)]
)
def test_episode_statistics_over_several_rollouts_match_a_plain_loop(shape, often, fillers):
    rng = np.random.default_rng(0)
    rollouts = 4
    steps, n = shape
    rewards = rng.normal(size=(rollouts * steps, n)).astype(np.float32)
    done = rng.random(rewards.shape) < often
    valid = None
    if fillers:
        valid = rng.random(rewards.shape) < 0.8
        done &= valid
    stats = EpisodeStats(n, torch.device("cpu"))
    seen = 0
    for i in range(rollouts):
        part = slice(i * steps, (i + 1) * steps)
        mask = None if valid is None else torch.from_numpy(valid[part])
        measured = stats.measure(torch.from_numpy(rewards[part]), torch.from_numpy(done[part]), mask).numpy()
        stats.add(int(measured[0]), measured[3:])
        until = slice(0, part.stop)
        expected = reference_episodes(rewards[until], done[until], None if valid is None else valid[until])
        new = expected[seen:]
        assert measured[0] == len(new)
        assert measured[1:3] == pytest.approx([sum(r for r, _ in new), sum(k for _, k in new)], abs=1e-9)
        seen = len(expected)
        assert stats.count == seen
        assert list(stats.recent_returns) == pytest.approx([r for r, _ in expected[-WINDOW:]], abs=1e-9)
        assert list(stats.recent_lengths) == [k for _, k in expected[-WINDOW:]]
    assert stats.reached(-1e9) == (seen >= WINDOW)
    assert not stats.reached(1e9)


def test_steps_of_an_odd_rollout_above_2_to_24_are_counted_exactly():
    n = 2**24 + 1  # float32 rounds it
    rewards = torch.zeros(1).expand(n)
    assert int(count_rows(rewards, None)) == n
    assert int(count_rows(rewards, torch.ones(1, dtype=torch.bool).expand(n))) == n


def random_rollout(steps, n, *, fillers, seed):
    g = torch.Generator().manual_seed(seed)
    terminated, truncated, valid = (
        torch.rand(3, steps, n, generator=g) < torch.tensor([0.1, 0.1, 0.8])[:, None, None]
    ).unbind()
    if fillers:
        terminated, truncated = terminated & valid, truncated & valid
    done = terminated | truncated
    rewards, values, next_values, returns = torch.randn(4, steps, n, generator=g).unbind()
    next_values[terminated] = torch.nan
    obs, actions = torch.randn(steps + 1, n, 3, generator=g), 2 * torch.randn(steps, n, 2, generator=g)
    return SimpleNamespace(
        obs=obs,
        actions=actions,
        params=torch.zeros(steps, n, 4),
        rewards=rewards,
        values=values,
        returns=returns,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
        done=done,
        valid=valid if fillers else None,
    )


def spoil(rollout, what):
    """Write a number that is not finite."""
    t, i = 3, 2
    if rollout.valid is not None:
        rollout.valid[t, i] = True
    rollout.truncated[t, i], rollout.terminated[t, i] = what == "last observation", False
    rollout.done[t, i] = rollout.truncated[t, i]
    {"reward": rollout.rewards, "observation": rollout.obs[1:, :, 0], "last observation": rollout.next_values}[what][
        t, i
    ] = np.inf


@pytest.mark.skipif(native.unavailable() is not None, reason="no C compiler")
@pytest.mark.parametrize("spoilt", [None, "reward", "observation", "last observation"])
@pytest.mark.parametrize("fillers", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (40, 7), (200, 5)])
def test_c_measures_what_torch_measures(shape, fillers, spoilt):
    rollouts, measured = [random_rollout(*shape, fillers=fillers, seed=seed) for seed in range(2)], []
    if spoilt:
        spoil(rollouts[1], spoilt)
    spec = ActionSpec("box", (2,), "float32", low=(-1.0, -1.0), high=(1.0, 1.0))
    bounds = (torch.full((3,), -2.0), torch.full((3,), 2.0))
    for fused in (False, True):
        store = SimpleNamespace(**{k: None if x is None else x.clone() for k, x in vars(rollouts[0]).items()})
        obs_spec = ObsSpec.single("vector", (3,), "float32")
        metrics = Metrics(store, obs_spec, spec, (), world=World(), obs_bounds=(bounds,))
        if fused:
            metrics.fuse()
        for rollout in rollouts:
            for name, x in vars(rollout).items():
                if x is not None:
                    getattr(store, name).copy_(x)
            measured.append(metrics.measure(torch.zeros(0)))
    # after a reward that is not finite the run ends, and the returns don't matter
    for i in range(1 if spoilt == "reward" else 2):
        torch.testing.assert_close(measured[2 + i], measured[i], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert metrics.read(measured[2])["broken"] == 0
    assert bool(measured[3][metrics.names.index("broken")]) == (spoilt is not None)
