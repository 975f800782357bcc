"""Training in processes of their own, one for each run, for `fastppo study` and `fastppo tune`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from fastppo.config import Config
from fastppo.errors import FastPPOError, FinishedError
from fastppo.runtime.cores import usable_cores

_POLL_SECONDS = 0.1


def run_each(configs: Sequence[Config], jobs: int) -> Generator[tuple[Config, str | None]]:
    """Run every config that has not ended, `jobs` at a time; yield each with its error, or None if it ended.

    A run that was interrupted is resumed. Leaving the iteration ends the runs, each with a checkpoint.

    The runs of one time divide the cores among them: each takes at most cores / jobs threads, and at least one.
    """
    threads = max(1, usable_cores() // jobs)
    waiting = [config for config in configs if not ended(config)]
    running: dict[subprocess.Popen[bytes], Config] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                config = waiting.pop(0)
                running[_start(config, threads)] = config
            for process in [p for p in running if p.poll() is not None]:
                config = running.pop(process)
                _close(process)
                log = _log(config).read_text(errors="replace")
                yield config, None if ended(config) else exit_reason(process.returncode, log)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:  # each saves a checkpoint and ends
            process.terminate()
        for process in running:
            process.wait()
            _close(process)


def ended(config: Config) -> bool:
    """Return whether a run has reached its target or its planned steps."""
    assert config.run_dir is not None
    try:
        return json.loads((config.run_dir / "result.json").read_text())["ended"] in ("target", "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _log(config: Config) -> Path:
    assert config.run_dir is not None
    return config.run_dir.with_suffix(".log")


def _start(config: Config, threads: int) -> subprocess.Popen[bytes]:
    """Start a training process that takes at most `threads` threads, unless its config says otherwise.

    It ends when this process does, because its standard input then closes.
    """
    _log(config).parent.mkdir(parents=True, exist_ok=True)
    with _log(config).open("wb") as log:
        command = [sys.executable, "-m", "fastppo.analysis.training_processes", json.dumps(config.to_dict())]
        # A session of its own keeps Ctrl-C of the terminal from the process: it gets one signal, from `run_study`.
        # A second signal would end it before it has saved.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def exit_reason(status: int, log: str) -> str:
    """Return one line that says why a process failed.

    Args:
        status: exit status as `subprocess` reports it; negative: minus the signal that killed the process.
        log: standard error of the process; its last line is the reason if no signal killed it.
    """
    if status < 0:
        return f"killed by signal {-status}{' (out of memory?)' if status == -signal.SIGKILL else ''}"
    lines = log.strip().splitlines()
    return lines[-1] if lines else f"exit status {status}"


def _train(config: Config) -> None:
    """Train one run, resumed if it was interrupted; the process ends when its standard input closes."""
    from fastppo.resume_run import continue_run, resumable_run
    from fastppo.trainer import Trainer

    def end_with_parent() -> None:
        os.read(0, 1)  # not sys.stdin: no thread may hold its lock when the interpreter ends
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    run = resumable_run(config)
    try:
        trainer = Trainer(config, progress=False) if run is None else continue_run(config, run)
    except FinishedError:  # killed between its last checkpoint and its result: its time to the target is unknown
        assert run is not None
        shutil.rmtree(run)
        trainer = Trainer(config, progress=False)
    trainer.run()


if __name__ == "__main__":
    try:
        _train(Config.from_dict(json.loads(sys.argv[1])))
    except FastPPOError as _error:
        sys.exit(str(_error))
