"""Probes of environments: how they continue after a resume, and which of their random streams ignore the seed.

A probe takes the same steps in two environments and compares every output. It spends about a second.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from fastppo.envs.env_state import (
    BUILT,
    ConstructedData,
    EpisodeLog,
    ResumeSupport,
    layers_of,
    replay_episode,
    set_state,
    state_of,
)
from fastppo.envs.factory import close_env, shared_env_text
from fastppo.envs.pack_observation import sample_action, sample_actions
from fastppo.envs.plain_data import NotPlainError, encode
from fastppo.errors import ENV_ERRORS, EnvError, EnvStartError, first_line

_STEPS = 48  # of the probe before it saves a state, if there is time
_PROBE_SECONDS = 1.0
_MAX_CHECKPOINT_BYTES = 2**28  # of all environments
_MAX_CHECKPOINT_SECONDS = 10.0  # to save all environments
_MAX_RESET_SECONDS = 0.02  # to save one environment at a reset, for a replay


def probe_resume_support(make: Callable[[], gym.Env[Any, Any]], n_envs: int = 1) -> ResumeSupport:
    """Find how `n_envs` environments from `make` continue after a resume, by trying each way for about a second.

    Raises:
        EnvStartError: `make` returns the same environment twice.
    """
    try:
        return _try_out(make, n_envs)
    except EnvStartError:
        raise
    except ENV_ERRORS as error:  # from any environment's own code
        return ResumeSupport("restart", f"the probe failed: {type(error).__name__}: {first_line(error)}")


def probe_vector_resume_support(make: Callable[[], VectorEnv[Any, Any, Any]]) -> ResumeSupport:
    """Find how a native vector environment continues after a resume: exact or restart."""
    try:
        venv = make()
        venv.action_space.seed(0)
        venv.single_action_space.seed(0)
        outs, actions = [], []
        try:
            obs, _ = venv.reset(seed=7)
            for _ in range(_STEPS):
                obs = venv.step(sample_actions(venv, obs))[0]
            state, out = json.loads(json.dumps(state_of(venv))), list[bytes]()
            for _ in range(_STEPS):
                actions.append(sample_actions(venv, obs))
                obs, *rest = venv.step(actions[-1])[:4]
                out += [np.asarray(part).tobytes() for part in (obs, *rest)]
            outs.append(out)
        finally:
            close_env(venv)
        twin = make()
        try:
            twin.reset(seed=11)
            set_state(twin, state)
            results = [twin.step(action)[:4] for action in actions]
            outs.append([np.asarray(part).tobytes() for result in results for part in result])
        finally:
            close_env(twin)
    except NotPlainError as error:
        return ResumeSupport("restart", str(error))
    except ENV_ERRORS as error:
        return ResumeSupport("restart", f"the probe failed: {type(error).__name__}: {first_line(error)}")
    if outs[0] == outs[1]:
        return ResumeSupport("exact", "environment state can be saved")
    return ResumeSupport("restart", "a copy of its attributes behaves differently")


def probe_seeding(make: Callable[[], gym.Env[Any, Any]]) -> tuple[str, ...]:
    """Return notes on random streams that ignore the seed, from two environments and a few steps.

    Raises:
        EnvStartError: `make` returns the same environment twice.
    """
    with contextlib.ExitStack() as undo:
        try:
            env = make()
            undo.callback(close_env, env)
            twin = make()
            undo.callback(close_env, twin)
            _check_distinct(env, twin)
            before = _streams(env)
            obs, _ = env.reset(seed=7)
            twin.reset(seed=11)
            after, other = _streams(env), _streams(twin)
            env.action_space.seed(0)
            for _ in range(2):
                obs, _, terminated, truncated, _ = env.step(sample_action(env, obs))
                if terminated or truncated:
                    break
            return _notes_on_streams(env, before, after, other)
        except EnvStartError:
            raise
        except ENV_ERRORS:  # from any environment's own code, which may allow one instance only; the run will report it
            return ()


def _try_out(make: Callable[[], gym.Env[Any, Any]], n_envs: int) -> ResumeSupport:
    env = make()
    env.action_space.seed(0)
    # a seeded episode, then unseeded ones; the state is taken in the middle of one
    log, built = EpisodeLog(1), ConstructedData(env)
    fresh = _streams(env)
    log.begin(0, env, 7, built)
    started = time.perf_counter()
    obs, _ = env.reset(seed=7)
    seeded, steps = _streams(env), 0
    while steps < 2 or (steps < _STEPS and time.perf_counter() - started < _PROBE_SECONDS / 10):
        action = sample_action(env, obs)
        obs, _, terminated, truncated, _ = env.step(action)
        log.add(np.array([action]))
        steps += 1
        if terminated or truncated or steps == 1:  # the replay must cover an episode that began without a seed
            log.begin(0, env, None, built)
            obs, _ = env.reset()
    episode = json.loads(json.dumps(log.episode(0)))
    state, why, excess = None, "a copy of its attributes behaves differently", ""
    started = time.thread_time()  # not the clock: a busy machine must not decide about a resume
    try:
        text = json.dumps(state_of(env, built))
        excess = _excess(len(text), time.thread_time() - started, n_envs)
        state = json.loads(text)
    except NotPlainError as error:
        why = str(error)
        started = time.thread_time()
        size = len(json.dumps(state_of(env, built, all_of_it=False, check=False)))
        excess = _excess(size, 0.0, n_envs, time.thread_time() - started)
    drawn = _streams(env)
    actions, after = _sampled_outputs(env, obs, 2 * steps)
    close_env(env)
    twin = make()
    try:
        _check_distinct(env, twin)
        twin.reset(seed=11)  # creates attributes that only a reset makes
        notes = _notes_on_streams(env, fresh, seeded, _streams(twin), drawn)
        if excess:
            return ResumeSupport("restart", excess, notes)
        if state is not None and _prepared_outputs(twin, lambda: set_state(twin, state), actions) == after:
            return ResumeSupport("exact", "environment state can be saved", notes)
    finally:
        close_env(twin)
    twin = make()
    try:
        twin.reset(seed=11)
        replayed = _prepared_outputs(twin, lambda: replay_episode(twin, episode), actions)
    finally:
        close_env(twin)
    if replayed == after:
        return ResumeSupport("replay", f"{why}, but replaying an episode's actions restores it", notes)
    return ResumeSupport("restart", f"{why}, and replaying its episode leads to other observations", notes)


def _excess(size: int, seconds: float, n_envs: int, reset_seconds: float = 0.0) -> str:
    """Return why the state of one environment is too much to save; "" if it isn't.

    Args:
        size: in bytes.
        seconds: to save it in a checkpoint.
        n_envs: environments in a checkpoint.
        reset_seconds: to save it at each reset.
    """
    if reset_seconds > _MAX_RESET_SECONDS:
        return f"saving its state takes {reset_seconds * 1e3:,.0f} ms at each reset"
    if size * n_envs > _MAX_CHECKPOINT_BYTES:
        total, most = (x / 2**20 for x in (size * n_envs, _MAX_CHECKPOINT_BYTES))
        return f"its state takes {total:,.0f} MiB per checkpoint, more than {most:,.0f}"
    if seconds * n_envs > _MAX_CHECKPOINT_SECONDS:
        return f"saving its state takes {seconds * n_envs:,.0f} s per checkpoint"
    return ""


def _check_distinct(env: gym.Env[Any, Any], twin: gym.Env[Any, Any]) -> None:
    """Refuse environments that share one instance under their wrappers.

    Raises:
        EnvStartError: they do.
    """
    if env.unwrapped is twin.unwrapped:
        raise EnvStartError(shared_env_text(env))


def _streams(env: Any) -> dict[str, str]:  # noqa: ANN401 - an Env
    """Return the state of every random stream that the environment or an object of it holds, by name."""
    found: dict[str, str] = {}

    def search(owner: Any, prefix: str, depth: int) -> None:  # noqa: ANN401 - any object
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
                with contextlib.suppress(NotPlainError):
                    found[f"{prefix}.{name}"] = json.dumps(encode(value))
            elif depth and not isinstance(value, BUILT):
                search(value, f"{prefix}.{name}", depth - 1)

    for layer in layers_of(env):
        search(layer, type(layer).__name__, 2)
    return found


def _notes_on_streams(
    env: gym.Env[Any, Any],
    fresh: Mapping[str, str],
    seeded: Mapping[str, str],
    other: Mapping[str, str],
    drawn: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Return a note on the random streams that draw the same numbers under every seed.

    Args:
        env: the environment.
        fresh: its random streams after construction.
        seeded: after its first reset.
        other: those of another environment after a reset with another seed.
        drawn: of `env` after some steps; None: now.
    """
    now = _streams(env) if drawn is None else drawn
    fixed = [
        name
        for name, state in seeded.items()
        # a stream that nobody draws from, or only the constructor, matters to nobody
        if other.get(name) == state and (fresh.get(name) != state or now.get(name) != state)
    ]
    if not fixed:
        return ()
    return (
        f"the seed changes nothing in {', '.join(fixed)}: every environment draws the same random numbers from it. "
        "Draw from self.np_random, after super().reset(seed=seed), or the N environments may be copies.",
    )


