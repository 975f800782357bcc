"""Any Gymnasium vector environment as a VecEnv, in each of the three autoreset modes.

same-step: a finished episode's successor starts in the same step; true last observations arrive in `final_obs`.
next-step: the step after an end only resets; that row is marked as filler, and its observation is the last one.
disabled:  driven from here with `reset_mask`, and so the same as same-step to whoever looks on.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from fastppo.envs.env_state import NotPlainError, Resumable, set_state, state_of
from fastppo.envs.pool import PoolVectorEnv
from fastppo.envs.sync import Outcome, SerialVectorEnv
from fastppo.envs.vec_env import Transitions
from fastppo.errors import EnvError
from fastppo.spaces import ActionSpec, ObsSpec

_Array = np.ndarray[Any, Any]


UNKNOWN = Resumable("restart", "its state can't be asked for")


class _Stage:
    """A step's results and actions of one group on their way: one block of host memory and its twin on the device.

    All that a step yields crosses in one copy, and its actions come in another. The memory is pinned for CUDA, so that
    copies are not waited for; the wait for the next actions is the only one in a step.

    Attributes:
        host: views of the block here, as numpy: obs, rewards, terminated, truncated, valid (None without fillers).
        device: the same views there.
    """

    def __init__(self, to: Transitions, at: slice) -> None:
        """For the part `at` of the environments in `to`."""
        parts = [None if x is None else x[0, at] for x in (to.obs, to.rewards, to.terminated, to.truncated, to.valid)]
        sizes = [0 if x is None else -(-x.numel() * x.element_size() // 16) * 16 for x in parts]
        device, pinned = to.rewards.device, to.rewards.device.type == "cuda"
        self._here = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        self._there = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)

        def views(block: Tensor) -> list[Tensor | None]:
            pieces = torch.split(block, sizes)
            return [
                None if x is None else piece[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
                for x, piece in zip(parts, pieces, strict=True)
            ]

        self.host = [None if x is None else x.numpy() for x in views(self._here)]
        self.device = views(self._there)
        self._actions = torch.zeros(to.actions[0, at].shape, dtype=to.actions.dtype, pin_memory=pinned)
        self._pinned = pinned

    def send(self) -> None:
        """Copy the block to the device, without waiting."""
        self._there.copy_(self._here, non_blocking=True)

    def fetch(self, actions: Tensor) -> _Array:
        """Actions from the device, waited for; the step before has left the block by then."""
        self._actions.copy_(actions, non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        fetched: _Array = self._actions.numpy()
        return fetched


class HostEnv:
    """A Gymnasium vector environment behind the VecEnv protocol."""

    cuts: None = None
    state: None = None

    def __init__(
        self,
        venv: VectorEnv[Any, Any, Any],
        *,
        seeded: bool = False,
        resumable: Resumable = UNKNOWN,
        timeout: float | None = None,
    ) -> None:
        """Take over `venv`.

        Args:
            venv: any vector environment.
            seeded: it got its seed when it was made and wants none in reset.
            resumable: how it goes on after a resume.
            timeout: seconds that a step of an AsyncVectorEnv may take; a pool has its own.

        Raises:
            EnvError: an unsupported space, or no declared autoreset mode.
        """
        self.venv, self._seeded, self._timeout = venv, seeded, timeout
        self.resumable = resumable
        self._keeper = venv if isinstance(venv, (SerialVectorEnv, PoolVectorEnv)) else None
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
        self.notes: Sequence[str] = []
        if self.obs_spec.leaf.kind == "vector" and self.obs_spec.source_dtype != "float32":
            self._note(f"observations are {self.obs_spec.source_dtype}; stored as float32, cast once.")
        self.groups: Sequence[slice] = getattr(venv, "groups", [slice(0, self.n_envs)])
        self._ended = np.zeros(self.n_envs, bool)
        self._final = np.zeros((self.n_envs, *self.obs_spec.shape), self.obs_spec.source_dtype)
        self.final_obs = torch.from_numpy(self._final)
        self._out: list[Outcome] = [() for _ in self.groups]  # type: ignore[misc]
        self._checked = self._broken = False

    @property
    def obs_bounds(self) -> tuple[Tensor, Tensor] | None:
        """What observations should lie between, where their space says more than their type."""
        space = self.venv.single_observation_space
        if (
            not isinstance(space, gym.spaces.Box)
            or space.dtype.kind != "f"
            or not (np.isfinite(space.low).any() or np.isfinite(space.high).any())
        ):
            return None
        low, high = (torch.from_numpy(np.asarray(x, np.float32)) for x in (space.low, space.high))
        return low, high

    def reset(self, seeds: _Array) -> Tensor:
        """Start every environment with its seed, where the vectoriser takes several."""
        self._ended[:] = False
        if self._seeded:
            obs, _ = self.venv.reset()
        elif isinstance(self.venv.unwrapped, (SyncVectorEnv, AsyncVectorEnv, SerialVectorEnv, PoolVectorEnv)):
            obs, _ = self.venv.reset(seed=seeds.tolist())
        else:
            obs = self._reset_foreign(seeds)
        expected = (self.n_envs, *self.obs_spec.shape)
        if np.shape(obs) != expected:
            raise EnvError(f"reset returned observations of shape {np.shape(obs)}; its space says {expected}.")
        return torch.from_numpy(obs)

    def attach(self, transitions: Transitions, *, staged: bool | None = None) -> None:
        """Write into `transitions` from now on: through numpy where they lie in this memory, else `staged`."""
        self._to = transitions
        staged = transitions.obs.device.type != "cpu" if staged is None else staged
        self._stages = [_Stage(transitions, at) for at in self.groups] if staged else None
        self._rows: list[Any] = [None if x is None or staged else x.numpy() for x in transitions]

    def send(self, t: int, group: int) -> None:
        """Begin step t: done at once, unless the vector environment steps in groups.

        Raises:
            EnvError: a worker process died.
        """
        at = self.groups[group]
        mine = self._rows[1][t, at] if self._stages is None else self._stages[group].fetch(self._to.actions[t, at])
        actions = self.action_spec.to_env(mine)
        if isinstance(self.venv, PoolVectorEnv):
            self.venv.send(group, actions)
            return
        try:
            if isinstance(self.venv, AsyncVectorEnv):
                self.venv.step_async(actions)
                self._out[group] = self.venv.step_wait(self._timeout)
            else:
                self._out[group] = self.venv.step(actions)
        except multiprocessing.TimeoutError:
            self._broken = True
            raise EnvError(
                f"the environments have not answered for {self._timeout:.0f} s (--env-timeout); "
                "vectorization=pool would say which, and where it is."
            ) from None
        except (EOFError, ConnectionError):  # all that a dead worker leaves of itself
            processes = getattr(self.venv.unwrapped, "processes", [])
            wait([p.sentinel for p in processes], timeout=1.0)  # its pipe closes a moment before it is gone
            dead = [f"{i} (exit code {p.exitcode})" for i, p in enumerate(processes) if not p.is_alive()]
            self._broken = True
            raise EnvError(f"the worker process of environment {', '.join(dead) or '?'} died in a step.") from None

    def wait(self, group: int) -> None:
        """End a step that was only begun."""
        if isinstance(self.venv, PoolVectorEnv):
            self._out[group] = self.venv.wait(group)

    def store(self, t: int, group: int) -> Sequence[int]:
        """Write a step down.

        Raises:
            EnvError: shapes or types other than promised, or no last observations where there must be.
        """
        at = self.groups[group]
        obs, rewards, terminated, truncated, infos = self._out[group]
        if not self._checked:
            self._check(at, obs, rewards, terminated, truncated)
        cut: Sequence[int] = ()
        real = None
        if self.fillers:
            real = ~self._ended[at]
            # a step that only resets ends nothing, whatever its flags say
            terminated, truncated = terminated & real, truncated & real
            self._ended[at] = terminated | truncated
        elif truncated.any():
            mine = np.flatnonzero(truncated & ~terminated)
            self._keep_final(mine, at.start, obs, infos)
            cut = (mine + at.start).tolist()
        if self.mode == AutoresetMode.DISABLED and (done := terminated | truncated).any():
            # the vector environment may clear its own flags in place
            terminated, truncated = terminated.copy(), truncated.copy()
            obs, _ = self.venv.reset(options={"reset_mask": done})
        if self._stages is None:
            to_obs, _, to_rewards, to_terminated, to_truncated, to_valid = self._rows
            to_obs[t + 1, at], to_rewards[t, at] = obs, rewards
            to_terminated[t, at], to_truncated[t, at] = terminated, truncated
            if to_valid is not None:
                to_valid[t, at] = real
            return cut
        stage, to = self._stages[group], self._to
        for place, array in zip(stage.host, (obs, rewards, terminated, truncated, real), strict=True):
            if place is not None:
                place[...] = array
        stage.send()
        rows = (to.obs[t + 1, at], to.rewards[t, at], to.terminated[t, at], to.truncated[t, at])
        for row, value in zip((*rows, None if to.valid is None else to.valid[t, at]), stage.device, strict=True):
            if row is not None and value is not None:
                row.copy_(value)
        return cut

    def state_dict(self) -> dict[str, Any]:
        """Each environment's state, or the whole vector environment's, and who ended in the last step."""
        if self.resumable.way == "restart":
            return {}
        ended = {"ended": torch.from_numpy(self._ended)}
        if self._keeper is None:
            try:
                return {"envs": state_of(self.venv), **ended}
            except NotPlainError:  # it was when it was tried out
                return {}
        states = self._keeper.env_states()
        if len(states) < self.n_envs:
            return {}
        seeds, restarts = (torch.from_numpy(x) for x in self._keeper.seeding)
        return {"envs": states, "seeds": seeds, "restarts": restarts, **ended}

    def load_state_dict(self, saved: Mapping[str, Any], obs: Tensor) -> None:
        """Go on from there.

        Raises:
            EnvError: what is no such state, or leads to other observations than `obs`.
        """
        self._ended[:] = saved["ended"].numpy()
        if self._keeper is None:
            set_state(self.venv, saved["envs"])
            return
        for mine, theirs in zip(self._keeper.seeding, (saved["seeds"], saved["restarts"]), strict=True):
            mine[:] = theirs.numpy()
        there = self._keeper.load_env_states(saved["envs"])
        if self.resumable.way == "replay":
            if not torch.equal(torch.from_numpy(there).to(obs.dtype), obs.cpu()):
                raise EnvError("the open episodes, played again, led to other observations.")
        else:
            there[:] = obs.cpu().numpy()  # where an environment last stood, should it fail in its first step

    def restart_messages(self) -> Sequence[str]:
        """Lines about environments that failed and were made anew since the last call."""
        return () if self._keeper is None or not self._keeper.fault_policy.restarts else self._keeper.restart_messages()

    @property
    def restarts(self) -> int:
        """How many times an environment failed and was made anew, or a worker was lost and replaced."""
        return 0 if self._keeper is None else self._keeper.failures

    def close(self) -> None:
        """Close the vector environment, by force where a worker no longer answers."""
        if not self._broken:
            self.venv.close()
            return
        # Gymnasium's close, also the forced one, waits for the answer that will never come
        for process in getattr(self.venv.unwrapped, "processes", []):
            process.kill()
            process.join()
        self.venv.unwrapped.closed = True

    def _reset_foreign(self, seeds: _Array) -> _Array:
        """Reset a vectoriser whose form of seeds isn't known: an array (ALE), a list, or one number for all."""
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

    def _keep_final(self, cut: _Array, start: int, obs: _Array, infos: dict[str, Any]) -> None:
        if self.mode == AutoresetMode.DISABLED:
            self._final[cut + start] = obs[cut]
            return
        final = infos.get("final_obs")
        for i in cut:
            if final is None or final[i] is None:
                raise EnvError(
                    f"environment {i} was truncated, but infos['final_obs'] does not hold its last observation; "
                    "same-step autoreset must supply it."
                )
            if np.shares_memory(final[i], obs):
                raise EnvError(
                    f"infos['final_obs'][{i}] lies in the memory of the next observation and is overwritten by it; "
                    "have the vector environment copy it."
                )
            self._final[start + i] = final[i]

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
