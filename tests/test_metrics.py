"""Episode statistics compared with a plain loop, over rollouts that split episodes at any step."""

import numpy as np
import pytest
import torch

from fastppo.ppo.metrics import WINDOW, EpisodeStats, count_rows


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
