"""`fastppo bench`: time real training iterations at several n_envs and vectorizations.

`run_points` starts a fresh process for each point, `measure` runs in it and times the point, and `verdict` says which
part limits a point and what would make it faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.analysis.training_processes import exit_reason
from fastppo.config import Config
from fastppo.errors import FastPPOError

if TYPE_CHECKING:
    from fastppo.monitoring.stats import Stats
    from fastppo.trainer import Trainer

WARM_UP = 2  # iterations
PARTS = {"env": "environments", "act": "acting", "update": "update"}
_RESULT = "fastppo bench: "  # prefix of the line that holds the result
_PHASES = ("env", "act", "store", "rollout", "advantages", "update", "log")
_LONG = 10**12  # planned steps, so many that schedules stay at their start
_MIN_ITERATIONS = 3
_OTHER_CORES = 0.25  # used by other programs; more on a full machine slows a point down visibly
_CONTRADICTION = 2.0  # ratio of a part's speed alone and in training, either way
# how many times as fast a fused update is on a CPU, by compile: means over minibatches of 128 and 2,048 rows, which
# differ much (benchmarks/update.py)
_FUSED = {"on": 2.2, "off": 10.0}
_LARGE = 0.1  # share of a part that is compared


@dataclasses.dataclass(frozen=True)
class Point:
    """Measurement of one n_envs and vectorization, or the reason why it failed.

    Attributes:
        n_envs: N.
        vectorization: vectorization of the environments.
        failure: reason of the failure; "": the point was measured.
        sps: environment steps per second of the median iteration: rollout, update and logging together.
        sps_low: first quartile over iterations.
        sps_high: third quartile over iterations.
        iterations: measured iterations, without warm-up.
        iteration_seconds: median seconds of an iteration.
        phases: share of the time by phase; the rest up to 1 is time outside the phases.
        ceilings: steps per second of env, act and update when each runs alone in the same process; "rollout" replaces
            env and act where both are in one CUDA graph.
        overlapped: whether the policy acts while environments step.
        cores: cores of the machine.
        own_cores: cores that this point's processes used on average while training was timed.
        other_cores: cores that all other programs used meanwhile.
        setup_seconds: seconds from the start of the process to the first iteration, without compilation.
        compile_seconds: seconds of compilation; 0 without it.
        memory_mb: memory of the process and its workers at the end, shared pages counted once.
        peak_mb: peak memory of the training process.
        planned_mb: memory before the trainer was made, plus the trainer's plan.
        config: resolved settings.
        notes: choices of the trainer with their reasons.
        can_fuse: whether compile=fused covers this run.
        on_gpu: whether it learns on a GPU.
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
    cores: int = 0
    own_cores: float = 0.0
    other_cores: float = 0.0
    setup_seconds: float = 0.0
    compile_seconds: float = 0.0
    memory_mb: float = 0.0
    peak_mb: float = 0.0
    planned_mb: float = 0.0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    can_fuse: bool = False
    on_gpu: bool = False

    def gain(self, part: str, times: float = 2.0) -> float:
        """Return the gain in training speed if `part` were `times` as fast: 0.1 is 10 %.

        Amdahl's law: 1 / (1 - share (1 - 1 / times)) - 1. Where the policy acts while environments step, only the
        trainer's wait for the environments counts, and it shrinks by all the time that they save.

        Args:
            part: "env", "act", "rollout" or "update".
            times: factor.
        """
        removed = 1 - 1 / times
        saved = self.phases[part] * removed
        if part == "env" and self.overlapped:
            alone = self.sps / self.ceilings["env"]  # share of an iteration that the environments take alone
            saved = min(self.phases["env"], max(alone, self.phases["env"]) * removed)
        return 1 / (1 - saved) - 1

    def doubts(self) -> list[str]:
        """Return the reasons not to trust the point: load on the machine, parts that contradict the whole."""
        found = []
        if self.other_cores > _OTHER_CORES and self.own_cores + self.other_cores > 0.9 * self.cores:
            found.append(
                f"other programs used {self.other_cores:.1f} of {self.cores} cores meanwhile, so the speeds are too low"
            )
        for part, alone in self.ceilings.items():
            share = self.phases.get(part, 0.0)
            if share < _LARGE or (part == "env" and self.overlapped):
                continue
            within = self.sps / share
            if not 1 / _CONTRADICTION < alone / within < _CONTRADICTION:
                found.append(
                    f"{part} runs at {alone:,.0f} steps/s alone but at {within:,.0f} within training: the machine's "
                    "speed changed between the two"
                )
        return found

    def differs(self, other: Point) -> bool:
        """Return whether the quartiles of the two speeds don't overlap."""
        return self.sps_low > other.sps_high or other.sps_low > self.sps_high

    def choice(self) -> dict[str, Any]:
        """Return the vectorization settings for `fastppo.envs.auto_vectorization.remember`."""
        settings = {name: self.config.get(name) for name in ("vectorization", "workers", "half_batches")}
        day = datetime.date.today().isoformat()
        return settings | {"reason": f"fastest by fastppo bench on {day}, {self.sps:,.0f} steps/s of training"}


