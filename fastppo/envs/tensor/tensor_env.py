"""A task as N environments in the loop: seeds, episodes, time limits, same-step autoreset, all on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.envs.env_state import Resumable
from fastppo.envs.tensor.task import Task, uniforms
from fastppo.envs.vec_env import Cuts, Transitions
from fastppo.spaces import ActionSpec, ObsSpec


class TensorEnv:
    """N copies of a task behind the VecEnv protocol; nothing is read back to the host.

    Attributes:
        state: what the environments are, by name: seeds, episodes and steps so far, the task's columns.
    """

    fillers = False
    notes: Sequence[str] = ()
    obs_bounds: None = None
    restarts = 0
    resumable = Resumable("exact", "its state is tensors")

    def __init__(
        self,
        task: Task,
        n_envs: int,
        obs_spec: ObsSpec,
        action_spec: ActionSpec,
        *,
        max_steps: int | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """N of `task`, cut after `max_steps` (None: never), on `device`, its floats of `dtype`."""
        self.n_envs, self.obs_spec, self.action_spec = n_envs, obs_spec, action_spec
        self.groups: Sequence[slice] = [slice(0, n_envs)]
        self.final_obs = obs_spec.blank(0, device=device)
        self._task, self._max_steps, self._dtype, self._device = task, max_steps, dtype, device
        self._bounds = action_spec.bounds(device) if action_spec.kind == "box" else None
        zeros = torch.zeros(n_envs, dtype=torch.int64, device=device)
        start = task.reset(torch.zeros(task.n_uniforms, n_envs, dtype=dtype, device=device))
        names = ("seed", "episode", "steps", *(f"state{i}" for i in range(len(start))))
        columns = (zeros, zeros, zeros, *start)
        self.state = {name: column.clone() for name, column in zip(names, columns, strict=True)}
        self.cuts: Cuts
        self._advance: Callable[..., None] = self._advance_eagerly

    def reset(self, seeds: np.ndarray[Any, Any]) -> Tensor:
        """Start every environment with its seed."""
        for name, column in self.state.items():
            if not name.startswith("state"):
                column.zero_()
        self.state["seed"].copy_(torch.from_numpy(seeds))
        seed_column, episode, _, *columns = self.state.values()
        for column, first in zip(columns, self._fresh(seed_column, episode), strict=True):
            column.copy_(first)
        return self._task.observe(tuple(columns))

    def attach(self, transitions: Transitions) -> None:
        """Write into `transitions` from now on."""
        self._to = transitions
        self.cuts = Cuts.allocate(len(transitions.rewards), self.n_envs, self.obs_spec, self._max_steps, self._device)

    def compile(self, compiler: Callable[[Callable[..., Any], Sequence[Tensor]], Callable[..., Any]]) -> None:
        """Have `compiler` make one kernel of a step; it gets the function and an example of its arguments."""
        self._advance = compiler(self._advance_eagerly, self._arguments(0))

    def send(self, t: int, group: int) -> None:
        """Take step t, all of it."""
        self._advance(*self._arguments(t))

    def wait(self, group: int) -> None:
        """Nothing to wait for."""

    def store(self, t: int, group: int) -> Sequence[int]:
        """Nothing to store: `send` wrote it. Who was cut stays on the device, in `cuts`."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Seeds, episodes, steps and columns."""
        return dict(self.state)

    def load_state_dict(self, saved: Mapping[str, Any], obs: Tensor) -> None:
        """Go on from there."""
        for name, column in self.state.items():
            column.copy_(saved[name])

    def restart_messages(self) -> Sequence[str]:
        """None: tensors don't fail."""
        return ()

    def close(self) -> None:
        """Nothing to let go of."""

    def _arguments(self, t: int) -> list[Tensor]:
        to, cuts = self._to, self.cuts
        rows = (to.actions[t], to.obs[t + 1], to.rewards[t], to.terminated[t], to.truncated[t])
        return [*rows, cuts.step, cuts.obs, cuts.steps, cuts.made, *self.state.values()]

    def _fresh(self, seed: Tensor, episode: Tensor) -> tuple[Tensor, ...]:
        return self._task.reset(uniforms(seed, episode, self._task.n_uniforms, self._dtype))

    def _advance_eagerly(self, *tensors: Tensor) -> None:
        """A step as a function of `_arguments`, which writes into all of them but actions and seeds."""
        actions, obs, rewards, terminated, truncated, step, final, steps_cut, made, seed, episode, steps, *state = (
            tensors
        )
        if self._bounds is not None:
            actions = actions.clamp(*self._bounds)
        else:
            assert not any(self.action_spec.start), "tasks count actions from 0"
        after, reward, ended = self._task.step(tuple(state), actions)
        taken = steps + 1
        out_of_time = torch.zeros_like(ended) if self._max_steps is None else taken >= self._max_steps
        done, cut = ended | out_of_time, out_of_time & ~ended
        following = episode + done
        fresh = self._fresh(seed, following)
        now = tuple(torch.where(done, new, old) for new, old in zip(fresh, after, strict=True))
        last = self._task.observe(after)
        for k in range(len(steps_cut)):
            mine = cut & (made == k)
            steps_cut[k].copy_(torch.where(mine, step, steps_cut[k]))
            final[k].copy_(torch.where(mine.view(-1, *[1] * (last.dim() - 1)), last, final[k]))
        made.add_(cut)
        step.add_(1)
        obs.copy_(self._task.observe(now))
        rewards.copy_(reward)
        terminated.copy_(ended)
        truncated.copy_(out_of_time)
        episode.copy_(following)
        steps.copy_(torch.where(done, 0, taken))
        for column, value in zip(state, now, strict=True):
            column.copy_(value)
