"""Collect a rollout: T steps of a policy in N environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.envs.vec_env import VecEnv
from fastppo.policies.actors import fill_values_and_logprobs, make_actor
from fastppo.policies.decisions import Actor
from fastppo.policies.native_actor import NativeActor, NativePolicy, can_act_in_c
from fastppo.policies.policy import Policy, PolicyState
from fastppo.ppo.acting_copy import ActingCopy
from fastppo.ppo.final_values import FinalValues
from fastppo.ppo.kernel_rollout import KernelRollout, check_kernel_rollout, not_covered
from fastppo.ppo.rollout import Rollout
from fastppo.runtime.clock import Clock
from fastppo.runtime.compile import CompileError
from fastppo.runtime.graphs import capture
from fastppo.runtime.seeding import restore_generator


class Collector:
    """Fills a rollout with T steps of a policy in N environments.

    Attributes:
        rollout: the storage.
        actors: one per group of environments.
        roll: takes the steps; after `capture`, replays them.
    """

    def __init__(
        self,
        env: VecEnv,
        policy: Policy,
        rollout: Rollout,
        generator: torch.Generator,
        clock: Clock,
        *,
        torch_only: bool = False,
        acting_copy: ActingCopy | None = None,
    ) -> None:
        """Bind the environment, and an actor for each of its groups, to the storage.

        Args:
            env: the environments.
            policy: the acting policy.
            rollout: the storage.
            generator: draws the noise of actions.
            clock: times the phases.
            torch_only: use torch operations only, so that `capture` can capture whole rollouts.
            acting_copy: copies policy and rollout between devices; None: acting and learning share one.
        """
        self._acting_copy = acting_copy
        r = self.rollout = rollout
        self._env, self._policy, self._generator, self._clock = env, policy, generator, clock
        env.attach(r.transitions())
        self._decisions = r.decisions()
        self._fused: NativePolicy | KernelRollout | None = None
        self._final_values = FinalValues(r, env, self._value_of_final)
        self.actors: list[Actor] = [
            make_actor(policy, self._decisions.of_group(group), torch_only=torch_only) for group in env.groups
        ]
        self.roll: Callable[[], None] = self._roll
        self._abandon: Callable[[float], bool] | None = None
        self._complete = True

    def __call__(self, abandon: Callable[[float], bool] | None = None) -> bool:
        """Collect a rollout, starting from the observations in row T of the previous one.

        Fills every tensor except advantages and returns. next_values is V of each row's true successor: the final
        observation where the episode was truncated, the next row otherwise. With next-step autoreset the next row is
        the final observation already.

        While one group of environments steps, the policy acts for the next.

        Args:
            abandon: called between steps with the share of the rollout that is done; True ends the collection, and
                neither rollout nor environments can be used any longer. Captured rollouts don't call it.

        Returns:
            Whether the rollout is complete.
        """
        self._abandon, self._complete = abandon, True
        with self._clock.phase("act"):
            if self._acting_copy is not None:
                self._acting_copy.fetch_policy()
            self.prepare()
        self.roll()
        if self._acting_copy is not None and self._complete:
            with self._clock.phase("store"):
                self._acting_copy.send_rollout()
        self._abandon = None
        return self._complete

    def prepare(self) -> None:
        """Draw the rollout's noise and pass the current parameters and moments to the actors."""
        self._policy.distribution.fill_noise(self.rollout.noise, self._generator)
        if self._fused is not None:
            self._fused.begin()
        for actor in self.actors:
            actor.begin()

    def _roll(self) -> None:
        r, env = self.rollout, self._env
        with self._clock.phase("act"):
            r.obs[0].copy_(r.obs[-1])
            for states in self._memory:
                states[0].copy_(states[-1])
            if env.final_obs_buffer is not None:
                env.final_obs_buffer.clear(len(r.rewards))
        if isinstance(self._fused, KernelRollout):
            self._fused.roll()
        else:
            self._take_steps()
        if self._complete:
            with self._clock.phase("act"):
                self.compute_values()

    def _take_steps(self) -> None:
        r, env = self.rollout, self._env
        acting, stepping, storing = (self._clock.phase(name) for name in ("act", "env", "store"))
        n_steps, lap = len(r.rewards), self._clock.lap
        self._clock.begin_laps()
        for t in range(n_steps + 1):
            if t > 0 and self._abandon is not None and self._abandon(t / n_steps):
                self._complete = False
                return
            for group, actor in enumerate(self.actors):
                if t > 0:
                    env.wait(group)
                    lap(stepping)
                    truncated = env.store(t - 1, group)
                    if r.starts is not None:
                        self._mark_starts(r.starts, t, env.groups[group])
                    lap(storing)
                    if truncated:
                        self._final_values.add(t - 1, truncated, env.final_obs)
                        lap(acting)
                if t < n_steps:
                    actor.act(t)
                    lap(acting)
                    env.send(t, group)
                    lap(stepping)

    @property
    def _memory(self) -> list[Tensor]:
        """The tensors [T + 1, N, ...] that a policy with memory carries from one rollout to the next."""
        r = self.rollout
        return [*r.states, *([] if r.starts is None else [r.starts])]

    def _mark_starts(self, starts: Tensor, t: int, group: slice) -> None:
        """Write where step t starts an episode: after an end, or after the filler row that only reset."""
        r = self.rollout
        if r.valid is None:
            torch.logical_or(r.terminated[t - 1, group], r.truncated[t - 1, group], out=starts[t, group])
        else:
            torch.logical_not(r.valid[t - 1, group], out=starts[t, group])

    def compute_values(self) -> None:
        """Fill in values and log-probabilities where acting did not, and the values of the true successors."""
        r = self.rollout
        if self._fused is not None:
            self._fused.fill(self._decisions)
        elif not self.actors[0].complete:
            fill_values_and_logprobs(self._policy, self._decisions)
        self._final_values.write()
        last_starts = None if r.starts is None else r.starts[-1]
        last_values = self._value(r.obs[-1], tuple(x[-1] for x in r.states), last_starts)
        torch.logical_or(r.terminated, r.truncated, out=r.done)
        successors = torch.cat((r.values[1:], last_values.unsqueeze(0)))
        if r.valid is None:
            successors = torch.where(r.truncated & ~r.terminated, r.next_values, successors)
        r.next_values.copy_(successors)

    @property
    def _value(self) -> Callable[..., Tensor]:
        return self._policy.value if self._fused is None else self._fused.value

    def _value_of_final(self, obs: Tensor, state: PolicyState = ()) -> Tensor:
        """Return V [B] of final observations [B, *obs], seen from `state`: NaN where an observation is not finite.

        Final observations are not stored, so a bad one must show in its value, which a bounded activation or a
        normaliser's clipping could hide.
        """
        return torch.where(self._policy.encoder.spec.finite(obs), self._value(obs, state), torch.nan)

    def fuse(self, threads: int) -> None:
        """Act without torch: in C on a CPU, in `threads` threads, if C covers the policy; on CUDA in kernels.

        Values are computed by the same means.

        Raises:
            CompileError: on CUDA, no kernel covers policy and environments, or one fails or differs from torch.
        """
        if self.rollout.rewards.device.type == "cuda":
            if reason := not_covered(self._policy, self._env):
                raise CompileError(reason)
            assert isinstance(self._env, TensorEnv)
            check_kernel_rollout(self._policy, self._env)
            self._fused = KernelRollout(self._policy, self._env, self.rollout)
        elif self.rollout.rewards.device.type == "cpu" and can_act_in_c(self._policy):
            self._fused = NativePolicy(self._policy, threads)
            self.actors = [NativeActor(self._fused, self._decisions.of_group(group)) for group in self._env.groups]

    @property
    def acts_in(self) -> Literal["torch", "C", "Triton"]:
        """The language of the code that acts."""
        if self._fused is None:
            return "torch"
        return "Triton" if isinstance(self._fused, KernelRollout) else "C"

    def compile(self) -> None:
        """Compile the actors.

        Raises:
            CompileError: an actor can't be compiled.
        """
        for actor in self.actors:
            actor.compile()

    def capture(self) -> None:
        """Capture the whole rollout if the environment can be captured, and the actors' decisions otherwise.

        Raises:
            CaptureError: the capture failed.
        """
        r, env = self.rollout, self._env
        device = r.rewards.device
        if env.capturable_state is None:
            for actor in self.actors:
                actor.capture(device)
            return
        roll = capture(
            self._roll,
            keep=[*env.capturable_state.values(), r.obs[-1], *(x[-1] for x in self._memory)],
            fresh=[r.noise],
            device=device,
        )

        def replay() -> None:
            with self._clock.phase("rollout"):
                roll()

        self.roll = replay

    def state_dict(self) -> dict[str, Tensor]:
        """Return the next observations, the policy's state and the random stream of the noise."""
        states = {f"memory{i}": x[-1] for i, x in enumerate(self._memory)}
        return {"obs": self.rollout.obs[-1], "noise": self._generator.get_state(), **states}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore in place from `state_dict()`."""
        self.rollout.obs[-1].copy_(saved["obs"])
        for i, x in enumerate(self._memory):
            x[-1].copy_(saved[f"memory{i}"])
        restore_generator(self._generator, saved["noise"])
