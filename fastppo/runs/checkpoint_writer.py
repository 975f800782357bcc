"""When a checkpoint is due, and its writing beside training."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from fastppo.runs.checkpoint import (
    abandon_checkpoint,
    begin_checkpoint,
    end_checkpoint,
    mark_best,
    prune_checkpoints,
    write_files,
)
from fastppo.runtime.distributed import World

Files = Callable[[], dict[str, bytes]]  # names and contents, made where they are written
_RETRY = 30.0  # seconds after a save that failed


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time: by a thread, or together with the other processes.

    Attributes:
        failure: why the last save failed; None: it didn't.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        every_steps: int | None,
        every_minutes: float,
        world: World,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        """Save into `run_dir`, after so many steps (None: not by steps) and minutes (0: not by time)."""
        self._run_dir, self._keep, self._world, self._device, self._say = run_dir, keep, world, device, say
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._thread = ThreadPoolExecutor(1, "checkpoint") if world.size == 1 else None
        self._pending: Future[None] | None = None
        self._saved: tuple[float, int] = (time.monotonic(), 0)
        self._unmarked: float | None = None  # the best mean return of an evaluation whose checkpoint isn't done
        self.failure: str | None = None

    def start(self, step: int) -> None:
        """Training begins at `step`."""
        self._saved = (time.monotonic(), step)

    def has(self, step: int) -> bool:
        """Whether the last checkpoint, saved or on its way, is of `step`, or training began there."""
        self.wait()
        return self._saved[1] == step and self.failure is None

    def due(self, step: int) -> bool:
        """Whether to save at `step`; the same answer in every process."""
        when, last = self._saved
        waited = time.monotonic() - when
        due = self._every_steps is not None and step // self._every_steps > last // self._every_steps
        due = due or (0 < self._every_seconds <= waited) or (self.failure is not None and waited >= _RETRY)
        return self._world.any(due and self._world.is_main, self._device)

    def save(self, step: int, shared: Files, own: Files, best: float | None = None) -> None:
        """Save a checkpoint; on return it may still be on its way to the disk.

        Args:
            step: global step.
            shared: files that the main process writes.
            own: files that every process writes.
            best: the mean return with which it evaluated best so far, if it did.
        """
        self.wait()
        self._saved = (time.monotonic(), step)
        best = self._unmarked if best is None else best
        self._unmarked = best  # until it is done
        if self._thread is not None:
            self._pending = self._thread.submit(self._write, step, shared, own, best)
        else:
            self._write_together(step, shared, own, best)

    def wait(self) -> None:
        """Until nothing is on its way any longer."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish, and end the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, shared: Files, own: Files, best: float | None) -> None:
        folder = None
        try:
            folder = begin_checkpoint(self._run_dir, step)
            write_files(folder, shared() | own())
            self._seal(folder, step, best)
        except Exception as error:  # also memory: training goes on
            self._fail(step, error)
            if folder is not None:
                abandon_checkpoint(folder)

    def _write_together(self, step: int, shared: Files, own: Files, best: float | None) -> None:
        """The main process makes the folder and seals it; all write; if one fails, nothing comes of it."""
        error = None
        folder = self._run_dir / "checkpoints" / f"step-{step:012d}.tmp"
        for stage in range(3):
            try:
                if stage == 0 and self._world.is_main:
                    begin_checkpoint(self._run_dir, step)
                    write_files(folder, shared())
                elif stage == 1:
                    write_files(folder, own())
                elif stage == 2 and self._world.is_main:
                    self._seal(folder, step, best)
            except OSError as e:
                error = e
            if self._world.any(error is not None, self._device):
                self._fail(step, error or OSError("another process could not write"))
                if self._world.is_main:
                    abandon_checkpoint(folder)
                return

    def _seal(self, folder: Path, step: int, best: float | None) -> None:
        end_checkpoint(folder, self._world.size)
        if best is not None:
            mark_best(self._run_dir, step, best)
        self.failure = self._unmarked = None
        prune_checkpoints(self._run_dir, self._keep)

    def _fail(self, step: int, error: Exception) -> None:
        why = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        self.failure = f"the checkpoint at step {step:,} could not be written ({why})"
        self._say(f"{self.failure}; training goes on and tries again in {_RETRY:.0f} s.")
