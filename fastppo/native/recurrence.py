"""The recurrences in C (`recurrence.c`), for tensors of float32 on a CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.native.library import NativeError, load

_FEWEST = 4  # sequences of a thread; fewer don't fill a tile of the matrix products


@functools.cache
def unavailable() -> str | None:
    """Return why the recurrences in C can't be used on this machine, or None."""
    try:
        load("recurrence")
    except NativeError as error:
        return str(error)
    return None


def takes(*tensors: Tensor) -> bool:
    """Whether the recurrences in C can read these tensors: float32 on a CPU, none of them empty."""
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 for x in tensors)
    return plain and unavailable() is None


def lstm_forward(
    gates: Tensor, weight: Tensor, starts: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return outputs, last hidden and cell, activated gates, cells and tanh(cells); see functional.recurrence."""
    shape = *starts.shape, hidden.shape[-1]
    outputs, cells, tanh_cells = (gates.new_empty(shape) for _ in range(3))
    last_hidden, last_cell = (hidden.new_empty(hidden.shape) for _ in range(2))
    results = outputs, last_hidden, last_cell, gates.new_empty(gates.shape), cells, tanh_cells
    _call("lstm_forward", shape, (gates, weight, starts, hidden, cell), results)
    return results


def lstm_backward(
    grad_outputs: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    weight: Tensor,
    starts: Tensor,
    cell: Tensor,
    gates: Tensor,
    cells: Tensor,
    tanh_cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to gates, hidden and cell."""
    results = gates.new_empty(gates.shape), cell.new_empty(cell.shape), cell.new_empty(cell.shape)
    arguments = grad_outputs, grad_hidden, grad_cell, weight, starts, cell, gates, cells, tanh_cells
    _call("lstm_backward", tuple(cells.shape), arguments, results)
    return results


def gru_forward(
    gates: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return outputs, last hidden, (r, z, d + bias) and candidates; see functional.recurrence."""
    shape = *starts.shape, hidden.shape[-1]
    results = (
        gates.new_empty(shape),
        hidden.new_empty(hidden.shape),
        gates.new_empty(gates.shape),
        gates.new_empty(shape),
    )
    _call("gru_forward", shape, (gates, weight, bias, starts, hidden), results)
    return results


def gru_backward(
    grad_outputs: Tensor | None,
    grad_hidden: Tensor | None,
    weight: Tensor,
    starts: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    gates: Tensor,
    candidates: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to (a, b, d), the candidates' gate and hidden."""
    results = gates.new_empty(gates.shape), candidates.new_empty(candidates.shape), hidden.new_empty(hidden.shape)
    arguments = grad_outputs, grad_hidden, weight, starts, hidden, outputs, gates, candidates
    _call("gru_backward", tuple(candidates.shape), arguments, results)
    return results


def _call(name: str, shape: tuple[int, ...], arguments: tuple[Tensor | None, ...], results: tuple[Tensor, ...]) -> None:
    """Call the function `name` for L steps, S sequences and H units, `shape`; None is a null pointer."""
    length, sequences, units = shape
    threads = max(1, min(torch.get_num_threads(), sequences // _FEWEST))
    given = [None if x is None else x.contiguous() for x in arguments]  # kept alive until the call returns
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (*given, *results)]
    sizes = [ctypes.c_long(x) for x in (length, sequences, units)]
    if getattr(load("recurrence"), name)(*sizes, ctypes.c_int(threads), *pointers):
        raise MemoryError(f"{name}: no memory for {sequences} sequences of {units} units")


def step(name: str, rows: int, units: int, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    """Call `name`, "lstm_step", "gru_step" or "mingru_step", on contiguous float32 arrays; the last are written.

    Args:
        name: of a function of recurrence.c.
        rows: states.
        units: H.
        arrays: the function's other arguments.
    """
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in arrays]
    getattr(load("recurrence"), name)(ctypes.c_long(rows), ctypes.c_long(units), *pointers)
