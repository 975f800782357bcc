"""Sinks: what they write, as the readers of TensorBoard, MLflow and wandb see it."""

import dataclasses
import io
import json
import os
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tensorboard.summary.writer.record_writer import RecordWriter

from fastppo import Config, Trainer
from fastppo.monitoring.health_rules import HealthFinding, RunTraits
from fastppo.monitoring.run_logger import RunLogger
from fastppo.monitoring.sinks.console import ConsoleSink
from fastppo.monitoring.sinks.records import crc32c, record
from fastppo.monitoring.sinks.trackers import ThrottledSink, check_trackers
from fastppo.monitoring.stats import Stats
from tests import PATIENCE

SMALL = Config(n_envs=2, n_steps=32, total_timesteps=64 * 6, compile="off", threads=1)


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """A run's events as TensorBoard reads them, and its trainer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path_factory.mktemp("run") / "run"
    trainer = Trainer(dataclasses.replace(SMALL, run_dir=run, record_ratios=3, log_histograms=True))
    trainer.run()
    found = EventAccumulator(str(run), size_guidance={"histograms": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found, trainer


def test_histograms_cover_all_trainable_parameters(events):
    found, trainer = events
    names = set(found.Tags()["histograms"])
    trainable = {name for name, p in trainer.policy.named_parameters() if p.requires_grad}
    assert names == {f"histograms/{kind}/{name}" for kind in ("weights", "gradients") for name in trainable} | {
        "histograms/actions",
        "histograms/ratios",
    }
    steps = [event.step for event in found.Histograms("histograms/actions")]
    assert steps == [64, 256]  # of iterations 1 and 4
    value = found.Histograms("histograms/actions")[0].histogram_value
    assert (value.num, value.min, value.max) == (64, 0, 1)
    ratios = found.Histograms("histograms/ratios")[0].histogram_value
    assert abs(ratios.sum / ratios.num - 1) < 0.1


def test_hparams_hold_every_setting_and_name_logged_metrics(events):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found, trainer = events
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["n_envs"].number_value == 2
    assert hparams["env_id"].string_value == "CartPole-v1"
    assert set(hparams) == {k for k, v in trainer.config.to_dict().items() if v is not None}
    content = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert metrics <= set(found.Tags()["scalars"])
    # the tab shows the last value of a metric: of returns, the mean of the run's last 100 episodes
    assert "charts/mean_return" in metrics
    assert "charts/episodic_return" not in metrics
    assert found.Scalars("charts/mean_return")[-1].value == pytest.approx(trainer.result.mean_return)


def test_the_config_table_shows_unset_settings_as_none(events):
    found, _ = events
    text = found.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert "|target_return|none|" in text
    assert "None" not in text


class RecordingSink:
    """Records the steps and findings it receives."""

    def __init__(self):
        self.steps, self.findings, self.closed = [], [], False

    def write(self, stats):
        self.steps.append(stats.global_step)
        self.findings.append(stats.findings)

    def close(self):
        self.closed = True


def stats(step, sample=None, **scalars):
    return Stats(step, 10, step, 10, 1.0, 1, 1.0, 100.0, 0.0, "", scalars, sample=sample)


def test_a_throttled_sink_receives_the_first_and_last_iteration_and_those_with_histograms():
    recorder = RecordingSink()
    sink = ThrottledSink(recorder)
    for step in range(1, 11):
        sink.write(stats(step, sample=SimpleNamespace(histograms={"a": 1} if step == 5 else {})))
    assert recorder.steps == [1, 5]
    sink.close()
    assert (recorder.steps, recorder.closed) == ([1, 5, 10], True)


def test_findings_are_printed_once_and_reach_every_sink():
    console, recorder = Console(record=True, width=200, file=open(os.devnull, "w")), RecordingSink()
    logger = RunLogger(console, RunTraits())
    logger.open(recorder)
    for step in range(1, 40):
        logger.write(stats(step, **{"losses/clipfrac": 0.9}))
    console.file.close()
    assert console.export_text().count("clip fraction high: 90% of the ratios") == 1
    assert recorder.findings[-1][0].name == "clip fraction high"
    assert recorder.findings[0] == []


def test_the_progress_line_shows_the_first_finding(capsys):
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=200, file=nowhere)
        sink = ConsoleSink(console, 10)
        findings = [HealthFinding("clip fraction high", "e.", "r."), HealthFinding("returns flat", "e.", "r.")]
        sink.write(dataclasses.replace(stats(1), findings=findings))
        assert "! clip fraction high +1" in console.export_text()


def test_findings_are_text_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fastppo.monitoring.sinks.tensorboard import TensorBoardSink

    sink = TensorBoardSink(tmp_path, {"n_envs": 2})
    finding = HealthFinding("clip fraction high", "evidence.", "remedy.")
    for step, findings in ((1, []), (2, [finding]), (3, [finding]), (4, [])):
        sink.write(dataclasses.replace(stats(step), findings=findings))
    sink.close()
    found = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    found.Reload()
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors("health")]
    assert texts == [(2, "- **clip fraction high**: evidence. remedy."), (4, "- no problems detected")]


def fastppo(*arguments, **env):
    command = [sys.executable, "-m", "fastppo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | env)


@pytest.mark.slow
def test_mlflow_receives_scalars_and_a_resumed_run_continues_its_mlflow_run(tmp_path):
    run, store = tmp_path / "run", tmp_path / "mlflow.db"
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{store}"}
    small = ["--n-envs", 2, "--n-steps", 32, "--compile", "off", "--record-ratios", 2, "--track", "mlflow"]
    done = fastppo("train", "--run-dir", run, "--total-timesteps", 256, *small, **env)
    assert done.returncode == 0, done.stderr
    done = fastppo("resume", run, "--total-timesteps", 512, **env)
    assert done.returncode == 0, done.stderr
    lines = {row["global_step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    with sqlite3.connect(store) as db:
        ((name, status),) = db.execute("select name, status from runs").fetchall()
        assert (name, status) == ("run", "FINISHED")
        params = dict(db.execute("select key, value from params"))
        assert (params["n_envs"], params["env_id"]) == ("2", "CartPole-v1")
        found = dict(db.execute("select step, value from metrics where key = 'losses/entropy'").fetchall())
    db.close()
    assert {64, 256, 320, 512} <= set(found) <= set(lines)  # the first and the last of each part
    np.testing.assert_allclose(list(found.values()), [lines[step]["losses/entropy"] for step in found])


def test_wandb_logs_offline(tmp_path):
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    small = ["--n-envs", 2, "--n-steps", 32, "--compile", "off", "--total-timesteps", 128, "--log-histograms"]
    done = fastppo("train", "--run-dir", run, *small, "--track", "wandb", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    (logged,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = logged.read_bytes()
    assert b"losses/entropy" in content
    assert b"histograms/ratios" in content


def test_a_missing_library_is_refused_before_the_run_starts(tmp_path, monkeypatch):
    from fastppo.errors import ConfigError

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'fastppo\\[mlflow\\]'"):
        Trainer(dataclasses.replace(SMALL, run_dir=tmp_path / "run", track=("mlflow",)))
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_refused_before_the_run_starts(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from fastppo.errors import ConfigError

    def login():
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", login)
    config = dataclasses.replace(SMALL, run_dir=tmp_path / "run", track=("wandb",))
    with pytest.raises(ConfigError, match=r"track wandb: No API key configured; .* WANDB_MODE=offline logs to files"):
        Trainer(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "1")  # the main process alone logs
    check_trackers(["wandb"])


@pytest.mark.parametrize("size", [0, 1, 3, 4, 255, 256, 257, 700])
def test_records_are_tensorboards(size):
    data, expected = np.random.default_rng(size).bytes(size), io.BytesIO()
    RecordWriter(expected).write(data)
    assert record(data) == expected.getvalue()
    assert crc32c(b"123456789") == 0xE3069283, "the check value of CRC-32C"
