"""Adapter for simulators that step many environments on the device and return torch tensors.

Isaac Lab, mjlab and ManiSkill return them directly, Brax and MJX through dlpack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from fastppo.envs.env_state import ResumeSupport
from fastppo.envs.vec_env import FinalObsBuffer, Transitions, VecEnv
from fastppo.errors import EnvError
from fastppo.spaces import ActionSpec, ObsSpec, ToEnv


class Simulator(Protocol):
    """The interface that a simulator must have, with same-step autoreset.

    Attributes:
        num_envs: N.
    """

    num_envs: int

    def reset(self) -> Any:  # noqa: ANN401 - obs, or (obs, extras)
        """Return observations ([N, *obs] or a mapping that holds them), or (observations, extras)."""

    def step(self, actions: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, Mapping[str, Any]]:
        """Return observations, rewards [N], terminated [N], truncated [N] and extras."""


class SimulatorEnv(VecEnv):
    """A simulator as a VecEnv: return it from `make_env`. It must run on the training device.

    Without final observations, a truncated episode is bootstrapped from V of the observation before the final one,
    and a note says so. Not supported: next-step autoreset, and per-environment seeds, for which simulators have no
    common interface.
    """

    final_obs_buffer: FinalObsBuffer
    resume_support = ResumeSupport("restart", "a simulator gives no access to its state")

    def __init__(
        self,
        simulator: Simulator,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        obs_key: str = "policy",
        final_obs_key: str | None = None,
    ) -> None:
        """Wrap `simulator`.

        Args:
            simulator: the simulator, with N environments.
            observation_space: space of one environment.
            action_space: space of one environment.
            obs_key: key of the policy's observations, where observations are a mapping.
            final_obs_key: key of the final observations [N, *obs] in extras, valid in ended rows; None: no such key.

        Raises:
            EnvError: a space is not supported.
        """
        self._simulator, self._key, self._final_key = simulator, obs_key, final_obs_key
        self.n_envs = self.num_envs = simulator.num_envs
        self.name = type(simulator).__name__
        self.obs_spec, self.action_spec = ObsSpec.from_space(observation_space), ActionSpec.from_space(action_space)
        self.groups = [slice(0, self.n_envs)]
        if final_obs_key is None:
            self.notes = [
                f"{self.name} gives no final observations: truncated episodes are bootstrapped from V of the "
                "observation before the final one (approximate)."
            ]
        self._checked = False

    def reset(self, seeds: np.ndarray[Any, Any]) -> Tensor:
        """Reset every environment; the first seed seeds torch's global generators, which simulators draw from."""
        torch.manual_seed(int(seeds[0]))
        found = self._simulator.reset()
        return self._obs(found[0] if isinstance(found, tuple) else found, "reset")

    def attach(self, transitions: Transitions) -> None:
        """Use `transitions` as the storage of all later steps."""
        self._to = transitions
        device = transitions.rewards.device
        # any step may truncate an episode, so keep one row of final observations per step
        self.final_obs_buffer = FinalObsBuffer.allocate(len(transitions.rewards), self.n_envs, self.obs_spec, 1, device)
        self._to_env = ToEnv(self.action_spec).to(device)

    def send(self, t: int, group: int) -> None:
        """Take step t and write its results.

        Raises:
            EnvError: shapes are wrong, or final observations are missing.
        """
        to, buffer = self._to, self.final_obs_buffer
        obs, rewards, terminated, truncated, extras = self._simulator.step(self._actions(to.actions[t]))
        obs = self._obs(obs, "step")
        if not self._checked:
            self._check(rewards, terminated, truncated)
        if self._final_key is None:
            last = to.obs[t]
        elif self._final_key in extras:
            last = self._obs(extras[self._final_key], "step's extras")
        else:
            raise EnvError(
                f"step's extras hold no {self._final_key!r}, but {', '.join(map(repr, extras)) or 'nothing'}."
            )
        if self._final_key is not None and last.untyped_storage().data_ptr() == obs.untyped_storage().data_ptr():
            raise EnvError(
                f"step's extras give {self._final_key!r} in the memory of the next observations, which overwrite it; "
                "copy it in the simulator."
            )
        buffer.obs[t].copy_(last)
        terminated, truncated = terminated.bool(), truncated.bool()
        buffer.end_steps[t].copy_(torch.where(truncated & ~terminated, t, len(to.rewards)))
        to.obs[t + 1].copy_(obs)
        to.rewards[t].copy_(rewards.detach())
        to.terminated[t].copy_(terminated)
        to.truncated[t].copy_(truncated)

    def store(self, t: int, group: int) -> Sequence[int]:
        """Return nothing: `send` wrote the results, and final observations stay in `final_obs_buffer`."""
        return ()

    def close(self) -> None:
        """Close the simulator, if it has a `close`."""
        if hasattr(self._simulator, "close"):
            self._simulator.close()

    def _actions(self, actions: Tensor) -> Tensor:
        # copied, because some simulators change their actions in place
        converted: Tensor = self._to_env(actions)
        return converted.reshape(self.n_envs, *self.action_spec.shape).clone()

    def _obs(self, found: Any, where: str) -> Tensor:  # noqa: ANN401 - a tensor, or a mapping of them
        if isinstance(found, Mapping):
            if self._key not in found:
                raise EnvError(f"observations of {where} are {', '.join(map(repr, found))}; name one with obs_key.")
            found = found[self._key]
        expected = (self.n_envs, *self.obs_spec.shape)
        if not isinstance(found, Tensor) or found.shape != expected:
            what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"as {type(found).__name__}"
            raise EnvError(f"{where} gave observations {what}; its space says a tensor of {expected}.")
        if hasattr(self, "_to") and found.device != self._to.rewards.device:
            raise EnvError(
                f"{where} gave observations on {found.device}; the rollout lies on {self._to.rewards.device}."
            )
        leaf = self.obs_spec.leaf
        # read back in each step, because one-hot encoding would fail on the device
        if leaf.kind == "discrete" and (outside := leaf.outside(found.numpy(force=True))):
            row, value, space = outside
            raise EnvError(
                f"environment {row} returned observation {value} in {where}, outside its observation_space {space}."
            )
        return found.detach()

    def _check(self, rewards: Tensor, terminated: Tensor, truncated: Tensor) -> None:
        rows = {"rewards": rewards, "terminated": terminated, "truncated": truncated}
        for name, x in rows.items():
            if not isinstance(x, Tensor) or x.shape != (self.n_envs,):
                what = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"as {type(x).__name__}"
                raise EnvError(f"step returned {name} {what}; it must be a tensor of ({self.n_envs},).")
        self._checked = True
