"""Environments stepped in sequence in one process: a whole vector environment, or one pool worker's share.

Rollouts are bit-identical to Gymnasium's SyncVectorEnv (same-step autoreset) at a third to a half of its overhead
(benchmarks/vectorizers.py): results are written straight into their rows, and infos are not merged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fastppo.envs.env_state import ConstructedData, EpisodeLog, Way, moments_of, replay_episode, set_state, state_of
from fastppo.envs.factory import close_env, shared_env_text
from fastppo.envs.info_sums import NO_INFO, InfoSums, InfoTotals
from fastppo.envs.plain_data import NotPlainError
from fastppo.errors import ENV_ERRORS, ConfigError, EnvError, EnvStartError, FastPPOError, cause_line

_Array = np.ndarray[Any, Any]
StepResult = tuple[_Array, _Array, _Array, _Array, dict[str, Any]]  # obs, rewards, terminated, truncated, infos
_MAX_MESSAGE = 400  # characters of a restart message


@dataclasses.dataclass(frozen=True)
class FaultPolicy:
    """Handling of failed environments and workers, and of environment state for a resume.

    Attributes:
        way: how the environments continue after a resume; "replay" records the actions of open episodes.
        restarts: failures to recover from by a restart, which truncates the episode; the next one is an error.
        timeout: seconds that a step or a reset may take in a worker process; None: no limit.
    """

    way: Way = "restart"
    restarts: int = 0
    timeout: float | None = None


NO_FAULT_POLICY = FaultPolicy()


def layout(n: int, obs: gym.Space[Any], action: gym.Space[Any]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the shapes and dtypes of the arrays for actions and results of N environments, by name.

    Raises:
        EnvError: a space whose elements aren't arrays.
    """
    return {
        "obs": ((n, *_shape(obs)), obs.dtype),
        "final_obs": ((n, *_shape(obs)), obs.dtype),
        "actions": ((n, *_shape(action)), action.dtype),
        "rewards": ((n,), np.float64),
        "terminated": ((n,), np.bool_),
        "truncated": ((n,), np.bool_),
        "seeds": ((n,), np.int64),
        "restarts": ((n,), np.int64),  # of each environment, including those of a lost worker; part of its seed
        "failures": ((n,), np.int64),  # of each environment
    }


def _shape(space: gym.Space[Any]) -> tuple[int, ...]:
    if space.shape is None or space.dtype is None:
        raise EnvError(
            f"observations and actions must be arrays, but the space is {type(space).__name__}; wrap the environment."
        )
    return tuple(space.shape)


def check_spaces(i: int, env: gym.Env[Any, Any], obs: gym.Space[Any], action: gym.Space[Any]) -> None:
    """Refuse environment i if its spaces differ from the others.

    Raises:
        EnvError: they differ.
    """
    for name, mine, theirs in (("observation", env.observation_space, obs), ("action", env.action_space, action)):
        if mine != theirs:
            raise EnvError(f"environment {i} has {name}_space {mine}; the others have {theirs}.")


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


def step_result(arrays: Mapping[str, _Array], rows: slice) -> StepResult:
    """Return the results of Gymnasium's `step` for `rows`: views, which the next step overwrites."""
    terminated, truncated = arrays["terminated"][rows], arrays["truncated"][rows]
    done = terminated | truncated
    ended = np.count_nonzero(done)  # a tenth of the time of any() on small arrays
    infos = {"final_obs": arrays["final_obs"][rows].copy(), "_final_obs": done} if ended else {}
    return arrays["obs"][rows], arrays["rewards"][rows], terminated, truncated, infos


def write_truncation(arrays: Mapping[str, _Array], rows: slice | int) -> None:
    """Record lost episodes as truncated at their last observation, with reward 0."""
    arrays["final_obs"][rows] = arrays["obs"][rows]
    arrays["rewards"][rows], arrays["terminated"][rows], arrays["truncated"][rows] = 0.0, False, True


