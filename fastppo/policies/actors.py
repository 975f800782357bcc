"""Acting: the action of each environment, written into the rollout's row, at the lowest cost this policy allows.

Values and log-probabilities of a rollout are not needed to act. Where policy and value have layers of their own they
are computed afterwards, for all rows at once.
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
from fastppo.policies.policy import Action, Policy
from fastppo.spaces import ObsSpec

_Array = np.ndarray[Any, Any]
_CHUNK = 4096  # rows of one pass: what stays in a core's cache


class Decisions(NamedTuple):
    """What a rollout holds of the policy's side, for one group of N environments.

    Attributes:
        obs: [T + 1, N, *obs] where environments stand before each step.
        noise: [T, N, noise_size] drawn before each rollout.
        actions: [T, N, *action] where actions go.
        logprobs: [T, N] of those actions.
        params: [T, N, P] of the distribution.
        values: [T, N] V(s_t).
    """

    obs: Tensor
    noise: Tensor
    actions: Tensor
    logprobs: Tensor
    params: Tensor
    values: Tensor


# Compiles a function for tensors like the given ones
Compiler = Callable[[Callable[..., Any], Sequence[Tensor]], Callable[..., Any]]
# Makes a recording of work that keeps some tensors
Capturer = Callable[[Callable[[], None], Sequence[Tensor]], Callable[[], None]]


class Actor(Protocol):
    """Acts for one group of environments.

    Attributes:
        complete: whether `act` fills log-probabilities and values too, or actions and parameters alone.
    """

    complete: bool

    def compile(self, compiler: Compiler) -> None:
        """Have what decides compiled, where that is torch."""

    def capture(self, capturer: Capturer) -> None:
        """Replace what decides by a recording, where that is torch."""

    def begin(self) -> None:
        """A rollout begins: parameters and moments may have changed."""

    def act(self, t: int) -> None:
        """Decide step t from obs[t] and noise[t]."""


def make_actor(policy: Policy, decisions: Decisions, *, torch_only: bool = False) -> Actor:
    """The cheapest actor for `policy` where the rollout lies; `torch_only` for a rollout that is recorded as a graph.

    On the CPU, plain BLAS on numpy's views of the parameters beats torch, whose operations cost 3 us each: 13 against
    35 us at N=1, 32 against 59 at N=64, 150 against 145 at N=512 (two 64-wide layers; benchmarks/act.py).
    """
    if (
        not torch_only
        and not policy.bf16
        and decisions.obs.device.type == "cpu"
        and (layers := _plain_layers(policy)) is not None
    ):
        return _NumpyActor(policy, layers, decisions)
    return _ModuleActor(policy, decisions)


def choose_act_device(
    wanted: Literal["auto", "cpu", "cuda"], policy: Policy, obs_spec: ObsSpec, n_envs: int, device: torch.device
) -> tuple[Literal["cpu", "cuda"], str]:
    """Where to act for environments on the host while `policy` learns on `device`, a GPU; and why.

    `auto` times a step both ways: here, and there with the way over and back.
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
    actor = make_actor(here, Decisions(obs, noise, actions, scalars, params, scalars.clone()))
    obs_there, noise_there = obs[0].to(device), noise[0].to(device)

    def there() -> None:
        obs_there.copy_(obs[0])
        policy.act(obs_there, noise_there).actions.to(cpu)

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