def _prepared_outputs(twin: gym.Env[Any, Any], prepare: Callable[[], Any], actions: Sequence[Any]) -> list[Any] | None:
    """Return the outputs of `actions` after `prepare`; None if that fails."""
    try:
        prepare()
        return _outputs(twin, actions)
    except EnvError:
        return None


def _outputs(env: gym.Env[Any, Any], actions: Sequence[Any]) -> list[Any]:
    """Return all outputs of `actions`, with a reset after half of them and after each episode end."""
    return _play(env, lambda k, obs: actions[k], len(actions), None)


def _sampled_outputs(env: gym.Env[Any, Any], obs: Any, n: int) -> tuple[list[Any], list[Any]]:  # noqa: ANN401
    """Return `n` random actions, the first taken after observation `obs`, and their outputs as `_outputs` does."""
    actions: list[Any] = []

    def sample(k: int, obs: Any) -> Any:  # noqa: ANN401 - an observation, an action
        actions.append(sample_action(env, obs))
        return actions[k]

    return actions, _play(env, sample, n, obs)


def _play(env: gym.Env[Any, Any], choose: Callable[[int, Any], Any], n: int, obs: Any) -> list[Any]:  # noqa: ANN401
    found: list[Any] = []
    for k in range(n):
        obs, reward, terminated, truncated, _ = env.step(choose(k, obs))
        over = bool(terminated or truncated)
        found.append((np.asarray(obs).tobytes(), float(reward), over))
        if over or k == n // 2:
            obs, _ = env.reset()
            found.append(np.asarray(obs).tobytes())
    return found
