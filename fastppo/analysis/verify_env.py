"""Checks of `fastppo verify-env`: whether an environment behaves as its spaces, seeds and autoreset mode declare."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from fastppo.analysis.checks import CheckResult
from fastppo.envs.auto_vectorization import Vectorization
from fastppo.envs.backends import backend_of
from fastppo.envs.env_info import EVERYTHING
from fastppo.envs.factory import EnvFactory
from fastppo.envs.make_envs import EnvInfo, Maker, Reading, inspect_env, make_vectorized
from fastppo.envs.native import has_native
from fastppo.envs.pack_observation import sample_action, sample_actions
from fastppo.envs.resume_probe import probe_seeding
from fastppo.errors import ENV_ERRORS, ConfigError, first_line
from fastppo.spaces.leaves import ObsLeaf

_N = 4  # environments in the comparison of vectorizations
_COMPARED: tuple[Vectorization, ...] = ("sync", "async", "pool")
_AUTORESET_STEPS = 2000  # maximum wait for the end of an episode
_UNSEEDED = "runs are not repeatable; draw all randomness from self.np_random"
_RESUME_ADVICE = {
    "exact": "",
    "replay": "a resume replays the actions of open episodes",
    "restart": "see docs/long-runs.md",
}
_Array = np.ndarray[Any, Any]


def verify_env(
    env_id: str,
    env_kwargs: dict[str, Any],
    steps: int = 300,
    make_env: Maker | None = None,
    wrappers: tuple[str, ...] = (),
    reading: Reading = EVERYTHING,
) -> Iterator[CheckResult]:
    """Check one environment alone, then several of them in each vectorization, with random actions that it allows.

    Args:
        env_id: Gymnasium id.
        env_kwargs: keyword arguments of the environment.
        steps: environment steps per check.
        make_env: function that makes one environment, instead of `env_id`.
        wrappers: wrappers around it, as in `Config.wrappers`.
        reading: what a run would read of its observations.

    Raises:
        ConfigError, EnvError: the environment can't be made, or its spaces aren't supported.
    """
    env_info = inspect_env(env_id, env_kwargs, make_env, wrappers, reading=reading)
    factory = env_info.factory
    if factory is None:
        raise ConfigError("make_env returned a vector environment; verify-env needs one that returns a single one.")
    leaves = " + ".join(map(_described, env_info.obs_spec.leaves))
    yield CheckResult("environment", f"{env_info.name}: {leaves}, {env_info.action_spec.kind}")
    yield from _or_failure("steps", lambda: _check_steps(factory, steps))
    seeds = list(_or_failure("seeds", lambda: [_check_seeds(factory, steps, env_info.global_streams)]))
    yield from seeds
    yield _check_pickling(factory)
    yield from _check_vectorizations(env_info, steps, repeatable=seeds[0].state == "ok")
    resume = backend_of(env_info, "sync").probe_resume(env_info, _N)
    yield CheckResult(
        "resume",
        f"{resume.way}: {resume.why}",
        "ok" if resume.way == "exact" else "note",
        _RESUME_ADVICE[resume.way],
    )


def _described(leaf: ObsLeaf) -> str:
    """Return name, kind and shape of an array, and who reads it."""
    if leaf.kind == "mask":
        return f"mask of {leaf.size} actions"
    name, reader = f"{leaf.name}: " if leaf.path else "", " for the critic" if leaf.critic_only else ""
    return f"{name}{leaf.kind} {leaf.shape}{reader}"


def _or_failure(name: str, check: Callable[[], Iterable[CheckResult]]) -> Iterator[CheckResult]:
    """Yield the results of `check`; an exception of the environment becomes a bad result."""
    try:
        yield from check()
    except ENV_ERRORS as error:
        yield CheckResult(name, f"fails: {type(error).__name__}: {first_line(error)}", "bad")


def _check_steps(factory: EnvFactory, steps: int) -> Iterator[CheckResult]:
    """Check types, shapes and bounds of one environment's results, and measure its speed."""
    env = factory()
    space = env.observation_space
    env.action_space.seed(0)
    wrong: dict[str, str] = {}  # first violation of each kind
    outside, spent, episodes = 0, 0.0, 0
    obs, _ = env.reset(seed=0)
    try:
        for step in range(steps):
            x = np.asarray(obs)
            for kind, text in _obs_violations(space, x, step):
                wrong.setdefault(kind, text)
            outside += not _inside(space, x)
            action = sample_action(env, obs)
            begin = time.perf_counter()
            obs, reward, terminated, truncated, _ = env.step(action)
            spent += time.perf_counter() - begin
            for kind, text in _result_violations(reward, terminated, truncated, step):
                wrong.setdefault(kind, text)
            if terminated or truncated:
                episodes += 1
                obs, _ = env.reset()
    finally:
        env.close()
    for kind, text in wrong.items():
        castable = kind == "dtype" and np.issubdtype(space.dtype, np.floating)
        yield CheckResult(kind, text, "note" if castable else "bad", f"stored as {space.dtype}" if castable else "")
    if not wrong:
        yield CheckResult("types", f"shapes, dtypes, rewards and flags are valid in {steps} steps")
    if outside:
        yield CheckResult("space", f"{outside} of {steps} observations lie outside observation_space", "note")
    if factory.copy_obs:
        yield CheckResult("memory", "overwrites observations that it returned, so they are copied", "note")
    yield CheckResult("speed", f"{spent / steps * 1e6:,.0f} us per step; {episodes} episodes ended in {steps} steps")


