"""Memory between the trunks and the heads of a network: LSTM, GRU and minGRU.

A memory reads sequences [L, S, F], time first, and resets its state where an episode starts. Acting is a sequence of
one step. The cells are tensor operations of our own, because torch's are one opaque operation that can neither be reset
within a sequence nor captured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fastppo.functional.recurrence import gru_scan, lstm_scan, mingru_scan
from fastppo.policies.mlp import Body, orthogonal

MemoryKind = Literal["lstm", "gru", "mingru"]
State = tuple[Tensor, ...]


class Memory(nn.Module):
    """One recurrent layer.

    Attributes:
        n_states: tensors [S, size] in its state.
        n_gates: gates per unit.
        is_recurrent: whether the gates read the state, by a recurrent weight.
        size: units.
    """

    n_states = 1
    n_gates: int
    is_recurrent = True
    input: nn.Linear

    def __init__(self, n_features: int, size: int) -> None:
        """Read `n_features` into `size` units; weights orthogonal, biases zero, as in CleanRL's Atari LSTM."""
        super().__init__()
        self.size = size
        self.input = nn.Linear(n_features, self.n_gates * size)
        orthogonal(self.input, 1.0)

    @classmethod
    def count_weights(cls, n_features: int, size: int) -> int:
        """Return the number of weights of such a layer, without its biases."""
        return cls.n_gates * size * (n_features + (size if cls.is_recurrent else 0))

    def forward(self, x: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
        """Return outputs [L, S, size] and the state after the last step.

        Args:
            x: [L, S, F].
            state: [S, size] each, before the first step.
            starts: [L, S] bool: an episode starts at this step, so the state that enters it counts as zero.
        """
        return self.scan(self.input(x), state, starts)

    def scan(self, gates: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
        """Run the recurrence on the inputs' share of the gates, [L, S, n_gates * size]."""
        raise NotImplementedError


def _recurrent_weight(rows: int, size: int) -> nn.Parameter:
    weight = torch.empty(rows, size)
    nn.init.orthogonal_(weight)
    return nn.Parameter(weight)


class LSTM(Memory):
    """Long short-term memory; source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000."""

    n_states, n_gates = 2, 4

    def __init__(self, n_features: int, size: int) -> None:
        """See `Memory`."""
        super().__init__(n_features, size)
        self.recurrent = _recurrent_weight(4 * size, size)

    def scan(self, gates: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
        """Return outputs and the state (hidden, cell)."""
        outputs, hidden, cell = lstm_scan(gates, self.recurrent, starts, *state)
        return outputs, (hidden, cell)


class GRU(Memory):
    """Gated recurrent unit; source: Cho et al. 2014 (arXiv:1406.1078), in torch's form."""

    n_gates = 3

    def __init__(self, n_features: int, size: int) -> None:
        """See `Memory`."""
        super().__init__(n_features, size)
        self.recurrent = _recurrent_weight(3 * size, size)
        self.bias = nn.Parameter(torch.zeros(size))

    def scan(self, gates: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
        """Return outputs and the state (hidden,)."""
        outputs, hidden = gru_scan(gates, self.recurrent, self.bias, starts, *state)
        return outputs, (hidden,)


class MinGRU(Memory):
    """A GRU whose gates read the input alone, so that a sequence is one parallel scan.

    Source: Feng et al. 2024, "Were RNNs all we needed?" (arXiv:2410.01201).
    """

    n_gates = 2
    is_recurrent = False

    def __init__(self, n_features: int, size: int) -> None:
        """See `Memory`; the units start with memories of 2 to 33 steps, by the bias of their update gates.

        Source: Tallec and Ollivier 2018, "Can recurrent neural networks warp time?" (arXiv:1804.11188), with times
        evenly spaced in their logarithm instead of random ones.
        """
        super().__init__(n_features, size)
        # with biases of 0 each step loses half the state, and what happened ten steps ago can't be learned
        self.input.get_parameter("bias").detach()[:size] = -torch.linspace(0, math.log(32), size)

    def scan(self, gates: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
        """Return outputs and the state (hidden,)."""
        outputs, hidden = mingru_scan(gates, starts, *state)
        return outputs, (hidden,)


MEMORIES: dict[str, type[Memory]] = {"lstm": LSTM, "gru": GRU, "mingru": MinGRU}


class RecurrentNetwork(nn.Module):
    """A network with memory: trunks, a memory after each of them, heads.

    Attributes:
        body: trunks and heads.
        memories: one for a shared trunk; else the critic's and the actor's.
    """

    def __init__(self, body: Body, kind: MemoryKind, size: int, *, shared: bool) -> None:
        """Put memories of `size` units after the trunks of `body`, one if these are `shared`."""
        super().__init__()
        self.body = body
        self.memories = nn.ModuleList([MEMORIES[kind](body.width, size) for _ in range(1 if shared else 2)])

    def initial_state(self, n_envs: int) -> State:
        """Return the state at the start of an episode: zeros [n_envs, size], for each memory in turn."""
        device = next(self.parameters()).device
        return tuple(
            torch.zeros(n_envs, memory.size, device=device) for memory in self._each() for _ in range(memory.n_states)
        )

    def recurrences(self) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Return each memory's recurrent weight, with the parameters of that memory and of the heads on it.

        Empty for minGRU, which has no recurrent weights.
        """
        critic, actor = self.body.critic, self.body.actor
        heads: list[list[nn.Module]] = [[critic, actor]] if len(self.memories) == 1 else [[critic], [actor]]
        return [
            (memory.recurrent, [*memory.parameters(), *(p for head in own for p in head.parameters())])
            for memory, own in zip(self._each(), heads, strict=True)
            if isinstance(memory, (LSTM, GRU))
        ]

    @property
    def n_critic_states(self) -> int:
        """Number of leading tensors of the state that belong to the critic alone."""
        return sum(memory.n_states for memory in self._each()[:-1])

    def _each(self) -> list[Memory]:
        return [memory for memory in self.memories if isinstance(memory, Memory)]

    def forward(
        self, x: Tensor | Mapping[str, Tensor], state: State, episode_start: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        """Return parameters [L, S, P], values [L, S] and the state after the last step.

        Args:
            x: encoded observations [L, S, ...], or a dict of them.
            state: as `initial_state`, before the first step.
            episode_start: [L, S] bool: an episode starts at this step.
        """
        rows = x.flatten(0, 1) if isinstance(x, Tensor) else {name: part.flatten(0, 1) for name, part in x.items()}
        sizes = episode_start.shape
        given, states, outputs = iter(state), list[Tensor](), list[Tensor]()
        for features, memory in zip(self.body.features(rows), self._each(), strict=True):
            own = tuple(itertools.islice(given, memory.n_states))
            out, after = memory(features.view(*sizes, -1), own, episode_start)
            outputs.append(out.flatten(0, 1))
            states += after
        params, values = self.body.heads(tuple(outputs))
        return params.view(*sizes, -1), values.view(sizes), tuple(states)
