"""Endurance of long runs: kill -9 at random times, and the events of a day without growth of memory or descriptors.

    python -m benchmarks.soak --kills 300 --output benchmarks/results/kills_2core-cpu_2026-11-21.json
    python -m benchmarks.soak --hours-of-events 24 --compare-at 1 4 12 --output benchmarks/results/soak_2core-cpu.json

Kills: a run is killed at random times and started again with --resume auto until it ends, after about 20 kills; it is
then compared bit by bit with a run that was never killed. Processes are forked from one with all imports done, so that
kills hit training and not imports.

Events: 24 hours are 200,000 iterations, a million episodes and 2,000 checkpoints of an environment that takes almost no
time, in one process. Memory, descriptors, threads, children and shared memory are sampled a hundred times. At the end,
and after the hours of --compare-at, speed is compared with a process that has just started the same run: the two
alternate in turns of 100 iterations, and the result is the median ratio over turns. (The last part of the run against
an early one would mostly measure other load on the machine.) Each comparison is written to --output as soon as it is
done, so that a run that is stopped keeps those before. 24 hours of events take about 40 minutes at 3,000 steps/s, and
each comparison of 30 turns a minute more; progress goes to standard error.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import psutil
import tyro
from gymnasium import spaces

from benchmarks import report

ITERATIONS_PER_HOUR = 200_000 / 24
SAVE_EVERY = 100  # iterations; a turn has as many, and so one checkpoint
BATCH = 4 * 8
STEPS = 512  # per iteration of a run that is killed
KILLS_PER_RUN = 20  # about


class Quick(gym.Env[Any, Any]):
    """Episodes of six steps that take almost no time."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        self.left = 6
        return self.np_random.random(3, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step."""
        self.left -= 1
        return self.np_random.random(3, np.float32), float(action), self.left == 0, False, {}


gym.register("Quick-v0", entry_point=Quick)


def kill_and_resume(folder: Path, kills: int, seed: int = 0, vectorization: str = "sync") -> dict[str, Any]:
    """Kill runs `kills` times; return the figures. A separate process forks the runs."""
    command = [sys.executable, "-m", "benchmarks.soak", "--kills-in", str(folder), "--kills", str(kills)]
    command += ["--seed", str(seed), "--vectorization", vectorization]
    # processes that clean up after killed pools warn about it
    quiet = os.environ | {"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root, env=quiet)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _kill(folder: Path, kills: int, seed: int, vectorization: str) -> dict[str, Any]:
    import torch

    from fastppo.analysis.verify_resume import run_hashes

    torch.set_num_threads(1)
    rng = random.Random(seed)
    expected_kills = min(kills, KILLS_PER_RUN)
    total = STEPS * 12 * expected_kills  # twice the steps expected between kills
    arguments = ["train", "--env-id", "CartPole-v1", "--n-envs", "8", "--n-steps", str(STEPS // 8), "--threads", "1"]
    arguments += ["--checkpoint-every", str(STEPS), "--total-timesteps", str(total), "--compile", "off"]
    arguments += ["--vectorization", vectorization, "--normalize-obs", "--normalize-rewards", "--target-kl", "0.02"]
    begin = time.perf_counter()
    assert _wait(_start([*arguments, "--run-dir", str(folder / "whole")])) == 0
    patience = 0.4 + (time.perf_counter() - begin) / expected_kills
    expected = run_hashes(folder / "whole")
    figures: dict[str, Any] = {"vectorization": vectorization, "kills": 0, "unloadable": 0}
    figures |= {
        "lost past the last checkpoint": 0,
        "killed before the first checkpoint": 0,
        "most iterations redone": 0,
    }
    figures |= {"runs compared": 0, "tensors and rows of each": len(expected), "hash differences": 0}
    while figures["kills"] < kills:
        run = folder / f"killed-{figures['runs compared']}"
        _kill_one([*arguments, "--run-dir", str(run), "--resume", "auto"], run, kills, patience, rng, figures)
        found = run_hashes(run)
        figures["runs compared"] += 1
        figures["hash differences"] += sum(found.get(name) != x for name, x in expected.items())
        print(figures, file=sys.stderr, flush=True)
    return figures


def _kill_one(
    arguments: list[str], run: Path, kills: int, patience: float, rng: random.Random, figures: dict[str, Any]
) -> None:
    """Start one run and kill it repeatedly, until it has ended or the total of kills is reached."""
    from fastppo.runs.checkpoint import list_checkpoints, newest_checkpoint

    newest = 0
    while figures["kills"] < kills:
        pid = _start(arguments)
        time.sleep(rng.uniform(0.1, patience))
        os.kill(pid, signal.SIGKILL)
        status = _wait(pid)
        if status == 0:
            return
        assert status == -signal.SIGKILL, f"the run ended with status {status} before it was killed"
        figures["kills"] += 1
        if not list_checkpoints(run):
            figures["killed before the first checkpoint"] += 1
            shutil.rmtree(run, ignore_errors=True)
            continue
        path, problems = newest_checkpoint(run)  # raises if none can be loaded
        figures["unloadable"] += len(problems)
        figures["lost past the last checkpoint"] += int(path.name[5:]) < newest
        newest = int(path.name[5:])
        redone = (_last_step(run) - newest) // STEPS
        figures["most iterations redone"] = max(figures["most iterations redone"], redone)
    assert _wait(_start(arguments)) == 0


def _last_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["global_step"])
        except ValueError:
            continue
    return 0


def _start(arguments: list[str]) -> int:
    """Fork a child that runs the command line; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    from fastppo.cli import main

    code = 99
    try:
        code = main(arguments)
    finally:
        os._exit(code)


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run(iterations: int, folder: Path) -> Any:
    """Return a trainer with `iterations` iterations."""
    from fastppo import Config, Trainer

    config = Config(
        env_id="Quick-v0",
        n_envs=4,
        n_steps=8,
        n_minibatches=1,
        update_epochs=1,
        total_timesteps=iterations * BATCH,
        checkpoint_every=SAVE_EVERY * BATCH,
        normalize_obs=True,
        compile="off",
        vectorization="sync",
        run_dir=folder,
    )
    return Trainer(config)


def _turn(running: Iterator[Any]) -> float:
    """Return the seconds of one turn of a run."""
    begin = time.perf_counter()
    for _ in itertools.islice(running, SAVE_EVERY):
        pass
    return time.perf_counter() - begin


def _serve_turns(folder: Path) -> None:
    """Start a run; for each line on standard input, take a turn and print its seconds."""
    running = _run(int(ITERATIONS_PER_HOUR), folder).iterations()
    for _ in sys.stdin:
        print(_turn(running), flush=True)


def _shared_memory_files(process: psutil.Process) -> int:
    """Count the files in /dev/shm that a process and its children map; other programs have files there too."""
    tree = [process, *process.children(recursive=True)]
    return len({m.path for p in tree for m in p.memory_maps() if m.path.startswith("/dev/shm/")})


def _relative_speed(running: Iterator[Any], turns: int, folder: Path) -> list[float]:
    """Return the speed of `running` relative to a run that has just started, per turn."""
    command = [sys.executable, "-m", "benchmarks.soak", "--turns-in", str(folder)]
    pipe, root = subprocess.PIPE, Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root) as fresh:

        def turn() -> float:
            assert fresh.stdin is not None
            assert fresh.stdout is not None
            fresh.stdin.write("\n")
            fresh.stdin.flush()
            return float(fresh.stdout.readline())

        turn()  # warms up
        return [turn() / _turn(running) for _ in range(turns)]


