"""The interface between the training loop and N environments, in this process, in workers or on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastppo.envs.env_state import ResumeSupport
from fastppo.envs.info_sums import NO_INFO, InfoTotals
from fastppo.errors import ConfigError, EnvError
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec


class Transitions(NamedTuple):
    """The rollout's tensors that an environment reads (actions) and writes (all others).

    Attributes:
        obs: [T + 1, N, *obs] obs[t + 1] follows step t; after an episode end it is the first of the next episode.
        actions: [T, N, *action] as sampled from the policy's distribution.
        rewards: [T, N] raw.
        terminated: [T, N] bool: the task ended; the value of the successor is 0.
        truncated: [T, N] bool: a time limit ended the episode; bootstrap from V of the final observation.
        valid: [T, N] bool: False where the vector env only reset (next-step autoreset); None: all True.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor | None

    @classmethod
    def allocate(cls, n_steps: int, env: VecEnv, device: torch.device) -> Transitions:
        """Allocate storage for `n_steps` of `env`; zeros make the OS commit the memory now, not mid-training."""
        dist, rows = env.action_spec.distribution, (n_steps, env.n_envs)

        def flags() -> Tensor:
            return torch.zeros(rows, dtype=torch.bool, device=device)

        return cls(
            obs=env.obs_spec.blank(n_steps + 1, env.n_envs, device=device),
            actions=torch.zeros((*rows, *dist.action_shape), dtype=dist.action_dtype, device=device),
            rewards=torch.zeros(rows, device=device),
            terminated=flags(),
            truncated=flags(),
            valid=flags() if env.fillers else None,
        )


class FinalObsBuffer(NamedTuple):
    """Final observations of the episodes truncated in one rollout, kept on the device.

    A time limit of L steps truncates an environment at most C = (T - 1) // L + 1 times in T steps.

    Attributes:
        step: [] int64, steps taken in this rollout.
        obs: [C, N, *obs] final observation of each environment's k-th truncated episode.
        end_steps: [C, N] int64, the step that truncated it; T in unused rows.
        counts: [N] int64, truncated episodes so far.
    """

    step: Tensor
    obs: Tensor
    end_steps: Tensor
    counts: Tensor

    @classmethod
    def allocate(
        cls, n_steps: int, n_envs: int, obs_spec: ObsSpec, max_steps: int | None, device: torch.device
    ) -> FinalObsBuffer:
        """Allocate for rollouts of `n_steps` with a time limit of `max_steps`; None: no limit."""
        capacity = 0 if max_steps is None else (n_steps - 1) // max_steps + 1
        step, counts = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((), (n_envs,)))
        end_steps = torch.full((capacity, n_envs), n_steps, device=device)
        return cls(step, obs_spec.blank(capacity, n_envs, device=device), end_steps, counts)

    def clear(self, n_steps: int) -> None:
        """Empty the buffer before a rollout of `n_steps`."""
        self.step.zero_()
        self.counts.zero_()
        self.end_steps.fill_(n_steps)


