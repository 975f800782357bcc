"""Episode statistics, and the metrics of an iteration: measured on the device, read by the host in one transfer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastppo.errors import EnvError
from fastppo.functional.diagnostics import action_range, explained_variance, masked_mean
from fastppo.native.metrics import measuring
from fastppo.ppo.rollout import Rollout
from fastppo.runtime.distributed import World
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec

_Array = np.ndarray[Any, Any]

WINDOW = 100  # episodes per mean
MASKED = "masked_actions"  # measured only if masks come with the observations
# The measured vector holds the update's report, MASKED if it is measured, then these, then the latest episodes
MEASURED = (
    *("explained_variance", "clipped_actions", "action_range", "action_std", "broken", "outside"),
    *("steps", "rewards", "episodes", "returns", "lengths"),
)


class EpisodeStats:
    """Returns and lengths of episodes, from raw rewards, on the rollout's device. Episodes may span rollouts.

    Attributes:
        recent_returns: returns of the last WINDOW episodes, latest last.
        recent_lengths: lengths of the same episodes.
        count: episodes ended so far.
        open: [2, N] float64, returns and lengths so far of unfinished episodes.
    """

    def __init__(self, n_envs: int, device: torch.device) -> None:
        """Start with zero counts for `n_envs` environments."""
        self.open = torch.zeros(2, n_envs, dtype=torch.float64, device=device)
        self.recent_returns: deque[float] = deque(maxlen=WINDOW)
        self.recent_lengths: deque[int] = deque(maxlen=WINDOW)
        self.count = 0

    def measure(self, rewards: Tensor, done: Tensor, valid: Tensor | None = None) -> Tensor:
        """Measure the episodes that end in a rollout, [T, N] each; filler rows (`valid` False) do not count.

        Returns:
            [3 + 3 K] float64: number of ended episodes, sums of their returns and of their lengths; then returns,
            lengths and last steps of the latest K, latest first, padded with NaN.
        """
        n_steps, n = rewards.shape
        # running sums over the rollout, on top of the open episodes
        t = torch.arange(n_steps, device=done.device).unsqueeze(1)
        if valid is None:
            returns, lengths = rewards.cumsum(0, dtype=torch.float64), (t + 1).expand(n_steps, n)
        else:
            returns = torch.where(valid, rewards, 0.0).cumsum(0, dtype=torch.float64)
            lengths = valid.cumsum(0)
        totals = torch.stack((returns, lengths.double())).add_(self.open.unsqueeze(1))
        ends = torch.where(done, t, -1).cummax(0).values  # the latest end at or before t
        env = torch.arange(n, device=done.device)

        def total_at(end: Tensor, env: Tensor) -> Tensor:
            return torch.where(end >= 0, totals[:, end.clamp(min=0), env], 0.0)

        over = total_at(ends[-1], env)  # per environment, over all episodes that ended
        self.open.copy_(totals[:, -1] - over)
        latest = torch.where(done, t * n + env, -1).flatten().topk(min(WINDOW, n_steps * n)).values
        at, whose = latest.clamp(min=0) // n, latest.clamp(min=0) % n
        before = torch.where(at > 0, ends[at - 1, whose], -1)
        chosen = torch.cat((total_at(at, whose) - total_at(before, whose), at.double().unsqueeze(0)))
        chosen = torch.where(latest >= 0, chosen, torch.nan)
        return torch.cat((done.sum().double().unsqueeze(0), over.sum(1), chosen.flatten()))

    def add(self, count: int, latest: _Array) -> None:
        """Add the result of `measure`: `count` episodes, and the latest [3 K]."""
        returns, lengths, _ = latest.reshape(3, -1)[:, : min(count, WINDOW)][:, ::-1]
        self.recent_returns.extend(returns.tolist())
        self.recent_lengths.extend(lengths.astype(int).tolist())
        self.count += count

    def latest(self, n: int) -> list[float]:
        """Return the returns of the latest `n` episodes, latest last."""
        return list(self.recent_returns)[len(self.recent_returns) - n :]

    @property
    def mean_return(self) -> float:
        """Mean return of the last episodes (at most 100); NaN before the first one ends."""
        return float(np.mean(self.recent_returns)) if self.recent_returns else float("nan")

    @property
    def mean_length(self) -> float:
        """Mean length of the last episodes (at most 100); NaN before the first one ends."""
        return float(np.mean(self.recent_lengths)) if self.recent_lengths else float("nan")

    def reached(self, target: float | None) -> bool:
        """Return whether the mean of the last 100 episodes has reached `target`; False before 100 episodes ended."""
        full = len(self.recent_returns) == self.recent_returns.maxlen
        return target is not None and full and self.mean_return >= target


class Metrics:
    """Measures an iteration on the device and brings the metrics to the host in one transfer.

    Attributes:
        names: names of the metrics: the update's report, MASKED if there are masks, then MEASURED.
        episodes: episode statistics.
        global_step: environment steps so far, without filler rows.
    """

    def __init__(
        self,
        rollout: Rollout,
        obs_spec: ObsSpec,
        spec: ActionSpec,
        report_names: Sequence[str],
        *,
        world: World,
        obs_bounds: Sequence[tuple[Tensor, Tensor] | None] = (),
    ) -> None:
        """Measure the rollouts stored in `rollout`, pooled over the ranks of `world`.

        Args:
            rollout: the storage that every iteration fills.
            obs_spec: the observation spec.
            spec: the action spec.
            report_names: names of the values that an update reports.
            world: the ranks that train together.
            obs_bounds: lowest and highest values of each array of an observation; None: unbounded. Empty: all are.
        """
        self._rollout, self._world, self._obs_spec = rollout, world, obs_spec
        self._nvec = spec.nvec if obs_spec.has_mask else ()
        self.names: tuple[str, ...] = (*report_names, *((MASKED,) if obs_spec.has_mask else ()), *MEASURED)
        device = rollout.rewards.device
        self._box = spec.box if spec.kind == "box" else None
        self._bounds = spec.bounds(device) if spec.kind == "box" else None
        self._obs_bounds = [bounds and tuple(x.to(device) for x in bounds) for bounds in obs_bounds]
        self.episodes = EpisodeStats(rollout.rewards.shape[1], device)
        self.global_step = 0
        self._latest: _Array
        self._measure_in_c: Callable[[], Tensor] | None = None
        self._plain_obs = obs_spec.is_plain and obs_spec.dtype == torch.float32  # C reads no other observations

    def fuse(self) -> None:
        """Measure the figures that need no action bounds, masks or observation spaces in C; for one rank on a CPU.

        Raises:
            NativeError: it can't be compiled here.
        """
        r, max_episodes = self._rollout, min(WINDOW, self._rollout.rewards.numel())
        obs = r.obs[1:] if self._plain_obs else None
        self._measure_in_c = measuring(
            r.rewards,
            r.values,
            r.next_values,
            r.returns,
            r.terminated,
            r.truncated,
            r.done,
            r.valid,
            obs,
            self.episodes.open,
            max_episodes,
        )

    @property
    def checks_bounds(self) -> bool:
        """Whether observations are compared with the bounds of their space."""
        return bool(self._obs_bounds)

    def kept(self) -> list[Tensor]:
        """List the tensors that `measure` changes and the next iteration reads."""
        return [self.episodes.open]

    def state_dict(self) -> dict[str, Any]:
        """Return the steps and episodes so far, including open episodes."""
        e = self.episodes
        latest = {"returns": list(e.recent_returns), "lengths": list(e.recent_lengths)}
        return {"open": e.open, "global_step": self.global_step, "episodes": e.count, **latest}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore in place from `state_dict()`."""
        e = self.episodes
        e.open.copy_(saved["open"])
        self.global_step, e.count = int(saved["global_step"]), int(saved["episodes"])
        e.recent_returns.clear()
        e.recent_lengths.clear()
        e.recent_returns.extend(float(x) for x in saved["returns"])
        e.recent_lengths.extend(int(x) for x in saved["lengths"])

    def measure(self, report: Tensor) -> Tensor:
        """Measure the iteration: the values of `names`, then the latest episodes, as one float64 vector on the device.

        Args:
            report: the update's report.
        """
        masked: tuple[Tensor, ...] = ()
        if (allowed := self._obs_spec.allowed(self._rollout.obs[:-1])) is not None:
            masked = (masked_mean((~allowed).float().mean(-1), self._rollout.valid).double().unsqueeze(0),)
        measured = self._measured() if self._measure_in_c is None else self._measured_in_c(self._measure_in_c())
        return torch.cat((report.double(), *masked, measured))

    def _measured_in_c(self, measured: Tensor) -> Tensor:
        """Complete in place what C has `measured`, and return it in the layout of `_measured`."""
        r, at = self._rollout, MEASURED.index
        if self._box is not None:
            first = at("clipped_actions")
            measured[first : first + 3] = torch.stack(self._action_figures())
        if self._obs_bounds:
            measured[at("outside")] = self._outside().sum()
        if not self._plain_obs and (self._stuck().any() or not self._obs_spec.finite(r.obs[1:]).all()):
            measured[at("broken")] = 1
        return measured

    def _measured(self) -> Tensor:
        """Return the values of MEASURED, then the latest episodes, float64."""
        r = self._rollout
        variance = explained_variance(r.values, r.returns, r.valid, self._world.pool)
        steps = count_rows(r.rewards, r.valid)
        rewards = (r.rewards if r.valid is None else torch.where(r.valid, r.rewards, 0.0)).sum(dtype=torch.float64)
        figures = variance, *self._action_figures(), self._broken().any(), self._outside().sum(), steps, rewards
        return torch.cat(
            (torch.stack([x.double() for x in figures]), self.episodes.measure(r.rewards, r.done, r.valid))
        )

    def _action_figures(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the shares of clipped actions and of the bounds' range, and the standard deviation, [] each."""
        r = self._rollout
        clipped = torch.zeros((), device=r.rewards.device)
        used = std = torch.full_like(clipped, torch.nan)
        if self._box is not None and self._bounds is not None:
            low, high = self._bounds
            actions = r.actions if self._box.squash is None else torch.tanh(self._box.squash * r.actions)
            clipped = masked_mean(((actions < low) | (actions > high)).float().mean(-1), r.valid)
            used = action_range(actions, low, high, r.valid)
            std = masked_mean(self._box.std(r.params).mean(-1), r.valid)
        return clipped, used, std

    def read(self, measured: Tensor) -> dict[str, float]:
        """Transfer the result of `measure` to the host, pooled over ranks: the only transfer of an iteration.

        Returns:
            The metrics by name; `count` adds them to the run.

        Raises:
            EnvError: a reward or an observation is not finite; the message names the first environment and step.
        """
        gathered = self._world.gather(measured)
        self._world.wait(gathered.device)
        everyone: _Array = gathered.numpy(force=True)
        pooled = everyone[0] if len(everyone) == 1 else merge_ranks(everyone, self.names)
        metrics: dict[str, float] = dict(zip(self.names, pooled.tolist(), strict=False))
        if metrics["broken"]:
            self._raise_broken()
        self._latest = pooled[len(self.names) :]
        return metrics

    def count(self, metrics: Mapping[str, float]) -> None:
        """Add an iteration's steps and episodes, as returned by `read`, to the run's totals."""
        self.global_step += int(metrics["steps"])
        self.episodes.add(int(metrics["episodes"]), self._latest)

    def outside(self) -> str | None:
        """Describe this rank's first observation outside its space in the last rollout; None if there is none."""
        outside = self._outside()
        if not outside.any():
            return None
        t, n = outside.nonzero()[0].tolist()
        # global_step already includes this rollout
        return self._where(t - len(outside), n, "returned an observation outside its observation_space")

    def _raise_broken(self) -> NoReturn:
        r, broken = self._rollout, self._broken()
        if not broken.any():
            raise EnvError(
                "another process stopped: its environment returned a value that is not finite; see its message."
            )
        t, n = broken.any(0).nonzero()[0].tolist()
        reward, obs, _, stuck = broken[:, t, n].tolist()
        if stuck:
            # the step that returned the mask; 0: the first reset
            where = self._where(t - 1, n, "had an action mask that allows no action")
            raise EnvError(f"{where} of its run; allow one, or end the episode.")
        value = (
            f"a reward of {r.rewards[t, n].item()}"
            if reward
            else "an observation that is not finite"
            if obs
            else "a last observation that is not finite, at a time limit,"
        )
        raise EnvError(
            f"{self._where(t, n, f'returned {value}')} of its run; the model so far is saved. "
            "Fix the environment, or wrap it to replace such values."
        )

    def _where(self, t: int, n: int, did: str) -> str:
        before = self.global_step // (len(self._rollout.rewards[0]) * self._world.size)
        rank = f" of process {self._world.rank}" if self._world.size > 1 else ""
        return f"environment {n}{rank} {did} at step {before + t + 1}"

    def _outside(self) -> Tensor:
        """Return where the observation after a row lies outside its space, [T, N] bool."""
        r = self._rollout
        outside = torch.zeros_like(r.done)
        if self._obs_bounds:
            for i, bounds in enumerate(self._obs_bounds):
                if bounds is not None:
                    x, (low, high) = self._obs_spec.part(r.obs[1:], i), bounds
                    outside |= ((x < low) | (x > high)).reshape(*outside.shape, -1).any(-1)
        return outside

    def _broken(self) -> Tensor:
        """Return where a number of the environment can't be used, [4, T, N] bool.

        In a valid row's reward [0], in the observation after a row [1], in the last observation of an episode that a
        time limit cut [2]. That observation is not stored; its value, which the advantage needs, shows it. And where
        no action was allowed [3].
        """
        r = self._rollout
        rewards = ~r.rewards.isfinite() if r.valid is None else ~r.rewards.isfinite() & r.valid
        obs = ~self._obs_spec.finite(r.obs[1:])
        cut = r.truncated & ~r.terminated & r.values.isfinite() & ~r.next_values.isfinite()
        return torch.stack((rewards, obs, cut, self._stuck()))

    def _stuck(self) -> Tensor:
        """Return where the mask of the observation before a row allows no action, [T, N] bool."""
        r = self._rollout
        if not self._nvec:
            return torch.zeros_like(r.done)
        allowed = self._obs_spec.allowed(r.obs[:-1])
        assert allowed is not None, "masks come with observations"
        stuck = torch.stack([~part.any(-1) for part in torch.split(allowed, list(self._nvec), -1)]).any(0)
        return stuck if r.valid is None else stuck & r.valid


def count_rows(rewards: Tensor, valid: Tensor | None) -> Tensor:
    """Return the number of valid rows of a rollout, [] float64: float32 can't count beyond 2^24."""
    if valid is None:
        return rewards.new_full((), rewards.numel(), dtype=torch.float64)
    return valid.sum(dtype=torch.int64).double()


def merge_ranks(everyone: _Array, names: Sequence[str]) -> _Array:
    """Merge the measured vectors [R, F] of R ranks into one: counts are summed, the latest episodes merged."""
    at = list(names).index
    merged: _Array = everyone[0].copy()
    steps = everyone[:, at("steps")]
    for name in {"clipped_actions", "action_range", "action_std", MASKED}.intersection(names):
        merged[at(name)] = everyone[:, at(name)] @ steps / steps.sum()
    for name in ("broken", "outside", "steps", "rewards", "episodes", "returns", "lengths"):
        merged[at(name)] = everyone[:, at(name)].sum()
    latest = everyone[:, len(names) :].reshape(len(everyone), 3, -1)
    # latest first; within a step, higher environments first, as in a single process
    columns = np.concatenate(list(latest[::-1]), axis=1)
    columns = columns[:, ~np.isnan(columns[2])]
    columns = columns[:, np.argsort(-columns[2], kind="stable")][:, :WINDOW]
    return np.concatenate((merged[: len(names)], columns.reshape(-1)))
