"""Work over static tensors, recorded once and replayed: CUDA graphs, and the same contract kept on the CPU.

A replay repeats tensor operations at the addresses they were recorded at. Python is not run again, so what is recorded
must decide nothing on the host, read nothing back to it, and draw no random numbers; everything that changes between
replays is written into tensors beforehand.

On the CPU a recording is the list of operations that the function made (`make_fx`), run anew. It gains no time. It is
there so that a function that would break under CUDA breaks in a test on any machine: host reads are refused, Python
is not run again, and `fresh` tensors are spoilt after each replay, so that one that wasn't written again shows as NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.errors import CaptureError

Result = TypeVar("Result")
_WARM_UP = 3  # runs before a capture: libraries and Inductor choose algorithms and allocate in the first ones


def capture(
    work: Callable[[], Result], *, keep: Iterable[Tensor], fresh: Iterable[Tensor], device: torch.device
) -> Callable[[], Result]:
    """`work` as a recording; calling that repeats it and returns the same tensors, with new contents.

    Args:
        work: reads and writes tensors that stay where they are; returns tensors, or None.
        keep: tensors that `work` changes and that must not be changed by recording.
        fresh: tensors that will be written anew before each replay.
        device: where all of it happens.

    Raises:
        CaptureError: it reads back to the host, or does what can't be recorded.
    """
    kept = [(tensor, tensor.clone()) for tensor in keep]
    try:
        with torch.no_grad():
            return _on_cuda(work) if device.type == "cuda" else _on_cpu(work, list(fresh))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"it can't be recorded as a graph ({first.strip()}); a network must not look at values on the host "
            "(.item(), .cpu(), if tensor: ...) or make tensors from Python numbers on another device."
        ) from error
    finally:
        for tensor, before in kept:
            tensor.copy_(before)


def _on_cuda(work: Callable[[], Result]) -> Callable[[], Result]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()

    def replay() -> Result:
        graph.replay()
        return out

    return replay


def _on_cpu(work: Callable[[], Result], fresh: list[Tensor]) -> Callable[[], Result]:
    with _Strict():  # type: ignore[no-untyped-call]
        recording = make_fx(lambda: work())()  # a plain function: it looks at the signature
    out: list[Result] = []

    def replay() -> Result:
        with torch.no_grad():
            result = recording()
        if not out:
            out.append(result)
        elif isinstance(result, Tensor):  # as a graph: at the same address each time
            out[0].copy_(result)  # type: ignore[attr-defined]
        for tensor in fresh:
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
        return out[0]

    return replay


class _Strict(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what CUDA refuses in a capture, or would freeze: results of unknown size, constants, random numbers.

    Not seen: .tolist() and .numpy(), which go past torch's dispatcher.
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
            raise RuntimeError(f"{name} gives a result whose size only the values tell")
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"{name} reads values on the host")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{name} draws random numbers")
        if name == "lift_fresh":
            raise RuntimeError("torch.tensor(...) makes a constant on the host; make it before, or by torch.full")
        return func(*args, **(kwargs or {}))


def _plain_index(args: Sequence[Any]) -> bool:
    """Whether the arguments are those of indexing without masks, whose result has the size of the indices."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else None
    return indices is not None and all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in indices)
