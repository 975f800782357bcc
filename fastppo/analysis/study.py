"""`fastppo study`: train at several n_envs and seeds until a target return, and recommend an n_envs.

Every run has its own process and its own folder. A study that was killed continues: it reads the runs that have ended
and resumes the ones that were interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fastppo.analysis.run_data import RunData, read_run
from fastppo.analysis.training_processes import claim_folder, ended, env_cores
from fastppo.builders.parts import may_update_in_c, policy_spec
from fastppo.builders.resolve import resolve_config, target_of
from fastppo.config import Config
from fastppo.envs.make_envs import EnvInfo
from fastppo.errors import ConfigError
from fastppo.runs.inspect_env import inspect_configured
from fastppo.runs.system_info import system_info
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.device import choose_device
from fastppo.runtime.files import write_json
from fastppo.runtime.threads import choose_threads

Hold = Literal["batch", "n_steps"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Runs of a study.

    Attributes:
        target: mean return of the last 100 episodes that ends a run.
        hold: setting that is the same for all n_envs.
        configs: config of each run, run_dir included; seeds of one n_envs are adjacent.
        cores: CPU cores that the largest run uses.
        about: machine and versions.
    """

    target: float
    hold: Hold
    configs: list[Config]
    cores: int
    about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean over seeds with its 95 % confidence interval, mean +- t(n - 1) std / sqrt(n) with Student's t.

    The interval is NaN for fewer than two values. All estimated quantities are positive, so it is cut at 0.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate from one value per seed; NaN without values."""
        if not values:
            return cls(math.nan, math.nan, math.nan)
        if len(values) < 2:
            return cls(values[0], math.nan, math.nan)
        from scipy import stats

        mean = statistics.fmean(values)
        quantile = float(stats.t.ppf(0.975, len(values) - 1))
        half_width = quantile * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, max(0.0, mean - half_width), mean + half_width)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One n_envs of a study, and its results.

    Attributes:
        n_envs: N.
        n_steps: T.
        runs: runs that have ended, one per seed.
        failures: error of each seed that failed.
        reached: seeds that reached the target.
        steps: environment steps to the target.
        seconds: seconds of training to the target.
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
        """Seeds that have ended or failed."""
        return len(self.runs) + len(self.failures)


def plan_study(base: Config, n_envs: Sequence[int], seeds: int, hold: Hold, folder: Path) -> Plan:
    """Return the runs of a study.

    Args:
        base: settings of all runs; target_return may be "threshold".
        n_envs: values to compare, each at least 1.
        seeds: number of seeds per n_envs, at least 1; they are 1 to `seeds`.
        hold: "batch": the batch is the same and n_steps follows from n_envs; "n_steps": n_steps is the same.
        folder: folder of the study.

    Raises:
        ConfigError: there is no target, or an n_envs does not divide the batch.
    """
    env_info = inspect_configured(base)
    device = choose_device(base.device)
    resolved = _resolve(dataclasses.replace(base, n_envs=None), env_info, device)
    target = target_of(resolved)
    if target is None:
        reason = f"{env_info.name} has no reward threshold" if base.target_return == "threshold" else "none was given"
        raise ConfigError(f"study needs a target return, and {reason}: use --target-return NUMBER.")
    configs, cores = [], 1
    for n in dict.fromkeys(n_envs):
        n_steps = _steps_for(n, resolved) if hold == "batch" else resolved.n_steps
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
            configs.append(config)
        cores = max(cores, run_cores(configs[-1], env_info, device))
    return Plan(target, hold, configs, cores, system_info(device))


def _resolve(config: Config, env_info: EnvInfo, device: torch.device) -> Config:
    """Resolve defaults as a run does, without the choices that measure speed or start processes."""
    plain = dataclasses.replace(config, vectorization="sync", workers=None, half_batches=False)
    return resolve_config(plain, env_info, device)[0]


def run_cores(config: Config, env_info: EnvInfo, device: torch.device) -> int:
    """Return the cores that a run keeps busy: torch threads, by the work of a minibatch, and those of its environments.

    Raises:
        ConfigError: settings contradict each other.
    """
    resolved = _resolve(config, env_info, device)
    policy = policy_spec(resolved, env_info, custom=False).build()
    work = resolved.minibatch_size * sum(x.numel() for x in policy.network.parameters())
    in_c = may_update_in_c(resolved, policy, device)
    return (config.threads or choose_threads(work, in_c=in_c)) + env_cores(config)


def _steps_for(n_envs: int, resolved: Config) -> int:
    """Return the n_steps that gives as many rows as those of `resolved`, a config of the default n_envs.

    Raises:
        ConfigError: n_envs does not divide the batch.
    """
    batch = resolved.batch_size
    if batch % n_envs:
        nearest = sorted((d for d in range(1, batch + 1) if batch % d == 0), key=lambda d: abs(d - n_envs))[:3]
        raise ConfigError(
            f"n_envs={n_envs} does not divide the common batch of {batch}, which is n_envs {resolved.n_envs} x n_steps "
            f"{resolved.n_steps}; use {', '.join(map(str, sorted(nearest)))}, another --n-steps, or --hold n_steps."
        )
    return batch // n_envs


def begin_study(plan: Plan, base: Config, folder: Path) -> None:
    """Create the folder and record the study's settings in it, or check that it continues the same study.

    Raises:
        ConfigError: the folder holds other files or a study with other settings, or can't be created.
    """
    claim_folder(folder, "study", base, target_return=plan.target, hold=plan.hold)


def choose_jobs(plan: Plan) -> int:
    """Return the number of concurrent runs that do not compete for cores."""
    return max(1, usable_cores() // plan.cores)


def outcome(config: Config) -> str:
    """Return the outcome of a run that has ended, as text."""
    assert config.run_dir is not None
    result = json.loads((config.run_dir / "result.json").read_text())
    verb = "reached the target" if result["ended"] == "target" else "did not reach the target"
    return f"{verb} in {result['global_step']:,} steps, {result['seconds']:.1f} s"


def summarize(plan: Plan, failures: dict[Path, str]) -> list[Candidate]:
    """Return the results of each n_envs so far; `failures` holds errors by run folder."""
    by_n_envs: dict[int, list[Config]] = {}
    for config in plan.configs:
        by_n_envs.setdefault(config.n_envs or 0, []).append(config)
    return [_summarize_candidate(n, configs, failures) for n, configs in by_n_envs.items()]


def _summarize_candidate(n_envs: int, configs: Sequence[Config], failures: dict[Path, str]) -> Candidate:
    runs = [read_run(c.run_dir) for c in configs if c.run_dir is not None and ended(c)]
    reached = [run.result for run in runs if run.result["ended"] == "target"]
    speeds = [float(run.result["sps_steady"]) for run in runs if run.result.get("sps_steady") is not None]

    def estimate(name: str) -> Estimate:
        return Estimate.of([float(result[name]) for result in reached])

    return Candidate(
        n_envs=n_envs,
        n_steps=configs[0].n_steps or 0,
        runs=runs,
        failures={c.seed: failures[c.run_dir] for c in configs if c.run_dir in failures},
        reached=len(reached),
        steps=estimate("global_step"),
        seconds=estimate("seconds"),
        updates=estimate("iterations"),
        sps=statistics.median(speeds) if speeds else math.nan,
    )


def recommend(candidates: Sequence[Candidate], target: float) -> str:
    """Return a recommendation in words, with its uncertainty; without one where there is nothing to compare.

    It is the one with the shortest mean time among those that reach the target with the most seeds.
    """
    able = [s for s in candidates if s.reached]
    if not able:
        return f"No run reached {target:g}: train longer (--total-timesteps), or tune one n_envs first."
    best_share = max(s.reached / s.tried for s in able)
    reliable = [s for s in able if s.reached / s.tried == best_share]
    fastest = min(reliable, key=lambda s: s.seconds.mean)
    reached = (
        f"{fastest.reached} of {fastest.tried} seed{'s' if fastest.tried > 1 else ''} reached {target:g}, "
        f"in {format_estimate(fastest.seconds, ',.1f')} s."
    )
    one_seed = all(s.tried <= 1 for s in candidates)
    if len(candidates) == 1:
        proof = " One seed proves nothing; run more seeds." if one_seed else ""
        return f"n_envs {fastest.n_envs}: {reached} There is no other n_envs to compare it with.{proof}"
    if one_seed:
        return (
            f"n_envs {fastest.n_envs} was the fastest: {reached} One seed per n_envs cannot rank them; run more seeds."
        )
    sentences = [f"Use n_envs {fastest.n_envs}: {reached}"]
    rivals = [str(s.n_envs) for s in reliable if s is not fastest and _overlap(s.seconds, fastest.seconds)]
    if rivals and all(math.isnan(s.seconds.low) for s in reliable):
        sentences.append("One seed per n_envs cannot rank them; run more seeds.")
    elif rivals:
        sentences.append(f"The difference to n_envs {' and '.join(rivals)} is not significant; run more seeds.")
    cheapest = min(reliable, key=lambda s: s.steps.mean)
    if cheapest.steps.mean < fastest.steps.mean:
        steps = format_estimate(cheapest.steps, ",.0f")
        sentences.append(f"n_envs {cheapest.n_envs} needs the fewest environment steps: {steps}.")
    unreliable = [f"{s.n_envs} ({s.reached} of {s.tried})" for s in candidates if s.tried and s not in reliable]
    if unreliable:
        sentences.append(f"Less reliable: n_envs {', '.join(unreliable)}.")
    highest = max((s for s in candidates if s.runs), key=lambda s: s.sps)
    if highest is not fastest:
        sentences.append(
            f"n_envs {highest.n_envs} has the highest speed, {highest.sps:,.0f} steps/s, "
            "but does not reach the target sooner."
        )
    return " ".join(sentences)


def format_estimate(estimate: Estimate, form: str) -> str:
    """Return "mean (low-high)"; "-" without a mean, the mean alone without an interval."""
    if math.isnan(estimate.mean):
        return "-"
    mean = format(estimate.mean, form)
    if math.isnan(estimate.low):
        return mean
    return f"{mean} ({format(estimate.low, form)}-{format(estimate.high, form)})"


def _overlap(a: Estimate, b: Estimate) -> bool:
    return not (a.low > b.high or b.low > a.high)  # unknown intervals count as overlapping


def write_study(folder: Path, plan: Plan, candidates: Sequence[Candidate]) -> None:
    """Write study.json."""
    rows = []
    for s in candidates:
        row = {name: getattr(s, name) for name in ("n_envs", "n_steps", "reached", "failures", "sps")}
        row |= {name: dataclasses.asdict(getattr(s, name)) for name in ("steps", "seconds", "updates")}
        row["runs"] = [{"seed": run.config["seed"], "run_dir": str(run.run_dir)} | run.result for run in s.runs]
        rows.append(row)
    values = {
        "target_return": plan.target,
        "hold": plan.hold,
        "recommendation": recommend(candidates, plan.target),
        "settings": rows,
        "about": plan.about,
    }
    # JSON has no NaN: write null instead
    finite = json.loads(json.dumps(values, default=str), parse_constant=lambda _: None)
    write_json(folder / "study.json", finite)
