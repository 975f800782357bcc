"""Environments stepped in sequence: all of a vector environment, or one pool worker's share.

Rollouts are bit-identical to Gymnasium's SyncVectorEnv (same-step autoreset) at a third to a half of its overhead
(benchmarks/vectorizers.py): results are written straight into their rows, and infos are not merged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from fastppo.envs.env_calls import call_env, look_up, set_env
from fastppo.envs.env_state import ConstructedData, EpisodeLog, moments_of, replay_episode, set_state, state_of
from fastppo.envs.factory import shared_env_text, wrong_result_text
from fastppo.envs.fault_policy import FaultPolicy
from fastppo.envs.info_sums import NO_INFO, InfoSums, InfoTotals
from fastppo.envs.plain_data import NotPlainError
from fastppo.envs.step_arrays import write_truncation
from fastppo.errors import ENV_ERRORS, EnvError, EnvStartError, FastPPOError, cause_line

_Array = np.ndarray[Any, Any]
_MAX_MESSAGE = 400  # characters of a restart message
_BOOLS = frozenset((bool, np.bool_))
_NUMBERS = _BOOLS | {float, int, np.float64, np.float32, np.int64, np.int32}


def make_envs(
    makers: Mapping[int, Callable[[], gym.Env[Any, Any]]], made: dict[int, gym.Env[Any, Any]] | None = None
) -> dict[int, gym.Env[Any, Any]]:
    """Make environments by index, into `made`.

    Raises:
        EnvStartError: a constructor fails, or two environments are one.
    """
    made = {} if made is None else made
    for i, make in makers.items():
        try:
            env = make()
        except FastPPOError:
            raise
        except ENV_ERRORS as error:
            raise EnvStartError(f"environment {i} failed in its constructor: {cause_line(error)}.") from error
        if any(env.unwrapped is other.unwrapped for other in made.values()):
            raise EnvStartError(shared_env_text(env))
        made[i] = env
    return made


def fresh_seed(seed: int, restarts: int) -> int:
    """Return the seed of an environment after its `restarts`-th restart; negative ones (no seed) stay."""
    return seed if seed < 0 else int(np.random.SeedSequence((seed, restarts)).generate_state(1)[0] >> 1)


def error_text(error: BaseException) -> str:
    """Return an error's text, even if its class fails to produce one."""
    try:
        return str(error)
    except Exception:
        return "(it has no text)"


