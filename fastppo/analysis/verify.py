"""What an environment really does, and whether a run on it goes on after an interruption as if there had been none."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from fastppo.analysis.doctor import CheckResult
from fastppo.build import settle
from fastppo.config import Config
from fastppo.envs import factory as single
from fastppo.envs.auto_vectorization import Vectorization
from fastppo.envs.backends import backend_of
from fastppo.envs.factory import EnvFactory
from fastppo.envs.registry import EnvInfo, Maker, inspect_env, make_vectorized
from fastppo.errors import ConfigError
from fastppo.resume_run import resume
from fastppo.runs.checkpoint import newest_checkpoint, read_state, read_tensors
from fastppo.runtime.device import choose_device
from fastppo.trainer import Trainer

_RESULTS = ("reward", "terminated", "truncated")
_N = 4  # environments that are compared
_Array = np.ndarray[Any, Any]


def verify_env(
    env_id: str, env_kwargs: dict[str, Any], steps: int = 300, make_env: Maker | None = None
) -> Iterator[CheckResult]:
    """Look at one environment, and at several of them in each vectorisation; a finding for each look.

    Args:
        env_id: Gymnasium id.
        env_kwargs: keyword arguments.
        steps: how many are taken in each look.
        make_env: makes one environment, instead of `env_id`.

    Raises:
        ConfigError, EnvError: it can't be made, or its spaces aren't supported.
    """
    found = inspect_env(env_id, env_kwargs, make_env)
    factory = found.factory
    if factory is None:
        raise ConfigError("make_env returned a vector environment; return a single one to have it looked at.")
    yield CheckResult(
        "environment", f"{found.name}: {found.obs_spec.kind} {found.obs_spec.shape}, {found.action_spec.kind}"
    )
    yield from _whatever_happens("steps", lambda: _one(factory, steps))
    seeds = list(_whatever_happens("seeds", lambda: [_seeds(factory, steps)]))
    yield from seeds
    yield _pickles(factory)
    yield from _vectorized(found, steps, repeatable=seeds[0].state == "ok")
    how = backend_of(found, "sync").probe_resume(found, _N)
    advice = {"exact": "", "replay": "resuming takes the actions of open episodes again", "restart": "see README"}
    yield CheckResult("resume", f"{how.way}: {how.why}", "ok" if how.way == "exact" else "note", advice[how.way])


def _whatever_happens(name: str, look: Callable[[], Iterable[CheckResult]]) -> Iterator[CheckResult]:
    """What a look finds; an error in the environment is a finding too."""
    try:
        yield from look()
    except Exception as error:
        yield CheckResult(name, f"it fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}", "bad")


def _one(factory: EnvFactory, steps: int) -> Iterator[CheckResult]:
    """Types, shapes and bounds of what one environment returns, and its time."""
    env = factory()
    space = env.observation_space
    env.action_space.seed(0)
    wrong: dict[str, str] = {}
    outside, spent, episodes = 0, 0.0, 0
    obs, _ = env.reset(seed=0)
    try:
        for step in range(steps):
            x = np.asarray(obs)
            if x.shape != space.shape:
                wrong.setdefault(
                    "shape", f"observation of shape {x.shape} at step {step}; its space says {space.shape}"
                )
            if x.dtype != space.dtype:
                wrong.setdefault("dtype", f"observation of {x.dtype} at step {step}; its space says {space.dtype}")
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                wrong.setdefault("numbers", f"observation that is not finite at step {step}")
            outside += not _inside(space, x)
            action = env.action_space.sample()
            begin = time.perf_counter()
            obs, reward, terminated, truncated, _ = env.step(action)
            spent += time.perf_counter() - begin
            if np.ndim(reward) or np.asarray(reward).dtype.kind not in "biuf":  # type: ignore[arg-type]
                wrong.setdefault("reward", f"reward {reward!r} at step {step}; it must be a number")
            elif not np.isfinite(float(reward)):
                wrong.setdefault("numbers", f"reward {reward!r} at step {step}")
            flags: dict[str, Any] = {"terminated": terminated, "truncated": truncated}
            for name, flag in flags.items():
                if not isinstance(flag, (bool, np.bool_)):
                    wrong.setdefault(name, f"{name} {flag!r} ({type(flag).__name__}) at step {step}; it must be a bool")
            if terminated or truncated:
                episodes += 1
                obs, _ = env.reset()
    finally:
        env.close()
    mild = {"dtype"}
    for name, text in wrong.items():
        castable = name in mild and np.issubdtype(space.dtype, np.floating)
        yield CheckResult(name, text, "note" if castable else "bad", "stored as its space says" if castable else "")
    if not wrong:
        yield CheckResult("types", f"shapes, dtypes, rewards and flags as promised, over {steps} steps")
    if outside:
        yield CheckResult("space", f"{outside} of {steps} observations lie outside observation_space", "note")
    if factory.copy_obs:
        yield CheckResult("memory", "it hands out one and the same array; its observations are copied", "note")
    yield CheckResult("speed", f"{spent / steps * 1e6:,.0f} us a step; {episodes} episodes ended in {steps} steps")


def _inside(space: gym.Space[Any], x: _Array) -> bool:
    if not isinstance(space, gym.spaces.Box) or x.shape != space.shape:
        return True
    return bool(((x >= space.low) & (x <= space.high)).all())


def _seeds(factory: EnvFactory, steps: int) -> CheckResult:
    """Whether a seed decides everything, in a fresh environment and in a used one."""
    a, b = factory(), factory()
    try:
        b.reset(seed=99)
        for _ in range(5):
            b.step(b.action_space.sample())
        a.action_space.seed(1)
        mine, theirs = a.reset(seed=5)[0], b.reset(seed=5)[0]
        for step in range(steps):
            if not np.array_equal(mine, theirs, equal_nan=np.asarray(mine).dtype.kind == "f"):
                return CheckResult(
                    "seeds", f"two environments with one seed differ: obs at step {step}", "note", _SEEDS
                )
            action = a.action_space.sample()
            mine, *rest, _ = a.step(action)
            theirs, *others, _ = b.step(action)
            for name, x, y in zip(_RESULTS, map(np.asarray, rest), map(np.asarray, others), strict=True):
                if not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
                    return CheckResult(
                        "seeds", f"two environments with one seed differ: {name} at step {step}", "note", _SEEDS
                    )
            if rest[1] or rest[2]:
                mine, theirs = a.reset()[0], b.reset()[0]
    finally:
        a.close()
        b.close()
    return CheckResult("seeds", f"a seed decides everything, over {steps} steps")


_SEEDS = "runs on it can't be repeated; draw all randomness from self.np_random"


def _pickles(factory: EnvFactory) -> CheckResult:
    try:
        cloudpickle.loads(cloudpickle.dumps(factory))
    except Exception as error:
        return CheckResult("processes", f"its maker can't be sent to a process: {error}", "note", "use sync")
    return CheckResult("processes", "its maker can be sent to worker processes")


def _vectorized(found: EnvInfo, steps: int, *, repeatable: bool) -> Iterator[CheckResult]:
    """Whether all ways to step several of them agree, as a `repeatable` environment must, and how they reset."""
    assert found.factory is not None
    spec = None if found.factory.make else single.find_spec(found.factory.env_id)
    reference: list[dict[str, _Array]] = []
    ways: tuple[Vectorization, ...] = ("sync", "async", "pool")
    for way in ways:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mine = _play(make_vectorized(found, _N, way), steps)
        except Exception as error:
            yield CheckResult(way, f"it can't be stepped so: {str(error).partition(chr(10))[0]}", "bad")
            continue
        reference = reference or mine
        difference = _first_difference(reference, mine)
        if difference is None:
            yield CheckResult(way, f"{_N} environments, {steps} steps: the same as sync" if way != "sync" else "works")
        else:
            n, step, key = difference
            text = f"differs from sync: environment {n}, step {step}, {key}"
            advice = "it depends on the process, or on what ran in it before" if repeatable else _SEEDS
            yield CheckResult(way, text, "bad" if repeatable else "note", advice)
    if spec is not None and spec.vector_entry_point is not None:
        yield _autoreset(lambda: make_vectorized(found, _N, "native"))


def _play(venv: VectorEnv[Any, Any, Any], steps: int) -> list[dict[str, _Array]]:
    """Every step's results."""
    try:
        venv.action_space.seed(3)
        seeds: Any = [10 + i for i in range(_N)]
        obs, _ = venv.reset(seed=seeds)
        seen = [{"obs": obs.copy()}]
        for _ in range(steps):
            obs, rewards, terminated, truncated, infos = venv.step(venv.action_space.sample())
            step = {"obs": obs, "reward": rewards, "terminated": terminated, "truncated": truncated}
            seen.append({name: np.array(x) for name, x in step.items()})
            done = np.flatnonzero(terminated | truncated)
            final = np.zeros_like(obs)
            for i in done:
                final[i] = infos["final_obs"][i]
            seen[-1]["final_obs"] = final
        return seen
    finally:
        venv.close()


