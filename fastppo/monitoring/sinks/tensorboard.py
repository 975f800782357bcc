"""Statistics as TensorBoard events."""

from __future__ import annotations

import itertools
import os
import platform
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXT_PLUGIN
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import summary

from fastppo.config import shown
from fastppo.monitoring.sinks.records import record
from fastppo.monitoring.stats import Stats

_FLUSH_SECONDS = 5.0
_HPARAM_METRICS = ("charts/mean_return", "charts/sps_steady", "losses/approx_kl", "losses/explained_variance")
_file_number = itertools.count()  # two runs of one process may start in the same second


class TensorBoardSink:
    """Writes an events file, with one event per iteration: ten times cheaper than one event per scalar."""

    def __init__(self, run_dir: Path, config: dict[str, Any], resumed_at: int | None = None) -> None:
        """Open an events file in `run_dir`, and write the config for the Text and HParams tabs.

        `resumed_at` is the global step that a resumed run continues from; TensorBoard drops later events.
        """
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}.{next(_file_number)}"
        # kept open: TensorBoard's own writer opens the file at each flush and fails if the folder was deleted
        self._file = (run_dir / name).open("ab")
        self._flushed = time.monotonic()
        self._findings: list[str] = []
        self._scalars: dict[str, Summary.Value] = {}  # kept: making one takes longer than writing to it
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resumed_at is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=resumed_at + 1, session_log=start))
            return
        table = "|setting|value|\n|-|-|\n" + "\n".join(f"|{key}|{shown(value)}|" for key, value in config.items())
        self._add(Event(wall_time=time.time(), step=0, summary=Summary(value=[_text("config", table)])))
        # the HParams tab compares runs by their settings and these metrics
        settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.items() if v is not None}
        for part in summary.hparams(settings, dict.fromkeys(_HPARAM_METRICS)):
            self._add(Event(wall_time=time.time(), step=0, summary=part))

    def write(self, stats: Stats) -> None:
        """Write scalars, histograms and images at the global step; health findings only when they change."""
        if self._scalars.keys() != stats.scalars.keys():
            self._scalars = {tag: Summary.Value(tag=tag) for tag in stats.scalars}
        for tag, value in stats.scalars.items():
            self._scalars[tag].simple_value = value
        values = [self._scalars[tag] for tag in stats.scalars]
        if (names := [f.name for f in stats.findings]) != self._findings:
            self._findings = names
            lines = [f"- **{f.name}**: {f.evidence} {f.remedy}" for f in stats.findings] or ["- no problems detected"]
            values.append(_text("health", "\n".join(lines)))
        if stats.sample is not None:
            for tag, array in stats.sample.histograms.items():
                if np.isfinite(array).any():
                    values.extend(summary.histogram(tag, array[np.isfinite(array)], 64).value)
        for tag, gif in stats.images.items():
            values.append(Summary.Value(tag=tag, image=_image(gif)))
        self._add(Event(wall_time=time.time(), step=stats.global_step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def log(self, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Write the user's own figures."""
        parts = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=parts)))

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _add(self, event: Event) -> None:
        self._file.write(record(event.SerializeToString()))


def _text(tag: str, text: str) -> Summary.Value:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=TEXT_PLUGIN))
    return Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([text.encode()]))


def _image(gif: bytes) -> Summary.Image:
    """Return an animated GIF as TensorBoard's image, which keeps it animated."""
    width, height = struct.unpack("<HH", gif[6:10])
    return Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif)
