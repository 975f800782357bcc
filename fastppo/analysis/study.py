"""`fastppo study`: real training at several n_envs and seeds, each run to a target; what each took, and which to take.

Every run is a process of its own in a folder of its own, so that a study that was killed goes on where it was: runs
that have ended are read, one that was interrupted is resumed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fastppo.analysis.run_data import RunData, read_run
from fastppo.build.parts import policy_spec
from fastppo.build.resolve import resolve_config, target_of
from fastppo.config import Config
from fastppo.envs.registry import inspect_env
from fastppo.errors import ConfigError, FastPPOError, FinishedError
from fastppo.runs.system_info import system_info
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.device import choose_device
from fastppo.runtime.files import write_json
from fastppo.runtime.threads import choose_threads

Hold = Literal["batch", "n_steps"]

# Student's t at 97.5 %, for 1 to 30 degrees of freedom
_T975: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
_T975 += (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
_POLL_SECONDS = 0.1
_PLAN = "plan.json"  # written first, so that other settings are found


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study runs.

    Attributes:
        target: mean return of the last 100 episodes that ends a run.
        hold: what stays the same over n_envs.
        configs: each run's, with its folder; seeds of one n_envs follow each other.
        cores: that the largest of them keeps busy.
        about: machine and versions.
    """

    target: float
    hold: Hold
    configs: list[Config]
    cores: int
    about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over the seeds that reached the target, with its 95 % interval (Student's t; NaN for fewer than two).

    What is estimated can't be negative, so no interval begins below 0.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value for each seed; NaN from none."""
        if not values:
            return cls(math.nan, math.nan, math.nan)
        if len(values) < 2:
            return cls(values[0], math.nan, math.nan)
        mean = statistics.fmean(values)
        reach = _t975(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, max(0.0, mean - reach), mean + reach)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What came of one n_envs.

    Attributes:
        n_envs: N.
        n_steps: T.
        runs: one for each seed that was run.
        failures: seeds that failed, with their last words.
        reached: how many reached the target.
        steps: to the target.
        seconds: of training to the target.
        updates: iterations to the target.
        sps: median over runs of steady steps per second; NaN without runs.
    """

    n_envs: int
    n_steps: int
    runs: list[RunData]
    failures: dict[int, str]
    reached: int
    steps: Estimate
    seconds: Estimate
    updates: Estimate
    sps: float

    @property
    def tried(self) -> int:
        """Seeds that were run, those that failed among them."""
        return len(self.runs) + len(self.failures)


def plan_study(base: Config, n_envs: Sequence[int], seeds: int, hold: Hold, folder: Path) -> Plan:
    """The runs of a study.

    Args:
        base: settings that all runs share; its target_return may be "threshold".
        n_envs: to compare.
        seeds: 1 to this, for each.
        hold: "batch": n_steps follows from n_envs; "n_steps": the batch does.
        folder: of the study.

    Raises:
        ConfigError: no target, or the batch can't be divided.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds} must be at least 1; 5 say something.")
    found = inspect_env(base.env_id, base.env_kwargs)
    device = choose_device(base.device)

    def resolved_like(config: Config) -> Config:
        """Settled without measuring or starting anything."""
        plain = dataclasses.replace(config, vectorization="sync", workers=None, half_batches=False)
        return resolve_config(plain, found, device, custom_policy=False)[0]

    resolved = resolved_like(dataclasses.replace(base, n_envs=None))
    target = target_of(resolved)
    if target is None:
        why = f"{found.name} has no threshold of its own" if base.target_return == "threshold" else "none was given"
        raise ConfigError(f"study needs a return to reach, and {why}: --target-return NUMBER.")
    batch = resolved.batch_size
    parameters = sum(x.numel() for x in policy_spec(resolved, found, custom=False).build().network.parameters())
    configs, cores = [], 1
    for n in dict.fromkeys(n_envs):
        if n < 1:
            raise ConfigError(f"n_envs={n} must be at least 1.")
        if hold == "batch" and batch % n:
            near = sorted((d for d in range(1, batch + 1) if batch % d == 0), key=lambda d: abs(d - n))[:3]
            raise ConfigError(
                f"n_envs={n} does not divide the batch of {batch} that all share; "
                f"take {', '.join(map(str, sorted(near)))}, another --n-steps, or --hold n_steps."
            )
        n_steps = batch // n if hold == "batch" else resolved.n_steps
        for seed in range(1, seeds + 1):
            config = dataclasses.replace(
                base,
                n_envs=n,
                n_steps=n_steps,
                seed=seed,
                target_return=target,
                total_timesteps=resolved.total_timesteps,
                resume="auto",
                run_dir=folder / "runs" / f"n{n}-seed{seed}",
            )
            checked = resolved_like(config)
            threads = base.threads or choose_threads(checked.minibatch_size * parameters)
            cores = max(cores, threads + _beside(config))
            configs.append(config)
    return Plan(target, hold, configs, cores, system_info(device))


def _beside(config: Config) -> int:
    """Processes that step environments beside a run, or a core to spare for what else it does."""
    if config.vectorization == "pool" and config.workers:
        return config.workers
    return usable_cores() if config.vectorization in ("pool", "async", "envpool", "auto") else 1


def _t975(freedom: int) -> float:
    return _T975[freedom - 1] if freedom <= len(_T975) else 1.96 + 2.4 / freedom


def begin_study(plan: Plan, base: Config, folder: Path) -> None:
    """Write down what the study in `folder` is of, before anything is run.

    Raises:
        ConfigError: the folder holds a study with other settings, or something else, or can't be made.
    """
    now = {**base.to_dict(), "target_return": plan.target, "hold": plan.hold}
    path = folder / _PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(folder.iterdir()):
                raise ConfigError(f"run_dir={folder} is not empty and holds no study; name a new folder.")
            write_json(path, now)
            return
        before = json.loads(path.read_text())
    except ConfigError:
        raise
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"run_dir={folder} is, or lies in, a file; name a new folder.") from None
    except OSError as error:
        raise ConfigError(f"run_dir={folder} can't be used ({error.strerror}); name another.") from None
    except ValueError as error:
        raise ConfigError(f"{path} can't be understood ({error}); name a new folder by --run-dir.") from None
    differing = [f"{k} was {before.get(k)}, is {v}" for k, v in now.items() if before.get(k) != v]
    if differing:
        raise ConfigError(
            f"{folder} holds a study with other settings: {'; '.join(differing)}. Name a new folder by --run-dir."
        )


