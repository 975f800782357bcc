"""Decides when a checkpoint is due, and writes it while training continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from fastppo.errors import first_line
from fastppo.runs.checkpoint import (
    begin_checkpoint,
    discard_checkpoint,
    mark_best,
    prune_checkpoints,
    seal_checkpoint,
    temporary_folder,
)
from fastppo.runs.state_files import write_files
from fastppo.runtime.distributed import World

Files = Callable[[], dict[str, bytes]]  # returns contents by name; called where they are written, to serialise there
_RETRY_SECONDS = 30.0  # between a failed save and the next attempt
# Iterations of this many seconds are saved each, where checkpoints are saved by time at all: a stop signal leaves a
# rollout that would take as long, and the run then resumes from the end of the iteration before
LONG_ITERATION = 10.0


class _Save(NamedTuple):
    """The arguments of `CheckpointWriter.save`."""

    step: int
    shared: Files
    own: Files
    best: float | None


class CheckpointWriter:
    """Writes the checkpoints of a run one at a time, in a thread, or together with the other processes.

    Attributes:
        failure: why the last save failed; None if it succeeded.
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
        """Configure the writer.

        Args:
            run_dir: the run folder.
            keep: number of latest checkpoints that are kept.
            every_steps: environment steps between saves; None disables this trigger.
            every_minutes: minutes between saves; 0 disables this trigger.
            world: the processes that train together.
            device: device for messages between the processes.
            say: prints a line in the terminal.
        """
        self._run_dir, self._keep, self._world, self._device, self._say = run_dir, keep, world, device, say
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._thread = ThreadPoolExecutor(1, "checkpoint") if world.size == 1 else None
        self._pending: Future[None] | None = None
        self._last_save: tuple[float, int] = (time.monotonic(), 0)
        self._saved = False  # whether the last save was one, and not the start of the count
        self._lost_best: _Save | None = None  # the best so far, if it could not be written; tried again with the next
        self.failure: str | None = None

    def start(self, step: int, *, saved: bool) -> None:
        """Begin to count steps and minutes at `step`; `saved`: a checkpoint of that step exists."""
        self._last_save, self._saved = (time.monotonic(), step), saved

    def has(self, step: int) -> bool:
        """Wait for a pending save; return whether the state at `step` is saved."""
        self.wait()
        return self._saved and self._last_save[1] == step and self.failure is None

    def due(self, step: int, iteration_seconds: float) -> bool:
        """Return whether to save at `step`, after an iteration of that duration; the same answer in every process."""
        saved_at, saved_step = self._last_save
        elapsed = time.monotonic() - saved_at
        due = self._every_steps is not None and step // self._every_steps > saved_step // self._every_steps
        due = due or (0 < self._every_seconds <= elapsed) or (self.failure is not None and elapsed >= _RETRY_SECONDS)
        due = due or (self._every_seconds > 0 and iteration_seconds >= LONG_ITERATION)
        return self._world.any(due and self._world.is_main, self._device)

    def save(self, step: int, shared: Files, own: Files, best: float | None = None) -> None:
        """Save a checkpoint; the files may still be being written on return.

        Args:
            step: global step.
            shared: files that the main process writes.
            own: files that every process writes.
            best: mean return of the evaluation at `step` if it is the best so far.
        """
        self.wait()
        self._last_save, self._saved = (time.monotonic(), step), True
        saves = [_Save(step, shared, own, best)]
        if self._lost_best is not None and best is None:
            saves.insert(0, self._lost_best)
        self._lost_best = None
        if self._thread is not None:
            self._pending = self._thread.submit(self._write_each, saves)
        else:
            for save in saves:
                self._write_together(save)

    def wait(self) -> None:
        """Wait until the pending save is done."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish the pending save and end the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _write_each(self, saves: Sequence[_Save]) -> None:
        for save in saves:
            self._write(save)

    def _write(self, save: _Save) -> None:
        folder = None
        try:
            folder = begin_checkpoint(self._run_dir, save.step)
            write_files(folder, save.shared() | save.own())
            self._seal(folder, save)
        except Exception as error:  # whatever fails, also a lack of memory: training continues
            self._fail(save, error)
            if folder is not None:
                discard_checkpoint(folder)

    def _write_together(self, save: _Save) -> None:
        """Write in all processes; the main one makes and seals the folder. If one fails, all give up."""
        error = None
        folder = temporary_folder(self._run_dir, save.step)
        for stage in range(3):
            try:
                if stage == 0 and self._world.is_main:
                    begin_checkpoint(self._run_dir, save.step)
                    write_files(folder, save.shared())
                elif stage == 1:
                    write_files(folder, save.own())
                elif stage == 2 and self._world.is_main:
                    self._seal(folder, save)
            except OSError as e:
                error = e
            if self._world.any(error is not None, self._device):
                self._fail(save, error or OSError("another process could not write"))
                if self._world.is_main:
                    discard_checkpoint(folder)
                return
        self.failure = None  # in every process: `has` must answer the same in all

    def _seal(self, folder: Path, save: _Save) -> None:
        seal_checkpoint(folder, self._world.size)
        if save.best is not None:
            mark_best(self._run_dir, save.step, save.best)
        self.failure = None
        prune_checkpoints(self._run_dir, self._keep)

    def _fail(self, save: _Save, error: Exception) -> None:
        if save.best is not None:
            self._lost_best = save
        reason = (
            error.strerror if isinstance(error, OSError) else None
        ) or f"{type(error).__name__}: {first_line(error)}"
        self.failure = f"the checkpoint at step {save.step:,} could not be written ({reason})"
        self._say(f"{self.failure}; training continues and tries again in {_RETRY_SECONDS:.0f} s.")
