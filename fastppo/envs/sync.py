"""A vector environment of environments in this process, stepped in sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fastppo.envs.env_calls import check_callable, one_each
from fastppo.envs.env_group import EnvGroup, make_envs
from fastppo.envs.factory import check_maker, close_env
from fastppo.envs.fault_policy import NO_FAULT_POLICY, FaultPolicy
from fastppo.envs.info_sums import InfoTotals
from fastppo.envs.step_arrays import StepResult, check_spaces, copy_actions, layout, seeds, step_result

_Array = np.ndarray[Any, Any]


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
            ConfigError: a maker is no function.
            EnvError: their spaces aren't arrays.
        """
        for i, make in enumerate(env_fns):
            check_maker(f"env_fns[{i}]", make)
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
