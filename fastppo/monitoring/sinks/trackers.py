"""Tracking services: Weights & Biases and MLflow, configured by their own environment variables."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastppo.errors import ConfigError, first_line
from fastppo.monitoring.sinks.sink import Sink
from fastppo.monitoring.stats import Stats
from fastppo.runtime.distributed import is_main_process

_SECONDS = 5.0  # between two writes; one takes 40 ms in a local MLflow store
_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")  # values of WANDB_MODE

Tracker = Literal["wandb", "mlflow"]


class ThrottledSink:
    """Passes one iteration every five seconds to another sink, and the last one."""

    def __init__(self, sink: Sink) -> None:
        """Wrap `sink`."""
        self._sink, self._next_time = sink, 0.0
        self._held_back: Stats | None = None
        self._own: dict[tuple[int, int], dict[str, float]] = {}  # of the iteration that is held back

    def write(self, stats: Stats) -> None:
        """Write or hold back one iteration; those with histograms or images are always written."""
        self._own.clear()
        has_media = stats.images or (stats.sample is not None and stats.sample.histograms)
        if time.monotonic() >= self._next_time or has_media:
            self._next_time = time.monotonic() + _SECONDS
            self._sink.write(stats)
            self._held_back = None
        else:
            self._held_back = stats

    def log(self, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Write or hold back the user's own figures, together with their iteration."""
        if self._held_back is None:
            self._sink.log(iteration, step, values)
        else:
            self._own[iteration, step] = {**self._own.get((iteration, step), {}), **values}

    def close(self) -> None:
        """Write the last iteration if it was held back, and close the sink."""
        try:
            if self._held_back is not None:
                self._sink.write(self._held_back)
                for (iteration, step), values in self._own.items():
                    self._sink.log(iteration, step, values)
        finally:
            self._sink.close()


class WandbSink:
    """Logs to Weights & Biases; WANDB_PROJECT (default fastppo) and WANDB_MODE set project and mode."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Start a run named after its folder, or continue the one that this folder started.

        Raises:
            ConfigError: the service refuses, for example the login.
        """
        import wandb

        name = hashlib.sha1(str(run_dir.resolve()).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fastppo"),
                name=run_dir.name,
                id=name,
                resume="allow",
                config=config,
                dir=run_dir,
            )
        except Exception as error:  # its own classes, and those of its service
            raise ConfigError(f"track wandb: {first_line(error)}") from None
        self._wandb = wandb

    def write(self, stats: Stats) -> None:
        """Write scalars, histograms and images at the global step."""
        values: dict[str, Any] = dict(stats.scalars)
        if stats.sample is not None:
            for tag, array in stats.sample.histograms.items():
                finite = array[np.isfinite(array)]
                values[tag] = self._wandb.Histogram(np_histogram=np.histogram(finite, 64))
        for tag, gif in stats.images.items():
            values[tag] = self._wandb.Video(io.BytesIO(gif), format="gif")
        self._run.log(values, step=stats.global_step)

    def log(self, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Write the user's own figures."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is buffered, and end the run."""
        self._run.finish()


class MlflowSink:
    """Logs to MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME (default fastppo) set server and experiment."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Start a run named after its folder, or continue the one that this folder started.

        Raises:
            ConfigError: the store can't be reached.
        """
        from mlflow.entities import Metric, Param

        self._client, self._metric = _mlflow_client(), Metric
        name, where = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastppo"), str(run_dir.resolve())
        try:
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
            quoted = where.replace("'", "''")
            before = self._client.search_runs([experiment], f"tags.run_dir = '{quoted}'", max_results=1)
            if before:
                self._id = before[0].info.run_id
                self._client.update_run(self._id, status="RUNNING")
            else:
                self._id = self._client.create_run(
                    experiment, tags={"run_dir": where}, run_name=run_dir.name
                ).info.run_id
                params = [Param(k, str(v)) for k, v in config.items() if v is not None]
                self._client.log_batch(self._id, params=params)
        except Exception as error:  # its own classes, and those of its database
            raise ConfigError(f"track mlflow: {first_line(error)}") from None

    def write(self, stats: Stats) -> None:
        """Write the finite scalars at the global step."""
        self.log(stats.iteration, stats.global_step, stats.scalars)

    def log(self, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Write the user's own figures, those that are finite."""
        now = int(time.time() * 1000)
        metrics = [self._metric(tag, float(value), now, step) for tag, value in values.items() if math.isfinite(value)]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


def _mlflow_client() -> Any:  # noqa: ANN401 - its own class
    # by default an unreachable server blocks for minutes; the user's own settings win
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    import mlflow

    return mlflow.MlflowClient()


def check_trackers(names: Iterable[str]) -> None:
    """Check, before a run starts, that the trackers can be used.

    Raises:
        ConfigError: a library is missing, the MLflow store can't be reached, or there is no valid login at Weights &
            Biases.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track {name} needs its library: pip install 'fastppo[{name}]'.")
        if name == "wandb" and is_main_process() and os.environ.get("WANDB_MODE") not in _WITHOUT_LOGIN:
            import wandb

            try:
                wandb.login()  # in a terminal it asks for a key
            except Exception as error:  # its own classes
                raise ConfigError(
                    f"track wandb: {first_line(error).rstrip('.')}; without a login, WANDB_MODE=offline logs to files."
                ) from None
        if name == "mlflow":
            try:
                _mlflow_client().search_experiments(max_results=1)
            except Exception as error:  # its own classes, and those of its database
                raise ConfigError(f"track mlflow: {first_line(error)}") from None


def open_tracker(name: Tracker, run_dir: Path, config: dict[str, Any]) -> Sink:
    """Open the tracker `name` for a run.

    Raises:
        ConfigError: the service can't be reached.
    """
    return ThrottledSink(WandbSink(run_dir, config) if name == "wandb" else MlflowSink(run_dir, config))