class VecEnv(ABC):
    """N environments stepped together, as the training loop drives them.

    A step of one group is `send`, `wait`, `store`. Most backends have a single group; with two, the policy acts on one
    group while worker processes step the other.

    Subclasses implement the abstract methods and set the attributes without a default. Everything else is an optional
    capability: override it where the backend has it.

    Attributes:
        n_envs: N.
        groups: slices of 0..N-1 that are stepped together.
        obs_spec: of one observation.
        action_spec: of one action.
        fillers: whether some steps only reset (next-step autoreset), so that `Transitions.valid` is needed.
        final_obs: [N, *obs] on the host; valid in the rows that the last `store` returned.
        notes: what the user should know about these environments, one line each.
        obs_bounds: lowest and highest values of each array of an observation; None for an array without finite bounds.
            Empty: none has any.
        resume_support: how these environments continue after a resume.
        approximates_finals: whether final observations are missing, so that V of the one before stands in for theirs.
        final_obs_buffer: final observations of a whole rollout, for environments on the device; None: `store` reports
            truncated episodes.
        capturable_state: every tensor that a step changes outside the rollout, by name, if CUDA graphs can capture a
            step; else None.
        changed: whether `call` or `set_attr` may have changed an environment since the last checkpoint.
    """

    n_envs: int
    groups: Sequence[slice]
    obs_spec: ObsSpec
    action_spec: ActionSpec
    fillers: bool = False
    final_obs: Tensor = torch.empty(0)
    notes: Sequence[str] = ()
    obs_bounds: tuple[tuple[Tensor, Tensor] | None, ...] = ()
    resume_support: ResumeSupport = ResumeSupport("restart", "it gives no access to its state")
    approximates_finals: bool = False
    final_obs_buffer: FinalObsBuffer | None = None
    capturable_state: Mapping[str, Tensor] | None = None
    changed: bool = False

    @abstractmethod
    def reset(self, seeds: np.ndarray[Any, Any]) -> Tensor:
        """Reset every environment with its own seed, [N] as `env_seeds` draws them; return obs [N, *obs]."""

    @abstractmethod
    def attach(self, transitions: Transitions) -> None:
        """Use these tensors as the storage of all later steps."""

    @abstractmethod
    def send(self, t: int, group: int) -> None:
        """Start step t of a group with its rows of actions[t]."""

    def wait(self, group: int) -> None:  # noqa: B027 - an optional capability
        """Wait for the step that `send` started; by default `send` completes it."""

    @abstractmethod
    def store(self, t: int, group: int) -> Sequence[int]:
        """Write the step's results into row t (obs: t + 1) and return the environments with a new `final_obs` row.

        Those are the ones whose episode was truncated and not terminated. Empty under next-step autoreset, where the
        next row holds the final observation, and for environments with a `final_obs_buffer`.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and JSON-able values to resume from; empty if these environments restart."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any], obs: Tensor) -> None:
        """Resume from `state_dict()`, saved when the observations were `obs` [N, *obs].

        Raises:
            EnvError: `saved` is not such a state, or it leads to other observations.
        """
        raise EnvError(f"{type(self).__name__} can't resume: {self.resume_support.why}.")

    def load_moments(self, saved: Mapping[str, Any]) -> None:  # noqa: B027 - an optional capability
        """Restore the running moments of the user's own normalising wrappers; call before a reset."""

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 - the method's own
        """Return the results [N] of a method of each environment or wrapper, or the values of an attribute.

        Call it between iterations. What it changes takes effect from the next step on. Of several processes, each calls
        its own environments. Semantics: Gymnasium's `VectorEnv.call`.

        Args:
            name: of the method or attribute; not reset, step or close.
            *args: of the method.
            **kwargs: of the method.

        Raises:
            EnvError: these environments can't be called, there is no such method, or it fails in one of them; those
                before it have been called.
        """
        raise EnvError(no_access(type(self).__name__, "call"))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return `call(name)`: the values [N] of an attribute, or the results of a method without arguments.

        Raises:
            EnvError: as `call`.
        """
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:  # noqa: ANN401 - any values
        """Set an attribute of each environment, in the outermost wrapper that has it; between iterations.

        Unlike Gymnasium's, it creates no attribute, because a wrapper's would hide from the environment.

        Args:
            name: of the attribute.
            values: one value for all environments, or a list or tuple of one for each.

        Raises:
            EnvError: these environments have no attributes to set, there is no such attribute, or it can't be set.
        """
        raise EnvError(no_access(type(self).__name__, "set_attr"))

    def log_info(self, patterns: Sequence[str]) -> None:
        """Sum the numbers under keys of info that match `patterns`, from the next step on; see `InfoSums`.

        Raises:
            ConfigError: these environments give no info.
        """
        raise ConfigError(f"log_info: {type(self).__name__} gives no info; use vectorization sync, pool or async.")

    def read_info(self) -> InfoTotals:
        """Return the sums since the last call; call it between iterations."""
        return NO_INFO

    def restart_messages(self) -> Sequence[str]:
        """Return one line per failed and restarted environment or worker since the last call."""
        return ()

    @property
    def restarts(self) -> int:
        """Failed environments and lost workers that were replaced so far."""
        return 0

    def close(self) -> None:  # noqa: B027 - an optional capability
        """Release processes and windows."""


def no_access(name: str, method: str) -> str:
    """Return the message of a vector environment that lacks `call` or `set_attr`."""
    return f"{method}: {name} gives no access to single environments; use vectorization sync, pool or async."


def env_seeds(stream: np.random.SeedSequence, n_envs: int, rank: int = 0, size: int = 1) -> np.ndarray[Any, Any]:
    """Return the seeds [N] int64 of one rank's environments; they differ over all `size` ranks."""
    # 31 bits, which every environment accepts; drawn without replacement, so that no two environments share a stream
    every = np.random.default_rng(stream).choice(2**31 - 1, n_envs * size, replace=False)
    return every[rank * n_envs : (rank + 1) * n_envs].astype(np.int64)


class Step(NamedTuple):
    """One step of N environments outside a rollout (evaluation); the next step overwrites it."""

    obs: Tensor  # [N, *obs] observations to act on next
    rewards: Tensor  # [N] raw
    terminated: Tensor  # [N] bool
    truncated: Tensor  # [N] bool
    valid: Tensor | None  # [N] bool
    with_final_obs: Sequence[int]  # environments with a row in final_obs
    final_obs: Tensor  # [N, *obs]


def stepper(env: VecEnv, device: torch.device) -> Callable[[Tensor], Step]:
    """Return a function that steps `env` once with actions [N, *action]."""
    to = Transitions.allocate(1, env, device)
    env.attach(to)

    def step(actions: Tensor) -> Step:
        to.actions[0].copy_(actions)
        truncated: list[int] = []
        for group in range(len(env.groups)):
            env.send(0, group)
        for group in range(len(env.groups)):
            env.wait(group)
            truncated += env.store(0, group)
        valid = None if to.valid is None else to.valid[0]
        return Step(
            obs=to.obs[1],
            rewards=to.rewards[0],
            terminated=to.terminated[0],
            truncated=to.truncated[0],
            valid=valid,
            with_final_obs=truncated,
            final_obs=env.final_obs,
        )

    return step
