"""Where training time goes: real iterations at several n_envs and vectorisations, each in a fresh process.

`measure` runs in that process and times one point; `run_points` starts the processes; `verdict` says in words what
the figures of a point mean beside the others.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastppo.config import Config
from fastppo.errors import FastPPOError

WARM_UP = 2  # iterations
_RESULT = "fastppo bench: "
PARTS = {"env": "the environments", "act": "acting", "update": "the update"}
_PHASES = ("env", "act", "store", "rollout", "advantages", "update", "log")
_LONG = 10**12  # steps that are planned: nothing is annealed away
_FEWEST = 5  # iterations measured


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting, measured; or why it could not be.

    Attributes:
        n_envs: N.
        vectorization: how they were stepped.
        failure: why there are no figures; "" if there are.
        sps: environment steps per second, rollout and update and logging together: the median iteration's.
        sps_low: first quartile over iterations.
        sps_high: third quartile.
        iterations: measured, after the warm-up.
        iteration_seconds: the median.
        phases: share of the time by phase; what is missing from 1 is none of them.
        ceilings: steps per second of env, act (or rollout, where they are one graph) and update when each runs alone in
            the same process.
        overlapped: whether the policy acts while environments step.
        setup_seconds: from the start of the process to the first iteration, compilation left out.
        compile_seconds: 0 where nothing was compiled.
        memory_mb: of the process and its workers at the end, shared pages counted once.
        peak_mb: highest of the training process alone.
        planned_mb: what that was expected to be: as it was before, and the trainer's plan on top.
        config: every setting as it was resolved.
        notes: what the trainer chose and why.
    """

    n_envs: int
    vectorization: str
    failure: str = ""
    sps: float = 0.0
    sps_low: float = 0.0
    sps_high: float = 0.0
    iterations: int = 0
    iteration_seconds: float = 0.0
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    overlapped: bool = False
    setup_seconds: float = 0.0
    compile_seconds: float = 0.0
    memory_mb: float = 0.0
    peak_mb: float = 0.0
    planned_mb: float = 0.0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def gain(self, part: str, times: float = 2.0) -> float:
        """By how much training would be faster if `part` ("env", "act", "update") were `times` as fast: 0.1 is 10 %.

        Amdahl's law over the measured shares. Where the policy acts while environments step, the trainer only waits
        for the rest of their time, and all of that wait may go.
        """
        removed = 1 - 1 / times
        saved = self.phases[part] * removed
        if part == "env" and self.overlapped:
            alone = self.sps / self.ceilings["env"]  # share of an iteration that they would need by themselves
            saved = min(self.phases["env"], max(alone, self.phases["env"]) * removed)
        return 1 / (1 - saved) - 1

    def choice(self) -> dict[str, Any]:
        """This way of stepping, as `fastppo.envs.auto_vectorization.remember` keeps it."""
        kept = {name: self.config.get(name) for name in ("vectorization", "workers", "half_batches")}
        day = datetime.date.today().isoformat()
        return kept | {"reason": f"fastest by fastppo bench on {day}, {self.sps:,.0f} steps/s of training"}


def best_by_n_envs(points: Sequence[Point]) -> dict[int, Point]:
    """The fastest point for each n_envs."""
    best: dict[int, Point] = {}
    for p in points:
        if not p.failure and (p.n_envs not in best or p.sps > best[p.n_envs].sps):
            best[p.n_envs] = p
    return best


def run_points(configs: Sequence[Config], seconds: float) -> Iterator[Point]:
    """Measure each config in a process of its own, one after the other; one that fails is a point with its reason."""
    for config in configs:
        yield _in_fresh_process(config, seconds)


def verdict(point: Point, points: Sequence[Point]) -> str:
    """What limits `point`, what would make it faster, and what the next n_envs among `points` gave."""
    if point.failure:
        return point.failure
    parts = PARTS
    if point.phases.get("rollout", 0.0) > 0:  # one graph: environments and acting can't be told apart
        parts = {"rollout": "the rollout", "update": PARTS["update"]}
    most = max(parts, key=lambda part: point.phases[part])
    others = ", ".join(f"{parts[part]} {point.gain(part):+.0%}" for part in parts if part != most)
    text = f"{most}-bound ({point.phases[most]:.0%} of the time): twice as fast, {parts[most]} would give "
    text += f"{point.gain(most):+.0%} ({others})"
    larger = [p for p in points if p.vectorization == point.vectorization and p.n_envs > point.n_envs and not p.failure]
    if larger:
        following = min(larger, key=lambda p: p.n_envs)
        text += f"; n_envs {point.n_envs} -> {following.n_envs} gives {following.sps / point.sps - 1:+.0%}"
    rivals = [p for p in points if p.n_envs == point.n_envs and p.sps > point.sps]
    if rivals:
        best = max(rivals, key=lambda p: p.sps)
        text += f"; {best.vectorization} gives {best.sps / point.sps - 1:+.0%}"
    return text


