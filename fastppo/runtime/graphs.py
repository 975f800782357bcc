"""Capture work over static tensors as a CUDA graph, and replay it.

A replay repeats tensor operations at the addresses that were captured. Python doesn't run again, so captured work must
decide nothing on the host, read nothing back and draw no random numbers; whatever changes between replays is written
into tensors beforehand.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastppo.errors import CaptureError, first_line, innermost
from fastppo.runtime.distributed import World

Result = TypeVar("Result")
_WARM_UP = 3  # runs before a capture: libraries and Inductor choose algorithms and allocate in the first ones


class GraphPool:
    """Memory that several CUDA graphs share, replayed one after another and never at once.

    A replay overwrites the temporary tensors of the other graphs, but not results that were returned before its graph
    was captured.
    """

    def __init__(self, device: torch.device) -> None:
        """Make an empty pool on `device`; on the CPU it has no effect."""
        self.handle = torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def capture(
    work: Callable[[], Result],
    *,
    keep: Iterable[Tensor],
    fresh: Iterable[Tensor],
    device: torch.device,
    pool: GraphPool | None = None,
    world: World | None = None,
) -> Callable[[], Result]:
    """Capture `work`; returns a function that replays it and returns the same tensors with new contents.

    On CUDA, `work` runs three times before the capture and is replayed once after it, so that failures show here. Each
    run begins with the same contents of `keep`. Ranks vote after each stage: all capture, or none.

    Args:
        work: reads and writes tensors that stay where they are; returns tensors, or None.
        keep: tensors that `work` changes and that capturing must leave unchanged.
        fresh: tensors that are written before each replay.
        device: of all tensors; its type has a recorder in `RECORDERS`.
        pool: memory that the graph shares with others; None: its own.
        world: the ranks whose collective operations are part of `work`; None: it has none.

    Raises:
        CaptureError: `work` reads back to the host, or does something else that can't be captured; on every rank.
        FastPPOError: only some ranks failed, so that the others can't go on either.
    """
    # backward passes run in this thread: a thread of autograd's own is not part of a trace or of the debug mode
    with torch.no_grad(), torch.autograd.set_multithreading_enabled(False):
        return RECORDERS[device.type](work, list(keep), list(fresh), device, pool, world or World())


class _Kept:
    """Copies of tensors, to restore them from."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._pairs = [(tensor, tensor.clone()) for tensor in tensors]

    def restore(self) -> None:
        for tensor, before in self._pairs:
            tensor.copy_(before)


def _attempt(stage: Callable[[], Result], name: str = "") -> Result:
    """Call a stage of a capture; whatever it raises becomes a CaptureError that names the first cause."""
    try:
        return stage()
    except Exception as error:
        cause = innermost(error)
        text = f"it can't be captured as a graph ({name}{first_line(cause)})"
        if isinstance(cause, (RuntimeError, NotImplementedError, ValueError)) and not isinstance(
            cause, torch.OutOfMemoryError
        ):
            text += (
                "; a network must not look at values on the host (.item(), .cpu(), if tensor: ...) or make tensors "
                "from Python numbers on another device"
            )
        raise CaptureError(f"{text}.") from error


def _on_cuda(
    work: Callable[[], Result],
    keep: list[Tensor],
    fresh: list[Tensor],
    device: torch.device,
    pool: GraphPool | None,
    world: World,
) -> Callable[[], Result]:
    stream, debug_mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def warm_up() -> _Kept:
        kept = _Kept(keep)
        side.wait_stream(stream)
        try:
            with torch.cuda.stream(side):
                for k in range(_WARM_UP):
                    if k == _WARM_UP - 1:  # find host reads here: in a capture they leave errors behind
                        _set_sync_debug_mode("error")
                    work()
                    kept.restore()
        finally:
            _set_sync_debug_mode(debug_mode)
            torch.cuda.set_stream(stream)
            stream.wait_stream(side)
            kept.restore()
        return kept

    def record() -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        handle = GraphPool(device).handle if pool is None else pool.handle
        try:
            with torch.cuda.graph(graph, pool=handle):
                out = work()
        except BaseException:
            _clean_up(stream, device, handle)
            raise
        torch.cuda.set_stream(stream)
        return graph, out

    def first_replay() -> None:
        try:
            graph.replay()
            world.wait(device)
            torch.cuda.synchronize(device)
        finally:
            kept.restore()

    kept = world.together(lambda: _attempt(warm_up, "before the capture: "), CaptureError, collective=True)
    graph, out = world.together(lambda: _attempt(record), CaptureError)
    world.together(lambda: _attempt(first_replay, "first replay: "), CaptureError, collective=True)

    def replay() -> Result:
        graph.replay()
        return out

    return replay


class Recorder(Protocol):
    """Captures work on one type of device; see `capture` for arguments and errors."""

    def __call__(
        self,
        work: Callable[[], Result],
        keep: list[Tensor],
        fresh: list[Tensor],
        device: torch.device,
        pool: GraphPool | None,
        world: World,
    ) -> Callable[[], Result]:
        """Return the function that replays `work`."""


# by type of device: where work can be captured
RECORDERS: dict[str, Recorder] = {"cuda": _on_cuda}


def _set_sync_debug_mode(mode: str | int) -> None:
    with warnings.catch_warnings():  # that the mode is a prototype; an error where warnings are errors
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)


def _clean_up(stream: torch.cuda.Stream, device: torch.device, handle: Any) -> None:  # noqa: ANN401 - torch's own type
    """Undo what a failed capture leaves behind in torch, as far as it can be undone.

    The stream of the capture stays current. If the capture fails at its end, as after a forbidden operation, torch's
    allocator counts it as still under way, and fails at the next capture or lack of memory. Some versions also leave
    the default generator in its capturing state, in which it draws nothing; a capture that succeeds ends it.
    """
    torch.cuda.set_stream(stream)
    with contextlib.suppress(Exception):  # for the allocator, the capture had ended: newer torch ends it by itself
        torch._C._cuda_endAllocateToPool(device.index, handle)
    with contextlib.suppress(Exception):
        torch._C._cuda_releasePool(device.index, handle)
    # suppressed: after some errors, no GPU work is possible any more
    with contextlib.suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros((), device=device)
    torch.cuda.set_stream(stream)