def _first_difference(a: list[dict[str, _Array]], b: list[dict[str, _Array]]) -> tuple[int, int, str] | None:
    """Environment, step and key of the first difference."""
    for step, (mine, theirs) in enumerate(zip(a, b, strict=True)):
        for key in mine:
            same = mine[key] == theirs[key]
            if mine[key].dtype.kind == "f":
                same |= np.isnan(mine[key]) & np.isnan(theirs[key])
            if not same.all():
                return int(np.argwhere(~same)[0][0]), step, key
    return None


def _autoreset(make: Callable[[], VectorEnv[Any, Any, Any]]) -> CheckResult:
    """What the environment's own vector version does at the end of an episode, against what it declares."""
    venv = make()
    try:
        declared = venv.metadata.get("autoreset_mode")
        if declared is None:
            return CheckResult("native", "it declares no autoreset mode", "bad", "set metadata['autoreset_mode']")
        mode = AutoresetMode(declared)
        venv.action_space.seed(0)
        venv.reset(seed=0)
        for _ in range(2000):
            last, _, terminated, truncated, infos = venv.step(venv.action_space.sample())
            done = terminated | truncated
            if done.any():
                break
        else:
            return CheckResult("native", f"declares {mode.name}; no episode ended in 2000 steps", "note")
        i, last = int(np.flatnonzero(done)[0]), np.array(last)
        if mode == AutoresetMode.DISABLED:
            return CheckResult("native", "declares DISABLED: reset from here, through reset_mask")
        same_step = "final_obs" in infos
        if same_step and mode == AutoresetMode.SAME_STEP:
            kept = np.array(infos["final_obs"][i])
            if np.array_equal(kept, last[i]):
                return CheckResult("native", "declares SAME_STEP, but final_obs equals the next observation", "bad")
            return CheckResult("native", "declares SAME_STEP, and keeps last observations in final_obs")
        following = venv.step(venv.action_space.sample())
        resets = float(following[1][i]) == 0.0 and not (following[2] | following[3])[i]
        if mode == AutoresetMode.NEXT_STEP and resets and not same_step:
            return CheckResult("native", "declares NEXT_STEP, and the step after an end only resets")
        return CheckResult("native", f"declares {mode.name}, but does otherwise at the end of an episode", "bad")
    finally:
        venv.close()


