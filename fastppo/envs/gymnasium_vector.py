"""Any Gymnasium vector environment as a VecEnv, in each of the three autoreset modes.

same-step: the next episode starts in the step that ends one; final observations arrive in `infos["final_obs"]`.
next-step: the step after an episode end only resets; its row is marked as filler and holds the final observation.
disabled:  reset here with `reset_mask` in the same step, so that the rollout sees same-step autoreset.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from fastppo.envs.env_calls import call_env, check_callable, one_each, set_env
from fastppo.envs.env_state import ResumeSupport, moments_of, set_state, state_of
from fastppo.envs.factory import close_env
from fastppo.envs.info_sums import NO_INFO, InfoSums, InfoTotals
from fastppo.envs.plain_data import NotPlainError
from fastppo.envs.step_arrays import StepResult
from fastppo.envs.vec_env import Transitions, VecEnv, no_access
from fastppo.errors import ENV_ERRORS, EnvError, FastPPOError, cause_line
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import PackedSpace, finite_bounds

_Array = np.ndarray[Any, Any]


# The seeds that a vector environment's reset takes: a list, none (its constructor took one), or not known
Seeding = Literal["list", "constructor", "unknown"]


class _Stage:
    """Host and device buffers for one group's actions and step results.

    All results of a step cross to the device in one copy, and its actions come back in another. The host memory is
    pinned for CUDA, so that copies are asynchronous; waiting for the next actions is the only synchronisation per step.

    Attributes:
        host: numpy views of the host buffer: obs, rewards, terminated, truncated, valid (None without fillers).
        device: the same views of the device buffer.
    """

    def __init__(self, to: Transitions, at: slice) -> None:
        """Allocate buffers for the environments `at` of `to`."""
        parts = [None if x is None else x[0, at] for x in (to.obs, to.rewards, to.terminated, to.truncated, to.valid)]
        sizes = [0 if x is None else -(-x.numel() * x.element_size() // 16) * 16 for x in parts]
        device, pinned = to.rewards.device, to.rewards.device.type == "cuda"
        self._host_buffer = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        self._device_buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)

        def views(block: Tensor) -> list[Tensor | None]:
            pieces = torch.split(block, sizes)
            return [
                None if x is None else piece[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
                for x, piece in zip(parts, pieces, strict=True)
            ]

        self.host = [None if x is None else x.numpy() for x in views(self._host_buffer)]
        self.device = views(self._device_buffer)
        self._actions = torch.zeros(to.actions[0, at].shape, dtype=to.actions.dtype, pin_memory=pinned)
        self._pinned = pinned

    def send(self) -> None:
        """Copy the results to the device, asynchronously."""
        self._device_buffer.copy_(self._host_buffer, non_blocking=True)

    def fetch(self, actions: Tensor) -> _Array:
        """Copy actions to the host and wait for them; the copy of the last results has then finished too."""
        self._actions.copy_(actions, non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        fetched: _Array = self._actions.numpy()
        return fetched


class GymnasiumVecEnv(VecEnv):
    """A Gymnasium vector environment as a VecEnv."""

    def __init__(
        self,
        venv: VectorEnv[Any, Any, Any],
        *,
        seeding: Seeding = "list",
        resume_support: ResumeSupport = VecEnv.resume_support,
    ) -> None:
        """Wrap `venv`.

        Args:
            venv: any vector environment.
            seeding: the seeds that its reset takes; "unknown" tries an array, a list and a single seed.
            resume_support: how it continues after a resume.

        Raises:
            EnvError: an unsupported space, or no declared autoreset mode.
        """
        self.venv, self._seeding, self.resume_support = venv, seeding, resume_support
        self.n_envs = venv.num_envs
        self.obs_spec = ObsSpec.from_space(venv.single_observation_space)
        self.action_spec = ActionSpec.from_space(venv.single_action_space)
        declared = venv.metadata.get("autoreset_mode")
        if declared is None:
            raise EnvError(
                f"{type(venv.unwrapped).__name__} does not declare its autoreset mode; "
                "set metadata['autoreset_mode'] to a gymnasium.vector.AutoresetMode."
            )
        try:
            self.mode = AutoresetMode(declared)
        except ValueError:
            modes = ", ".join(mode.name for mode in AutoresetMode)
            raise EnvError(f"metadata['autoreset_mode'] is {declared!r}; it must be one of {modes}.") from None
        self.fillers = self.mode == AutoresetMode.NEXT_STEP
        self.notes = []
        self.obs_bounds = _bounds(venv.single_observation_space)
        first = self.obs_spec.leaves[0]
        if first.kind == "vector" and self.obs_spec.source_dtype != "float32" and self.obs_spec.dtype == torch.float32:
            self._note(f"observations are {self.obs_spec.source_dtype}; stored as float32, cast once.")
        self.groups = getattr(venv, "groups", [slice(0, self.n_envs)])
        self._ended = np.zeros(self.n_envs, bool)
        self._final = np.zeros((self.n_envs, *self.obs_spec.shape), self.obs_spec.source_dtype)
        self.final_obs = torch.from_numpy(self._final)
        self._results: list[StepResult] = [() for _ in self.groups]  # type: ignore[misc]
        self._checked, self._steps = False, 0
        self._info_sums: InfoSums | None = None
        self._discrete = first if self.obs_spec.is_single and first.kind == "discrete" else None

    def reset(self, seeds: _Array) -> Tensor:
        """Reset every environment with its own seed, as far as the vector environment takes seeds."""
        self._ended[:] = False
        if self._seeding == "constructor":
            obs, _ = self.venv.reset()
        elif self._seeding == "list":
            obs, _ = self.venv.reset(seed=seeds.tolist())
        else:
            obs = self._reset_with_unknown_seeding(seeds)
        expected = (self.n_envs, *self.obs_spec.shape)
        if np.shape(obs) != expected:
            raise EnvError(f"reset returned observations of shape {np.shape(obs)}; its space says {expected}.")
        self._check_discrete(obs, 0, "reset")
        return torch.from_numpy(obs)

    def attach(self, transitions: Transitions, *, staged: bool | None = None) -> None:
        """Use `transitions` as storage: through numpy if they are in host memory, else through `staged` copies."""
        self._to = transitions
        staged = transitions.obs.device.type != "cpu" if staged is None else staged
        self._stages = [_Stage(transitions, at) for at in self.groups] if staged else None
        self._rows: list[Any] = [None if x is None or staged else x.numpy() for x in transitions]

    def send(self, t: int, group: int) -> None:
        """Start step t; it completes here, unless the vector environment steps in groups.

        Raises:
            EnvError: an environment or a worker process failed.
        """
        at = self.groups[group]
        mine = self._rows[1][t, at] if self._stages is None else self._stages[group].fetch(self._to.actions[t, at])
        self._begin_step(group, self.action_spec.to_env(mine))

    def _begin_step(self, group: int, actions: _Array) -> None:
        try:
            self._results[group] = self.venv.step(actions)
        except (EOFError, ConnectionError) as error:  # the only trace of a dead worker process
            name = type(self.venv.unwrapped).__name__
            raise EnvError(
                f"a worker process of {name} died in step {self._steps + 1} ({type(error).__name__})."
            ) from error
        except FastPPOError:
            raise
        except ENV_ERRORS as error:
            raise self._failure(f"step {self._steps + 1}", error) from error

    def store(self, t: int, group: int) -> Sequence[int]:
        """Write a step's results into the rollout and return the environments whose episode was truncated.

        Raises:
            EnvError: wrong shapes or dtypes, or missing final observations.
        """
        at = self.groups[group]
        obs, rewards, terminated, truncated, infos = self._results[group]
        if not self._checked:
            self._check(at, obs, rewards, terminated, truncated)
        self._steps += group == 0
        self._check_discrete(obs, at.start, f"step {self._steps}")
        truncations: Sequence[int] = ()
        real = None
        if self.fillers:
            real = ~self._ended[at]
            # a step that only resets ends nothing, whatever its flags say
            terminated, truncated = terminated & real, truncated & real
            self._ended[at] = terminated | truncated
        elif np.count_nonzero(truncated):  # faster than any()
            mine = np.flatnonzero(truncated & ~terminated)
            self._keep_final(mine, at.start, obs, infos)
            truncations = (mine + at.start).tolist()
        if self._info_sums is not None:
            self._info_sums.add_batch(infos, terminated | truncated, real)
        if self.mode == AutoresetMode.DISABLED and (done := terminated | truncated).any():
            # the vector environment may clear its own flags in place
            terminated, truncated = terminated.copy(), truncated.copy()
            obs, _ = self.venv.reset(options={"reset_mask": done})
            self._check_discrete(obs, at.start, f"the reset after step {self._steps}")
        if self._stages is None:
            to_obs, _, to_rewards, to_terminated, to_truncated, to_valid = self._rows
            to_obs[t + 1, at], to_rewards[t, at] = obs, rewards
            to_terminated[t, at], to_truncated[t, at] = terminated, truncated
            if to_valid is not None:
                to_valid[t, at] = real
            return truncations
        stage, to = self._stages[group], self._to
        for place, array in zip(stage.host, (obs, rewards, terminated, truncated, real), strict=True):
            if place is not None:
                place[...] = array
        stage.send()
        rows = (to.obs[t + 1, at], to.rewards[t, at], to.terminated[t, at], to.truncated[t, at])
        for row, value in zip((*rows, None if to.valid is None else to.valid[t, at]), stage.device, strict=True):
            if row is not None and value is not None:
                row.copy_(value)
        return truncations

    def log_info(self, patterns: Sequence[str]) -> None:
        """See `VecEnv.log_info`."""
        self._info_sums = InfoSums(patterns, self.n_envs)

    def read_info(self) -> InfoTotals:
        """See `VecEnv.read_info`."""
        return NO_INFO if self._info_sums is None else self._info_sums.take()

    def state_dict(self) -> dict[str, Any]:
        """Return the vector environment's attributes, and which episodes ended in the last step."""
        if self.resume_support.way == "restart":
            moments = [moments_of(env) for env in self._wrapped()]
            return {"moments": moments} if any(moments) else {}
        try:
            return {"envs": state_of(self.venv), "ended": torch.from_numpy(self._ended)}
        except NotPlainError:  # the probe found plain data, but an attribute changed its type since
            return {}

    def load_state_dict(self, saved: Mapping[str, Any], obs: Tensor) -> None:
        """Restore in place from `state_dict()`.

        Raises:
            EnvError: `saved` is not such a state.
        """
        self._ended[:] = saved["ended"].numpy()
        set_state(self.venv, saved["envs"])

    def load_moments(self, saved: Mapping[str, Any]) -> None:
        """Restore the running moments of wrappers from `state_dict()`; call before a reset."""
        for env, moments in zip(self._wrapped(), saved.get("moments", ()), strict=False):
            if moments:
                set_state(env, moments)

    def _wrapped(self) -> list[Any]:
        """Return the objects whose wrappers may keep running moments: the vector environment, and those it holds."""
        return [self.venv, *getattr(self.venv.unwrapped, "envs", ())]

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 - the method's own
        """See `VecEnv.call`.

        Raises:
            EnvError: this vector environment gives no access to its environments, or `call` fails in one of them.
        """
        access = self._access("call")
        check_callable("call", name)
        self.changed = True
        if (envs := self._own_envs()) is not None:
            return tuple(call_env(i, env, name, args, kwargs) for i, env in enumerate(envs))
        with self._failing_in(f"call({name!r})"):
            return tuple(access(name, *args, **kwargs))

    def set_attr(self, name: str, values: Any) -> None:  # noqa: ANN401 - any values
        """See `VecEnv.set_attr`.

        Raises:
            EnvError: this vector environment gives no access to its environments, or one of them refuses.
        """
        access, each = self._access("set_attr"), one_each(values, self.n_envs)
        check_callable("set_attr", name)
        self.changed = True
        if (envs := self._own_envs()) is not None:
            for i, (env, value) in enumerate(zip(envs, each, strict=True)):
                set_env(i, env, name, value)
            return
        with self._failing_in(f"set_attr({name!r})"):
            access(name, each)

    def _own_envs(self) -> Sequence[gym.Env[Any, Any]] | None:
        """Return the environments of Gymnasium's SyncVectorEnv, whose own `call` doesn't say which of them failed."""
        inner = self.venv.unwrapped
        return inner.envs if type(inner) is SyncVectorEnv else None

    @contextlib.contextmanager
    def _failing_in(self, doing: str) -> Iterator[None]:
        """Raise errors of a vector environment's own `call` or `set_attr` as EnvError."""
        try:
            yield
        except FastPPOError:
            raise
        except ENV_ERRORS as error:
            raise self._failure(doing, error) from error

    def _failure(self, doing: str, error: BaseException) -> EnvError:
        return EnvError(f"{type(self.venv.unwrapped).__name__} failed in {doing}: {cause_line(error)}.")

    def _access(self, method: str) -> Callable[..., Any]:
        found = getattr(self.venv, method, None) or getattr(self.venv.unwrapped, method, None)
        if found is None:
            raise EnvError(no_access(type(self.venv.unwrapped).__name__, method))
        access: Callable[..., Any] = found
        return access

    def close(self) -> None:
        """Close the vector environment."""
        close_env(self.venv)

    def _reset_with_unknown_seeding(self, seeds: _Array) -> _Array:
        """Reset with an array of seeds (ALE takes one), else a list, else one seed for all."""
        for form in (seeds.astype(np.int64), seeds.tolist()):
            try:
                obs: _Array = self.venv.reset(seed=form)[0]  # type: ignore[arg-type]
                return obs
            except (TypeError, ValueError, gym.error.Error):
                continue
        obs = self.venv.reset(seed=int(seeds[0]))[0]
        self._note("this vector environment takes one seed: one random stream serves all environments.")
        return obs

    def _note(self, text: str) -> None:
        self.notes = [*self.notes, text]

    def _keep_final(self, truncated: _Array, start: int, obs: _Array, infos: dict[str, Any]) -> None:
        if self.mode == AutoresetMode.DISABLED:
            self._final[truncated + start] = obs[truncated]
            return
        final = infos.get("final_obs")
        for i in truncated:
            if final is None or final[i] is None:
                raise EnvError(
                    f"environment {i} was truncated, but infos['final_obs'] does not hold its final observation; "
                    "same-step autoreset must supply it."
                )
            if np.shares_memory(final[i], obs):
                raise EnvError(
                    f"infos['final_obs'][{i}] shares memory with the next observation and is overwritten by it; "
                    "copy it in the vector environment."
                )
            self._check_discrete(np.asarray(final[i])[None], start + int(i), f"step {self._steps}")
            self._final[start + i] = final[i]

    def _check_discrete(self, obs: _Array, start: int, where: str) -> None:
        """Refuse discrete observations outside their space: they have no one-hot vector."""
        if self._discrete is not None and (found := self._discrete.outside(obs)):
            row, value, space = found
            raise EnvError(
                f"environment {start + row} returned observation {value} in {where}, outside its observation_space "
                f"{space}."
            )

    def _check(self, at: slice, obs: _Array, rewards: _Array, terminated: _Array, truncated: _Array) -> None:
        n = at.stop - at.start
        rows = {"observations": (obs, self.obs_spec.shape), "rewards": (rewards, ())}
        rows |= {"terminated": (terminated, ()), "truncated": (truncated, ())}
        for name, (array, shape) in rows.items():
            if np.shape(array) != (n, *shape):
                raise EnvError(f"step returned {name} of shape {np.shape(array)}, not {(n, *shape)}.")
        for name in ("terminated", "truncated"):
            if rows[name][0].dtype != np.bool_:
                raise EnvError(f"step returned {name} as {rows[name][0].dtype}; it must be bool.")
        self._checked = True


def _bounds(space: gym.Space[Any]) -> tuple[tuple[Tensor, Tensor] | None, ...]:
    """Return the finite bounds of each array of an observation; empty if there are none."""
    found = space.bounds if isinstance(space, PackedSpace) else (finite_bounds(space),)
    if all(bounds is None for bounds in found):
        return ()
    return tuple(None if x is None else (torch.from_numpy(x[0]), torch.from_numpy(x[1])) for x in found)