def _in_fresh_process(config: Config, seconds: float) -> Point:
    named: dict[str, Any] = {"n_envs": config.n_envs or 0, "vectorization": config.vectorization}
    task = json.dumps({"config": config.to_dict(), "seconds": seconds, "started": time.time()})
    limit = 180 + 10 * seconds
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # files, not pipes: worker processes that outlive a killed trainer would hold a pipe open
        try:
            command = [sys.executable, "-m", "fastppo.analysis.bench", task]
            status = subprocess.run(command, stdout=out, stderr=err, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return Point(**named, failure=f"no result within {limit:.0f} s")
        out.seek(0)
        err.seek(0)
        if status == 0:
            # an environment's library may print too, before or after
            results = [line for line in out.read().splitlines() if line.startswith(_RESULT)]
            if not results:
                return Point(**named, failure="it ended without a result: does the environment exit by itself?")
            return Point(**json.loads(results[-1].removeprefix(_RESULT)))
        complaints = err.read().strip().splitlines()
    if status < 0:
        return Point(**named, failure=f"killed by signal {-status}{' (out of memory?)' if status == -9 else ''}")
    return Point(**named, failure=complaints[-1] if complaints else f"exit status {status}")


def measure(config: Config, seconds: float, started: float) -> Point:
    """Train for about `seconds` after the warm-up, then time each part alone.

    Args:
        config: what to train; `compile` auto compiles, as in a long run.
        seconds: of real iterations, five at least.
        started: time.time() when this process was started.
    """
    import torch

    from fastppo.runtime.device import choose_device
    from fastppo.runtime.preflight import peak_memory
    from fastppo.trainer import Trainer

    before = _memory_of_all()
    with tempfile.TemporaryDirectory() as folder:
        on_cpu = choose_device(config.device).type == "cpu"  # elsewhere a long run's auto is off, too
        compiled = "on" if config.compile == "auto" and on_cpu else config.compile
        plan = dataclasses.replace(
            config,
            compile=compiled,
            total_timesteps=_LONG,
            target_return=None,
            init_from=None,
            run_dir=Path(folder) / "run",
        )
        trainer = Trainer(plan)
        setup = time.time() - started - trainer.compile_seconds
        if trainer.device.type == "cuda":
            trainer.clock.wait = torch.cuda.synchronize
        ticks: list[tuple[float, int, dict[str, float]]] = []
        for stats in trainer.iterations():
            if stats.iteration >= WARM_UP:
                ticks.append((stats.seconds, stats.global_step, stats.scalars))
            if len(ticks) > _FEWEST and ticks[-1][0] - ticks[0][0] >= seconds:
                memory, alone = _memory_of_all(), ceilings(trainer, seconds / 6)
                break
    spent = [after[0] - before[0] for before, after in itertools.pairwise(ticks)]
    steps = [after[1] - before[1] for before, after in itertools.pairwise(ticks)]
    low, middle, high = statistics.quantiles([n / s for n, s in zip(steps, spent, strict=True)], n=4)
    phases = {phase: sum(scalars[f"time/{phase}"] for _, _, scalars in ticks[1:]) / sum(spent) for phase in _PHASES}
    return Point(
        n_envs=trainer.env.n_envs,
        vectorization=trainer.config.vectorization,
        sps=middle,
        sps_low=low,
        sps_high=high,
        iterations=len(spent),
        iteration_seconds=statistics.median(spent),
        phases=phases,
        ceilings=alone,
        overlapped=len(trainer.env.groups) > 1,
        setup_seconds=setup,
        compile_seconds=trainer.compile_seconds,
        memory_mb=memory,
        planned_mb=before + trainer.memory.total / 2**20,
        peak_mb=peak_memory() / 2**20,
        config=trainer.config.to_dict(),
        notes=trainer.notes,
    )


def ceilings(trainer: Any, seconds: float) -> dict[str, float]:  # noqa: ANN401 - a Trainer, whose module imports torch
    """Steps per second of each part of a Trainer alone, on the last rollout's actions, observations and rows."""
    env, collect, rollout = trainer.env, trainer.collect, trainer.rollout
    n_steps = len(rollout.rewards)

    def step_all() -> None:
        for t in range(n_steps):
            for group in range(len(env.groups)):
                env.send(t, group)
            for group in range(len(env.groups)):
                env.wait(group)
                env.store(t, group)

    def decide_all() -> None:
        collect.prepare()
        for t in range(n_steps):
            for actor in collect.actors:
                actor.act(t)
        collect.evaluate()

    def learn() -> None:
        if trainer.config.compile == "graph":  # one recording, which advantages are part of
            trainer.learner.anneal(0.0)
            trainer.learner()
        else:
            trainer.update(rollout.batch(), trainer.learner.coefs, math.inf)

    def waited(call: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            call()
            if trainer.clock.wait is not None:
                trainer.clock.wait()

        return both

    if trainer.config.compile == "graph" and env.capturable_state is not None:
        parts = {"rollout": collect, "update": learn}
    else:
        parts = {"act": decide_all, "update": learn, "env": step_all}  # env last: its actions are the rollout's own
    valid = rollout.valid
    real = rollout.rewards.numel() if valid is None else int(valid.sum())
    return {part: real / _seconds_of(waited(call), seconds) for part, call in parts.items()}


def _seconds_of(call: Callable[[], None], seconds: float) -> float:
    """Median time of a call, repeated for about `seconds`."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _memory_of_all() -> float:
    """MB of this process and those it started; shared pages are counted once (PSS) where the system tells."""
    import psutil

    total = 0
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # it just ended
            continue
        total += getattr(memory, "pss", memory.rss)
    return total / 2**20


if __name__ == "__main__":
    _task = json.loads(sys.argv[1])
    try:
        _point = measure(Config.from_dict(_task["config"]), _task["seconds"], _task["started"])
    except FastPPOError as _error:
        sys.exit(str(_error))
    print(f"\n{_RESULT}{json.dumps(dataclasses.asdict(_point))}", flush=True)