class EnvGroup:
    """Environments stepped in sequence, and their rows of the arrays of `layout`.

    Attributes:
        envs: the environments.
        at: index in `envs` of the environment being stepped or reset.
        steps: taken so far.
        ended: whether the last step may have ended an episode; if not, its rows of both flags are False.
        restart_messages: one line per restarted environment.
    """

    def __init__(
        self,
        envs: list[gym.Env[Any, Any]],
        makers: Sequence[Callable[[], gym.Env[Any, Any]]],
        arrays: Mapping[str, _Array],
        rows: slice,
        fault_policy: FaultPolicy,
    ) -> None:
        """Bind `envs`, made by `makers`, to `rows` of `arrays`."""
        self.envs, self.at, self.steps, self.restart_messages = envs, 0, 0, list[str]()
        self.ended = True  # the arrays may hold another group's flags
        self._makers, self._first, self._fault_policy = makers, rows.start, fault_policy
        self._arrays = {name: array[rows] for name, array in arrays.items()}
        self._all_failures = arrays["failures"]  # of all groups: they share the number of restarts
        self._obs, self._final_obs, self._actions, self._rewards, self._terminated, self._truncated, self._seeds = (
            self._arrays[name]
            for name in ("obs", "final_obs", "actions", "rewards", "terminated", "truncated", "seeds")
        )
        # like Gymnasium, accept floats of any width; the values of integers must fit, or they would wrap
        self._casting: Any = "same_kind" if self._obs.dtype.kind == "f" else "safe"
        self._log = EpisodeLog(len(makers)) if fault_policy.way == "replay" else None
        self._built = [self._constructed(env) for env in envs]
        self._info_sums: InfoSums | None = None

    def _constructed(self, env: gym.Env[Any, Any]) -> ConstructedData | None:
        return None if self._fault_policy.way == "restart" else ConstructedData(env)

    def reset(self) -> None:
        """Reset each environment with its seed; a negative one keeps its random stream."""
        try:
            for i in range(len(self.envs)):
                self.at = i
                self._put(self.at, self._reset(self.at, int(self._seeds[self.at])))
        except ENV_ERRORS as error:
            raise self._named(error, "reset") from error

    def step(self) -> None:
        """Step each environment with its action, and reset those that ended."""
        rewards, flags = list[Any](), list[tuple[int, Any, Any]]()
        # a copy, as an environment may keep its action
        actions = self._actions.copy()
        self.steps += 1
        if self._log is not None:
            self._log.add(actions)
        try:
            while len(rewards) < len(self.envs):
                try:
                    self._step_on(actions, rewards, flags)
                except ENV_ERRORS as error:
                    self._replace(self.at, error)
                    rewards.append(0.0)
                    flags.append((self.at, False, True))
            # checking types suffices in the common case, at a tenth of the cost of making an array
            plain = _NUMBERS.issuperset(map(type, rewards))
            self._rewards[:] = rewards if plain else self._checked("reward", rewards)
            if flags or self.ended:
                self._write_flags(flags)
        except ENV_ERRORS as error:
            raise self._named(error, f"step {self.steps}") from error

    def _write_flags(self, flags: list[tuple[int, Any, Any]]) -> None:
        """Write the flags of a step: (environment, terminated, truncated) wherever one is not the object False."""
        self.ended = bool(flags)
        if not flags:
            self._terminated.fill(False)
            self._truncated.fill(False)
            return
        terminated, truncated = columns = [[False] * len(self.envs) for _ in range(2)]
        for i, *values in flags:
            for column, value in zip(columns, values, strict=True):
                column[i] = value
        plain = _BOOLS.issuperset(map(type, terminated)) and _BOOLS.issuperset(map(type, truncated))
        self._terminated[:] = terminated if plain else self._checked("terminated", terminated)
        self._truncated[:] = truncated if plain else self._checked("truncated", truncated)

    def _step_on(self, actions: _Array, rewards: list[Any], flags: list[tuple[int, Any, Any]]) -> None:
        """Step the environments that have no reward yet."""
        rows, envs, sums, shape, dtype = self._obs, self.envs, self._info_sums, self._obs.shape[1:], self._obs.dtype
        for i in range(len(rewards), len(envs)):
            self.at = i
            result: Any = envs[i].step(actions[i])
            try:
                obs, reward, terminal, truncation, info = result
            except (TypeError, ValueError):
                raise EnvError(wrong_result_text("step", result)) from None
            if sums is not None:
                sums.add(i, info)
            if getattr(obs, "shape", None) != shape:
                self._check_shape("step", obs)
            running = terminal is False and truncation is False
            if not running and (terminal or truncation):
                self._write(self._final_obs[i, ...], obs)
                obs = self._reset(i, None)
            if getattr(obs, "dtype", None) == dtype:  # a quarter of the time of `_write`
                rows[i] = obs
            else:
                self._write(rows[i, ...], obs)
            rewards.append(reward)
            if not running:
                flags.append((i, terminal, truncation))

    def _reset(self, i: int, seed: int | None) -> Any:  # noqa: ANN401 - an observation
        seed = None if seed is None or seed < 0 else seed
        if self._log is not None:
            self._log.begin(i, self.envs[i], seed, self._built[i])
        obs, _ = self.envs[i].reset(seed=seed)
        self._check_shape("reset", obs)
        return obs

    def _named(self, error: BaseException, doing: str) -> EnvError:
        """Return `error` as an EnvError that names the environment."""
        which = f"environment {self._first + self.at} (seed {self._seeds[self.at]})"
        kind = "" if isinstance(error, EnvError) else f"{type(error).__name__}: "
        start = self.steps == 0 or doing == "step 1"
        return (EnvStartError if start else EnvError)(f"{which} failed in {doing}: {kind}{error_text(error)}")

    def _put(self, i: int, obs: Any) -> None:  # noqa: ANN401 - an observation
        self._write(self._obs[i, ...], obs)

    def _write(self, row: _Array, obs: Any) -> None:  # noqa: ANN401 - an observation
        try:
            np.copyto(row, obs, self._casting)
        except TypeError:
            np.copyto(row, _fitting(np.asarray(obs), row.dtype), "unsafe")

    def _check_shape(self, where: str, obs: Any) -> None:  # noqa: ANN401 - an observation
        shape = self._obs.shape[1:]
        if np.shape(obs) != shape:
            raise EnvError(f"{where} returned an observation of shape {np.shape(obs)}; its space says {shape}.")

    def _checked(self, what: str, values: list[Any]) -> _Array:
        """Return a column of results; raise EnvError for the first that is not a number (or a bool)."""
        kinds, expected = ("biuf", "a number") if what == "reward" else ("b", "a bool")
        try:
            column: _Array = np.array(values)
            if column.ndim == 1 and column.dtype.kind in kinds:
                return column
        except ValueError:  # of several shapes
            pass
        for i, value in enumerate(values):
            self.at, x = i, np.asarray(value)
            if x.ndim or x.dtype.kind not in kinds:
                shape = f" of shape {x.shape}" if x.ndim else ""
                raise EnvError(f"step returned {what} {value!r} ({x.dtype}{shape}); it must be {expected}.")
        raise AssertionError("one of the values has the wrong type")

    def _replace(self, i: int, error: BaseException) -> None:
        """Restart environment i after `error`, or raise it again."""
        restarts, failures = self._arrays["restarts"], self._arrays["failures"]
        if isinstance(error, EnvError) or self._all_failures.sum() >= self._fault_policy.restarts:
            raise error
        restarts[i] += 1
        failures[i] += 1
        text = f"environment {self._first + i} failed ({type(error).__name__}: {error_text(error)})"
        self.restart_messages.append(f"{text[:_MAX_MESSAGE]}; restarted, its episode truncated.")
        with contextlib.suppress(*ENV_ERRORS):
            self.envs[i].close()
        self.envs[i] = self._makers[i]()
        self._built[i] = self._constructed(self.envs[i])
        obs = self._reset(i, fresh_seed(int(self._seeds[i]), int(restarts[i])))
        write_truncation(self._arrays, i)
        self._put(i, obs)

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return `call_env` of each environment.

        Raises:
            EnvError: there is no such attribute, or the method fails.
        """
        results = []
        for i, env in enumerate(self.envs):
            if callable(look_up(self._first + i, env, name)):
                self._touch(i)
            results.append(call_env(self._first + i, env, name, args, kwargs))
        return results

    def set_attr(self, name: str, values: Sequence[Any]) -> None:
        """Set an attribute of each environment by `set_env`.

        Raises:
            EnvError: it can't be set.
        """
        for i, (env, value) in enumerate(zip(self.envs, values, strict=True)):
            self._touch(i)
            set_env(self._first + i, env, name, value)

    def log_info(self, patterns: Sequence[str]) -> None:
        """See `VecEnv.log_info`."""
        self._info_sums = InfoSums(patterns, len(self.envs))

    def read_info(self) -> InfoTotals:
        """See `VecEnv.read_info`."""
        return NO_INFO if self._info_sums is None else self._info_sums.take()

    def _touch(self, i: int) -> None:
        """Record that environment i changes by more than its actions, so that its open episode can't be replayed."""
        if self._log is not None:
            self._log.mark_touched(i)

    def state(self) -> list[Any]:
        """Return each environment's state as JSON-able values; empty if it can't be saved any longer.

        Of environments that restart, the state is their running moments.
        """
        if self._fault_policy.way == "restart":
            return [moments_of(env) for env in self.envs]
        try:
            if self._log is None:
                return [state_of(env, built) for env, built in zip(self.envs, self._built, strict=True)]
        except NotPlainError:  # the probe found plain data, but an attribute changed its type since
            return []
        unchanged = (
            built is None or built.all_unchanged(env) for env, built in zip(self.envs, self._built, strict=True)
        )
        if not self._log.replayable or not all(unchanged):
            return []
        return [self._log.episode(i) for i in range(len(self.envs))]

    def load(self, states: Sequence[Any]) -> None:
        """Restore each environment from `state()`; a replay writes its observations into obs.

        Raises:
            EnvError: not such a state.
        """
        if self._log is not None:
            self._log.load(states)
        for i, (env, state) in enumerate(zip(self.envs, states, strict=True)):
            if self._log is None:
                set_state(env, state)
            else:
                self._put(i, replay_episode(env, state))

    def load_moments(self, moments: Sequence[Any]) -> None:
        """Restore each environment's running moments from `moments_of`; call before a reset.

        Raises:
            EnvError: of another environment.
        """
        for env, own in zip(self.envs, moments, strict=True):
            if own:
                set_state(env, own)


def _fitting(obs: _Array, dtype: np.dtype[Any]) -> _Array:
    """Return integer observations of a wider dtype than their space's `dtype`, if that can hold their values.

    Raises:
        EnvError: it can't, or they are no integers.
    """
    if obs.dtype.kind not in "iu" or dtype.kind not in "iu":
        raise EnvError(f"an observation of {obs.dtype} doesn't fit its space of {dtype}; return {dtype}.")
    limits = np.iinfo(dtype)
    for value in (int(obs.min()), int(obs.max())):
        if not limits.min <= value <= limits.max:
            raise EnvError(
                f"the value {value} of an observation doesn't fit its space of {dtype}, which holds {limits.min} to "
                f"{limits.max}; give the space a wider dtype."
            )
    return obs
