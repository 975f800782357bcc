"""Rollouts: preallocated tensors [T, N, ...], and the loop that fills them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.envs.api import Step, VecEnv
from fastppo.functional.losses import Batch
from fastppo.policies.api import Policy
from fastppo.runtime.clock import Clock


@dataclasses.dataclass
class Rollout:
    """One rollout of T steps in N environments; every tensor is allocated once and written in place.

    Attributes:
        obs: [T + 1, N, *obs] raw; row T is where the next rollout begins.
        actions: [T, N, *action] as the distribution made them (not clipped, counted from 0).
        logprobs: [T, N] nats.
        params: [T, N, P] of the distribution that acted.
        values: [T, N] V(s_t).
        rewards: [T, N] raw.
        terminated: [T, N] bool.
        truncated: [T, N] bool.
        done: [T, N] bool, either.
        valid: [T, N] bool, False in filler rows; None where the environments make none.
        next_values: [T, N] V of the true successor.
        advantages: [T, N].
        returns: [T, N].
        noise: [T, N, noise_size], drawn anew for each rollout.
        final_obs: [K, *obs] staging for last observations of episodes that were cut; see `FinalValues`.
    """

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    params: Tensor
    values: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    done: Tensor
    valid: Tensor | None
    next_values: Tensor
    advantages: Tensor
    returns: Tensor
    noise: Tensor
    final_obs: Tensor

    @classmethod
    def allocate(cls, n_steps: int, env: VecEnv, policy: Policy, device: torch.device) -> Rollout:
        """Storage for `n_steps` of `env`, with zeros in it so that memory is really there before training starts."""
        dist, n = policy.distribution, env.n_envs

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros((n_steps, n, *shape), dtype=dtype, device=device)

        return cls(
            obs=env.obs_spec.blank(n_steps + 1, n, device=device),
            actions=zeros(*dist.action_shape, dtype=dist.action_dtype),
            logprobs=zeros(),
            params=zeros(dist.n_params),
            values=zeros(),
            rewards=zeros(),
            terminated=zeros(dtype=torch.bool),
            truncated=zeros(dtype=torch.bool),
            done=zeros(dtype=torch.bool),
            valid=zeros(dtype=torch.bool) if env.fillers else None,
            next_values=zeros(),
            advantages=zeros(),
            returns=zeros(),
            noise=zeros(dist.noise_size),
            final_obs=env.obs_spec.blank(max(n, 32), device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def batch(self) -> Batch:
        """All T x N rows, flat, as views."""

        def flat(x: Tensor) -> Tensor:
            return x.flatten(0, 1)

        return Batch(
            flat(self.obs[:-1]),
            flat(self.actions),
            flat(self.logprobs),
            flat(self.params),
            flat(self.values),
            flat(self.advantages),
            flat(self.returns),
            None if self.valid is None else flat(self.valid),
        )


class FinalValues:
    """V of last observations where episodes were cut, by critic calls of one fixed shape.

    Observations gather in a preallocated block; the critic is called when it is full and once at the end.
    """

    def __init__(self, rollout: Rollout, value: Callable[[Tensor], Tensor]) -> None:
        """Collect into `rollout.final_obs`, evaluate with `value`, write into `rollout.next_values`."""
        self._rollout = rollout
        self._value = value
        self._rows: list[tuple[int, int]] = []

    def add(self, t: int, step: Step) -> None:
        """Take in the episodes that step t cut."""
        for i in step.cut:
            assert step.final_obs is not None
            self._rollout.final_obs[len(self._rows)].copy_(step.final_obs[i])
            self._rows.append((t, i))
            if len(self._rows) == len(self._rollout.final_obs):
                self.flush()

    def flush(self) -> None:
        """Evaluate what is in the block and start it anew."""
        if self._rows:
            values = self._value(self._rollout.final_obs)
            t, i = torch.tensor(self._rows, device=values.device).unbind(1)
            self._rollout.next_values[t, i] = values[: len(self._rows)]
            self._rows.clear()


def collect(env: VecEnv, policy: Policy, rollout: Rollout, generator: torch.Generator, clock: Clock) -> None:
    """Fill `rollout` by T steps of `policy` in `env`, from the observations in row T of the rollout before.

    Afterwards every tensor but advantages and returns holds this rollout's values. next_values is V of the true
    successor of each row: of the last observation where an episode was cut, of the next row otherwise. Where the
    environments autoreset at the next step, the next row is that last observation already.
    """
    r = rollout
    r.obs[0].copy_(r.obs[-1])
    policy.distribution.fill_noise(r.noise, generator)
    finals = FinalValues(r, policy.value)
    for t in range(len(r.rewards)):
        with clock.phase("act"):
            action = policy.act(r.obs[t], r.noise[t])
        with clock.phase("env"):
            step = env.step(action.actions)
        with clock.phase("store"):
            r.actions[t].copy_(action.actions)
            r.logprobs[t].copy_(action.logprobs)
            r.params[t].copy_(action.params)
            r.values[t].copy_(action.values)
            r.rewards[t].copy_(step.rewards)
            r.terminated[t].copy_(step.terminated)
            r.truncated[t].copy_(step.truncated)
            if r.valid is not None and step.valid is not None:
                r.valid[t].copy_(step.valid)
            r.obs[t + 1].copy_(step.obs)
        if step.cut:
            with clock.phase("act"):
                finals.add(t, step)
    with clock.phase("act"):
        finals.flush()
        last_values = policy.value(r.obs[-1])
    torch.logical_or(r.terminated, r.truncated, out=r.done)
    successors = torch.cat((r.values[1:], last_values.unsqueeze(0)))
    if r.valid is None:
        cut = r.truncated & ~r.terminated
        successors = torch.where(cut, r.next_values, successors)
    r.next_values.copy_(successors)
