"""The processes that train one model together, as torchrun starts them.

Each holds the whole model and environments of its own. What is averaged is averaged over the rows of all of them, so
that two processes of N environments compute what one of 2 N does, but for rounding.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastppo.errors import ConfigError, FastPPOError

T = TypeVar("T")
_PATIENCE = float(os.environ.get("FASTPPO_PATIENCE", 600))  # seconds for the slowest process: environments start slowly


class World:
    """All processes; of size one every call is the identity.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, owned: bool = False) -> None:
        """This process's place among `size`; `owned`: `close` ends the group."""
        self.rank, self.size, self._owned = rank, size, owned

    @property
    def is_main(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    @property
    def pool(self) -> Callable[[Tensor], Tensor] | None:
        """`sum_`, for functions that take None for a single process."""
        return self.sum_ if self.size > 1 else None

    def sum_(self, x: Tensor) -> Tensor:
        """`x` summed over all processes, in place; the same bits in each of them."""
        if self.size > 1:
            with self._waiting():
                dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """`x` of all processes, [size, *x.shape], in each of them."""
        if self.size == 1:
            return x.unsqueeze(0)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._waiting():
            dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    def from_main_(self, x: Tensor) -> Tensor:
        """`x` as the main process has it, in place."""
        if self.size > 1:
            with self._waiting():
                dist.broadcast(x, 0)
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up in any process."""
        return bool(self.sum_(torch.full((), float(flag), device=device))) if self.size > 1 else flag

    def total(self, count: int, device: torch.device) -> int:
        """The sum of every process's `count`."""
        return int(self.sum_(torch.full((), float(count), device=device))) if self.size > 1 else count

    def shared(self, make: Callable[[], T]) -> T:
        """What `make` returns, or raises, in the main process, in every one."""
        if self.size == 1:
            return make()
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = make()
            except FastPPOError as error:
                found[1] = error
        with self._waiting():
            dist.broadcast_object_list(found, 0)
        if found[1] is not None:
            raise found[1]
        value: T = found[0]
        return value

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise FastPPOError(
                f"process {self.rank} of {self.size} waited in vain for another: it ended (see its message) or has not "
                f"answered for {_PATIENCE:.0f} s ({str(error).splitlines()[0]})."
            ) from None

    def close(self) -> None:
        """Leave."""
        if self._owned and dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: torch.device) -> World:
    """The world that torchrun's environment variables describe, or the group that is joined already; else alone.

    Raises:
        ConfigError: some of the variables are missing.
    """
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    if processes() == 1:
        return World()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set, but {', '.join(missing)} not: start several processes with torchrun.")
    patience = datetime.timedelta(seconds=_PATIENCE)
    store, rank, size = next(rendezvous("env://", timeout=patience))
    # torchrun may keep its store over restarts, and with it addresses of processes that are gone
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    return World(dist.get_rank(), dist.get_world_size(), owned=True)


def is_main_process() -> bool:
    """Whether this is the process that talks, before any group is joined."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many are meant to train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, and that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