def complete(policy: Policy, d: Decisions) -> None:
    """Fill log-probabilities and values of a whole rollout from its observations, parameters and actions."""
    steps, n = d.noise.shape[:2]
    chunk = max(1, _CHUNK // n)
    for t in range(0, steps, chunk):
        rows = slice(t, min(t + chunk, steps))
        params, actions = d.params[rows].flatten(0, 1), d.actions[rows].flatten(0, 1)
        d.logprobs[rows] = policy.distribution.log_prob(params, actions).view(-1, n)
        d.values[rows] = policy.value(d.obs[rows].flatten(0, 1)).view(-1, n)


class _ModuleActor:
    """Any module: one forward pass gives everything."""

    complete = True

    def __init__(self, policy: Policy, decisions: Decisions) -> None:
        self._policy, self._d = policy, decisions
        # the step that a recording is at: it finds its rows by itself, so that a step is one launch
        self._row = torch.zeros(1, dtype=torch.int64, device=decisions.obs.device)
        self._recording: Callable[[], None] | None = None
        self._compiled: Callable[[Tensor, Tensor], Action] | None = None

    def begin(self) -> None:
        """Back to the first row."""
        self._row.zero_()

    def act(self, t: int) -> None:
        """Decide step t; a recording takes the steps in their order."""
        if self._recording is not None:
            self._recording()
            return
        d, decide = self._d, self._compiled or self._policy.act
        action = decide(d.obs[t], d.noise[t])
        d.actions[t].copy_(action.actions)
        d.logprobs[t].copy_(action.logprobs)
        d.params[t].copy_(action.params)
        d.values[t].copy_(action.values)

    def compile(self, compiler: Compiler) -> None:
        """Have compiled code decide, from parameters and buffers as they are when it is called."""
        policy, d = self._policy, self._d
        tensors = dict(policy.named_parameters()) | dict(policy.named_buffers())

        def act(obs: Tensor, noise: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            params, values = functional_call(policy, dict(zip(tensors, state, strict=True)), (obs,))
            actions = policy.distribution.sample(params, noise)
            return actions, policy.distribution.log_prob(params, actions), params, values

        state = [x.detach() for x in tensors.values()]
        compiled = compiler(act, [d.obs[0], d.noise[0], *state])
        self._compiled = lambda obs, noise: Action(*compiled(obs, noise, *state))

    def capture(self, capturer: Capturer) -> None:
        """Have a recording decide from now on, unless compiled code does, which no recording sees into."""
        if self._compiled is None:
            self._recording = capturer(self._decide, [self._row])

    def _decide(self) -> None:
        d, row = self._d, self._row
        action = self._policy.act(d.obs.index_select(0, row)[0], d.noise.index_select(0, row)[0])
        d.actions.index_copy_(0, row, action.actions.unsqueeze(0).to(d.actions.dtype))
        d.logprobs.index_copy_(0, row, action.logprobs.unsqueeze(0))
        d.params.index_copy_(0, row, action.params.unsqueeze(0))
        d.values.index_copy_(0, row, action.values.unsqueeze(0))
        row.add_(1)


def _plain_layers(policy: Policy) -> list[nn.Linear] | None:
    """The actor's linear layers, if it is nothing but those with tanh or ReLU between, on vectors."""
    network = policy.network
    if type(network) is not MLP or network.actor_trunk is None or policy.encoder.spec.kind != "vector":
        return None
    if not isinstance(policy.distribution, (Categorical, Gaussian)):
        return None
    trunk = list(network.actor_trunk)
    if not all(isinstance(layer, (nn.Flatten, nn.Linear, nn.Tanh, nn.ReLU)) for layer in trunk):
        return None
    return [layer for layer in (*trunk, network.actor.linear) if isinstance(layer, nn.Linear)]


class _NumpyActor:
    """A multi-layer perceptron in preallocated numpy arrays that share their memory with the network's parameters."""

    complete = False

    def __init__(self, policy: Policy, layers: Sequence[nn.Linear], decisions: Decisions) -> None:
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
        self.begin()

    def begin(self) -> None:
        """Take up parameters that moved, and what changes only between rollouts."""
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

    def compile(self, compiler: Compiler) -> None:
        """Nothing to compile."""

    def capture(self, capturer: Capturer) -> None:
        """Nothing to record: numpy is not launched."""

    def act(self, t: int) -> None:
        """Fill params[t] and actions[t] from obs[t] and noise[t]."""
        x = self._obs[t]
        if self._moments is not None:
            mean, scale, clip = self._moments
            # as ObsNormalizer: the difference in float64
            x = np.clip((x - mean) * scale, -clip, clip, out=self._scaled, casting="same_kind")
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