def best_by_n_envs(points: Sequence[Point]) -> dict[int, Point]:
    """Return the fastest point of each n_envs."""
    best: dict[int, Point] = {}
    for p in points:
        if not p.failure and (p.n_envs not in best or p.sps > best[p.n_envs].sps):
            best[p.n_envs] = p
    return best


def conclusion(points: Sequence[Point]) -> str:
    """Return the fastest point in words, or which points the measurement can't tell apart; "" if all failed."""
    measured = sorted((p for p in points if not p.failure), key=lambda p: -p.sps)
    if not measured:
        return ""
    best, *others = measured
    names = [f"n_envs {p.n_envs}, {p.vectorization} ({p.sps_low:,.0f}-{p.sps_high:,.0f})" for p in measured]
    rivals = [name for p, name in zip(others, names[1:], strict=True) if not p.differs(best)]
    if rivals:
        return (
            f"no clear winner: the steps/s of {names[0]} overlap with those of {'; '.join(rivals)}. Measure longer "
            "(--seconds), on an idle machine."
        )
    return (
        f"fastest: n_envs {best.n_envs}, {best.vectorization}: {best.sps:,.0f} steps/s. More environments also mean "
        "fewer updates for the same steps: compare returns before choosing the largest."
    )


def clear_winners(points: Sequence[Point]) -> dict[int, Point]:
    """Return the fastest point of each n_envs whose quartiles overlap with no other vectorization's."""
    return {
        n: best
        for n, best in best_by_n_envs(points).items()
        if all(p is best or p.failure or p.n_envs != n or best.differs(p) for p in points)
    }


def verdict(point: Point, points: Sequence[Point]) -> str:
    """Return the limiting part of `point`, the gains from faster parts, and the speed of its neighbours in `points`."""
    if point.failure:
        return point.failure
    parts = PARTS
    if point.phases.get("rollout", 0.0) > 0:  # one CUDA graph holds environments and acting
        parts = {"rollout": "rollout", "update": PARTS["update"]}
    limit = max(parts, key=lambda part: point.phases[part])
    others = ", ".join(f"{parts[part]} {point.gain(part):+.0%}" for part in parts if part != limit)
    text = (
        f"{limit}-bound ({point.phases[limit]:.0%} of the time); "
        f"{parts[limit]} twice as fast: {point.gain(limit):+.0%} steps/s ({others})"
    )
    if limit == "update" and point.can_fuse and point.config["compile"] != "fused":
        if point.on_gpu:
            text += "; --compile fused covers it, by kernels whose gain has not been measured"
        elif times := _FUSED.get(str(point.config["compile"])):
            text += f"; --compile fused would give about {point.gain('update', times):+.0%}"
    larger = [p for p in points if p.vectorization == point.vectorization and p.n_envs > point.n_envs and not p.failure]
    if larger:
        following = min(larger, key=lambda p: p.n_envs)
        text += f"; n_envs {point.n_envs} -> {following.n_envs}: {_change(point, following)}"
    faster = [p for p in points if p.n_envs == point.n_envs and p.sps > point.sps]
    if faster:
        best = max(faster, key=lambda p: p.sps)
        text += f"; vectorization {best.vectorization}: {_change(point, best)}"
    return "; ".join([text, *(f"unreliable: {doubt}" for doubt in point.doubts())])


def _change(before: Point, after: Point) -> str:
    return f"{after.sps / before.sps - 1:+.0%}" if after.differs(before) else "no clear difference"


def run_points(configs: Sequence[Config], seconds: float) -> Iterator[Point]:
    """Measure each config in a fresh process, one after the other; a failure is a point with its reason."""
    for config in configs:
        yield _run_point(config, seconds)


