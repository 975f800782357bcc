"""Acting, and the critic's values, in C: one call per step, for policies of fully connected layers on vectors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastppo.native import mlp as native
from fastppo.policies.decisions import Decisions
from fastppo.policies.native_mlp import describe, not_covered
from fastppo.policies.policy import Policy, PolicyState

_ROWS_PER_THREAD = 256  # with fewer, waking a thread costs more than it saves


def can_act_in_c(policy: Policy) -> bool:
    """Return whether the policy is an MLP that C covers, on float32 vectors."""
    return policy.encoder.spec.is_plain and not_covered(policy) is None


class NativePolicy:
    """A policy for which `can_act_in_c` is true, ready for calls from C; call `begin` once parameters have changed."""

    def __init__(self, policy: Policy, threads: int) -> None:
        """Describe `policy` and allocate what a call in `threads` threads needs."""
        self._policy, self.threads = policy, threads
        self.vector: Tensor = policy.network.actor.linear.weight  # type: ignore[union-attr,assignment]
        self.net = describe(policy, self.vector)
        self.workspace = native.new_workspace(self.net, self.threads)
        self.input = native.Input()
        self._moments: tuple[Tensor, ...] = ()
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Read the current parameters and moments."""
        self.net = describe(self._policy, self.vector)
        native.pack(self.net, self.vector, self.workspace)
        normalizer, divisor = self._policy.encoder.normalizer, self._policy.encoder.spec.leaves[0].divisor
        if normalizer is None:
            self.input = native.Input(None, None, 0.0, divisor)
        else:
            self._moments = normalizer.mean.contiguous(), (normalizer.var + 1e-8).rsqrt().contiguous()
            self.input = native.Input(*map(native.address, self._moments), normalizer.clip, 1.0)

    def threads_for(self, rows: int) -> int:
        """Return how many threads `rows` rows occupy."""
        return max(1, min(self.threads, rows // _ROWS_PER_THREAD))

    def value(self, obs: Tensor, state: PolicyState = (), starts: Tensor | None = None) -> Tensor:
        """Return V of each row of obs [B, *obs]; as `Policy.value`."""
        rows = (obs.flatten(1) if obs.dim() > 1 else obs.unsqueeze(1)).contiguous()
        return native.values(self.net, self.vector, self.input, rows, self.threads_for(len(rows)), self.workspace)

    def fill(self, d: Decisions) -> None:
        """Fill values and log-probabilities of a whole rollout from its observations, parameters and actions."""
        steps, n = d.noise.shape[:2]
        d.values.copy_(self.value(d.obs[:steps].flatten(0, 1)).view(steps, n))
        rows, actions = d.params.flatten(0, 1).contiguous(), d.actions.flatten(0, 1).contiguous()
        d.logprobs.copy_(native.logprobs(self.net, rows, actions, self.threads_for(len(rows))).view(steps, n))


class NativeActor:
    """Acts with a policy for which `can_act_in_c` is true."""

    complete = False

    def __init__(self, policy: NativePolicy, decisions: Decisions) -> None:
        """Act with `policy`, writing into `decisions`."""
        d, self._policy = decisions, policy
        self._decisions = decisions
        n = d.noise.shape[1]
        self._n, self._threads, self._call = n, policy.threads_for(n), native.act_function()
        # address of the first step and bytes from step to step
        self._places = [(x.data_ptr(), x.stride(0) * x.element_size()) for x in (d.obs, d.noise, d.params, d.actions)]

    def begin(self) -> None:
        """Do nothing: the collector calls `NativePolicy.begin`."""

    def compile(self) -> None:
        """Do nothing: C isn't compiled by torch."""

    def capture(self, device: torch.device) -> None:
        """Do nothing: C launches no kernels."""

    def act(self, t: int) -> None:
        """Fill params[t] and actions[t] from obs[t] and noise[t]."""
        policy = self._policy
        obs, noise, params, actions = (start + t * step for start, step in self._places)
        self._call(
            ctypes.byref(policy.net),
            policy.vector.data_ptr(),
            ctypes.byref(policy.input),
            obs,
            noise,
            self._n,
            self._threads,
            policy.workspace.data_ptr(),
            params,
            actions,
        )
