"""Storage of a rollout: preallocated tensors [T, N, ...]."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastppo.envs.vec_env import Transitions, VecEnv
from fastppo.functional.gae import Trajectory
from fastppo.functional.losses import Batch
from fastppo.policies.decisions import Decisions
from fastppo.policies.policy import Policy, PolicyState


@dataclasses.dataclass
class Rollout:
    """One rollout of T steps in N environments; every tensor is allocated once and written in place.

    Attributes:
        obs: [T + 1, N, *obs] raw, as packed by `ObsSpec`; row T is the start of the next rollout.
        actions: [T, N, *action] as sampled (not clipped, counted from 0).
        logprobs: [T, N] in nats.
        params: [T, N, P] the acting distribution's parameters.
        values: [T, N] V(s_t).
        rewards: [T, N] raw.
        terminated: [T, N] bool.
        truncated: [T, N] bool.
        done: [T, N] bool, terminated or truncated.
        valid: [T, N] bool, False in filler rows; None: the environments make none.
        next_values: [T, N] V of each row's true successor.
        advantages: [T, N].
        returns: [T, N].
        noise: [T, N, noise_size], drawn once per rollout.
        final_obs: [K, *obs] staging for the final observations of truncated episodes; see `FinalValues`.
        states: the policy's state before each step, [T + 1, N, ...] each, not yet reset where an episode starts; row
            T is the start of the next rollout. `()` without memory.
        starts: [T + 1, N] bool: an episode starts at this step; None: the policy has no memory.
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
    states: PolicyState
    starts: Tensor | None

    @classmethod
    def allocate(cls, n_steps: int, env: VecEnv, policy: Policy, device: torch.device) -> Rollout:
        """Allocate zeroed storage for `n_steps` steps of `env`."""
        dist, n = policy.distribution, env.n_envs

        def zeros(*shape: int) -> Tensor:
            return torch.zeros((n_steps, n, *shape), device=device)

        return cls(
            **Transitions.allocate(n_steps, env, device)._asdict(),
            logprobs=zeros(),
            params=zeros(dist.n_params),
            values=zeros(),
            done=zeros().bool(),
            next_values=zeros(),
            advantages=zeros(),
            returns=zeros(),
            noise=zeros(dist.noise_size),
            final_obs=env.obs_spec.blank(max(n, 32), device=device),
            states=tuple(
                torch.zeros((n_steps + 1, *x.shape), dtype=x.dtype, device=device) + x for x in policy.initial_state(n)
            ),
            starts=torch.ones((n_steps + 1, n), dtype=torch.bool, device=device) if policy.has_memory else None,
        )

    def transitions(self) -> Transitions:
        """Return the tensors that environments read and write."""
        return Transitions(self.obs, self.actions, self.rewards, self.terminated, self.truncated, self.valid)

    def decisions(self) -> Decisions:
        """Return the tensors that actors read and write."""
        return Decisions(
            obs=self.obs,
            noise=self.noise,
            actions=self.actions,
            logprobs=self.logprobs,
            params=self.params,
            values=self.values,
            states=self.states,
            starts=self.starts,
        )

    def trajectory(self, rewards: Tensor) -> Trajectory:
        """Return the tensors that GAE reads; `rewards` [T, N] are those to learn from."""
        return Trajectory(rewards, self.values, self.next_values, self.terminated, self.done)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors [T, N, ...] by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        states = {f"states{i}": x for i, x in enumerate(self.states)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)} | states

    def batch(self) -> Batch:
        """Return all T x N rows, flattened, as views."""

        def flat(x: Tensor) -> Tensor:
            return x.flatten(0, 1)

        return Batch(
            obs=flat(self.obs[:-1]),
            actions=flat(self.actions),
            logprobs=flat(self.logprobs),
            params=flat(self.params),
            values=flat(self.values),
            advantages=flat(self.advantages),
            returns=flat(self.returns),
            valid=None if self.valid is None else flat(self.valid),
            starts=None if self.starts is None else flat(self.starts[:-1]),
            states=tuple(flat(x[:-1]) for x in self.states),
        )
