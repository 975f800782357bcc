"""Tests of a network's own memory at the start of a run: a wrong reset would train without an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastppo.errors import ConfigError
from fastppo.policies.encoder import Encoded

State = tuple[Tensor, ...]


def check_memory(network: nn.Module, x: Encoded) -> None:
    """Run `network` on short sequences and compare what must be equal.

    Parameters that are all zero, as those of a last layer often are at the start, have random values meanwhile: they
    would hide the memory.

    Args:
        network: a network with memory; see fastppo.policies.policy.
        x: encoded observations of 2 rows.

    Raises:
        ConfigError: it changes the state that it is given, computes several steps at once differently from one after
            the other, doesn't reset its state where an episode starts, or resets it elsewhere.
    """
    with torch.no_grad(), _no_zeros(network):
        _compare(network, x)


def _compare(network: nn.Module, x: Encoded) -> None:
    name = type(network).__name__

    def run(steps: Encoded, state: State, starts: Tensor) -> tuple[Tensor, Tensor, State]:
        params, values, after = network(steps, state, starts)
        return params.float(), values.float(), tuple(after)

    sequence = _map(lambda part: torch.stack((part, part.flip(0), part)), x)
    initial: State = tuple(part.detach().clone() for part in network.initial_state(2))  # type: ignore[operator]
    nowhere = torch.zeros(3, 2, dtype=torch.bool, device=initial[0].device)
    state = run(_steps(sequence, 0, 1), initial, nowhere[:1])[2]
    given = tuple(part.clone() for part in state)
    params, values, _ = run(sequence, state, nowhere)
    if not all(map(torch.equal, state, given)):
        raise ConfigError(
            f"network {name} changes the state that it is given, which later calls still need; return a new one."
        )
    after, rows = state, list[tuple[Tensor, Tensor]]()
    for t in range(3):
        one_params, one_values, after = run(_steps(sequence, t, t + 1), after, nowhere[:1])
        rows.append((one_params[0], one_values[0]))
    if not all(_close(params[t], p) and _close(values[t], v) for t, (p, v) in enumerate(rows)):
        raise ConfigError(
            f"network {name} computes 3 steps at once differently from one step after the other; carry the state "
            "from step to step within forward."
        )
    # an episode of the first row starts at the second step
    starts = nowhere.clone()
    starts[1, 0] = True
    params_after, values_after, _ = run(sequence, state, starts)
    # a network may also read episode_start beside the observation, so that it is given here too
    reset_params, reset_values, _ = run(_steps(sequence, 1, 3), initial, starts[1:])
    if not (_close(params_after[1:, 0], reset_params[:, 0]) and _close(values_after[1:, 0], reset_values[:, 0])):
        raise ConfigError(
            f"network {name} does not reset its state where an episode starts: where episode_start[t] is True, step t "
            "must see the state of initial_state."
        )
    goes_on = (params_after[:, 1], params[:, 1]), (values_after[:, 1], values[:, 1])
    before = (params_after[0, 0], params[0, 0]), (values_after[0, 0], values[0, 0])
    if not all(_close(*pair) for pair in (*goes_on, *before)):
        raise ConfigError(
            f"network {name} resets its state where no episode starts: an episode_start of one row changed another row "
            "or an earlier step; reset single rows, from that step on."
        )


@contextlib.contextmanager
def _no_zeros(network: nn.Module) -> Iterator[None]:
    """Give random values to the parameters that are all zero, and make them zero again at the end."""
    generator = torch.Generator().manual_seed(0)
    zeros = [x for x in network.parameters() if not x.any()]
    try:
        for x in zeros:
            x.copy_(torch.randn(x.shape, generator=generator) / 2)
        yield
    finally:
        for x in zeros:
            x.zero_()


def _steps(sequence: Encoded, first: int, end: int) -> Encoded:
    return _map(lambda part: part[first:end], sequence)


def _map(change: Callable[[Tensor], Tensor], x: Encoded) -> Encoded:
    return change(x) if isinstance(x, Tensor) else {name: change(part) for name, part in x.items()}


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, 1e-3, 1e-5)