def soak(hours: float, folder: Path, turns: int = 30, compare_at: Sequence[float] = ()) -> Iterator[dict[str, Any]]:
    """Run the events of `hours`; yield a summary of growth, the turns and the samples after each comparison.

    Args:
        hours: hours of events; speed is compared at their end.
        folder: an empty folder.
        turns: turns of a comparison.
        compare_at: earlier hours at which speed is compared too.
    """
    stops = sorted({int(h * ITERATIONS_PER_HOUR) for h in (*compare_at, hours) if h <= hours})
    planned = stops[-1] + len(stops) * turns * SAVE_EVERY
    samples, comparisons = list[dict[str, float]](), dict[str, list[float]]()
    trainer, run = _run(planned, folder / "run"), folder / "run"
    running, started = trainer.iterations(), time.perf_counter()
    for k, stop in enumerate(stops):
        done = k * turns * SAVE_EVERY  # iterations of the comparisons before
        every = max(1, stops[-1] // 100)
        begin, at = time.perf_counter(), trainer.progress.iteration
        for stats in itertools.islice(running, stop + done - at):
            if stats.iteration % every:
                continue
            now = time.perf_counter()
            samples.append(_sample(stats.iteration, (stats.iteration - at) * BATCH / (now - begin), run))
            left = (now - started) / stats.iteration * (planned - stats.iteration)
            print(f"{stats.iteration:,} of {planned:,} iterations; {left / 60:.0f} min left", file=sys.stderr)
            begin, at = time.perf_counter(), stats.iteration
        ratios = comparisons[f"{stop / ITERATIONS_PER_HOUR:g} hours"] = _relative_speed(
            running, turns, folder / f"fresh-{k}"
        )
        yield {"summary": _summary(trainer, samples, ratios), "turns": comparisons, "samples": samples}
    for _ in running:  # to its end
        pass


def _sample(iteration: int, steps_per_second: float, run: Path) -> dict[str, float]:
    this = psutil.Process()
    return {
        "iteration": iteration,
        "steps_per_second": steps_per_second,
        "memory_mib": this.memory_info().rss / 2**20,
        "descriptors": this.num_fds(),
        "threads": this.num_threads(),
        "children": len(this.children(recursive=True)),
        "shared_memory_files": _shared_memory_files(this),
        "checkpoint_folders": len(list((run / "checkpoints").glob("*"))),
    }


def _summary(trainer: Any, samples: Sequence[dict[str, float]], ratios: Sequence[float]) -> dict[str, Any]:
    """Return growth per 10,000 iterations from the samples, and the latest comparison."""
    iterations = trainer.progress.iteration
    settled = samples[len(samples) // 5 :]
    x = np.array([s["iteration"] for s in settled])
    slopes = {
        name: float(np.polyfit(x, [s[name] for s in settled], 1)[0] * 10_000)
        for name in ("memory_mib", "descriptors", "threads", "children", "shared_memory_files")
    }
    sps = [s["steps_per_second"] for s in samples]
    tenth = max(1, len(sps) // 10)
    return {
        "hours of events": iterations / ITERATIONS_PER_HOUR,
        "iterations": iterations,
        "episodes": trainer.metrics.episodes.count,
        "saves": iterations // SAVE_EVERY,
        **{f"{name} per 10k iterations": slope for name, slope in slopes.items()},
        "steps/s to a fresh run's, median (quartiles)": "{:.3f} ({:.3f}-{:.3f})".format(
            *np.quantile(ratios, (0.5, 0.25, 0.75))
        ),
        "steps/s, last tenth / second tenth": float(np.median(sps[-tenth:]) / np.median(sps[tenth : 2 * tenth])),
        "most checkpoint folders": max(s["checkpoint_folders"] for s in samples),
    }


def main(
    kills: int = 0,
    hours_of_events: float = 0.0,
    seed: int = 0,
    vectorization: Annotated[
        str, tyro.conf.arg(help="vectorization of the killed runs; `all`: sync, pool and native")
    ] = "all",
    turns: int = 30,
    compare_at: tuple[float, ...] = (),
    output: Path | None = None,
    kills_in: Annotated[Path | None, tyro.conf.arg(help="internal")] = None,
    turns_in: Annotated[Path | None, tyro.conf.arg(help="internal")] = None,
) -> None:
    """Kill runs `kills` times, or run `hours_of_events` hours of events.

    Args:
        kills: kills over all runs.
        hours_of_events: hours of events.
        seed: seed of the times of the kills.
        vectorization: see its help.
        turns: turns of each comparison with a fresh process.
        compare_at: hours of events after which speed is compared, besides the end.
        output: JSON file of the results.
        kills_in: internal.
        turns_in: internal.
    """
    if kills_in is not None:
        print(json.dumps(_kill(kills_in, kills, seed, vectorization)))
        return
    if turns_in is not None:
        _serve_turns(turns_in)
        return
    with tempfile.TemporaryDirectory(prefix="fastppo-soak-") as name:
        folder = Path(name)
        if kills:
            kinds = ["sync", "pool", "native"] if vectorization == "all" else [vectorization]
            for kind in kinds:
                (folder / kind).mkdir()
            share = max(1, kills // len(kinds))
            report([kill_and_resume(folder / kind, share, seed, kind) for kind in kinds], output)
        if hours_of_events:
            for figures in soak(hours_of_events, folder, turns, compare_at):
                report([figures.pop("summary")], output, **figures)


if __name__ == "__main__":
    tyro.cli(main)
