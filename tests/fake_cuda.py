"""A GPU that computes on the CPU: its tensors say `cuda:K`, so that every CUDA branch runs on a machine without one.

It keeps the rules of CUDA that Python code can break: tensors of two devices don't mix, a host read counts as a
synchronisation (an error in a capture and under `set_sync_debug_mode("error")`), a failed capture stays on its stream
and keeps the allocator and the default generator recording unless the code ends that, and a replay repeats operations
but no Python. `Memory` counts bytes as torch's allocator with the private pools of graphs does.
"""

from __future__ import annotations

import contextlib
import itertools
import types
import warnings
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
_MIXES = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "set_"}
_REAL_RANDPERM, _REAL_TENSOR = torch.randperm, torch.tensor


class OnGPU(Tensor):
    """A tensor on the fake GPU; its numbers are in `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor, index: int = 0) -> OnGPU:
        """Wrap `inner`."""
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # of torch's C++ code, which has no guard for CUDA in a CPU build; as FakeTensor does
        )

    def __init__(self, inner: Tensor, index: int = 0) -> None:
        """Wrap `inner`."""
        self.inner, self.index = inner.detach(), index
        GPU.current.memory.hold(self)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that Python sees."""
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True."""
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let `x.data = y` move the numbers too."""
        if getattr(func, "__self__", None) is Tensor.data and func.__name__ == "__set__":
            args[0].inner = args[1].inner
            GPU.current.memory.hold(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return GPU.current.compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """Return the address of the numbers."""
        return self.inner.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:  # type: ignore[override]
        """Read the numbers on the host."""
        assert force, "can't convert cuda:0 device type tensor to numpy"
        GPU.current.synchronise("numpy")
        return self.inner.numpy(force=True)

    def tolist(self) -> Any:  # type: ignore[override]
        """Read the numbers on the host."""
        GPU.current.synchronise("tolist")
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy the numbers; a parameter stays one."""
        copied = OnGPU(self.inner.clone(), self.index)
        result = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        memo[id(self)] = result
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        """Return the numbers."""
        return f"OnGPU({self.inner})"


class Stream:
    """A stream: a name."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Make a side stream."""

    def wait_stream(self, other: Stream) -> None:
        """Do nothing: the fake GPU runs every operation at once."""

    def synchronize(self) -> None:
        """Count a synchronisation."""
        GPU.current.synchronise("stream.synchronize")


class Event:
    """An event; `GPU.hangs` keeps it from finishing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Make an event."""

    def record(self, *_: Any) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Whether the work before the event is done."""
        return not GPU.current.hangs

    def synchronize(self) -> None:
        """Count a synchronisation."""
        GPU.current.synchronise("event.synchronize")


class Memory:
    """Bytes of live tensors in the common pool, and bytes that the private pools of graphs have taken for good.

    A graph's pool never gives memory back: it keeps the most that was alive in it at once. The model knows no blocks,
    so it leaves out rounding and fragmentation.

    Attributes:
        live: bytes alive, by pool; None is the common one.
        taken: the most that was alive in each private pool.
        peak: the most of everything at once.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.live: Counter[Any] = Counter()
        self.taken: Counter[Any] = Counter()
        self.peak = 0
        self._holders: Counter[int] = Counter()
        self._pool_of: dict[int, Any] = {}

    @property
    def now(self) -> int:
        """Bytes of the common pool's live tensors and of all private pools."""
        return self.live[None] + sum(self.taken.values())

    def hold(self, tensor: OnGPU) -> None:
        """Count the storage of `tensor` until the last tensor that shares it has died."""
        storage = tensor.inner.untyped_storage()
        key, size, graph = storage._cdata, storage.nbytes(), GPU.current.graph
        pool = None if graph is None else graph.pool_id
        self._holders[key] += 1
        if self._holders[key] == 1:
            self._pool_of[key] = pool
            self.live[pool] += size
            if pool is not None:
                self.taken[pool] = max(self.taken[pool], self.live[pool])
            self.peak = max(self.peak, self.now)
        # with the storage, whose key would be used again
        weakref.finalize(tensor, self._drop, key, size, storage).atexit = False

    def _drop(self, key: int, size: int, storage: Any) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.live[self._pool_of.pop(key)] -= size


class Graph:
    """A CUDA graph: the operations of a capture on the numbers of their tensors."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Make an empty graph."""
        self.operations: list[Any] = []
        self.undo: list[tuple[Tensor, Tensor]] = []

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        """Begin to note operations, in the private pool `pool` (None: a new one)."""
        gpu = GPU.current
        self.pool_id = gpu.pool_handle() if pool is None else pool
        assert self.pool_id not in gpu.recording, "already recording to this pool"
        gpu.recording.add(self.pool_id)
        gpu.fail_at("begin")
        assert gpu.stream is not gpu.main, "a capture needs a stream of its own"
        gpu.graph, gpu.invalid, gpu.generator_captures = self, False, True

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Note an operation. It runs, for its result, but what it writes is undone: CUDA runs nothing in a capture."""
        if func._schema.is_mutable:
            self.undo += [(x, x.clone()) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def capture_end(self) -> None:
        """End the capture; fails if an operation in it was not allowed."""
        gpu = GPU.current
        gpu.graph = None
        for x, before in reversed(self.undo):
            x.copy_(before)
        self.undo.clear()
        gpu.fail_at("end")
        if gpu.invalid:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
        gpu.recording.remove(self.pool_id)
        gpu.generator_captures = False

    def replay(self) -> None:
        """Repeat the operations, and write their results to the same tensors."""
        gpu = GPU.current
        gpu.fail_at("replay")
        assert gpu.stream is gpu.main, "replayed on the stream of a capture"
        gpu.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                for old, new in zip(tree_flatten(out)[0], tree_flatten(func(*args, **kwargs))[0], strict=True):
                    if isinstance(new, torch.ScriptObject):  # a collective operation
                        torch.distributed.Work.unbox(new).wait()
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Generator(torch.Generator):
    """A generator that says it is on the GPU."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        """Make a generator on the CPU."""
        if torch.device(device).type == "cpu":
            return _GENERATOR(device)
        made = super().__new__(cls, "cpu")
        made.on_gpu = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        """Keep the device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that was asked for."""
        return self.on_gpu


_MODES = {"default": 0, "warn": 1, "error": 2}
_GENERATOR = torch.Generator


class GPU(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The fake GPU, in use while it is entered.

    Attributes:
        fails: stage -> exception to raise there, once: "warm-up" (the first work off the main stream), "begin", "end"
            and "replay".
        hangs: events never finish.
        stream: the current stream; `main` at first.
        graph: the graph that is being captured.
        invalid: whether the capture under way is lost.
        replays: replays so far.
        set: devices given to `set_device`.
        recording: pools to which the allocator believes that a capture records.
        generator_captures: whether the default generator believes that a capture is under way.
        memory: bytes in use.
    """

    current: GPU

    def __init__(self, count: int = 1) -> None:
        """Have `count` devices."""
        super().__init__()
        self.count, self.main = count, Stream()
        self.stream, self.graph, self.invalid, self.hangs = self.main, None, False, False
        self.fails: dict[str, Exception] = {}
        self.replays, self.sync_mode, self.set = 0, 0, list[torch.device]()
        self.recording, self.generator_captures, self.memory = set[Any](), False, Memory()
        self._handles, self._warned = itertools.count(1), False
        GPU.current = self

    def fail_at(self, stage: str) -> None:
        """Raise the exception of `stage`, if it has one."""
        if stage in self.fails:
            self.invalid = True
            raise self.fails.pop(stage)

    def synchronise(self, what: str) -> None:
        """Refuse a synchronisation where CUDA refuses it."""
        if self.graph is not None:
            self.invalid = True
            raise torch.AcceleratorError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if self.sync_mode == _MODES["error"]:
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take what the subclass doesn't see: new tensors, and moves to the GPU."""
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute `func` on the numbers, and wrap the results that are on the GPU."""
        given = tree_flatten((args, kwargs))[0]
        mine = [x for x in given if isinstance(x, OnGPU)]
        to = kwargs.get("device")
        to = None if to is None else torch.device("cuda" if str(to) == "meta" else to)
        kwargs = {name: x for name, x in kwargs.items() if name != "pin_memory"}
        if not mine and (to is None or to.type != "cuda"):
            return func(*args, **kwargs)
        name = func.name().removeprefix("aten::").split(".")[0]
        self._check(name, given, to)
        on_gpu = to.type == "cuda" if to is not None else bool(mine)
        if name == "copy_":
            on_gpu = isinstance(args[0], OnGPU)
        if self.stream is not self.main and self.graph is None:
            self.fail_at("warm-up")
        if self.graph is not None:
            self.fail_at("inside")
        by_inner = {id(x.inner): x for x in mine}
        inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnGPU) else x, (args, kwargs))
        if to is not None:
            inner_kwargs["device"] = torch.device("cpu")
        with torch.no_grad():
            note = None if self.graph is None else self.graph.note
            out = func(*inner_args, **inner_kwargs) if note is None else note(func, inner_args, inner_kwargs)

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor) or not on_gpu:
                return x
            return by_inner[id(x)] if id(x) in by_inner else OnGPU(x)

        return tree_map(wrap, out)

    def _check(self, name: str, given: list[Any], to: torch.device | None) -> None:
        tensors = [x for x in given if isinstance(x, Tensor)]
        mine = [x for x in tensors if isinstance(x, OnGPU)]
        others = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
        if mine and others and name not in _MIXES:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"):
            self.synchronise(name)
        if mine and to is not None and to.type == "cpu":
            self.synchronise(name)
        if name == "copy_" and mine and not isinstance(given[0], OnGPU):
            self.synchronise(name)

    def pool_handle(self) -> Any:
        """Return the handle of a new private pool."""
        return (0, next(self._handles))

    def empty_cache(self) -> None:
        """Fail while the allocator believes that a capture is under way."""
        if self.recording:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def set_sync_debug_mode(self, mode: str | int) -> None:
        """Set what a synchronisation does; the first time, warn as torch does."""
        if not self._warned:
            self._warned = True
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)
        self.sync_mode = _MODES.get(mode, mode)  # type: ignore[arg-type,assignment]

    def set_stream(self, stream: Stream) -> None:
        """Make `stream` the current one."""
        self.stream = stream

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Any:
        """Work on `stream`."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def install(self, patch: Any) -> None:
        """Replace torch.cuda by this GPU."""
        cuda = {
            "is_available": lambda: self.count > 0,
            "is_initialized": lambda: True,
            "device_count": lambda: self.count,
            "current_device": lambda: self.set[-1].index if self.set else 0,
            "set_device": self._set_device,
            "get_device_name": lambda *_: "Fake GPU",
            "get_device_capability": lambda *_: (9, 0),
            "get_device_properties": lambda *_: types.SimpleNamespace(multi_processor_count=2),
            "is_bf16_supported": lambda *_, **__: True,
            "mem_get_info": lambda *_: (8 << 30, 16 << 30),
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
            "synchronize": lambda *_: self.synchronise("torch.cuda.synchronize"),
            "empty_cache": self.empty_cache,
            "_lazy_init": lambda: None,
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph_pool_handle": self.pool_handle,
            "current_stream": lambda *_: self.stream,
            "set_stream": self.set_stream,
            "stream": self.on_stream,
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "get_sync_debug_mode": lambda: self.sync_mode,
        }
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.graph, "default_capture_stream", Stream())
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: self.recording.remove(pool), raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", lambda *_: None, raising=False)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "randperm", self._randperm)
        patch.setattr(torch, "tensor", self._tensor)
        patch.setattr(Tensor, "pin_memory", lambda x, *_: x.clone())

    def _set_device(self, device: Any) -> None:
        index = torch.device(device).index
        if index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        self.set.append(torch.device("cuda", index))

    def _randperm(self, n: int, *, generator: Any = None, device: Any = "cpu", **kwargs: Any) -> Tensor:
        drawn = _REAL_RANDPERM(n, generator=generator, **kwargs)
        return drawn if torch.device(device).type == "cpu" else drawn.to(device)

    def _tensor(self, data: Any, *, device: Any = "cpu", **kwargs: Any) -> Tensor:
        made = _REAL_TENSOR(data, **kwargs)
        return made if torch.device(device or "cpu").type == "cpu" else made.to(device)
