"""Acting with small networks in preallocated numpy arrays, on views of the network's parameters.

On the CPU this avoids torch's overhead of 3 us per operation. Values and log-probabilities come after the rollout, for
all rows at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastppo.functional.bounded_distributions import Beta
from fastppo.functional.distributions import Categorical, Gaussian, bound_log_std
from fastppo.native import recurrence as native
from fastppo.policies.decisions import Decisions
from fastppo.policies.memory import GRU, LSTM, Memory, MinGRU, RecurrentNetwork
from fastppo.policies.mlp import MLP
from fastppo.policies.mlp_layout import is_changed
from fastppo.policies.policy import Policy

_Array = np.ndarray[Any, Any]


def can_act_in_numpy(policy: Policy) -> bool:
    """Return whether the network is an MLP as made here, tanh or ReLU, on vectors, with memory or separate trunks."""
    network = policy.network
    recurrent = type(network) is RecurrentNetwork
    mlp = network.body if isinstance(network, RecurrentNetwork) else network
    if policy.bf16 or not policy.encoder.spec.is_plain or type(mlp) is not MLP or is_changed(mlp):
        return False
    if not isinstance(policy.distribution, (Categorical, Gaussian, Beta)) or (
        mlp.actor_trunk is None and not recurrent
    ):
        return False
    trunk = mlp.critic_trunk if mlp.actor_trunk is None else mlp.actor_trunk
    return all(isinstance(layer, (nn.Flatten, nn.Linear, nn.Tanh, nn.ReLU)) for layer in trunk)


class NumpyActor:
    """Acts with a network for which `can_act_in_numpy` is true."""

    complete = False

    def __init__(self, policy: Policy, decisions: Decisions) -> None:
        """Act with `policy`, writing into `decisions`."""
        steps, n = decisions.noise.shape[:2]
        network = policy.network
        mlp: Any = network.body if isinstance(network, RecurrentNetwork) else network
        self._policy, self._decisions, self._log_std = policy, decisions, mlp.actor.log_std
        obs = decisions.obs.numpy()
        self._obs = obs.reshape(steps + 1, n, -1) if obs.ndim != 3 else obs
        self._noise, self._actions, self._params = (
            x.numpy() for x in (decisions.noise, decisions.actions, decisions.params)
        )
        relu = any(isinstance(layer, nn.ReLU) for layer in mlp.modules())
        activate: Callable[..., Any] = _relu if relu else np.tanh
        self._head = _Layers([mlp.actor.linear], n)
        self._trunks, self._memories = list[_Layers](), list[_Memory]()
        if isinstance(network, RecurrentNetwork):
            # the critic's memory advances too: the rollout stores its states
            trunks = [mlp.critic_trunk, *([] if mlp.actor_trunk is None else [mlp.actor_trunk])]
            states = iter(x.numpy() for x in decisions.states)
            for memory in network.memories:
                assert isinstance(memory, Memory), "a memory of this project"
                self._memories.append(_MEMORIES[type(memory)](memory, n, itertools.islice(states, memory.n_states)))
        else:
            trunks = [mlp.actor_trunk]
        for trunk in trunks:
            self._trunks.append(_Layers([x for x in trunk if isinstance(x, nn.Linear)], n, activate))
        self._starts = None if decisions.starts is None else decisions.starts.numpy()
        self._keep = np.empty((n, 1), bool)
        self._scaled = np.empty(self._obs.shape[1:], np.float32)
        self._divisor = np.float32(policy.encoder.spec.leaves[0].divisor)
        self.begin()

    def begin(self) -> None:
        """Refresh the views of the parameters and the constants of a rollout."""
        with torch.no_grad():
            for layers in (*self._trunks, self._head):
                layers.begin()
            for memory in self._memories:
                memory.begin()
            self._std: _Array | None = None
            if self._log_std is not None:
                self._std = bound_log_std(self._log_std).exp().numpy()
                self._params[..., len(self._std) :] = self._log_std.numpy()
        normalizer = self._policy.encoder.normalizer
        self._moments = None
        if normalizer is not None:
            mean, scale = normalizer.mean.numpy(), normalizer.scale.numpy()
            self._moments = mean.reshape(-1), scale.reshape(-1), normalizer.clip

    def compile(self) -> None:
        """Do nothing: numpy isn't compiled."""

    def capture(self, device: torch.device) -> None:
        """Do nothing: numpy launches no kernels."""

    def act(self, t: int) -> None:
        """Fill params[t], actions[t] and the states before step t + 1 from obs[t], noise[t] and the states of t."""
        x = self._obs[t]
        if self._moments is not None:
            mean, scale, clip = self._moments
            # the difference is in float64, as in ObsNormalizer
            x = np.clip((x - mean) * scale, -clip, clip, out=self._scaled, casting="same_kind")
        elif self._divisor != 1:
            x = np.divide(x, self._divisor, out=self._scaled)
        features = x
        if self._starts is None:
            features = self._trunks[0](x)
        else:
            starts = self._starts[t, :, None]
            keep = np.logical_not(starts, out=self._keep) if starts.any() else None
            for trunk, memory in zip(self._trunks, self._memories, strict=True):
                features = memory(trunk(x), t, keep)  # the last is the actor's
        x = self._head(features)
        self._params[t, :, : x.shape[1]] = x
        if self._std is not None:
            action = self._actions[t]
            np.multiply(self._noise[t], self._std, out=action)
            np.add(action, x, out=action)
        elif isinstance(self._policy.distribution, Categorical):
            np.add(x, self._noise[t], out=x)
            np.argmax(x, 1, out=self._actions[t])
        else:  # a Beta, or a Gaussian whose deviations are outputs: one definition, in torch
            d = self._decisions
            d.actions[t].copy_(self._policy.distribution.sample(d.params[t], d.noise[t]))


