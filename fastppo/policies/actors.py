"""Actors: write each environment's action into the rollout, as cheaply as the policy allows.

Acting doesn't need values and log-probabilities. If actor and critic share no layers, they are computed after the
rollout, for all rows at once.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from fastppo.policies.decisions import Actor, Decisions
from fastppo.policies.numpy_actor import NumpyActor, can_act_in_numpy
from fastppo.policies.policy import ActionStep, Policy, PolicyState
from fastppo.runtime.compile import compile_graph
from fastppo.runtime.graphs import capture
from fastppo.spaces.observations import ObsSpec

_CHUNK = 4096  # rows per pass; they fit a core's cache


def make_actor(policy: Policy, decisions: Decisions, *, torch_only: bool = False) -> Actor:
    """Make the fastest actor for `policy` on the rollout's device; with `torch_only`, one that can be captured.

    On the CPU, BLAS on numpy views of the parameters avoids torch's overhead of 3 us per operation. A step of two
    64-wide layers takes 13 us instead of 35 at N=1 and 32 instead of 59 at N=64; at N=512 it gains nothing (150 against
    145; benchmarks/act.py).
    """
    if not torch_only and decisions.obs.device.type == "cpu" and can_act_in_numpy(policy):
        return NumpyActor(policy, decisions)
    return ModuleActor(policy, decisions)


def choose_act_device(
    wanted: Literal["auto", "cpu", "cuda"], policy: Policy, obs_spec: ObsSpec, n_envs: int, device: torch.device
) -> tuple[Literal["cpu", "cuda"], str]:
    """Return the device to act on, for environments on the host and a `policy` that learns on a GPU, and the reason.

    `auto` times a step on the CPU, and a step on the GPU including both copies.
    """
    if wanted != "auto":
        return wanted, "asked for"
    cpu = torch.device("cpu")
    here, noise_size = copy.deepcopy(policy).cpu(), policy.distribution.noise_size
    obs, noise = obs_spec.blank(2, n_envs), torch.zeros(1, n_envs, noise_size)
    dist = policy.distribution
    actions = torch.zeros(1, n_envs, *dist.action_shape, dtype=dist.action_dtype)
    scalars = torch.zeros(1, n_envs)
    params = torch.zeros(1, n_envs, dist.n_params)
    states = tuple(torch.stack((x, x)) for x in here.initial_state(n_envs))
    starts = torch.ones(2, n_envs, dtype=torch.bool) if states else None
    actor = make_actor(here, Decisions(obs, noise, actions, scalars, params, scalars.clone(), states, starts))
    obs_there, noise_there = obs[0].to(device), noise[0].to(device)
    state_there = policy.initial_state(n_envs)

    def there() -> None:
        obs_there.copy_(obs[0])
        policy.act(obs_there, noise_there, state_there).actions.to(cpu)

    times = {"cpu": _seconds(lambda: actor.act(0)), "cuda": _seconds(there)}
    figures = ", ".join(f"{name} {seconds * 1e6:,.0f} us" for name, seconds in times.items())
    return ("cpu" if times["cpu"] < times["cuda"] else "cuda"), f"a step of {n_envs} takes {figures}"


def _seconds(call: Callable[[], None]) -> float:
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def fill_values_and_logprobs(policy: Policy, d: Decisions) -> None:
    """Fill values and log-probabilities of a whole rollout from its observations, parameters and actions."""
    steps, n = d.noise.shape[:2]
    chunk = max(1, _CHUNK // n)
    for t in range(0, steps, chunk):
        rows = slice(t, min(t + chunk, steps))
        params, actions = d.params[rows].flatten(0, 1), d.actions[rows].flatten(0, 1)
        d.logprobs[rows] = policy.distribution.log_prob(params, actions).view(-1, n)
        # each row is a sequence of one step, from the state that was stored before it
        state = tuple(x[rows].flatten(0, 1) for x in d.states)
        starts = None if d.starts is None else d.starts[rows].flatten()
        d.values[rows] = policy.value(d.obs[rows].flatten(0, 1), state, starts).view(-1, n)


class ModuleActor:
    """Acts with any network; one forward pass fills every tensor."""

    complete = True

    def __init__(self, policy: Policy, decisions: Decisions) -> None:
        """Act with `policy`, writing into `decisions`."""
        self._policy, self._d = policy, decisions
        # the row index is on the device, so a replayed step is a single launch
        self._row = torch.zeros(1, dtype=torch.int64, device=decisions.obs.device)
        self._replay: Callable[[], None] | None = None
        self._decide: Callable[[Tensor, Tensor, PolicyState, Tensor | None], ActionStep] = policy.act
        self._compiled = False

    def begin(self) -> None:
        """Go back to the first row."""
        self._row.zero_()

    def act(self, t: int) -> None:
        """Decide step t; a replay ignores t and takes the rows in order."""
        if self._replay is not None:
            self._replay()
            return
        d = self._d
        step = self._decide(d.obs[t], d.noise[t], d.state(t), d.starts_at(t))
        d.actions[t].copy_(step.actions)
        d.logprobs[t].copy_(step.logprobs)
        d.params[t].copy_(step.params)
        d.values[t].copy_(step.values)
        for states, new in zip(d.states, step.state, strict=True):
            states[t + 1].copy_(new)

    def compile(self) -> None:
        """Compile the decision; each call reads the current parameters and buffers."""
        policy, d = self._policy, self._d
        tensors = dict(policy.named_parameters()) | dict(policy.named_buffers())
        weights = tuple(x.detach() for x in tensors.values())

        def act(
            obs: Tensor, noise: Tensor, weights: tuple[Tensor, ...], state: PolicyState, starts: Tensor | None
        ) -> ActionStep:
            output = functional_call(policy, dict(zip(tensors, weights, strict=True)), (obs, state, starts))
            return policy.decide(output, noise)

        compiled = compile_graph(act, (d.obs[0], d.noise[0], weights, d.state(0), d.starts_at(0)))
        self._decide = lambda obs, noise, state, starts: compiled(obs, noise, weights, state, starts)
        self._compiled = True

    def capture(self, device: torch.device) -> None:
        """Capture the decision, unless it is compiled for the CPU: that code can't be captured."""
        if device.type == "cuda" or not self._compiled:
            # with rollouts of one step, the row that a step writes is the one that the next rollout begins with
            keep = [self._row, *(states[1] for states in self._d.states)]
            self._replay = capture(self._act_on_row, keep=keep, fresh=[], device=device)

    def _act_on_row(self) -> None:
        d, row = self._d, self._row

        def at_row(x: Tensor) -> Tensor:
            return x.index_select(0, row)[0]

        starts = None if d.starts is None else at_row(d.starts)
        step = self._decide(at_row(d.obs), at_row(d.noise), tuple(map(at_row, d.states)), starts)
        d.actions.index_copy_(0, row, step.actions.unsqueeze(0).to(d.actions.dtype))
        d.logprobs.index_copy_(0, row, step.logprobs.unsqueeze(0))
        d.params.index_copy_(0, row, step.params.unsqueeze(0))
        d.values.index_copy_(0, row, step.values.unsqueeze(0))
        row.add_(1)
        for states, new in zip(d.states, step.state, strict=True):
            states.index_copy_(0, row, new.unsqueeze(0).to(states.dtype))