def _obs_violations(space: gym.Space[Any], x: _Array, step: int) -> Iterator[tuple[str, str]]:
    """Yield kind and text of each violation in an observation."""
    if x.shape != space.shape:
        yield "shape", f"observation of shape {x.shape} at step {step}; its space has {space.shape}"
    if x.dtype != space.dtype:
        yield "dtype", f"observation of {x.dtype} at step {step}; its space has {space.dtype}"
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        yield "numbers", f"observation is not finite at step {step}"


def _result_violations(reward: Any, terminated: Any, truncated: Any, step: int) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - whatever the environment returns
    """Yield kind and text of each violation in a step's reward and flags."""
    if np.ndim(reward) or np.asarray(reward).dtype.kind not in "biuf":
        yield "reward", f"reward {reward!r} at step {step}; it must be a number"
    elif not np.isfinite(float(reward)):
        yield "numbers", f"reward {reward!r} at step {step}"
    for name, flag in {"terminated": terminated, "truncated": truncated}.items():
        if not isinstance(flag, (bool, np.bool_)):
            yield name, f"{name} {flag!r} ({type(flag).__name__}) at step {step}; it must be a bool"


def _inside(space: gym.Space[Any], x: _Array) -> bool:
    """Return whether an observation lies within the bounds of its Box; True for other spaces."""
    if not isinstance(space, gym.spaces.Box) or x.shape != space.shape:
        return True
    return bool(((x >= space.low) & (x <= space.high)).all())


def _check_seeds(factory: EnvFactory, steps: int, global_streams: Sequence[str]) -> CheckResult:
    """Look for random streams that ignore the seed, then compare a fresh and a used environment after one seed."""
    if notes := probe_seeding(factory):
        text, _, advice = notes[0].partition(". ")
        return CheckResult("seeds", text, "note", advice)
    fresh, used = factory(), factory()
    try:
        obs, _ = used.reset(seed=99)
        for _ in range(5):
            obs, _, terminated, truncated, _ = used.step(sample_action(used, obs))
            if terminated or truncated:
                obs, _ = used.reset()
        difference = _difference_after_seeding(fresh, used, steps)
    finally:
        fresh.close()
        used.close()
    if difference:
        source = f" (draws from the global stream of {', '.join(global_streams)})" if global_streams else ""
        return CheckResult("seeds", f"two environments with one seed differ: {difference}{source}", "note", _UNSEEDED)
    return CheckResult("seeds", f"a seed determines every result, in {steps} steps")


def _difference_after_seeding(a: gym.Env[Any, Any], b: gym.Env[Any, Any], steps: int) -> str:
    """Reset both with one seed, step both with the same actions; return the first difference, "" if there is none."""
    a.action_space.seed(1)
    obs_a, obs_b = a.reset(seed=5)[0], b.reset(seed=5)[0]
    for step in range(steps):
        if not _equal(obs_a, obs_b):
            return f"obs at step {step}"
        action = sample_action(a, obs_a)
        obs_a, *results_a, _ = a.step(action)
        obs_b, *results_b, _ = b.step(action)
        for name, x, y in zip(("reward", "terminated", "truncated"), results_a, results_b, strict=True):
            if not _equal(x, y):
                return f"{name} at step {step}"
        if results_a[1] or results_a[2]:
            obs_a, obs_b = a.reset()[0], b.reset()[0]
    return ""


def _equal(x: Any, y: Any) -> bool:  # noqa: ANN401 - numbers, flags, arrays
    """Return whether all values are equal; NaN equals NaN."""
    x = np.asarray(x)
    return np.array_equal(x, np.asarray(y), equal_nan=x.dtype.kind == "f")


def _check_pickling(factory: EnvFactory) -> CheckResult:
    try:
        cloudpickle.loads(cloudpickle.dumps(factory))
    except ENV_ERRORS as error:
        reason = first_line(error)
        return CheckResult(
            "processes", f"can't be sent to worker processes: {reason}", "note", "use vectorization sync"
        )
    return CheckResult("processes", "can be sent to worker processes")


