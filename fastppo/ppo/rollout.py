"""Rollouts: preallocated tensors [T, N, ...], and the loop that fills them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastppo.envs.vec_env import Transitions, VecEnv
from fastppo.functional.losses import Batch
from fastppo.policies.actors import Decisions, complete, make_actor
from fastppo.policies.policy import Policy
from fastppo.runtime.clock import Clock
from fastppo.runtime.compile import compile_graph
from fastppo.runtime.graphs import capture


@dataclasses.dataclass
class Rollout:
    """One rollout of T steps in N environments; every tensor is allocated once and written in place.

    Attributes:
        obs: [T + 1, N, *obs] raw; row T is where the next rollout begins.
        actions: [T, N, *action] as the distribution made them (not clipped, counted from 0).
        logprobs: [T, N] nats.
        params: [T, N, P] of the distribution that acted.
        values: [T, N] V(s_t).
        rewards: [T, N] raw.
        terminated: [T, N] bool.
        truncated: [T, N] bool.
        done: [T, N] bool, either.
        valid: [T, N] bool, False in filler rows; None where the environments make none.
        next_values: [T, N] V of the true successor.
        advantages: [T, N].
        returns: [T, N].
        noise: [T, N, noise_size], drawn anew for each rollout.
        final_obs: [K, *obs] staging for last observations of episodes that were cut; see `FinalValues`.
    """

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    params: Tensor
    values: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    done: Tensor
    valid: Tensor | None
    next_values: Tensor
    advantages: Tensor
    returns: Tensor
    noise: Tensor
    final_obs: Tensor

    @classmethod
    def allocate(cls, n_steps: int, env: VecEnv, policy: Policy, device: torch.device) -> Rollout:
        """Storage for `n_steps` of `env`, zeroed."""
        dist, n = policy.distribution, env.n_envs

        def zeros(*shape: int) -> Tensor:
            return torch.zeros((n_steps, n, *shape), device=device)

        return cls(
            **Transitions.allocate(n_steps, env, device)._asdict(),
            logprobs=zeros(),
            params=zeros(dist.n_params),
            values=zeros(),
            done=zeros().bool(),
            next_values=zeros(),
            advantages=zeros(),
            returns=zeros(),
            noise=zeros(dist.noise_size),
            final_obs=env.obs_spec.blank(max(n, 32), device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def batch(self) -> Batch:
        """All T x N rows, flat, as views."""

        def flat(x: Tensor) -> Tensor:
            return x.flatten(0, 1)

        return Batch(
            flat(self.obs[:-1]),
            flat(self.actions),
            flat(self.logprobs),
            flat(self.params),
            flat(self.values),
            flat(self.advantages),
            flat(self.returns),
            None if self.valid is None else flat(self.valid),
        )


class FinalValues:
    """V of last observations where episodes were cut, by critic calls of one fixed shape.

    Observations gather in a preallocated block; the critic is called when it is full and once at the end.
    """

    def __init__(self, rollout: Rollout, value: Callable[[Tensor], Tensor]) -> None:
        """Collect into `rollout.final_obs`, evaluate with `value`, write into `rollout.next_values`."""
        self._rollout = rollout
        self._value = value
        self._rows: list[tuple[int, int]] = []

    def add(self, t: int, cut: Sequence[int], final_obs: Tensor) -> None:
        """Take in the episodes that step t cut, whose last observations are in those rows of `final_obs` [N, *obs]."""
        for i in cut:
            self._rollout.final_obs[len(self._rows)].copy_(final_obs[i])
            self._rows.append((t, i))
            if len(self._rows) == len(self._rollout.final_obs):
                self.flush()

    def flush(self) -> None:
        """Evaluate what is in the block and start it anew."""
        if self._rows:
            values = self._value(self._rollout.final_obs)
            t, i = torch.tensor(self._rows, device=values.device).unbind(1)
            self._rollout.next_values[t, i] = values[: len(self._rows)]
            self._rows.clear()


class Handover:
    """Acting here for learning on another device: the policy comes over before a rollout, the rollout goes over after.

    For small networks a step on the CPU costs less than the way to a GPU and back.
    """

    def __init__(self, acting: Policy, here: Rollout, learning: Policy, there: Rollout) -> None:
        """`acting` fills `here`; `learning` learns from `there`."""
        self._acting, self._learning = acting, learning
        self._moved = {name: x for name, x in there.tensors().items() if name not in _OWN}
        self._here = here.tensors()
        if there.rewards.device.type == "cuda":
            self._here = {name: x.pin_memory() if name in self._moved else x for name, x in self._here.items()}
            for name, x in self._here.items():
                setattr(here, name, x)

    def fetch_policy(self) -> None:
        """The learning policy's parameters and moments, as they are now."""
        with torch.no_grad():
            pairs = zip(self._acting.state_dict().values(), self._learning.state_dict().values(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)

    def send_rollout(self) -> None:
        """What was collected."""
        for name, there in self._moved.items():
            there.copy_(self._here[name], non_blocking=True)


# What each side of a handover keeps to itself
_OWN = ("advantages", "returns", "noise", "final_obs")


class Collector:
    """Fills a rollout by T steps of a policy in an environment.

    Attributes:
        rollout: what is filled.
        actors: one for each group of environments.
        roll: the steps; may be replaced by a recording of them.
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
        handover: Handover | None = None,
    ) -> None:
        """Bind the environment and an actor for each of its groups to the storage; noise comes from `generator`.

        `torch_only`: so that `record` can record whole rollouts. `handover`: learning happens elsewhere.
        """
        self._handover = handover
        r = self.rollout = rollout
        self._env, self._policy, self._generator, self._clock = env, policy, generator, clock
        env.attach(Transitions(r.obs, r.actions, r.rewards, r.terminated, r.truncated, r.valid))
        self._decided = Decisions(r.obs, r.noise, r.actions, r.logprobs, r.params, r.values)
        self._finals = FinalValues(r, policy.value)
        self.actors = [
            make_actor(policy, Decisions(*(x[:, group] for x in self._decided)), torch_only=torch_only)
            for group in env.groups
        ]
        self.roll: Callable[[], None] = self._roll

    def __call__(self) -> None:
        """Collect, from the observations in row T of the rollout before.

        Afterwards every tensor but advantages and returns holds this rollout's values. next_values is V of the true
        successor of each row: of the last observation where an episode was cut, of the next row otherwise. Where the
        environments autoreset at the next step, the next row is that last observation already.

        While one group of environments steps, the policy acts on the next.
        """
        with self._clock.phase("act"):
            if self._handover is not None:
                self._handover.fetch_policy()
            self.prepare()
        self.roll()
        if self._handover is not None:
            with self._clock.phase("store"):
                self._handover.send_rollout()

    def _roll(self) -> None:
        r, env = self.rollout, self._env
        acting, stepping, storing = (self._clock.phase(name) for name in ("act", "env", "store"))
        n_steps = len(r.rewards)
        with acting:
            r.obs[0].copy_(r.obs[-1])
            if env.final_obs_buffer is not None:
                env.final_obs_buffer.clear(n_steps)
        for t in range(n_steps + 1):
            for group, actor in enumerate(self.actors):
                if t > 0:
                    with stepping:
                        env.wait(group)
                    with storing:
                        cut = env.store(t - 1, group)
                    if cut:
                        with acting:
                            self._finals.add(t - 1, cut, env.final_obs)
                if t < n_steps:
                    with acting:
                        actor.act(t)
                    with stepping:
                        env.send(t, group)
        with acting:
            self.evaluate()

    def compile(self) -> None:
        """Have decisions compiled, on the CPU.

        Raises:
            CompileError: one can't be.
        """
        if self.rollout.rewards.device.type == "cpu":
            for actor in self.actors:
                actor.compile(compile_graph)

    def capture(self) -> None:
        """Replace the rollout by a recording, where the environment can be recorded; else the decisions alone.

        Raises:
            CaptureError: it can't be recorded.
        """
        r, env = self.rollout, self._env
        device = r.rewards.device
        if env.capturable_state is None:
            for actor in self.actors:
                actor.capture(lambda work, keep: capture(work, keep=keep, fresh=[], device=device))
            return
        roll = capture(self._roll, keep=[*env.capturable_state.values(), r.obs[-1]], fresh=[r.noise], device=device)

        def replay() -> None:
            with self._clock.phase("rollout"):
                roll()

        self.roll = replay

    def state_dict(self) -> dict[str, Tensor]:
        """Where the environments stand, and the random stream of the noise."""
        return {"obs": self.rollout.obs[-1], "noise": self._generator.get_state()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.rollout.obs[-1].copy_(saved["obs"])
        self._generator.set_state(saved["noise"].cpu())

    def prepare(self) -> None:
        """Draw the rollout's noise and let the actors take up the policy as it is now."""
        self._policy.distribution.fill_noise(self.rollout.noise, self._generator)
        for actor in self.actors:
            actor.begin()

    def evaluate(self) -> None:
        """What the policy says of the rollout as a whole: what acting left out, and values of the true successors."""
        r = self.rollout
        if not self.actors[0].complete:
            complete(self._policy, self._decided)
        if (cuts := self._env.final_obs_buffer) is None:
            self._finals.flush()
        elif self._env.capturable_state is None:  # nothing is recorded, so the host may look who was cut
            k, n = (cuts.end_steps < len(r.rewards)).nonzero(as_tuple=True)
            if len(k):
                r.next_values[cuts.end_steps[k, n], n] = self._policy.value(cuts.obs[k, n])
        elif len(cuts.end_steps):
            values = self._policy.value(cuts.obs.flatten(0, 1)).view(cuts.end_steps.shape)
            # one row more, for those that were not cut
            padded = torch.cat((r.next_values, r.next_values[:1]))
            r.next_values.copy_(padded.scatter(0, cuts.end_steps, values)[:-1])
        last_values = self._policy.value(r.obs[-1])
        torch.logical_or(r.terminated, r.truncated, out=r.done)
        successors = torch.cat((r.values[1:], last_values.unsqueeze(0)))
        if r.valid is None:
            successors = torch.where(r.truncated & ~r.terminated, r.next_values, successors)
        r.next_values.copy_(successors)
