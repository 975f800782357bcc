"""Step N copies of a task on the device, with seeds, time limits and same-step autoreset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.envs.env_state import ResumeSupport
from fastppo.envs.tensor.task import MaskedTask, State, Task, uniforms
from fastppo.envs.vec_env import FinalObsBuffer, Transitions, VecEnv
from fastppo.spaces.actions import ActionSpec, ToEnv
from fastppo.spaces.observations import ObsSpec


class TensorEnv(VecEnv):
    """N copies of a task as a VecEnv; a step reads nothing back to the host.

    Attributes:
        task: the physics.
        max_steps: time limit of an episode; None: there is none.
        capturable_state: seeds, episodes and steps so far, and the task's state columns, by name.
    """

    capturable_state: dict[str, Tensor]
    final_obs_buffer: FinalObsBuffer
    resume_support = ResumeSupport("exact", "its state is tensors")

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
        """Make N copies of `task` on `device`, truncated after `max_steps` (None: never), with floats of `dtype`."""
        self.n_envs, self.obs_spec, self.action_spec = n_envs, obs_spec, action_spec
        self.groups = [slice(0, n_envs)]
        self.task, self.max_steps, self._dtype, self._device = task, max_steps, dtype, device
        assert not any(action_spec.start), "tasks count actions from 0"
        self._to_env = ToEnv(action_spec).to(device)
        zeros = torch.zeros(n_envs, dtype=torch.int64, device=device)
        start = task.reset(torch.zeros(task.n_uniforms, n_envs, dtype=dtype, device=device))
        names = ("seed", "episode", "steps", *(f"state{i}" for i in range(len(start))))
        columns = (zeros, zeros, zeros, *start)
        self.capturable_state = {name: column.clone() for name, column in zip(names, columns, strict=True)}
        self._advance: Callable[..., None] = self._advance_eagerly

    def reset(self, seeds: np.ndarray[Any, Any]) -> Tensor:
        """Reset every environment with its own seed."""
        for name, column in self.capturable_state.items():
            if not name.startswith("state"):
                column.zero_()
        self.capturable_state["seed"].copy_(torch.from_numpy(seeds))
        seed_column, episode, _, *columns = self.capturable_state.values()
        for column, first in zip(columns, self._fresh(seed_column, episode), strict=True):
            column.copy_(first)
        return self._observe(tuple(columns))

    def attach(self, transitions: Transitions) -> None:
        """Use `transitions` as the storage of all later steps."""
        self._to = transitions
        self.final_obs_buffer = FinalObsBuffer.allocate(
            len(transitions.rewards), self.n_envs, self.obs_spec, self.max_steps, self._device
        )

    def compile(self, compiler: Callable[[Callable[..., Any], Sequence[Tensor]], Callable[..., Any]]) -> None:
        """Compile a step with `compiler`, called with the step function and example arguments."""
        self._advance = compiler(self._advance_eagerly, self._arguments(0))

    def send(self, t: int, group: int) -> None:
        """Take step t and write its results."""
        self._advance(*self._arguments(t))

    def store(self, t: int, group: int) -> Sequence[int]:
        """Return nothing: `send` wrote the results, and final observations stay in `final_obs_buffer`."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Return `capturable_state`."""
        return dict(self.capturable_state)

    def load_state_dict(self, saved: Mapping[str, Any], obs: Tensor) -> None:
        """Restore in place from `state_dict()`."""
        for name, column in self.capturable_state.items():
            column.copy_(saved[name])

    def _arguments(self, t: int) -> list[Tensor]:
        to, buffer = self._to, self.final_obs_buffer
        rows = (to.actions[t], to.obs[t + 1], to.rewards[t], to.terminated[t], to.truncated[t])
        return [*rows, *buffer, *self.capturable_state.values()]

    def _observe(self, state: State) -> Tensor:
        """Return packed observations [N, *obs] of a state, with its mask of allowed actions if the task has one."""
        mask = self.task.action_mask(state) if isinstance(self.task, MaskedTask) else None
        return self.obs_spec.pack_tree(self.task.observe(state), mask)

    def _fresh(self, seed: Tensor, episode: Tensor) -> tuple[Tensor, ...]:
        return self.task.reset(uniforms(seed, episode, self.task.n_uniforms, self._dtype))

    def _advance_eagerly(self, *tensors: Tensor) -> None:
        """Take a step, given `_arguments`; writes into all of them except actions and seeds."""
        (
            actions,
            obs,
            rewards,
            terminated,
            truncated,
            step,
            final_obs,
            end_steps,
            counts,
            seed,
            episode,
            steps,
            *state,
        ) = tensors
        after, reward, ended = self.task.step(tuple(state), self._to_env(actions))
        taken = steps + 1
        out_of_time = torch.zeros_like(ended) if self.max_steps is None else taken >= self.max_steps
        done, truncations = ended | out_of_time, out_of_time & ~ended
        following = episode + done
        fresh = self._fresh(seed, following)
        now = tuple(torch.where(done, new, old) for new, old in zip(fresh, after, strict=True))
        last = self._observe(after)
        for k in range(len(end_steps)):
            mine = truncations & (counts == k)
            end_steps[k].copy_(torch.where(mine, step, end_steps[k]))
            final_obs[k].copy_(torch.where(mine.view(-1, *[1] * (last.dim() - 1)), last, final_obs[k]))
        counts.add_(truncations)
        step.add_(1)
        obs.copy_(self._observe(now))
        rewards.copy_(reward)
        terminated.copy_(ended)
        truncated.copy_(out_of_time)
        episode.copy_(following)
        steps.copy_(torch.where(done, 0, taken))
        for column, value in zip(state, now, strict=True):
            column.copy_(value)
