"""Capture work over static tensors and replay it: CUDA graphs, and the same contract on the CPU.

A replay repeats tensor operations at the addresses that were captured. Python doesn't run again, so captured work must
decide nothing on the host, read nothing back and draw no random numbers; whatever changes between replays is written
into tensors beforehand.

On the CPU a capture is the list of operations that the function made (`make_fx`). Replaying it brings no speed-up; it
lets a test on any machine find what would break under CUDA: host reads are refused, Python doesn't run again, and
`fresh` tensors are spoilt after each replay, so that one that isn't written again shows as NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.errors import CaptureError, first_line

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
) -> Callable[[], Result]:
    """Capture `work`; returns a function that replays it and returns the same tensors with new contents.

    Args:
        work: reads and writes tensors that stay where they are; returns tensors, or None.
        keep: tensors that `work` changes and that capturing must leave unchanged.
        fresh: tensors that are written before each replay.
        device: of all tensors.
        pool: memory that the graph shares with others; None: its own.

    Raises:
        CaptureError: `work` reads back to the host, or does something else that can't be captured.
    """
    kept = [(tensor, tensor.clone()) for tensor in keep]
    try:
        with torch.no_grad():
            return _on_cuda(work, pool) if device.type == "cuda" else _on_cpu(work, list(fresh))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise CaptureError(
            f"it can't be captured as a graph ({first_line(error)}); a network must not look at values on the host "
            "(.item(), .cpu(), if tensor: ...) or make tensors from Python numbers on another device."
        ) from error
    finally:
        for tensor, before in kept:
            tensor.copy_(before)


def _on_cuda(work: Callable[[], Result], pool: GraphPool | None) -> Callable[[], Result]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=None if pool is None else pool.handle):
        out = work()

    def replay() -> Result:
        graph.replay()
        return out

    return replay


def _on_cpu(work: Callable[[], Result], fresh: list[Tensor]) -> Callable[[], Result]:
    with _Strict():  # type: ignore[no-untyped-call]
        operations = make_fx(lambda: work())()  # a plain function: make_fx reads the signature
    out: list[Result] = []

    def replay() -> Result:
        with torch.no_grad():
            result = operations()
        if not out:
            out.append(result)
        elif isinstance(result, Tensor):  # like a graph, at the same address each time
            out[0].copy_(result)  # type: ignore[attr-defined]
        for tensor in fresh:
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
        return out[0]

    return replay


class _Strict(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what CUDA refuses in a capture, or would freeze: results of unknown size, constants, random numbers.

    It does not see .tolist() and .numpy(), which bypass torch's dispatcher.
    """

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what it returns
        name = func.name().removeprefix("aten::").split(".")[0]
        if torch.Tag.dynamic_output_shape in func.tags and not _plain_index(args):
            raise RuntimeError(f"the size of the result of {name} depends on values")
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"{name} reads values on the host")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{name} draws random numbers")
        if name == "lift_fresh":
            raise RuntimeError("torch.tensor(...) makes a constant on the host; make it beforehand, or with torch.full")
        return func(*args, **(kwargs or {}))


def _plain_index(args: Sequence[Any]) -> bool:
    """Whether the arguments index without masks, so that the result has the size of the indices."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else None
    return indices is not None and all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in indices)
