"""Collective operations of the processes that train one model together, started by torchrun.

Each process holds the whole model and its own environments. Averages are taken over the rows of all processes, so two
processes of N environments compute the same as one process of 2 N, up to rounding.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastppo.errors import ConfigError, FastPPOError, first_line
from fastppo.runtime.cores import processes

T = TypeVar("T")
_GROUPS = itertools.count()  # that this process has joined
# Time-out of a collective operation in seconds; long, as some environments take minutes to start
_TIMEOUT = float(os.environ.get("FASTPPO_PATIENCE", 600))


class World:
    """The group of training processes; in a group of one, every operation is the identity.

    Every process must call the same operations in the same order. An operation that loses another process raises
    FastPPOError.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, owned: bool = False) -> None:
        """Wrap an existing group; if `owned`, `close` leaves it."""
        self.rank, self.size, self._owned = rank, size, owned

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that logs and saves."""
        return self.rank == 0

    @property
    def pool(self) -> Callable[[Tensor], Tensor] | None:
        """`sum_`, or None in a group of one: the `pool` argument of functions that also work without a group."""
        return self.sum_ if self.size > 1 else None

    def sum_(self, x: Tensor) -> Tensor:
        """Sum `x` over all processes in place; the result is bit-identical on every process."""
        if self.size > 1:
            with self._naming_loss():
                dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return the `x` of every process in order of rank, [size, *x.shape]."""
        if self.size == 1:
            return x.unsqueeze(0)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._naming_loss():
            dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    def gather_objects(self, x: T) -> list[T]:
        """Return the `x` of every process in order of rank; any values that can be pickled."""
        if self.size == 1:
            return [x]
        parts: list[Any] = [None] * self.size
        with self._naming_loss():
            dist.all_gather_object(parts, x)
        return parts

    def from_main_(self, x: Tensor) -> Tensor:
        """Overwrite `x` with the main process's values."""
        if self.size > 1:
            with self._naming_loss():
                dist.broadcast(x, 0)
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether `flag` is True in any process."""
        return bool(self.sum_(torch.full((), float(flag), device=device))) if self.size > 1 else flag

    def total(self, count: int, device: torch.device) -> int:
        """Return the sum of every process's `count`."""
        return int(self.sum_(torch.full((), count, device=device))) if self.size > 1 else count

    def shared(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process only, and return its result, or raise its error, in every process.

        Choices that depend on a measurement are made this way, so that all processes make the same one. An error that
        isn't a FastPPOError becomes one in the other processes.
        """
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]  # result and error
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = make()
            except FastPPOError as error:
                outcome[1] = failure = error
            except Exception as error:
                outcome[1] = FastPPOError(f"process 0 failed: {type(error).__name__}: {first_line(error)}")
                failure = error
        with self._naming_loss():
            dist.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise failure or outcome[1]
        value: T = outcome[0]
        return value

    def together(self, attempt: Callable[[], T], error: type[Exception], *, collective: bool = False) -> T:
        """Call `attempt` in every process; if it raises `error` in one, raise `error` in all.

        So that no process goes on alone and waits for the others in a collective operation.

        Args:
            attempt: raises `error` if it fails.
            error: made of one text.
            collective: `attempt` runs collective operations. If it fails in some processes only, the others have begun
                operations that never complete, so every process raises a FastPPOError.
        """
        failure: Exception | None = None
        result: Any = None
        try:
            result = attempt()
        except error as caught:
            failure = caught
        if self.size > 1:
            texts = self.gather_objects(None if failure is None else str(failure))
            failed = [k for k, text in enumerate(texts) if text is not None]
            if failed and collective and len(failed) < self.size:
                raise FastPPOError(
                    f"process {failed[0]} of {self.size} failed, but not all did ({texts[failed[0]]}); their "
                    "collective operations can't complete any more. Start again with compile off."
                )
            if failed and failure is None:
                failure = error(f"process {failed[0]}: {texts[failed[0]]}")
        if failure is not None:
            raise failure
        value: T = result
        return value

    def wait(self, device: torch.device) -> None:
        """Wait for the queued work of a GPU, at most as long as for a collective operation.

        Captured collective operations have no time-out of their own: without this one, a process whose partner exited
        would wait for ever at its next read.
        """
        if self.size == 1 or device.type != "cuda":
            return
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        deadline = time.monotonic() + _TIMEOUT
        with self._naming_loss():
            while not done.query():  # type: ignore[no-untyped-call]
                if time.monotonic() > deadline:
                    raise RuntimeError("the GPU waits in a captured collective operation")
                time.sleep(20e-6)

    @contextlib.contextmanager
    def _naming_loss(self) -> Iterator[None]:
        """Replace an error of a collective operation by a FastPPOError that names this process and the cause."""
        try:
            yield
        except RuntimeError as error:
            raise FastPPOError(
                f"process {self.rank} of {self.size} lost another process: it exited (see its own message) or did not "
                f"answer within {_TIMEOUT:.0f} s ({first_line(error)}). FASTPPO_PATIENCE sets this time-out."
            ) from error

    def close(self) -> None:
        """Leave the group, if this object joined it."""
        if self._owned and dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: torch.device) -> World:
    """Return the process group already joined; else join the one in torchrun's variables; else a group of one.

    Args:
        device: the training device, which decides between NCCL and Gloo.

    Raises:
        ConfigError: only some of torchrun's environment variables are set.
    """
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    if processes() == 1:
        return World()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set, but not {', '.join(missing)}: start several processes with torchrun.")
    timeout = datetime.timedelta(seconds=_TIMEOUT)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # torchrun may keep its store across restarts, with the addresses of processes that have exited; and a process that
    # trains twice finds those of its first group
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = PrefixStore(f"{attempt}-{next(_GROUPS)}", store)
    # on CUDA, Gloo carries what the host decides: an unfinished operation of NCCL must not hold up a vote
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), owned=True)


def is_main_process() -> bool:
    """Return whether this process has rank 0; also before any group is joined."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