def _run_point(config: Config, seconds: float) -> Point:
    def failed(reason: str) -> Point:
        return Point(n_envs=config.n_envs or 0, vectorization=config.vectorization, failure=reason)

    task = json.dumps({"config": config.to_dict(), "seconds": seconds, "started": time.time()})
    limit = 180 + 10 * seconds
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # files, not pipes: worker processes that outlive a killed trainer would hold a pipe open
        try:
            command = [sys.executable, "-m", "fastppo.analysis.bench", task]
            status = subprocess.run(command, stdout=out, stderr=err, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return failed(f"no result within {limit:.0f} s")
        out.seek(0)
        err.seek(0)
        if status != 0:
            return failed(exit_reason(status, err.read()))
        # the environment may print other lines
        results = [line for line in out.read().splitlines() if line.startswith(_RESULT)]
    if not results:
        return failed("the process ended without a result; check that the environment does not exit the process")
    return Point(**json.loads(results[-1].removeprefix(_RESULT)))


def measure(config: Config, seconds: float, started: float) -> Point:
    """Train for about `seconds` after the warm-up, then time each part alone.

    Args:
        config: settings of the run; `compile` auto chooses as for a long run.
        seconds: seconds of real iterations; at least three iterations are measured.
        started: time.time() at the start of this process.
    """
    import torch

    from fastppo.runtime.resources import peak_memory
    from fastppo.trainer import Trainer

    memory_before = _total_memory()
    timed: list[Stats] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_long_run(config, Path(folder) / "run"), progress=False)
        setup_seconds = time.time() - started - trainer.compile_seconds
        if trainer.device.type == "cuda":
            trainer.clock.wait = torch.cuda.synchronize
        for stats in trainer.iterations():
            if stats.iteration >= WARM_UP:
                timed.append(stats)
            if stats.iteration == WARM_UP:
                used_before = _cpu_seconds()
            if len(timed) > _MIN_ITERATIONS and timed[-1].seconds - timed[0].seconds >= seconds:
                # within the loop, because its end closes the environments
                used = [after - before for before, after in zip(used_before, _cpu_seconds(), strict=True)]
                memory, alone = _total_memory(), ceilings(trainer, seconds / 6)
                break
    spent = [after.seconds - before.seconds for before, after in itertools.pairwise(timed)]
    steps = [after.global_step - before.global_step for before, after in itertools.pairwise(timed)]
    low, middle, high = statistics.quantiles([n / s for n, s in zip(steps, spent, strict=True)], n=4)
    phases = {phase: sum(stats.scalars[f"time/{phase}"] for stats in timed[1:]) / sum(spent) for phase in _PHASES}
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
        cores=os.cpu_count() or 1,
        own_cores=used[1] / used[0],
        other_cores=max(0.0, used[2] - used[1]) / used[0],
        setup_seconds=setup_seconds,
        compile_seconds=trainer.compile_seconds,
        memory_mb=memory,
        planned_mb=memory_before + trainer.memory.total / 2**20,
        peak_mb=peak_memory() / 2**20,
        config=trainer.config.to_dict(),
        notes=trainer.notes,
        can_fuse=trainer.device.type in ("cpu", "cuda") and trainer.update.not_fused() is None,
        on_gpu=trainer.device.type == "cuda",
    )


def _long_run(config: Config, run_dir: Path) -> Config:
    """Return settings under which a run behaves as in its first minutes, however long the measurement takes."""
    return dataclasses.replace(
        config,
        total_timesteps=_LONG,
        target_return=None,
        init_from=None,
        run_dir=run_dir,
    )


def ceilings(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Return steps per second of each part alone, each measured for `seconds`, on the data of the last rollout."""
    parts: dict[str, Callable[[], object]] = {"act": lambda: _act(trainer), "update": lambda: _update(trainer)}
    if _is_captured(trainer) and trainer.env.capturable_state is not None:
        parts = {"rollout": trainer.collect, "update": parts["update"]}
    else:
        parts["env"] = lambda: _step(trainer)  # last: it overwrites the rollout, which the other parts read
    valid = trainer.rollout.valid
    steps = trainer.rollout.rewards.numel() if valid is None else int(valid.sum())
    return {part: steps / _median_seconds(call, trainer.clock.wait, seconds) for part, call in parts.items()}


def _is_captured(trainer: Trainer) -> bool:
    compile = trainer.config.compile
    return compile == "graph" or (compile == "fused" and trainer.device.type == "cuda")


def _step(trainer: Trainer) -> None:
    """Step all environments with the rollout's actions; with masks, the most probable ones that are allowed."""
    import torch

    from fastppo.policies.policy import FORBIDDEN

    env, r, distribution = trainer.env, trainer.collect.rollout, trainer.policy.distribution
    for t in range(len(r.rewards)):
        if (allowed := env.obs_spec.allowed(r.obs[t if t > 0 else -1])) is not None:
            r.actions[t] = distribution.mode(torch.where(allowed, r.params[t], FORBIDDEN))
        for group in range(len(env.groups)):
            env.send(t, group)
        for group in range(len(env.groups)):
            env.wait(group)
            env.store(t, group)


def _act(trainer: Trainer) -> None:
    """Choose the actions of a rollout from its observations."""
    collect = trainer.collect
    collect.prepare()
    for t in range(len(trainer.rollout.rewards)):
        for actor in collect.actors:
            actor.act(t)
    collect.compute_values()


def _update(trainer: Trainer) -> None:
    """Run the epochs of an update on the rollout."""
    if _is_captured(trainer):  # the advantages belong to the first graph of an update
        trainer.learner.anneal(0.0)
        trainer.learner(watch=False)
    else:
        trainer.update.prepare(trainer.rollout.rewards.numel(), math.inf)
        trainer.update.run(trainer.rollout.batch(), trainer.learner.coefs, watch=False)


def _median_seconds(call: Callable[[], object], wait: Callable[[], None] | None, seconds: float) -> float:
    """Return the median time of a call over about `seconds`, at least one; `wait` synchronizes with the device."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        if wait is not None:
            wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _cpu_seconds() -> tuple[float, float, float]:
    """Return the clock, and CPU seconds so far of this process with its children and of the whole machine."""
    import psutil

    own, this = 0.0, psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended
            times = process.cpu_times()
            own += times.user + times.system
    machine = psutil.cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    return time.perf_counter(), own, sum(machine[:8]) - idle  # those after the first eight are counted twice


def _total_memory() -> float:
    """Return MB of this process and its children; PSS where available, which counts shared pages once."""
    import psutil

    total = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # the process has just ended
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
