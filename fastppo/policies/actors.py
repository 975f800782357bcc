"""Actors: write each environment's action into the rollout, as cheaply as the policy allows.

Acting doesn't need values and log-probabilities. If actor and critic share no layers, they are computed after the
rollout, for all rows at once.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastppo.functional.distributions import Categorical, Gaussian, bound_log_std
from fastppo.policies.mlp import MLP
from fastppo.policies.policy import ActionStep, Policy, PolicyState
from fastppo.runtime.compile import compile_graph
from fastppo.runtime.graphs import capture
from fastppo.spaces.observations import ObsSpec

_Array = np.ndarray[Any, Any]
_CHUNK = 4096  # rows per pass; they fit a core's cache


class Decisions(NamedTuple):
    """The tensors of a rollout that acting reads and writes, for N environments.

    Attributes:
        obs: [T + 1, N, *obs] observation before each step; read only.
        noise: [T, N, noise_size]; read only.
        actions: [T, N, *action].
        logprobs: [T, N] of those actions.
        params: [T, N, P] distribution parameters.
        values: [T, N] V(s_t).
        states: the policy's state before each step, [T + 1, N, ...] each; a step reads its own and writes the next.
        starts: [T + 1, N] bool: an episode starts at this step; read only. None: the policy has no memory.
    """

    obs: Tensor
    noise: Tensor
    actions: Tensor
    logprobs: Tensor
    params: Tensor
    values: Tensor
    states: PolicyState = ()
    starts: Tensor | None = None

    def of_group(self, group: slice) -> Decisions:
        """Return the slices of the environments in `group`."""
        rows = {name: x[:, group] for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return Decisions(**rows, states=tuple(x[:, group] for x in self.states))

    def state(self, t: int) -> PolicyState:
        """Return the state before step t, as views."""
        return tuple(x[t] for x in self.states)

    def starts_at(self, t: int) -> Tensor | None:
        """Return where step t starts an episode, as a view."""
        return None if self.starts is None else self.starts[t]


class Actor(Protocol):
    """Acts for one group of environments.

    Attributes:
        complete: whether `act` also fills log-probabilities and values, beside actions and parameters.
    """

    complete: bool

    def compile(self) -> None:
        """Compile the decision, if it runs in torch."""

    def capture(self, device: torch.device) -> None:
        """Capture the decision on `device`, if it runs in torch."""

    def begin(self) -> None:
        """Begin a rollout: parameters and moments may have changed."""

    def act(self, t: int) -> None:
        """Decide step t from obs[t] and noise[t]."""


def make_actor(policy: Policy, decisions: Decisions, *, torch_only: bool = False) -> Actor:
    """Make the fastest actor for `policy` on the rollout's device; with `torch_only`, one that can be captured.

    On the CPU, BLAS on numpy views of the parameters avoids torch's overhead of 3 us per operation. A step of two
    64-wide layers takes 13 us instead of 35 at N=1 and 32 instead of 59 at N=64; at N=512 it gains nothing (150 against
    145; benchmarks/act.py).
    """
    if (
        not torch_only
        and not policy.bf16
        and decisions.obs.device.type == "cpu"
        and (layers := plain_layers(policy)) is not None
    ):
        return NumpyActor(policy, layers, decisions)
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
            self._replay = capture(self._act_on_row, keep=[self._row], fresh=[], device=device)

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
            states.index_copy_(0, row, new.unsqueeze(0))


def plain_layers(policy: Policy) -> list[nn.Linear] | None:
    """Return the actor's linear layers if it is a plain MLP with tanh or ReLU on vector observations, else None."""
    network = policy.network
    if type(network) is not MLP or network.actor_trunk is None or not policy.encoder.spec.is_plain:
        return None
    if not isinstance(policy.distribution, (Categorical, Gaussian)):
        return None
    trunk = list(network.actor_trunk)
    if not all(isinstance(layer, (nn.Flatten, nn.Linear, nn.Tanh, nn.ReLU)) for layer in trunk):
        return None
    return [layer for layer in (*trunk, network.actor.linear) if isinstance(layer, nn.Linear)]


class NumpyActor:
    """Acts with an MLP in preallocated numpy arrays, on views of the network's parameters."""

    complete = False

    def __init__(self, policy: Policy, layers: Sequence[nn.Linear], decisions: Decisions) -> None:
        """Act with the actor `layers` of `policy` (see `plain_layers`), writing into `decisions`."""
        steps, n = decisions.noise.shape[:2]
        self._policy = policy
        obs = decisions.obs.numpy()
        self._obs = obs.reshape(steps + 1, n, -1) if obs.ndim != 3 else obs
        self._noise, self._actions, self._params = (
            x.numpy() for x in (decisions.noise, decisions.actions, decisions.params)
        )
        self._layers = layers
        self._outs = [np.empty((n, layer.out_features), np.float32) for layer in layers]
        relu = any(isinstance(layer, nn.ReLU) for layer in policy.network.modules())
        self._activate: Callable[..., Any] = _relu if relu else np.tanh
        assert isinstance(policy.network, MLP)
        self._log_std = policy.network.actor.log_std
        self._scaled = np.empty(self._obs.shape[1:], np.float32)
        self._divisor = np.float32(policy.encoder.spec.leaves[0].divisor)
        self.begin()

    def begin(self) -> None:
        """Refresh the views of the parameters and the constants of a rollout."""
        with torch.no_grad():
            self._weights = [layer.weight.numpy().T for layer in self._layers]
            self._biases = [layer.bias.numpy() for layer in self._layers]
            self._std: _Array | None = None
            if self._log_std is not None:
                self._std = bound_log_std(self._log_std).exp().numpy()
                self._params[..., len(self._std) :] = self._log_std.numpy()
        normalizer = self._policy.encoder.normalizer
        self._moments = None
        if normalizer is not None:
            mean, scale = normalizer.mean.numpy(), (normalizer.var + 1e-8).rsqrt().numpy()
            self._moments = mean.reshape(-1), scale.reshape(-1), normalizer.clip

    def compile(self) -> None:
        """Do nothing: numpy isn't compiled."""

    def capture(self, device: torch.device) -> None:
        """Do nothing: numpy launches no kernels."""

    def act(self, t: int) -> None:
        """Fill params[t] and actions[t] from obs[t] and noise[t]."""
        x = self._obs[t]
        if self._moments is not None:
            mean, scale, clip = self._moments
            # the difference is in float64, as in ObsNormalizer
            x = np.clip((x - mean) * scale, -clip, clip, out=self._scaled, casting="same_kind")
        elif self._divisor != 1:
            x = np.divide(x, self._divisor, out=self._scaled)
        last = len(self._outs) - 1
        for i, out in enumerate(self._outs):
            np.dot(x, self._weights[i], out=out)
            np.add(out, self._biases[i], out=out)
            if i < last:
                self._activate(out, out=out)
            x = out
        self._params[t, :, : x.shape[1]] = x
        if self._std is not None:
            action = self._actions[t]
            np.multiply(self._noise[t], self._std, out=action)
            np.add(action, x, out=action)
        else:
            np.add(x, self._noise[t], out=x)
            np.argmax(x, 1, out=self._actions[t])


def _relu(x: _Array, out: _Array) -> None:
    np.maximum(x, 0.0, out=out)