def fresh_seed(seed: int, restarts: int) -> int:
    """Return the seed of an environment after its `restarts`-th restart; negative ones (no seed) stay."""
    return seed if seed < 0 else int(np.random.SeedSequence((seed, restarts)).generate_state(1)[0] >> 1)


def error_text(error: BaseException) -> str:
    """Return an error's text, even if its class fails to produce one."""
    try:
        return str(error)
    except Exception:
        return "(it has no text)"


_BOOLS = frozenset((bool, np.bool_))
_NUMBERS = _BOOLS | {float, int, np.float64, np.float32, np.int64, np.int32}


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
            obs, reward, terminal, truncation, info = envs[i].step(actions[i])
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
        if isinstance(error, EnvError) or failures.sum() >= self._fault_policy.restarts:
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


def look_up(i: int, env: gym.Env[Any, Any], name: str) -> Any:  # noqa: ANN401 - any value
    """Return a method or an attribute of environment i, or of the outermost wrapper that has it.

    Raises:
        EnvError: there is none.
    """
    try:
        if env.has_wrapper_attr(name):
            return env.get_wrapper_attr(name)
    except ENV_ERRORS as error:  # a property's own
        raise EnvError(f"environment {i} failed in its attribute {name!r}: {cause_line(error)}.") from error
    near = difflib.get_close_matches(name, [x for x in dir(env.unwrapped) if not x.startswith("_")], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; its wrappers have none either."
    raise EnvError(f"environment {i} ({type(env.unwrapped).__name__}) has no method or attribute {name!r}{hint}")


def call_env(i: int, env: gym.Env[Any, Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the result of a method of environment i or of a wrapper of it, or the value of an attribute.

    Raises:
        EnvError: there is no such attribute, or the method fails.
    """
    found = look_up(i, env, name)
    try:
        return found(*args, **kwargs) if callable(found) else found
    except ENV_ERRORS as error:
        raise EnvError(f"environment {i} failed in call({name!r}): {cause_line(error)}.") from error


def set_env(i: int, env: gym.Env[Any, Any], name: str, value: Any) -> None:  # noqa: ANN401 - any value
    """Set an attribute of environment i, in the outermost wrapper that has it.

    Raises:
        EnvError: there is no such attribute, or it can't be set.
    """
    look_up(i, env, name)
    try:
        env.set_wrapper_attr(name, value)
    except ENV_ERRORS as error:
        raise EnvError(f"environment {i} failed in set_attr({name!r}): {cause_line(error)}.") from error


def check_callable(access: str, name: str) -> None:
    """Refuse `access`, "call" or "set_attr", to the methods by which the trainer steps environments.

    Raises:
        EnvError: `name` is one of them.
    """
    if name in ("reset", "step", "close"):
        raise EnvError(
            f"{access}({name!r}): the trainer itself steps, resets and closes the environments; name another method or "
            "attribute."
        )


def one_each(values: Any, n: int) -> list[Any]:  # noqa: ANN401 - any values
    """Return the values of `set_attr` for N environments: a list or tuple as it is, anything else N times.

    Raises:
        EnvError: a list of another length.
    """
    each = list(values) if isinstance(values, (list, tuple)) else [values] * n
    if len(each) != n:
        raise EnvError(f"set_attr got {len(each)} values for {n} environments; give one value, or one for each.")
    return each


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


def copy_actions(place: _Array, actions: _Array) -> None:
    """Copy `actions` into `place`, without numpy's broadcasting.

    Raises:
        EnvError: their shape differs.
    """
    if np.shape(actions) != place.shape:
        raise EnvError(f"actions have shape {np.shape(actions)}; these environments take {place.shape}.")
    place[...] = actions


class SerialVectorEnv(VectorEnv[_Array, _Array, _Array]):
    """Environments in this process, stepped in sequence, as a Gymnasium vector environment.

    The next step overwrites the arrays that `step` returns.

    Attributes:
        envs: the environments.
        fault_policy: handling of failed environments.
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]], fault_policy: FaultPolicy = NO_FAULT_POLICY
    ) -> None:
        """Make the environments.

        Args:
            env_fns: one maker per environment.
            fault_policy: handling of failed environments.

        Raises:
            EnvError: their spaces aren't arrays.
        """
        self.envs = list(make_envs(dict(enumerate(env_fns))).values())
        first, self.num_envs, self.fault_policy = self.envs[0], len(self.envs), fault_policy
        self.spec = first.spec
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.metadata = {**first.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        for i, env in enumerate(self.envs):
            check_spaces(i, env, first.observation_space, first.action_space)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        shapes = layout(self.num_envs, self.single_observation_space, self.single_action_space)
        self._arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        self._group = EnvGroup(self.envs, env_fns, self._arrays, slice(0, self.num_envs), fault_policy)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Array, dict[str, Any]]:
        """Reset every environment; one seed s means s, s + 1, ... as in Gymnasium."""
        self._arrays["seeds"][:] = seeds(seed, self.num_envs, options)
        self._group.reset()
        return self._arrays["obs"].copy(), {}

    def step(self, actions: _Array) -> StepResult:
        """Step every environment.

        Raises:
            EnvError: an environment failed, or `actions` are not one for each.
        """
        copy_actions(self._arrays["actions"], actions)
        self._group.step()
        if self._group.ended:
            return step_result(self._arrays, slice(0, self.num_envs))
        arrays = self._arrays
        return arrays["obs"], arrays["rewards"], arrays["terminated"], arrays["truncated"], {}

    def env_states(self) -> list[Any]:
        """See `EnvGroup.state`."""
        return self._group.state()

    def load_env_states(self, states: Sequence[Any]) -> _Array:
        """See `EnvGroup.load`; returns the observations."""
        self._group.load(states)
        return self._arrays["obs"]

    def load_moments(self, moments: Sequence[Any]) -> None:
        """See `EnvGroup.load_moments`."""
        self._group.load_moments(moments)

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 - the method's own
        """See `EnvGroup.call`."""
        check_callable("call", name)
        return tuple(self._group.call(name, args, kwargs))

    def set_attr(self, name: str, values: Any) -> None:  # noqa: ANN401 - any values
        """Set an attribute to one value for all environments, or to a list or tuple of one for each."""
        check_callable("set_attr", name)
        self._group.set_attr(name, one_each(values, self.num_envs))

    def log_info(self, patterns: Sequence[str]) -> None:
        """See `VecEnv.log_info`."""
        self._group.log_info(patterns)

    def read_info(self) -> InfoTotals:
        """See `VecEnv.read_info`."""
        return self._group.read_info()

    def restart_messages(self) -> list[str]:
        """Return one line per environment restarted since the last call."""
        found, self._group.restart_messages[:] = list(self._group.restart_messages), []
        return found

    @property
    def failures(self) -> int:
        """Environment restarts so far."""
        return int(self._arrays["failures"].sum())

    @property
    def seeding(self) -> tuple[_Array, _Array]:
        """Initial seeds [N] and restarts [N] of each environment, as views."""
        return self._arrays["seeds"], self._arrays["restarts"]

    def close_extras(self, **_: Any) -> None:  # noqa: ANN401 - Gymnasium's signature
        """Close every environment."""
        for env in self.envs:
            close_env(env)


def seeds(seed: int | Sequence[int | None] | None, n: int, options: dict[str, Any] | None) -> list[int]:
    """Return Gymnasium's `seed` as one number per environment, -1 for none.

    Raises:
        ConfigError: options, which aren't supported.
    """
    if options:
        raise ConfigError(f"options={options} are not supported; call reset without options.")
    each = seed if isinstance(seed, Sequence) else [None if seed is None else seed + i for i in range(n)]
    return [-1 if s is None else s for s in each]
