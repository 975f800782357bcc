"""Choose the fastest vectorisation for an environment on this machine, by measurement.

The results of `fastppo bench --save`, in a file of the user's cache folder, take precedence over the short measurement
here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from fastppo.envs.pack_observation import sample_actions
from fastppo.errors import ENV_ERRORS, first_line
from fastppo.runtime.files import replace_file
from fastppo.spaces.packing import PackedSpace

Vectorization = Literal["sync", "async", "pool", "native", "envpool", "tensor"]

# Seconds that a step of all environments must take to be worth processes: waking them costs 30-100 us each way
_SHORTEST_POOL_STEP = 200e-6


def choose(
    n_envs: int,
    speeds: Mapping[Vectorization, float],
    failures: Mapping[Vectorization, str],
    margins: Mapping[Vectorization, float],
) -> tuple[Vectorization, str]:
    """Return the fastest backend by measured environment steps per second, each divided by its margin, and the reason.

    Args:
        n_envs: N.
        speeds: environment steps per second with random actions, by vectorisation; sync is among them.
        failures: why other backends could not be measured.
        margins: the speed-up over sync that each backend needs to be chosen.
    """
    figures = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
    figures += "".join(f", {name}: {why}" for name, why in failures.items())
    best = max(speeds, key=lambda name: speeds[name] / margins[name])
    if len(speeds) == 1:
        return best, f"vectorization {best}: nothing else is worth trying at n_envs={n_envs} ({figures} steps/s)"
    return best, f"vectorization {best}: env steps/s with random actions, n_envs={n_envs}: {figures}"


def env_key(name: str, kwargs: Mapping[str, Any], wrappers: Sequence[str] = ()) -> str:
    """Return the key of saved choices: an environment's name, its keyword arguments and its wrappers."""
    return " ".join([name, *([json.dumps(kwargs, sort_keys=True, default=str)] if kwargs else ()), *wrappers])


def remember(env: str, machine: str, n_envs: int, choice: Mapping[str, Any]) -> Path:
    """Save `choice` (vectorization, half_batches, workers, reason) for N of `env` on `machine`; return the file."""
    path = _choices()
    known = _read(path)
    known.setdefault(env, {}).setdefault(machine, {})[str(n_envs)] = dict(choice)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(known, indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))
    return path


def recall(env: str, machine: str, n_envs: int) -> dict[str, Any] | None:
    """Return the choice that `remember` saved; None if there is none or the file is damaged."""
    found = _read(_choices()).get(env, {}).get(machine, {}).get(str(n_envs))
    return found if isinstance(found, dict) and found.get("vectorization") in get_args(Vectorization) else None


def _choices() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastppo" / "vectorization.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def measure(
    makers: Mapping[Vectorization, Callable[[], VectorEnv[Any, Any, Any]]],
    n_envs: int,
    seconds: float,
    in_processes: Collection[Vectorization] = (),
) -> tuple[dict[Vectorization, float], dict[Vectorization, str]]:
    """Time each maker's vector environment with random actions, sync first, for about `seconds` in total.

    Backends `in_processes` are skipped if a step of all environments is too short for them.

    Returns:
        speeds and failures, the arguments of `choose`.
    """
    speeds: dict[Vectorization, float] = {}
    failures: dict[Vectorization, str] = {}
    for name, make in makers.items():
        if name in in_processes and n_envs / speeds["sync"] < _SHORTEST_POOL_STEP:
            failures[name] = f"a step of all takes {n_envs / speeds['sync'] * 1e6:.0f} us, too short for processes"
            continue
        try:
            speeds[name] = _speed(make(), seconds / len(makers))
        except ENV_ERRORS as error:
            if name == "sync":
                raise
            failures[name] = first_line(error)
    return speeds, failures


def _speed(venv: VectorEnv[Any, Any, Any], seconds: float) -> float:
    try:
        obs, _ = venv.reset(seed=0)
        venv.action_space.seed(0)
        for _ in range(8):  # the first steps allocate buffers
            obs = venv.step(sample_actions(venv, obs))[0]
        masked = isinstance(venv.single_observation_space, PackedSpace) and venv.single_observation_space.mask
        actions = [venv.action_space.sample() for _ in range(8)]
        real, over = 0, np.zeros(venv.num_envs, bool)
        next_step = AutoresetMode(venv.metadata["autoreset_mode"]) == AutoresetMode.NEXT_STEP
        begin = now = time.perf_counter()
        rounds = 0
        while now - begin < seconds or rounds < 8:
            action = sample_actions(venv, obs) if masked else actions[rounds % 8]
            obs, _, terminated, truncated, _ = venv.step(action)
            real += venv.num_envs - (int(over.sum()) if next_step else 0)
            over = (terminated | truncated) & ~over
            rounds, now = rounds + 1, time.perf_counter()
        return real / (now - begin)
    finally:
        venv.close()
