"""A recorder of graphs for the CPU, so that tests on any machine find what would break in a CUDA graph.

A capture is the list of operations that the function made (`make_fx`). Host reads are refused, Python doesn't run
again, and `fresh` tensors are spoilt after each replay, so that one that isn't written again shows as NaN. It takes
whole trainings on the CPU; `tests.fake_cuda` takes the code for CUDA itself.
"""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.runtime.graphs import _attempt, _Kept


def record(work, keep, fresh, device, pool, world):
    """Record the operations of `work` on the CPU; see `fastppo.runtime.graphs.Recorder`."""
    kept = _Kept(keep)
    try:
        return _attempt(lambda: recorded(work, fresh))
    finally:
        kept.restore()


def recorded(work, fresh):
    """Return the function that replays `work`."""
    with _Strict():
        operations = make_fx(lambda: work())()  # a plain function: make_fx reads the signature
    out = []

    def replay():
        with torch.no_grad():
            result = operations()
        if not out:
            out.append(result)
        elif isinstance(result, Tensor):  # like a graph, at the same address each time
            out[0].copy_(result)
        for tensor in fresh:
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
        return out[0]

    return replay


class _Strict(TorchDispatchMode):
    """Refuses what CUDA refuses in a capture, or would freeze: results of unknown size, constants, random numbers.

    It does not see .tolist() and .numpy(), which bypass torch's dispatcher.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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


def _plain_index(args):
    """Whether the arguments index without masks, so that the result has the size of the indices."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else None
    return indices is not None and all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in indices)