def choose_jobs(plan: Plan) -> int:
    """How many runs go on at once: so many that none takes a core that another keeps busy."""
    return max(1, usable_cores() // plan.cores)


def run_study(plan: Plan, jobs: int) -> Iterator[tuple[Config, str | None]]:
    """Run what hasn't ended yet, `jobs` at a time; gives each run as it ends, with its last words if it failed."""
    waiting = [config for config in plan.configs if not ended(config)]
    running: dict[subprocess.Popen[bytes], Config] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                config = waiting.pop(0)
                running[_start(config)] = config
            for process in [p for p in running if p.poll() is not None]:
                config = running.pop(process)
                _close(process)
                yield config, None if ended(config) else _last_words(config, process.returncode)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:  # they save and end
            process.terminate()
        for process in running:
            process.wait()
            _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def ended(config: Config) -> bool:
    """Whether a run came to its target or its planned steps."""
    assert config.run_dir is not None
    try:
        return json.loads((config.run_dir / "result.json").read_text())["ended"] in ("target", "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def told(config: Config) -> str:
    """How a run that has ended went, in a few words."""
    assert config.run_dir is not None
    result = json.loads((config.run_dir / "result.json").read_text())
    how = "reached the target" if result["ended"] == "target" else "did not reach the target"
    return f"{how} in {result['global_step']:,} steps, {result['seconds']:.1f} s"


def _log(config: Config) -> Path:
    assert config.run_dir is not None
    return config.run_dir.with_suffix(".log")


def _start(config: Config) -> subprocess.Popen[bytes]:
    """A process that trains; it ends when this one does, for its standard input then closes."""
    _log(config).parent.mkdir(parents=True, exist_ok=True)
    with _log(config).open("wb") as log:
        command = [sys.executable, "-m", "fastppo.analysis.study", json.dumps(config.to_dict())]
        # in a session of its own, so that Ctrl-C reaches it once, through us: the second would end it unsaved
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)


def _last_words(config: Config, status: int) -> str:
    if status < 0:
        return f"killed by signal {-status}{' (out of memory?)' if status == -signal.SIGKILL else ''}"
    lines = _log(config).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {status}"


def summarize(plan: Plan, failures: dict[Path, str]) -> list[Setting]:
    """What came of each n_envs so far; `failures` are last words by run folder."""
    by_size: dict[int, list[Config]] = {}
    for config in plan.configs:
        by_size.setdefault(config.n_envs or 0, []).append(config)
    found = []
    for n, configs in by_size.items():
        runs = [read_run(c.run_dir) for c in configs if c.run_dir is not None and ended(c)]
        good = [r for r in runs if r.result["ended"] == "target"]
        speeds = [float(r.result["sps_steady"]) for r in runs if r.result.get("sps_steady") is not None]
        found.append(
            Setting(
                n_envs=n,
                n_steps=configs[0].n_steps or 0,
                runs=runs,
                failures={c.seed: failures[c.run_dir] for c in configs if c.run_dir in failures},
                reached=len(good),
                steps=Estimate.of([float(r.result["global_step"]) for r in good]),
                seconds=Estimate.of([float(r.result["seconds"]) for r in good]),
                updates=Estimate.of([float(r.result["iterations"]) for r in good]),
                sps=statistics.median(speeds) if speeds else math.nan,
            )
        )
    return found


def recommend(settings: Sequence[Setting], target: float) -> str:
    """Which n_envs to take, in words, and how sure that is."""
    able = [s for s in settings if s.reached]
    if not able:
        return f"No run reached {target:g}: train longer (--total-timesteps), or tune one n_envs first."
    most = max(s.reached / s.tried for s in able)
    steady = [s for s in able if s.reached / s.tried == most]
    soonest = min(steady, key=lambda s: s.seconds.mean)
    fewest = min(steady, key=lambda s: s.steps.mean)
    said = [
        f"Take n_envs {soonest.n_envs}: {soonest.reached} of {soonest.tried} seeds reached {target:g}, "
        f"in {_interval(soonest.seconds, '.1f')} s."
    ]
    near = [str(s.n_envs) for s in steady if s is not soonest and _overlap(s.seconds, soonest.seconds)]
    if near and all(math.isnan(s.seconds.low) for s in steady):
        said.append("One seed says little: any of them may have been lucky.")
    elif near:
        said.append(f"The interval of n_envs {' and '.join(near)} overlaps: it may be luck; more seeds tell.")
    if fewest is not soonest:
        said.append(f"Where steps are dear, n_envs {fewest.n_envs} needs {_interval(fewest.steps, ',.0f')} of them.")
    weak = [f"{s.n_envs} ({s.reached} of {s.tried})" for s in settings if s.tried and s not in steady]
    if weak:
        said.append(f"Less reliable: n_envs {', '.join(weak)}.")
    fastest = max((s for s in settings if s.runs), key=lambda s: s.sps)
    if fastest is not soonest:
        said.append(
            f"The most steps per second, {fastest.sps:,.0f}, come at n_envs {fastest.n_envs}, "
            "but speed alone doesn't reach a return."
        )
    return " ".join(said)


def _interval(estimate: Estimate, form: str) -> str:
    mean = format(estimate.mean, form)
    if math.isnan(estimate.low):
        return mean
    return f"{mean} ({format(estimate.low, form)} to {format(estimate.high, form)})"


def _overlap(a: Estimate, b: Estimate) -> bool:
    return not (a.low > b.high or b.low > a.high)  # unknown intervals count as overlapping


def write_study(folder: Path, plan: Plan, settings: Sequence[Setting]) -> None:
    """Write study.json."""
    rows = []
    for s in settings:
        row = {name: getattr(s, name) for name in ("n_envs", "n_steps", "reached", "failures", "sps")}
        row |= {name: dataclasses.asdict(getattr(s, name)) for name in ("steps", "seconds", "updates")}
        row["runs"] = [{"seed": r.config["seed"], "run_dir": str(r.run_dir)} | r.result for r in s.runs]
        rows.append(row)
    values = {"target_return": plan.target, "hold": plan.hold, "recommendation": recommend(settings, plan.target)}
    whole = values | {"settings": rows, "about": plan.about}
    # NaN is no JSON
    finite = json.loads(json.dumps(whole, default=str), parse_constant=lambda _: None)
    write_json(folder / "study.json", finite)


def _train(config: Config) -> None:
    """One run, resumed if it was interrupted, in a process that ends with its standard input."""
    from fastppo.resume_run import continue_run, resumable_run
    from fastppo.trainer import Trainer

    def end_with_parent() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    run = resumable_run(config)
    try:
        trainer = Trainer(config) if run is None else continue_run(config, run)
    except FinishedError:  # killed between its last checkpoint and its result, so that nobody knows how long it took
        assert run is not None
        shutil.rmtree(run)
        trainer = Trainer(config)
    trainer.run()


if __name__ == "__main__":
    try:
        _train(Config.from_dict(json.loads(sys.argv[1])))
    except FastPPOError as _error:
        sys.exit(str(_error))
