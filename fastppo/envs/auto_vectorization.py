"""Which vectorisation is fastest for this environment on this machine: measured, with the reason in words.

What `fastppo bench --save` found is kept in a file of the user's cache folder and wins over the short measurement here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

Vectorization = Literal["sync", "async", "pool", "native", "envpool", "tensor"]

# Steps per second by which another vectorisation must beat `sync` to be taken. The environment's own vector version is
# another implementation, with other random streams; processes bring a price of their own in memory and start-up.
MARGIN = {"native": 1.5, "pool": 1.2}
# Below this a step of all environments is too short for processes: waking them costs 30-100 us each way
_SHORTEST_POOL_STEP = 200e-6


def choose(n_envs: int, speeds: Mapping[str, float], failures: Mapping[str, str]) -> tuple[Vectorization, str]:
    """The fastest by measured environment steps per second, `sync` having the benefit of the doubt.

    Args:
        n_envs: N.
        speeds: environment steps per second with random actions, by vectorisation; sync is among them.
        failures: why others could not be measured.

    Returns:
        the choice and the reason.
    """
    figures = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
    figures += "".join(f", {name}: {why}" for name, why in failures.items())
    worth = {name: speed / MARGIN.get(name, 1.0) for name, speed in speeds.items()}
    best: Any = max(worth, key=lambda name: worth[name])
    if len(speeds) == 1:
        return best, f"vectorization {best}: nothing else is worth trying at n_envs={n_envs} ({figures} steps/s)"
    return best, f"vectorization {best}: env steps/s with random actions, n_envs={n_envs}: {figures}"


def env_key(name: str, kwargs: Mapping[str, Any]) -> str:
    """An environment's name with its keyword arguments, as choices are kept by."""
    return f"{name} {json.dumps(kwargs, sort_keys=True, default=str)}" if kwargs else name


def remember(env: str, machine: str, n_envs: int, choice: Mapping[str, Any]) -> Path:
    """Keep `choice` (vectorization, half_batches, workers, reason) for N of `env` on `machine`; returns the file."""
    path = _choices()
    known = _read(path)
    known.setdefault(env, {}).setdefault(machine, {})[str(n_envs)] = dict(choice)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=1) + "\n")
    temporary.replace(path)
    return path


def recall(env: str, machine: str, n_envs: int) -> dict[str, Any] | None:
    """What `remember` kept, or None; a damaged file is no file."""
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
    makers: Mapping[Vectorization, Callable[[], VectorEnv[Any, Any, Any]]], n_envs: int, seconds: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Time each maker's vector environment with random actions, sync first, for about `seconds` in all.

    Returns:
        speeds and failures, as `choose` takes them.
    """
    speeds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, make in makers.items():
        if name == "pool" and n_envs / speeds["sync"] < _SHORTEST_POOL_STEP:
            failures[name] = f"a step of all takes {n_envs / speeds['sync'] * 1e6:.0f} us, too short for processes"
            continue
        try:
            speeds[name] = _speed(make(), seconds / len(makers))
        except Exception as error:
            if name == "sync":
                raise
            failures[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return speeds, failures


def _speed(venv: VectorEnv[Any, Any, Any], seconds: float) -> float:
    try:
        venv.reset(seed=0)
        venv.action_space.seed(0)
        actions = [venv.action_space.sample() for _ in range(8)]
        for action in actions:  # first steps make buffers
            venv.step(action)
        real, over = 0, np.zeros(venv.num_envs, bool)
        next_step = AutoresetMode(venv.metadata["autoreset_mode"]) == AutoresetMode.NEXT_STEP
        begin = now = time.perf_counter()
        rounds = 0
        while now - begin < seconds or rounds < 8:
            _, _, terminated, truncated, _ = venv.step(actions[rounds % 8])
            real += venv.num_envs - (int(over.sum()) if next_step else 0)
            over = (terminated | truncated) & ~over
            rounds, now = rounds + 1, time.perf_counter()
        return real / (now - begin)
    finally:
        venv.close()
