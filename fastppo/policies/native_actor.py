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
        self._parameters = list(policy.network.parameters())
        self._places: list[int] = []
        self._describe()
        self.workspace = native.new_workspace(self.net, self.threads)
        self.input = native.Input()
        self._moments: tuple[Tensor, ...] = ()
        self.begin()

    def _describe(self) -> None:
        """Describe the network to C again if its parameters have moved."""
        if (places := [p.data_ptr() for p in self._parameters]) != self._places:
            self.net, self._places = describe(self._policy, self.vector), places

    @torch.no_grad()
    def begin(self) -> None:
        """Read the current parameters and moments."""
        self._describe()
        native.pack(self.net, self.vector, self.workspace)
        normalizer, divisor = self._policy.encoder.normalizer, self._policy.encoder.spec.leaves[0].divisor
        read = self.input  # changed in place: actors hold its address
        if normalizer is None:
            read.divisor = divisor
        else:
            self._moments = normalizer.mean.contiguous(), normalizer.scale.contiguous()
            read.mean, read.scale = map(native.address, self._moments)
            read.clip, read.divisor = normalizer.clip, 1.0

    def threads_for(self, rows: int) -> int:
        """Return how many threads `rows` rows occupy."""
        return max(1, min(self.threads, rows // _ROWS_PER_THREAD))

    def value(self, obs: Tensor, state: PolicyState = (), starts: Tensor | None = None) -> Tensor:
        """Return V of each row of obs [B, *obs]; as `Policy.value`."""
        result = obs.new_empty(len(obs))
        self._write_values(obs.contiguous(), result)
        return result

    def fill(self, d: Decisions) -> None:
        """Fill values and log-probabilities of a whole rollout from its observations, parameters and actions."""
        steps, n = d.noise.shape[:2]
        self._write_values(d.obs[:steps], d.values)
        threads = self.threads_for(steps * n)
        native.logprobs(self.net, d.params, d.actions, threads, self.workspace, d.logprobs)

    def _write_values(self, obs: Tensor, result: Tensor) -> None:
        """Write V of contiguous rows of obs [..., *obs] into `result` [...]."""
        threads = self.threads_for(result.numel())
        native.values(self.net, self.vector, self.input, obs, threads, self.workspace, result)


class NativeActor:
    """Acts with a policy for which `can_act_in_c` is true."""

    complete = False

    def __init__(self, policy: NativePolicy, decisions: Decisions) -> None:
        """Act with `policy`, writing into `decisions`."""
        d, n = decisions, decisions.noise.shape[1]
        self._policy, self._decisions, self._call = policy, decisions, native.act_function()
        written = d.obs, d.noise, d.params, d.actions
        self._group = native.Group(
            None,
            policy.vector.data_ptr(),
            None,
            *(x.data_ptr() for x in written),
            *(x.stride(0) * x.element_size() for x in written),
            n,
            policy.workspace.data_ptr(),
            policy.threads_for(n),
        )
        self._address = ctypes.addressof(self._group)
        self.begin()

    def begin(self) -> None:
        """Take the addresses of parameters and moments; the collector has called the policy's `begin` before."""
        group, policy = self._group, self._policy
        group.params = policy.vector.data_ptr()
        group.net, group.input = ctypes.pointer(policy.net), ctypes.pointer(policy.input)

    def compile(self) -> None:
        """Do nothing: C isn't compiled by torch."""

    def capture(self, device: torch.device) -> None:
        """Do nothing: C launches no kernels."""

    def act(self, t: int) -> None:
        """Fill params[t] and actions[t] from obs[t] and noise[t]."""
        self._call(self._address, t)
