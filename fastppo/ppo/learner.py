"""All that follows a rollout: advantages, epochs and the iteration's figures, as one function of static tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastppo.errors import CaptureError
from fastppo.functional.gae import choose_gae, gae_doubling
from fastppo.functional.losses import Coefficients
from fastppo.functional.schedules import scheduled
from fastppo.policies.normalizers import RewardNormalizer
from fastppo.policies.policy import Policy
from fastppo.ppo.metrics import Metrics
from fastppo.ppo.rollout import Rollout
from fastppo.ppo.update import PPOUpdate
from fastppo.runtime.clock import Clock
from fastppo.runtime.compile import compile_graph
from fastppo.runtime.graphs import capture


class Learner:
    """Learns from the rollout that lies in storage; calling it gives the figures, on the device.

    Attributes:
        coefs: this iteration's coefficients, as tensors that are written in place.
        values: the same and all others that are scheduled, as numbers; `kl_limit` is where an update ends.
        gae: the kernel of advantages.
        update: the epochs.
        rewards: [T, N] as they were last learned from.
        device: where it learns.
    """

    def __init__(
        self,
        rollout: Rollout,
        policy: Policy,
        update: PPOUpdate,
        metrics: Metrics,
        clock: Clock,
        *,
        rewards: RewardNormalizer | None,
        sign_rewards: bool,
        schedules: Mapping[str, tuple[str, float, float]],
        kl_stop_factor: float,
    ) -> None:
        """Bind the parts.

        Args:
            rollout: what is learned from.
            policy: whose observation moments follow each update.
            update: the epochs.
            metrics: measures what is reported.
            clock: whose phases are timed.
            rewards: scales rewards by running moments; None: they stay as they are.
            sign_rewards: learn from the sign of rewards.
            schedules: shape, start and end of each coefficient.
            kl_stop_factor: times target_kl is the limit of an update.
        """
        self._rollout, self._policy, self._metrics, self._clock = rollout, policy, metrics, clock
        self._rewards, self._sign_rewards, self.rewards = rewards, sign_rewards, rollout.rewards
        self._schedules, self._kl_stop_factor = schedules, kl_stop_factor
        self.update = update
        self.device = device = rollout.rewards.device
        n_steps, n_envs = rollout.rewards.shape
        self.gae = choose_gae(n_steps, n_envs, device)
        self.coefs = Coefficients(*(torch.zeros((), device=device) for _ in Coefficients._fields))
        self.values: dict[str, float] = {}
        self._learn: Callable[[], Tensor] = self.learn

    def anneal(self, progress: float) -> None:
        """Write the coefficients of an iteration that begins at `progress` in [0, 1], and draw its permutations."""
        self.values = {name: scheduled(*schedule, progress) for name, schedule in self._schedules.items()}
        for name, tensor in self.coefs._asdict().items():
            tensor.fill_(self.values[name])
        with self._clock.phase("update"):
            self.values["kl_limit"] = limit = self.values["target_kl"] * self._kl_stop_factor
            self.update.prepare(self._rollout.rewards.numel(), limit)

    def __call__(self, look: Callable[[], None] | None = None) -> Tensor:
        """Learn, as `anneal` set it up: by a recording, which can't be looked into, or step by step."""
        return self._learn() if look is None else self.learn(look=look)

    def learn(self, *, watched: bool = True, look: Callable[[], None] | None = None) -> Tensor:
        """Advantages, epochs, and the figures of both; for `watched` and `look` see `PPOUpdate.learn`."""
        with self._clock.phase("advantages"):
            self.set_targets()
        with self._clock.phase("update"):
            watched = watched and self.values["target_kl"] != math.inf
            report = self.update.learn(self._rollout.batch(), self.coefs, watched=watched, look=look)
            return self._metrics.measure(report)

    def set_targets(self) -> None:
        """Advantages and returns of the rollout, from rewards as they are learned from."""
        r, rewards = self._rollout, self._rollout.rewards
        if self._rewards is not None:
            self._rewards.update_from_rollout(rewards, r.done, r.valid, self.coefs.gamma)
            rewards = self._rewards(rewards)
        elif self._sign_rewards:
            rewards = rewards.sign()
        self.rewards = rewards
        advantages, returns = self.gae(*self._gae_inputs(rewards))
        r.advantages.copy_(advantages)
        r.returns.copy_(returns)

    def update_obs_moments(self) -> None:
        """Take the rollout into the observation moments, which the next one will see."""
        if (normalizer := self._policy.encoder.normalizer) is not None:
            batch = self._rollout.batch()
            normalizer.update(batch.obs, batch.valid)

    def state_dict(self) -> dict[str, Tensor]:
        """Discounted returns of the open episodes, where rewards are scaled."""
        return {} if self._rewards is None else {"carry": self._rewards.carry}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        if self._rewards is not None:
            self._rewards.carry.copy_(saved["carry"])

    def compile(self) -> None:
        """Compile the kernels; nothing is changed.

        Raises:
            CompileError: one of them can't be.
        """
        gae = self.gae
        if gae is gae_doubling:  # the loop wins where it was chosen, compiled doubling or not
            gae = compile_graph(gae, self._gae_inputs(self._rollout.rewards))
        self.update.compile(self._rollout.batch(), self.coefs)
        self.gae = gae

    def capture(self) -> None:
        """Replace what a call does by a recording of it.

        Raises:
            CaptureError: it can't be recorded.
        """
        if reason := self._policy.uncompilable():
            raise CaptureError(reason)
        shuffles = self.update.generator.get_state()
        self.anneal(0.0)
        self.update.generator.set_state(shuffles)  # permutations must not depend on whether work is recorded
        rewards = [] if self._rewards is None else list(self._rewards.buffers())
        learn = capture(
            lambda: self.learn(watched=False),
            keep=[*self.update.state(), *self._metrics.state(), *rewards],
            fresh=[*self.coefs, *self.update.inputs()],
            device=self._rollout.rewards.device,
        )

        def replay() -> Tensor:
            with self._clock.phase("update"):
                return learn()

        self._learn = replay

    def _gae_inputs(self, rewards: Tensor) -> tuple[Tensor, ...]:
        r = self._rollout
        return rewards, r.values, r.next_values, r.terminated, r.done, self.coefs.gamma, self.coefs.gae_lambda