def _check_vectorizations(env_info: EnvInfo, steps: int, *, repeatable: bool) -> Iterator[CheckResult]:
    """Compare `async` and `pool` with `sync`, and check the autoreset of the native vector version.

    A difference is bad if the environment is `repeatable`, and a note if it isn't.
    """
    assert env_info.factory is not None
    reference: list[dict[str, _Array]] = []
    for vectorization in _COMPARED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results = _collect(make_vectorized(env_info, _N, vectorization), steps)
        except ENV_ERRORS as error:
            yield CheckResult(vectorization, f"fails: {first_line(error)}", "bad")
            continue
        reference = reference or results
        difference = _first_difference(reference, results)
        if difference is not None:
            n, step, key = difference
            advice = "results depend on the process, or on earlier environments in it" if repeatable else _UNSEEDED
            text = f"differs from sync: environment {n}, step {step}, {key}"
            yield CheckResult(vectorization, text, "bad" if repeatable else "note", advice)
        elif vectorization == "sync":
            yield CheckResult(vectorization, "works")
        else:
            yield CheckResult(vectorization, f"{_N} environments, {steps} steps: same results as sync")
    if has_native(env_info.factory):
        yield from _or_failure("native", lambda: [_check_autoreset(make_vectorized(env_info, _N, "native"))])


def _collect(venv: VectorEnv[Any, Any, Any], steps: int) -> list[dict[str, _Array]]:
    """Return the results of `steps` random steps, and close the environment."""
    try:
        _seed_actions(venv, 3)
        seeds: Any = [10 + i for i in range(_N)]
        obs, _ = venv.reset(seed=seeds)
        collected = [{"obs": obs.copy()}]
        for _ in range(steps):
            obs, rewards, terminated, truncated, infos = venv.step(sample_actions(venv, obs))
            step = {"obs": obs, "reward": rewards, "terminated": terminated, "truncated": truncated}
            final_obs = np.zeros_like(obs)
            for i in np.flatnonzero(terminated | truncated):
                final_obs[i] = infos["final_obs"][i]
            collected.append({name: np.array(x) for name, x in step.items()} | {"final_obs": final_obs})
        return collected
    finally:
        venv.close()


def _seed_actions(venv: VectorEnv[Any, Any, Any], seed: int) -> None:
    """Seed the spaces that `sample_actions` draws from."""
    venv.action_space.seed(seed)
    venv.single_action_space.seed(seed)


def _first_difference(a: list[dict[str, _Array]], b: list[dict[str, _Array]]) -> tuple[int, int, str] | None:
    """Return environment, step and key of the first difference; None if all results are equal."""
    for step, (results_a, results_b) in enumerate(zip(a, b, strict=True)):
        for key in results_a:
            same = results_a[key] == results_b[key]
            if results_a[key].dtype.kind == "f":
                same |= np.isnan(results_a[key]) & np.isnan(results_b[key])
            if not same.all():
                return int(np.argwhere(~same)[0][0]), step, key
    return None


def _check_autoreset(venv: VectorEnv[Any, Any, Any]) -> CheckResult:
    """Compare the autoreset mode that a native vector environment declares with its behaviour; close it."""
    try:
        declared = venv.metadata.get("autoreset_mode")
        if declared is None:
            return CheckResult("native", "declares no autoreset mode", "bad", "set metadata['autoreset_mode']")
        return _compare_autoreset(venv, AutoresetMode(declared))
    finally:
        venv.close()


def _compare_autoreset(venv: VectorEnv[Any, Any, Any], mode: AutoresetMode) -> CheckResult:
    """Step until an episode ends, and compare what follows with `mode`."""
    _seed_actions(venv, 0)
    obs, _ = venv.reset(seed=0)
    for _ in range(_AUTORESET_STEPS):
        obs, _, terminated, truncated, infos = venv.step(sample_actions(venv, obs))
        done = terminated | truncated
        if done.any():
            break
    else:
        return CheckResult("native", f"declares {mode.name}; no episode ended in {_AUTORESET_STEPS} steps", "note")
    if mode == AutoresetMode.DISABLED:
        return CheckResult("native", "declares DISABLED; the trainer resets it through reset_mask")
    i, obs = int(np.flatnonzero(done)[0]), np.array(obs)
    same_step = "final_obs" in infos
    if same_step and mode == AutoresetMode.SAME_STEP:
        if np.array_equal(np.array(infos["final_obs"][i]), obs[i]):
            return CheckResult("native", "declares SAME_STEP, but final_obs equals the next observation", "bad")
        return CheckResult("native", "declares SAME_STEP, and final_obs holds the last observations")
    _, rewards, terminated, truncated, _ = venv.step(sample_actions(venv, obs))
    only_resets = float(rewards[i]) == 0.0 and not (terminated | truncated)[i]
    if mode == AutoresetMode.NEXT_STEP and only_resets and not same_step:
        return CheckResult("native", "declares NEXT_STEP, and the step after an episode only resets")
    return CheckResult("native", f"declares {mode.name}, but behaves differently at the end of an episode", "bad")
