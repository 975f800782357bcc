"""What an actor reads and writes, and its interface."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastppo.policies.policy import PolicyState


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
