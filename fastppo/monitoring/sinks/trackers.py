"""Figures for tracking services: Weights & Biases, and MLflow. Each is set up by its own environment variables."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastppo.errors import ConfigError
from fastppo.monitoring.sinks.api import Sink
from fastppo.monitoring.stats import Stats

_SECONDS = 5.0  # a row takes 40 ms in a local MLflow store


class Throttled:
    """A sink that gets an iteration each few seconds, and the last; TensorBoard and metrics.jsonl have them all."""

    def __init__(self, sink: Sink) -> None:
        """Hand figures on to `sink`."""
        self._sink, self._next = sink, 0.0
        self._waiting: Stats | None = None

    def write(self, stats: Stats) -> None:
        """One iteration; those with histograms or films are never left out."""
        shown = stats.images or (stats.sample is not None and stats.sample.histograms)
        if time.monotonic() >= self._next or shown:
            self._next = time.monotonic() + _SECONDS
            self._sink.write(stats)
            self._waiting = None
        else:
            self._waiting = stats

    def close(self) -> None:
        """The last iteration, if it was left out; no more will come."""
        try:
            if self._waiting is not None:
                self._sink.write(self._waiting)
        finally:
            self._sink.close()


class WandbSink:
    """A run of Weights & Biases; project and mode by WANDB_PROJECT (fastppo) and WANDB_MODE."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Begin a run named as its folder; the same folder again goes on with it.

        Raises:
            ConfigError: it can't log in.
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
        except Exception as error:  # its own kinds, and its service's
            raise ConfigError(f"track wandb: {error}") from None
        self._wandb = wandb

    def write(self, stats: Stats) -> None:
        """Scalars, histograms and films at the global step."""
        values: dict[str, Any] = dict(stats.scalars)
        if stats.sample is not None:
            for tag, array in stats.sample.histograms.items():
                finite = array[np.isfinite(array)]
                values[tag] = self._wandb.Histogram(np_histogram=np.histogram(finite, 64))
        for tag, gif in stats.images.items():
            values[tag] = self._wandb.Video(io.BytesIO(gif), format="gif")
        self._run.log(values, step=stats.global_step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MlflowSink:
    """A run of MLflow; server and experiment by MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME (fastppo)."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Begin a run named as its folder; the same folder again goes on with it.

        Raises:
            ConfigError: its store can't be reached.
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
        except Exception as error:  # its own kinds, and its database's
            raise ConfigError(f"track mlflow: {str(error).splitlines()[0]}") from None

    def write(self, stats: Stats) -> None:
        """Scalars at the global step."""
        now = int(time.time() * 1000)
        metrics = [
            self._metric(tag, float(value), now, stats.global_step)
            for tag, value in stats.scalars.items()
            if math.isfinite(value)
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """The run has ended."""
        self._client.set_terminated(self._id)


def _mlflow_client() -> Any:  # noqa: ANN401 - its own kind
    # a server that is gone is given up soon, not after minutes; unless the user says otherwise
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    import mlflow

    return mlflow.MlflowClient()


def check_trackers(names: Iterable[str]) -> None:
    """Refuse, before anything is made, what can't be tracked here.

    Raises:
        ConfigError: a library is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track {name} needs its library: pip install 'fastppo[{name}]'.")
        if name == "mlflow":
            try:
                _mlflow_client().search_experiments(max_results=1)
            except Exception as error:  # its own kinds, and its database's
                raise ConfigError(f"track mlflow: {str(error).strip().splitlines()[0]}") from None


def open_tracker(name: Literal["wandb", "mlflow"], run_dir: Path, config: dict[str, Any]) -> Sink:
    """The tracker `name`, for a run.

    Raises:
        ConfigError: it can't be reached.
    """
    return Throttled(WandbSink(run_dir, config) if name == "wandb" else MlflowSink(run_dir, config))
