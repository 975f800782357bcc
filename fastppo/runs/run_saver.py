"""Save a run: checkpoints during training, the model and the result at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastppo.errors import EnvError
from fastppo.runs.checkpoint_writer import CheckpointWriter
from fastppo.runs.model_files import model_files, save_model
from fastppo.runs.result import Result
from fastppo.runs.run_state import RunState
from fastppo.runs.state_files import snapshot, state_files
from fastppo.runtime.distributed import World
from fastppo.runtime.files import write_json


class RunSaver:
    """Saves a run's checkpoints, its model and its result."""

    def __init__(
        self,
        run_dir: Path,
        writer: CheckpointWriter,
        state: RunState,
        *,
        model_metadata: Mapping[str, Any],
        world: World,
        device: torch.device,
    ) -> None:
        """Save into `run_dir`.

        Args:
            run_dir: the run folder.
            writer: writes the checkpoints.
            state: what checkpoints hold.
            model_metadata: metadata of the model file, in addition to the global step.
            world: the ranks that train together.
            device: for messages between the ranks.
        """
        self._run_dir, self._writer, self._world, self._device = run_dir, writer, world, device
        self._state, self._model_metadata = state, model_metadata

    @property
    def failure(self) -> str | None:
        """Why the last checkpoint could not be written, or None."""
        return self._writer.failure

    def start(self, step: int, *, saved: bool) -> None:
        """Start counting checkpoint intervals at `step`; `saved`: a checkpoint of that step exists."""
        self._writer.start(step, saved=saved)

    def has(self, step: int) -> bool:
        """Whether a checkpoint of `step` is on the disk, with this rank's environments as they are after the step.

        Waits for one that is being written.
        """
        return not self._state.env.changed and self._writer.has(step)

    def due(self, step: int, iteration_seconds: float) -> bool:
        """Whether a checkpoint is due at `step`, after an iteration of that duration; the same answer on every rank."""
        return self._writer.due(step, iteration_seconds)

    def checkpoint(self, step: int, best: float | None = None, *, env_lost: bool = False) -> None:
        """Save a checkpoint; writing may continue in the background.

        Args:
            step: global step.
            best: mean return of this step's evaluation if it is the best so far, else None.
            env_lost: leave the environments out; they restart in a resumed run.

        Raises:
            EnvError: the environments' state can't be saved.
        """
        metadata = dict(self._state.metadata) | ({"way": "restart"} if env_lost else {})
        model, model_metadata = snapshot(self._state.models), {"global_step": step, **self._model_metadata}
        mine = snapshot(self._state.parts if env_lost else {**self._state.parts, "env": self._state.env})
        self._state.env.changed = False
        self._writer.save(
            step,
            lambda: model_files(model, self._state.spec, model_metadata),
            lambda: state_files(self._world.rank, mine, metadata),
            best,
        )

    def last_checkpoint(self, step: int, *, env_lost: bool) -> None:
        """Save a checkpoint at the end of a run, unless one of `step` exists, and wait for it.

        A checkpoint from before the loop's body changed the environments is replaced, if their state can be saved. With
        one rank, environments whose state can't be saved are left out.
        """
        saved = self._writer.has(step)
        if saved and (env_lost or not self._world.any(self._state.env.changed, self._device)):
            return
        try:
            self.checkpoint(step, env_lost=env_lost)
        except EnvError:  # reported elsewhere
            if self._world.size == 1 and not saved:
                self.checkpoint(step, env_lost=True)

    def wait(self) -> None:
        """Wait until the last checkpoint is written, or has failed."""
        self._writer.wait()

    def save_policy(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        """Save the model and the settings into `folder`, for `load_policy`, `evaluate` and init_from.

        Raises:
            OSError: the folder can't be written.
        """
        save_model(folder, self._state.spec, self._state.models, {"global_step": step, **self._model_metadata})
        write_json(folder / "config.json", dict(config))

    def save_result(self, result: Result) -> str | None:
        """Save the model and `result` into the run folder; return the reason if that fails, else None."""
        try:
            metadata = {"global_step": result.global_step, **self._model_metadata}
            save_model(self._run_dir, self._state.spec, self._state.models, metadata)
            write_json(self._run_dir / "result.json", result.to_dict())
        except OSError as error:
            return f"the model could not be saved ({error.strerror or error})"
        return None

    def close(self) -> None:
        """Finish writing and end the writer's thread."""
        self._writer.close()