def verify_resume(config: Config, iterations: int = 6) -> Iterator[CheckResult]:
    """Train for some iterations, and once more with an interruption; compare every tensor and every figure.

    Args:
        config: settings of the run; total_timesteps and run_dir are set here.
        iterations: how many; the interruption comes after half of them.

    Raises:
        ConfigError, EnvError: see their texts.
    """
    device = choose_device(config.device)
    found = inspect_env(config.env_id, config.env_kwargs)
    settled, notes = settle(config, found, device, custom_policy=False)
    steps = iterations * settled.batch_size
    quiet: dict[str, Any] = {
        "checkpoint_every": None,
        "checkpoint_minutes": 0.0,
        "resume": "never",
        "target_return": None,
    }
    settled = dataclasses.replace(settled, total_timesteps=steps, **quiet)
    for note in notes:
        yield CheckResult("note", note)
    with tempfile.TemporaryDirectory(prefix="fastppo-verify-") as folder:
        whole, parted, again = (Path(folder) / name for name in ("whole", "parted", "again"))
        trainer = Trainer(dataclasses.replace(settled, run_dir=whole))
        way = trainer.env.resume_support
        yield CheckResult("way", f"{way.way}: {way.why}", "note" if way.way == "restart" else "ok")
        _to_the_end(trainer)
        for stats in Trainer(dataclasses.replace(settled, run_dir=parted)).iterations():
            if stats.iteration >= iterations // 2:
                break
        shutil.copytree(parted, again)
        _to_the_end(resume(parted, allow_import=True))
        if way.way == "restart":
            _to_the_end(resume(again, allow_import=True))
            yield CheckResult(
                "what that means",
                "network, optimiser, normalisers and schedules go on exactly; environments start new episodes",
                "note",
                "--vectorization sync or pool may do better" if settled.vectorization in ("async", "envpool") else "",
            )
            yield from _compare(run_hashes(parted), run_hashes(again), "two resumes of one checkpoint")
        else:
            yield from _compare(
                run_hashes(whole), run_hashes(parted), f"resumed after {iterations // 2} of {iterations}"
            )


def _to_the_end(trainer: Trainer) -> None:
    """Run it; a signal that ends it early ends the verification, which would compare unequal halves."""
    if trainer.run().ended == "interrupted":
        raise KeyboardInterrupt


def _compare(a: Mapping[str, str], b: Mapping[str, str], what: str) -> Iterator[CheckResult]:
    for group in ("policy", "rewards", "update", "learner", "collector", "metrics", "env", "figures"):
        mine = {name: x for name, x in a.items() if name.split(".")[0] == group}
        differing = [name for name, x in mine.items() if b.get(name) != x]
        if not mine:
            continue
        if differing:
            yield CheckResult(group, f"{what}: {len(differing)} of {len(mine)} differ, first {differing[0]}", "bad")
        else:
            yield CheckResult(group, f"{what}: {len(mine)} of {len(mine)} equal, bit for bit")


def run_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of everything that a run left which measures no time."""
    path, _ = newest_checkpoint(run)
    found = read_state(path, 0)
    assert found is not None, "verified"
    state, _ = found
    tensors: dict[str, torch.Tensor] = {**read_tensors(path / "model.safetensors"), **state.tensors}
    # a process's own random states are not the run's
    mine = {name: x for name, x in tensors.items() if not name.startswith("randomness.")}
    out = {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in mine.items()}
    for part in ("env", "metrics"):
        for name, value in state.values.get(part, {}).items():
            out[f"{part}.{name}"] = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    with contextlib.suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            row = {k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)}
            text = json.dumps(row, sort_keys=True)
            out[f"figures.iteration {row['iteration']}"] = hashlib.sha256(text.encode()).hexdigest()
    return out


TIMED = ("time/", "charts/SPS", "charts/sps", "seconds")  # figures that measure time
