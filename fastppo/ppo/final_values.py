"""Values of the final observations of truncated episodes, from which returns bootstrap at a time limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastppo.envs.vec_env import FinalObsBuffer, VecEnv
from fastppo.policies.policy import PolicyState
from fastppo.ppo.rollout import Rollout


class FinalValues:
    """Write V of final observations into `rollout.next_values`, in the rows that truncated an episode.

    Environments on the host give their final observations step by step: `add` gathers these in a block, and the critic
    is called when the block is full. Environments on the device keep them in a buffer until `write`. With memory, the
    state after the last step of the episode goes with each observation.
    """

    def __init__(self, rollout: Rollout, env: VecEnv, value: Callable[[Tensor, PolicyState], Tensor]) -> None:
        """Compute V by `value`, of the final observations in the buffer of `env` or of those that `add` gathers."""
        self._rollout, self._env, self._value = rollout, env, value
        rows = len(rollout.final_obs)
        self._states = tuple(x.new_zeros((rows, *x.shape[2:])) for x in rollout.states)
        self._rows: list[tuple[int, int]] = []

    def add(self, t: int, truncated: Sequence[int], final_obs: Tensor) -> None:
        """Add the final observations `final_obs[truncated]` of the environments that step t truncated."""
        for i in truncated:
            self._rollout.final_obs[len(self._rows)].copy_(final_obs[i])
            for block, states in zip(self._states, self._rollout.states, strict=True):
                block[len(self._rows)].copy_(states[t + 1, i])
            self._rows.append((t, i))
            if len(self._rows) == len(self._rollout.final_obs):
                self._write_block()

    def write(self) -> None:
        """Write the values of all final observations of the rollout that are not written yet."""
        if (final := self._env.final_obs_buffer) is None:
            self._write_block()
        elif self._env.capturable_state is None:
            self._write_used_slots(final)
        elif len(final.end_steps):
            self._write_all_slots(final)

    def _write_block(self) -> None:
        """Evaluate the block, in its full size, and empty it."""
        if self._rows:
            values = self._value(self._rollout.final_obs, self._states)
            t, i = torch.tensor(self._rows, device=values.device).unbind(1)
            self._rollout.next_values[t, i] = values[: len(self._rows)]
            self._rows.clear()

    def _write_used_slots(self, final: FinalObsBuffer) -> None:
        """Evaluate the slots that hold an observation; without capture, the host may read which ones do."""
        r = self._rollout
        k, n = (final.end_steps < len(r.rewards)).nonzero(as_tuple=True)
        if len(k):
            t = final.end_steps[k, n]
            if self._env.approximates_finals:
                r.next_values[t, n] = r.values[t, n]
            else:
                state = tuple(x[t + 1, n] for x in r.states)
                r.next_values[t, n] = self._value(final.obs[k, n], state)

    def _write_all_slots(self, final: FinalObsBuffer) -> None:
        """Evaluate every slot, used or not, so that a captured rollout always runs the same operations."""
        r = self._rollout
        after = (final.end_steps + 1).clamp(max=len(r.rewards))  # any valid step for unused slots
        everyone = torch.arange(final.end_steps.shape[1], device=after.device)
        state = tuple(x[after, everyone].flatten(0, 1) for x in r.states)
        values = self._value(final.obs.flatten(0, 1), state).view(final.end_steps.shape)
        # the extra row takes the writes of unused slots
        padded = torch.cat((r.next_values, r.next_values[:1]))
        r.next_values.copy_(padded.scatter(0, final.end_steps, values)[:-1])
