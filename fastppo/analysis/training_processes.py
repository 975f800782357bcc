"""Training in processes of their own, one for each run: for `fastppo study`, `fastppo tune` and `train --seeds`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from fastppo.config import SETTINGS, Config, shown
from fastppo.envs.pool import count_workers
from fastppo.errors import ConfigError, FastPPOError
from fastppo.runtime.cores import processes, usable_cores
from fastppo.runtime.files import exclusive, write_json
from fastppo.runtime.signals import exit_on_sigterm

_PLAN = "plan.json"  # written first, so that other settings are noticed when the work continues
_TURN = ".turn"  # locked by the process that changes the folder
_POLL_SECONDS = 0.1


def turn_file(folder: Path) -> Path:
    """Return the file of `folder` that `exclusive` locks."""
    return folder / _TURN


def claim_folder(folder: Path, content: str, base: Config, **more: object) -> bool:
    """Create a folder of runs and record its settings there, or check that they continue what it holds.

    Args:
        folder: the folder.
        content: what is in it, such as "study".
        base: settings of all runs; those that change no number may differ from before.
        more: settings that are not a run's; they replace those of `base`.

    Returns:
        Whether the folder is new.

    Raises:
        ConfigError: it holds other files, or the same kind of content with other settings, or can't be used.
    """
    # a profile changes numbers through the settings that it fills, which are open in `base`
    compared = [name for name, setting in SETTINGS.items() if setting.changes != "nothing" or name == "profile"]
    # through JSON, as the file holds it: tuples become lists
    settings: dict[str, Any] = json.loads(json.dumps(base.to_dict() | more | {"content": content}, default=str))
    path = folder / _PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_content(folder, content)  # before it gets a lock file
        with exclusive(turn_file(folder)):
            _check_content(folder, content)
            if not path.exists():
                write_json(path, settings)
                return True
            before: dict[str, Any] = Config().to_dict() | {"content": content} | json.loads(path.read_text())
            before["profile"] = before.pop("preset", before["profile"])  # its name in earlier versions
    except ConfigError:
        raise
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"run_dir={folder} is a file, or lies in one; name a new folder.") from None
    except OSError as error:
        raise ConfigError(f"run_dir={folder} can't be used ({error.strerror}); name another folder.") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); name a new folder by --run-dir.") from None
    if before["content"] != content:
        raise ConfigError(f"run_dir={folder} holds a {before['content']}, not a {content}; name a new folder.")
    differing = [
        f"{name} was {shown(before.get(name))}, is {shown(settings[name])}"
        for name in (*compared, *(name for name in more if name not in compared))
        if before.get(name) != settings[name]
    ]
    if differing:
        raise ConfigError(
            f"{folder} holds a {content} with other settings: {'; '.join(differing)}. Name a new folder by --run-dir."
        )
    return False


def _check_content(folder: Path, content: str) -> None:
    if not (folder / _PLAN).exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(f"run_dir={folder} is not empty and holds no {content}; name a new folder.")


def check_single_process(command: str) -> None:
    """Check that torchrun has not started this process.

    Raises:
        ConfigError: it has.
    """
    if processes() > 1:
        raise ConfigError(f"{command} starts processes of its own, one for each run; start it without torchrun.")


def env_cores(config: Config) -> int:
    """Return the cores that a run needs beside its torch threads: those of its workers, or one for everything else."""
    if config.vectorization == "pool":
        return count_workers(config.n_envs or config.workers or usable_cores(), config.workers, 1)
    return usable_cores() if config.vectorization in ("async", "envpool", "auto") else 1


def run_each(configs: Sequence[Config], jobs: int) -> Generator[tuple[Config, str | None]]:
    """Run every config that has not ended, `jobs` at a time; yield each with its error, or None if it ended.

    A run that was interrupted is resumed. Leaving the iteration ends the runs, each with a checkpoint; so do Ctrl-C and
    SIGTERM. Close the generator where it may be left early: `with closing(run_each(...)) as runs`.

    The runs of one time divide the cores among them: each takes at most cores / jobs threads, and at least one.
    """
    threads = max(1, usable_cores() // jobs)
    waiting = [config for config in configs if not ended(config)]
    running: dict[subprocess.Popen[bytes], Config] = {}
    try:
        with exit_on_sigterm():
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
        # A session of its own keeps Ctrl-C of the terminal from the process: it gets one signal, from `run_each`.
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

    def end_with_parent() -> None:
        os.read(0, 1)  # not sys.stdin: no thread may hold its lock when the interpreter ends
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # imports torch, which takes seconds
    from fastppo.resume_run import continue_run, resumable_run
    from fastppo.trainer import Trainer

    run = resumable_run(config)
    trainer = Trainer(config, progress=False) if run is None else continue_run(config, run)
    trainer.run()


if __name__ == "__main__":
    try:
        _train(Config.from_dict(json.loads(sys.argv[1])))
    except FastPPOError as _error:
        sys.exit(str(_error))
