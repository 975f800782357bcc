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
from fastppo.envs.info_sums import NO_INFO, InfoTotals
from fastppo.envs.pack_observation import mask_under_key, n_choices
from fastppo.envs.tensor.info_sums import TensorInfoSums
from fastppo.envs.vec_env import FinalObsBuffer, Transitions, VecEnv
from fastppo.errors import EnvError
from fastppo.spaces.actions import ActionSpec, ToEnv
from fastppo.spaces.leaves import ObsLeaf
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import MASK_KEY, find, leaves_of, mask_leaf


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
        mask_key: str | None = None,
    ) -> None:
        """Wrap `simulator`.

        Args:
            simulator: the simulator, with N environments.
            observation_space: space of one environment.
            action_space: space of one environment.
            obs_key: key of the policy's observations, where observations are a mapping but the space is no Dict.
            final_obs_key: key of the final observations [N, *obs] in extras, valid in ended rows; None: no such key.
            mask_key: key of the masks of allowed actions [N, A] in the extras of reset and step; None: no such key.

        Raises:
            EnvError: a space is not supported.
        """
        self._simulator, self._key, self._final_key, self._mask_key = simulator, obs_key, final_obs_key, mask_key
        self.n_envs = self.num_envs = simulator.num_envs
        self.name = type(simulator).__name__
        self.action_spec = ActionSpec.from_space(action_space)
        self._observation_space, self._action_space = observation_space, action_space
        self.read((), (), masks=True)
        self.groups = [slice(0, self.n_envs)]
        self.approximates_finals = final_obs_key is None
        if self.approximates_finals:
            self.notes = [
                f"{self.name} gives no final observations: truncated episodes are bootstrapped from V of the "
                "observation before the final one (approximate)."
            ]
        self._checked = False
        self._info_sums: TensorInfoSums | None = None

    def read(self, obs_keys: Sequence[str], critic_obs_keys: Sequence[str], *, masks: bool) -> None:
        """Choose what to read of Dict observations, which the simulator returns as mappings of their keys.

        A mask of allowed actions is the key `action_mask` of the observation space, or `mask_key` of the extras.

        Raises:
            ConfigError: the observation space has no such keys.
            EnvError: a space is not supported, or a mask has the wrong size.
        """
        space, n = self._observation_space, n_choices(self._action_space)
        mask = None
        if masks and n and isinstance(space, spaces.Dict) and MASK_KEY in space.spaces:
            mask = mask_under_key(space.spaces[MASK_KEY], n)
        elif masks and n and self._mask_key is not None:
            mask = mask_leaf("info", n)
        self.obs_spec = ObsSpec(leaves_of(space, obs_keys, critic_obs_keys, mask))

    def reset(self, seeds: np.ndarray[Any, Any]) -> Tensor:
        """Reset every environment; the first seed seeds torch's global generators, which simulators draw from."""
        torch.manual_seed(int(seeds[0]))
        found = self._simulator.reset()
        obs, extras = found if isinstance(found, tuple) else (found, {})
        return self._obs(obs, "reset", extras)

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
        found, rewards, terminated, truncated, extras = self._simulator.step(self._actions(to.actions[t]))
        obs = self._obs(found, "step", extras)
        if not self._checked:
            self._check(rewards, terminated, truncated)
        if self._final_key is not None:
            if self._final_key not in extras:
                raise EnvError(
                    f"step's extras hold no {self._final_key!r}, but {', '.join(map(repr, extras)) or 'nothing'}."
                )
            final = extras[self._final_key]
            buffer.obs[t].copy_(self._obs(final, "step's extras", {}))  # nobody acts on these
            if all(map(_share_memory, self._arrays(final), self._arrays(found))):
                raise EnvError(
                    f"step's extras give {self._final_key!r} in the memory of the next observations, which overwrite "
                    "it; copy it in the simulator."
                )
        terminated, truncated = terminated.bool(), truncated.bool()
        if self._info_sums is not None:
            self._info_sums.add(extras, terminated | truncated)
        buffer.end_steps[t].copy_(torch.where(truncated & ~terminated, t, len(to.rewards)))
        to.obs[t + 1].copy_(obs)
        to.rewards[t].copy_(rewards.detach())
        to.terminated[t].copy_(terminated)
        to.truncated[t].copy_(truncated)

    def store(self, t: int, group: int) -> Sequence[int]:
        """Return nothing: `send` wrote the results, and final observations stay in `final_obs_buffer`."""
        return ()

    def log_info(self, patterns: Sequence[str]) -> None:
        """See `VecEnv.log_info`; the sums stay on the device."""
        self._info_sums = TensorInfoSums(patterns, self.n_envs)

    def read_info(self) -> InfoTotals:
        """See `VecEnv.read_info`."""
        return NO_INFO if self._info_sums is None else self._info_sums.take()

    def close(self) -> None:
        """Close the simulator, if it has a `close`."""
        if hasattr(self._simulator, "close"):
            self._simulator.close()

    def _actions(self, actions: Tensor) -> Tensor:
        # copied, because some simulators change their actions in place
        converted: Tensor = self._to_env(actions)
        return converted.reshape(self.n_envs, *self.action_spec.shape).clone()

    def _obs(self, found: Any, where: str, extras: Mapping[str, Any]) -> Tensor:  # noqa: ANN401 - a tree of tensors
        """Return packed observations [N, *obs], checked."""
        spec = self.obs_spec
        if self._is_keyed(found):
            if self._key not in found:
                raise EnvError(f"observations of {where} are {', '.join(map(repr, found))}; name one with obs_key.")
            found = found[self._key]
        for leaf in spec.leaves:
            if leaf.kind != "mask" or leaf.path:
                self._check_leaf(leaf, find(found, leaf), where)
        mask = None
        if spec.has_mask and not spec.leaves[-1].path and where != "step's extras":
            mask = extras.get(str(self._mask_key))
            if not isinstance(mask, Tensor) or mask.shape != (self.n_envs, spec.leaves[-1].size):
                raise EnvError(
                    f"{where} gave extras without masks of {(self.n_envs, spec.leaves[-1].size)} under "
                    f"{self._mask_key!r}; return them with every observation."
                )
        packed = spec.pack_tree(found, mask).detach()
        if hasattr(self, "_to") and packed.device != self._to.rewards.device:
            raise EnvError(
                f"{where} gave observations on {packed.device}; the rollout lies on {self._to.rewards.device}."
            )
        return packed

    def _is_keyed(self, found: Any) -> bool:  # noqa: ANN401 - a tree of tensors
        """Whether observations come under `obs_key`, which their space doesn't show."""
        return isinstance(found, Mapping) and not isinstance(self._observation_space, (spaces.Dict, spaces.Tuple))

    def _arrays(self, found: Any) -> list[Tensor]:  # noqa: ANN401 - a tree of tensors
        """Return the tensors that a network reads."""
        tree = found[self._key] if self._is_keyed(found) else found
        return [find(tree, leaf) for leaf in self.obs_spec.seen]

    def _check_leaf(self, leaf: ObsLeaf, x: Any, where: str) -> None:  # noqa: ANN401 - a tensor, hopefully
        name, expected = f" {leaf.name}" if leaf.path else "", (self.n_envs, *leaf.shape)
        if not isinstance(x, Tensor) or x.shape != expected:
            what = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"as {type(x).__name__}"
            raise EnvError(f"{where} gave observations{name} {what}; its space says a tensor of {expected}.")
        # read back in each step, because one-hot encoding would fail on the device
        if leaf.kind == "discrete" and (outside := leaf.outside(x.numpy(force=True))):
            row, value, space = outside
            raise EnvError(
                f"environment {row} returned observation{name} {value} in {where}, outside its observation_space "
                f"{space}."
            )

    def _check(self, rewards: Tensor, terminated: Tensor, truncated: Tensor) -> None:
        rows = {"rewards": rewards, "terminated": terminated, "truncated": truncated}
        for name, x in rows.items():
            if not isinstance(x, Tensor) or x.shape != (self.n_envs,):
                what = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"as {type(x).__name__}"
                raise EnvError(f"step returned {name} {what}; it must be a tensor of ({self.n_envs},).")
        self._checked = True


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
