"""Checks of `fastppo verify-resume`: a resumed run is bit-identical to an uninterrupted one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastppo.analysis.checks import CheckResult
from fastppo.builders.resolve import resolve_config
from fastppo.config import Config
from fastppo.resume_run import resume
from fastppo.runs.checkpoint import newest_checkpoint
from fastppo.runs.inspect_env import inspect_configured
from fastppo.runs.state_files import read_state, read_tensors
from fastppo.runtime.device import choose_device
from fastppo.trainer import Trainer

TIMED = ("time/", "charts/SPS", "charts/sps", "seconds")  # prefixes of tags that measure time
_GROUPS = ("policy", "rewards", "rnd", "update", "curiosity", "learner", "collector", "metrics", "env", "figures")
_FIXED: dict[str, Any] = {
    "checkpoint_every": None,
    "checkpoint_minutes": 0.0,
    "resume": "never",
    "target_return": None,
}


def verify_resume(config: Config, iterations: int = 6) -> Iterator[CheckResult]:
    """Train once without and once with an interruption, and compare every tensor and every logged figure.

    Where environments restart on a resume, two resumes of one checkpoint are compared instead.

    Args:
        config: settings of the run; total_timesteps and run_dir are replaced.
        iterations: length of the run; the interruption comes after half of them.

    Raises:
        ConfigError, EnvError: the run can't be made with these settings.
    """
    env_info = inspect_configured(config)
    c, notes = resolve_config(config, env_info, choose_device(config.device))
    c = dataclasses.replace(c, total_timesteps=iterations * c.batch_size, **_FIXED)
    for note in notes:
        yield CheckResult("note", note)
    with tempfile.TemporaryDirectory(prefix="fastppo-verify-") as folder:
        whole, resumed, resumed_again = (Path(folder) / name for name in ("whole", "resumed", "resumed-again"))
        trainer = Trainer(dataclasses.replace(c, run_dir=whole), progress=False)
        resumable = trainer.env.resume_support
        restarts = resumable.way == "restart"
        yield CheckResult("resume", f"{resumable.way}: {resumable.why}", "note" if restarts else "ok")
        _run_to_end(trainer)
        for stats in Trainer(dataclasses.replace(c, run_dir=resumed), progress=False).iterations():
            if stats.iteration >= iterations // 2:
                break
        shutil.copytree(resumed, resumed_again)
        _run_to_end(resume(resumed, allow_import=True, progress=False))
        if restarts:
            _run_to_end(resume(resumed_again, allow_import=True, progress=False))
            yield CheckResult(
                "scope",
                "network, optimiser, normalisers and schedules resume exactly; environments start new episodes",
                "note",
                "--vectorization sync or pool may resume exactly" if c.vectorization in ("async", "envpool") else "",
                "two resumes of one checkpoint are the same run; a resumed run differs from an uninterrupted one, "
                "because its environments start new episodes",
            )
            yield from _compare(run_hashes(resumed), run_hashes(resumed_again), "two resumes of one checkpoint")
        else:
            title = f"resumed after {iterations // 2} of {iterations}"
            yield from _compare(run_hashes(whole), run_hashes(resumed), title)


def _run_to_end(trainer: Trainer) -> None:
    """Run the trainer; a signal that ends it early also ends the verification, as half a run compares to nothing."""
    if trainer.run().ended == "interrupted":
        raise KeyboardInterrupt


def _compare(a: Mapping[str, str], b: Mapping[str, str], title: str) -> Iterator[CheckResult]:
    """Yield one result per group of hashes."""
    for group in _GROUPS:
        names = [name for name in a if name.split(".")[0] == group]
        differing = [name for name in names if b.get(name) != a[name]]
        if differing:
            yield CheckResult(group, f"{title}: {len(differing)} of {len(names)} differ, first {differing[0]}", "bad")
        elif names:
            yield CheckResult(group, f"{title}: {len(names)} of {len(names)} bit-identical")


def run_hashes(run: Path) -> dict[str, str]:
    """Return SHA-256 by name of every tensor, state value and logged iteration of a run, except measured times."""
    path, _ = newest_checkpoint(run)
    found = read_state(path, 0)
    assert found is not None, "newest_checkpoint verifies it"
    state, _ = found
    tensors: dict[str, torch.Tensor] = {**read_tensors(path / "model.safetensors"), **state.tensors}
    # "randomness." holds random states of the process, which other code in it draws from too
    run_tensors = {name: x for name, x in tensors.items() if not name.startswith("randomness.")}
    hashes = {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in run_tensors.items()}
    for part in ("env", "metrics"):
        for name, value in state.values.get(part, {}).items():
            hashes[f"{part}.{name}"] = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    with contextlib.suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            row = {k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)}
            text = json.dumps(row, sort_keys=True)
            hashes[f"figures.iteration {row['iteration']}"] = hashlib.sha256(text.encode()).hexdigest()
    return hashes