class _Layers:
    """Linear layers, each followed by the activation if there is one."""

    def __init__(self, layers: Sequence[nn.Linear], n: int, activate: Callable[..., Any] | None = None) -> None:
        self._layers, self._activate = layers, activate
        self._outs = [np.empty((n, layer.out_features), np.float32) for layer in layers]
        self.begin()

    def begin(self) -> None:
        with torch.no_grad():
            self._weights = [layer.weight.numpy().T for layer in self._layers]
            self._biases = [layer.bias.numpy() for layer in self._layers]

    def __call__(self, x: _Array) -> _Array:
        for weight, bias, out in zip(self._weights, self._biases, self._outs, strict=True):
            np.dot(x, weight, out=out)
            np.add(out, bias, out=out)
            if self._activate is not None:
                self._activate(out, out=out)
            x = out
        return x


class _Memory:
    """A memory of N environments; `states` are the rollout's arrays [T + 1, N, H]."""

    def __init__(self, memory: Memory, n: int, states: Any) -> None:  # noqa: ANN401 - an iterable of arrays
        self._input, self._memory = _Layers([memory.input], n), memory
        self._states: list[_Array] = list(states)
        self._kept = [np.empty_like(x[0]) for x in self._states]
        self._recurrent = np.empty((n, memory.n_gates * memory.size), np.float32)
        self._work = np.empty((n, memory.size), np.float32)
        self.begin()

    def begin(self) -> None:
        self._input.begin()
        with torch.no_grad():
            self._weights = {name: x.numpy() for name, x in self._memory.named_parameters() if "." not in name}

    def __call__(self, x: _Array, t: int, keep: _Array | None) -> _Array:
        """Return the outputs of step t for inputs x [N, F]; `keep` [N, 1] is False where an episode starts."""
        before = [states[t] for states in self._states]
        if keep is not None:
            for state, kept in zip(before, self._kept, strict=True):
                kept.fill(0.0)
                np.copyto(kept, state, where=keep)  # a product would keep a NaN
            before = self._kept
        self.step(self._input(x), before, [states[t + 1] for states in self._states])
        output: _Array = self._states[0][t + 1]  # of every memory, the hidden state
        return output

    def step(self, gates: _Array, before: list[_Array], after: list[_Array]) -> None:
        """Write the state after a step, as the scans of `functional.recurrence` define it."""
        raise NotImplementedError

    def _in_c(self, name: str, *arrays: _Array) -> bool:
        """Call a function of native/recurrence.c, and return True; False where it can't be used."""
        if native.unavailable() is not None or not all(x.flags.c_contiguous for x in arrays):
            return False
        native.step(name, len(self._work), self._memory.size, arrays)
        return True


class _LSTM(_Memory):
    def step(self, gates: _Array, before: list[_Array], after: list[_Array]) -> None:
        (hidden, cell), (new_hidden, new_cell), size = before, after, self._memory.size
        np.dot(hidden, self._weights["recurrent"].T, out=self._recurrent)
        if self._in_c("lstm_step", gates, self._recurrent, cell, new_hidden, new_cell):
            return
        np.add(gates, self._recurrent, out=gates)
        i, f, g, o = (gates[:, k * size : (k + 1) * size] for k in range(4))
        _sigmoid(gates[:, : 2 * size])
        _sigmoid(o)
        np.tanh(g, out=g)
        np.multiply(i, g, out=self._work)
        np.multiply(f, cell, out=new_cell)
        np.add(new_cell, self._work, out=new_cell)
        np.tanh(new_cell, out=new_hidden)
        np.multiply(new_hidden, o, out=new_hidden)


class _GRU(_Memory):
    def step(self, gates: _Array, before: list[_Array], after: list[_Array]) -> None:
        (hidden,), (new,), size = before, after, self._memory.size
        recurrent = np.dot(hidden, self._weights["recurrent"].T, out=self._recurrent)
        if self._in_c("gru_step", gates, recurrent, self._weights["bias"], hidden, new):
            return
        both, d = gates[:, : 2 * size], recurrent[:, 2 * size :]
        np.add(both, recurrent[:, : 2 * size], out=both)
        _sigmoid(both)
        r, z, n = (gates[:, k * size : (k + 1) * size] for k in range(3))
        np.add(d, self._weights["bias"], out=d)
        np.multiply(r, d, out=d)
        np.add(n, d, out=n)
        np.tanh(n, out=n)
        _blend(n, hidden, z, out=new)


class _MinGRU(_Memory):
    def step(self, gates: _Array, before: list[_Array], after: list[_Array]) -> None:
        (hidden,), (new,), size = before, after, self._memory.size
        if self._in_c("mingru_step", gates, hidden, new):
            return
        z, candidate = gates[:, :size], gates[:, size:]
        _sigmoid(z)
        _blend(hidden, candidate, z, out=new)


_MEMORIES: dict[type[Memory], type[_Memory]] = {LSTM: _LSTM, GRU: _GRU, MinGRU: _MinGRU}


def _blend(a: _Array, b: _Array, share: _Array, out: _Array) -> None:
    """Write a + share (b - a)."""
    np.subtract(b, a, out=out)
    np.multiply(out, share, out=out)
    np.add(out, a, out=out)


def _sigmoid(x: _Array) -> None:
    """Replace x by 1 / (1 + exp(-x)); exp overflows to infinity, whose inverse is 0."""
    np.negative(x, out=x)
    with np.errstate(over="ignore"):
        np.exp(x, out=x)
    np.add(x, 1.0, out=x)
    np.reciprocal(x, out=x)


def _relu(x: _Array, out: _Array) -> None:
    np.maximum(x, 0.0, out=out)
