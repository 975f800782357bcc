"""Episode statistics, and one iteration's figures under the names that dashboards know (CleanRL's tags)."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastppo.errors import EnvError
from fastppo.functional.diagnostics import explained_variance, masked_mean
from fastppo.rollout import Rollout
from fastppo.runtime.clock import Clock
from fastppo.spaces import ActionSpec
from fastppo.update import FIGURES, UpdateStats

_Array = np.ndarray[Any, Any]

# What `Metrics.read` brings to the host before the rows
NAMES = (*FIGURES, "skipped_minibatches", "explained_variance", "clipped_actions", "broken")


class Episodes(NamedTuple):
    """Episodes that ended in one rollout, in the order of time.

    Attributes:
        returns: undiscounted sums of raw rewards.
        lengths: in steps.
    """

    returns: _Array
    lengths: _Array


class EpisodeStats:
    """Returns and lengths of episodes, however many rollouts they span, from raw rewards."""

    def __init__(self, n_envs: int, window: int = 100) -> None:
        """For `n_envs` environments, remembering the last `window` episodes."""
        self._open_return = np.zeros(n_envs)
        self._open_length = np.zeros(n_envs, np.int64)
        self.recent_returns: deque[float] = deque(maxlen=window)
        self.recent_lengths: deque[int] = deque(maxlen=window)
        self.count = 0

    def add(self, rewards: _Array, done: _Array, valid: _Array | None = None) -> Episodes:
        """Take in a rollout, [T, N] each; filler rows (`valid` False) have neither length nor reward."""
        rows = np.ones(rewards.shape, np.int64) if valid is None else valid.astype(np.int64)
        # running sums over the rollout, continuing the episodes that were open when it began
        total = np.cumsum(np.where(rows > 0, rewards, 0.0), 0, dtype=np.float64) + self._open_return
        steps = np.cumsum(rows, 0) + self._open_length
        n, t = np.nonzero(done.T)  # environment by environment, so that neighbours in the list are neighbours in time
        later = np.zeros(len(n), bool)
        later[1:] = n[1:] == n[:-1]
        ends, counts = total[t, n], steps[t, n]
        returns, lengths = ends.copy(), counts.copy()
        returns[1:] -= np.where(later[1:], ends[:-1], 0.0)
        lengths[1:] -= np.where(later[1:], counts[:-1], 0)
        self._open_return, self._open_length = total[-1].copy(), steps[-1].copy()
        # the last end of each environment wins, being the latest in time
        self._open_return[n], self._open_length[n] = total[-1, n] - ends, steps[-1, n] - counts
        order = np.lexsort((n, t))
        returns, lengths = returns[order], lengths[order]
        self.recent_returns.extend(returns[-100:].tolist())
        self.recent_lengths.extend(lengths[-100:].tolist())
        self.count += len(returns)
        return Episodes(returns, lengths)

    @property
    def mean_return(self) -> float:
        """Mean return of the last episodes (100 at most); NaN before the first ends."""
        return float(np.mean(self.recent_returns)) if self.recent_returns else float("nan")

    @property
    def mean_length(self) -> float:
        """Mean length of the last episodes; NaN before the first ends."""
        return float(np.mean(self.recent_lengths)) if self.recent_lengths else float("nan")

    def reached(self, target: float | None) -> bool:
        """Whether the mean of the last 100 episodes, no fewer, has reached `target`."""
        full = len(self.recent_returns) == self.recent_returns.maxlen
        return target is not None and full and self.mean_return >= target


@dataclasses.dataclass(frozen=True)
class Stats:
    """One iteration, as it is logged.

    Attributes:
        iteration: counted from 1.
        n_iterations: planned.
        global_step: real environment steps so far, over all environments.
        total_timesteps: planned.
        mean_return: of the last 100 episodes (fewer at first); NaN before the first.
        episodes: ended so far.
        seconds: of training so far.
        sps: steps per second over the last iterations.
        kl: mean k3 of this update.
        stop: why the update ended early, or "".
        scalars: every figure by its TensorBoard tag.
    """

    iteration: int
    n_iterations: int
    global_step: int
    total_timesteps: int
    mean_return: float
    episodes: int
    seconds: float
    sps: float
    kl: float
    stop: str
    scalars: dict[str, float]


class Metrics:
    """Reads an iteration's figures from the device, once, and puts names to them.

    Attributes:
        episodes: statistics of episodes.
        global_step: real environment steps so far.
    """

    def __init__(self, rollout: Rollout, clock: Clock, spec: ActionSpec, *, n_iterations: int) -> None:
        """For the rollouts in `rollout`, timed by `clock`, of a run of `n_iterations`."""
        self._rollout, self._clock, self._n_iterations = rollout, clock, n_iterations
        device = rollout.rewards.device
        self._bounds = spec.bounds(device) if spec.kind == "box" else None
        self._seconds = clock.phase_seconds()
        self.episodes = EpisodeStats(rollout.rewards.shape[1])
        self.global_step = 0

    def read(self, diagnostics: Tensor) -> _Array:
        """The one transfer: `diagnostics`, explained variance, share of clipped actions; rewards, endings, validity.

        Raises:
            EnvError: a reward or an observation is not finite; names the first environment and step.
        """
        r = self._rollout
        variance = explained_variance(r.values, r.returns, r.valid)
        clipped = torch.zeros_like(variance)
        if self._bounds is not None:
            low, high = self._bounds
            clipped = masked_mean(((r.actions < low) | (r.actions > high)).float().mean(-1), r.valid)
        rows = (r.rewards, r.done) if r.valid is None else (r.rewards, r.done, r.valid)
        scalars = torch.stack((variance, clipped, self._broken().any(0).any().float()))
        figures: _Array = torch.cat((diagnostics, scalars, *(x.reshape(-1).float() for x in rows))).numpy(force=True)
        if figures[len(NAMES) - 1]:
            t, n = self._broken().any(0).nonzero()[0].tolist()
            what = (
                f"a reward of {r.rewards[t, n].item()}"
                if self._broken()[0, t, n]
                else "an observation that is not finite"
            )
            raise EnvError(
                f"environment {n} returned {what} at step {self.global_step // len(r.rewards[0]) + t} of its run; "
                "the model so far is saved. Mend the environment, or wrap it to replace such values."
            )
        return figures

    def _broken(self) -> Tensor:
        """Where a real row's reward [0] or the observation that followed it [1] is not finite: [2, T, N] bool."""
        r = self._rollout
        rewards = ~r.rewards.isfinite() if r.valid is None else ~r.rewards.isfinite() & r.valid
        obs = (
            ~r.obs[1:].reshape(*rewards.shape, -1).isfinite().all(-1)
            if r.obs.is_floating_point()
            else torch.zeros_like(rewards)
        )
        return torch.stack((rewards, obs))

    def stats(self, iteration: int, figures: _Array, update: UpdateStats, coefs: Mapping[str, float]) -> Stats:
        """The figures of the iteration that has just been updated from; ticks the clock."""
        clock, shape = self._clock, self._rollout.rewards.shape
        named = dict(zip(NAMES, figures.tolist(), strict=False))
        rows = figures[len(named) :].reshape(-1, *shape)
        valid = rows[2] > 0 if len(rows) == 3 else None
        self.global_step += rows[0].size if valid is None else int(valid.sum())
        clock.tick(self.global_step)
        ended = self.episodes.add(rows[0], rows[1] > 0, valid)
        before, self._seconds = self._seconds, clock.phase_seconds()
        spent = {name: total - before[name] for name, total in self._seconds.items()}
        clipped = named.pop("clipped_actions")
        del named["broken"]
        scalars = {f"losses/{name}": value for name, value in named.items()}
        scalars |= {
            "losses/epochs_run": update.epochs,
            "losses/minibatches_run": update.minibatches,
            "charts/SPS": clock.sps_cumulative,
            "charts/sps_window": clock.sps_window,
            "charts/sps_steady": clock.sps_steady,
            "charts/learning_rate": coefs["learning_rate"],
            "charts/clip_coef": coefs["clip_coef"],
            "time/rollout": spent["env"] + spent["act"] + spent["store"],
            **{f"time/{name}": seconds for name, seconds in spent.items()},
        }
        if self._bounds is not None:
            scalars["charts/clipped_actions"] = clipped
        if len(ended.returns):
            scalars["charts/episodic_return"] = float(ended.returns.mean())
            scalars["charts/episodic_length"] = float(ended.lengths.mean())
        stop = ""
        if update.stop_kl is not None:
            scalars["losses/stop_kl"] = update.stop_kl
            stop = f"KL {update.stop_kl:.3g} ended epoch {update.epochs}"
        return Stats(
            iteration=iteration,
            n_iterations=self._n_iterations,
            global_step=self.global_step,
            total_timesteps=self._n_iterations * shape.numel(),
            mean_return=self.episodes.mean_return,
            episodes=self.episodes.count,
            seconds=clock.seconds,
            sps=clock.sps_window,
            kl=named["approx_kl"],
            stop=stop,
            scalars=scalars,
        )
