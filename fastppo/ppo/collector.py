"""Collect a rollout: T steps of a policy in N environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.envs.vec_env import VecEnv
from fastppo.policies.actors import fill_values_and_logprobs, make_actor
from fastppo.policies.decisions import Actor
from fastppo.policies.native_actor import NativeActor, NativePolicy, can_act_in_c
from fastppo.policies.policy import Policy, PolicyState
from fastppo.ppo.kernel_rollout import KernelRollout, check_kernel_rollout, not_covered
from fastppo.ppo.rollout import Rollout
from fastppo.runtime.clock import Clock
from fastppo.runtime.compile import CompileError
from fastppo.runtime.graphs import capture


class FinalValues:
    """Evaluates V of the final observations of truncated episodes, in batches of one fixed shape.

    Observations gather in a preallocated block; the critic is called when the block is full, and at the end. With
    memory, the state after the last step of the episode goes with each observation.
    """

    def __init__(self, rollout: Rollout, value: Callable[[Tensor, PolicyState], Tensor]) -> None:
        """Gather in `rollout.final_obs`, evaluate by `value` and write into `rollout.next_values`."""
        self._rollout = rollout
        self._value = value
        rows = len(rollout.final_obs)
        self._states = tuple(x.new_zeros((rows, *x.shape[2:])) for x in rollout.states)
        self._rows: list[tuple[int, int]] = []

    def add(self, t: int, truncated: Sequence[int], final_obs: Tensor) -> None:
        """Add the final observations `final_obs[truncated]` of the environments that step t truncated."""
        for i in truncated:
            self._rollout.final_obs[len(self._rows)].copy_(final_obs[i])
            for block, states in zip(self._states, self._rollout.states, strict=True):
                block[len(self._rows)].copy_(states[t + 1, i])
            self._rows.append((t, i))
            if len(self._rows) == len(self._rollout.final_obs):
                self.flush()

    def flush(self) -> None:
        """Evaluate the block and empty it."""
        if self._rows:
            values = self._value(self._rollout.final_obs, self._states)
            t, i = torch.tensor(self._rows, device=values.device).unbind(1)
            self._rollout.next_values[t, i] = values[: len(self._rows)]
            self._rows.clear()


class ActingCopy:
    """Act on one device and learn on another: copies the policy before a rollout and the rollout after it.

    A step of a small network on the CPU costs less than a round trip to the GPU.
    """

    # each side has its own
    _NOT_COPIED = ("advantages", "returns", "noise", "final_obs")

    def __init__(self, acting: Policy, here: Rollout, learning: Policy, there: Rollout) -> None:
        """Copy `learning` to `acting` before a rollout, and `here` to `there` after it."""
        self._acting, self._learning = acting, learning
        self._there = {name: x for name, x in there.tensors().items() if name not in self._NOT_COPIED}
        self._here = here.tensors()
        if there.rewards.device.type == "cuda":
            self._here = {name: x.pin_memory() if name in self._there else x for name, x in self._here.items()}
            for name, x in self._here.items():
                if hasattr(here, name):
                    setattr(here, name, x)
            here.states = tuple(self._here[f"states{i}"] for i in range(len(here.states)))

    def fetch_policy(self) -> None:
        """Copy parameters and observation moments to the acting policy."""
        with torch.no_grad():
            pairs = zip(self._acting.state_dict().values(), self._learning.state_dict().values(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)

    def send_rollout(self) -> None:
        """Copy the rollout to the learning device."""
        for name, there in self._there.items():
            there.copy_(self._here[name], non_blocking=True)


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
        self._final_values = FinalValues(r, self._value_of_final)
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
        n_steps = len(r.rewards)
        for t in range(n_steps + 1):
            if t > 0 and self._abandon is not None and self._abandon(t / n_steps):
                self._complete = False
                return
            for group, actor in enumerate(self.actors):
                if t > 0:
                    with stepping:
                        env.wait(group)
                    with storing:
                        truncated = env.store(t - 1, group)
                        if r.starts is not None:
                            self._mark_starts(r.starts, t, env.groups[group])
                    if truncated:
                        with acting:
                            self._final_values.add(t - 1, truncated, env.final_obs)
                if t < n_steps:
                    with acting:
                        actor.act(t)
                    with stepping:
                        env.send(t, group)

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
        if (final := self._env.final_obs_buffer) is None:
            self._final_values.flush()
        elif self._env.capturable_state is None:  # not captured, so the host may read which episodes were truncated
            k, n = (final.end_steps < len(r.rewards)).nonzero(as_tuple=True)
            if len(k):
                t = final.end_steps[k, n]
                if self._env.approximates_finals:
                    r.next_values[t, n] = r.values[t, n]
                else:
                    state = tuple(x[t + 1, n] for x in r.states)
                    r.next_values[t, n] = self._value_of_final(final.obs[k, n], state)
        elif len(final.end_steps):
            after = (final.end_steps + 1).clamp(max=len(r.rewards))  # of unused slots, any
            everyone = torch.arange(final.end_steps.shape[1], device=after.device)
            state = tuple(x[after, everyone].flatten(0, 1) for x in r.states)
            values = self._value_of_final(final.obs.flatten(0, 1), state).view(final.end_steps.shape)
            # the extra row takes the writes of unused slots
            padded = torch.cat((r.next_values, r.next_values[:1]))
            r.next_values.copy_(padded.scatter(0, final.end_steps, values)[:-1])
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
        """What acts."""
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
        self._generator.set_state(saved["noise"].cpu())
