"""Learn from a rollout: advantages, epochs and metrics of one iteration, on static tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastppo.errors import CaptureError
from fastppo.functional.gae import Gae, choose_gae, gae_doubling
from fastppo.functional.losses import Coefficients
from fastppo.functional.schedules import scheduled
from fastppo.native.gae import gae as native_gae
from fastppo.policies.normalizers import RewardNormalizer
from fastppo.ppo.curiosity import Curiosity
from fastppo.ppo.metrics import Metrics
from fastppo.ppo.rollout import Rollout
from fastppo.ppo.update import PPOUpdate
from fastppo.runtime.clock import Clock
from fastppo.runtime.compile import CompileError, compile_graph
from fastppo.runtime.graphs import GraphPool, capture


class Learner:
    """Learns from the stored rollout: call `anneal`, then the learner.

    Attributes:
        coefs: this iteration's coefficients, as tensors that are written in place: by `anneal`, or by the update where
            it adapts them.
        coef_values: every scheduled coefficient as a number; `kl_limit` is the KL that stops an update.
        schedules: the value of each scheduled coefficient at a progress in [0, 1].
        gae: the kernel that computes advantages.
        update: the epochs.
        curiosity: adds intrinsic advantages; None: there are none.
        rewards: [T, N] the rewards of the last advantages, after normalisation or sign.
        device: of all tensors.
    """

    def __init__(
        self,
        rollout: Rollout,
        update: PPOUpdate,
        metrics: Metrics,
        clock: Clock,
        *,
        reward_normalizer: RewardNormalizer | None,
        sign_rewards: bool,
        schedules: Mapping[str, tuple[str, float, float]],
        kl_stop_factor: float,
        curiosity: Curiosity | None = None,
    ) -> None:
        """Bind the parts.

        Args:
            rollout: the storage.
            update: runs the epochs; its policy's observation moments change after them.
            metrics: measures the iteration.
            clock: times the phases.
            reward_normalizer: scales rewards by running moments; None: rewards are not scaled.
            sign_rewards: learn from the signs of rewards.
            schedules: (shape, start, end) of each coefficient that the update doesn't adapt, and of target_kl.
            kl_stop_factor: an update stops at a KL of kl_stop_factor * target_kl.
            curiosity: adds intrinsic advantages, and learns after the policy; None: rewards are the environment's.
        """
        self._rollout, self._metrics, self._clock = rollout, metrics, clock
        self._reward_normalizer, self._sign_rewards, self.rewards = reward_normalizer, sign_rewards, rollout.rewards
        self.schedules: dict[str, Callable[[float], float]] = {
            name: functools.partial(scheduled, *schedule) for name, schedule in schedules.items()
        }
        self._kl_stop_factor = kl_stop_factor
        self.update, self.curiosity = update, curiosity
        self.device = device = rollout.rewards.device
        n_steps, n_envs = rollout.rewards.shape
        self.gae: Gae = choose_gae(n_steps, n_envs, device)
        names = Coefficients._fields
        self.coefs = Coefficients(*(update.adapted.get(name, torch.zeros((), device=device)) for name in names))
        self.coef_values: dict[str, float] = {}
        self._begin: Callable[[], Tensor] = self._begin_eagerly
        self._finish: Callable[[], Tensor] = self._finish_eagerly

    def anneal(self, progress: float) -> None:
        """Write the coefficients of an iteration that begins at `progress` in [0, 1], and draw its permutations."""
        self.coef_values = {name: schedule(progress) for name, schedule in self.schedules.items()}
        for name, tensor in self.coefs._asdict().items():
            if name in self.coef_values:
                tensor.fill_(self.coef_values[name])
        with self._clock.phase("update"):
            self.coef_values["kl_limit"] = limit = self.coef_values["target_kl"] * self._kl_stop_factor
            self.update.prepare(self._rollout.rewards.numel(), limit)

    def __call__(self, *, watch: bool = True, on_epoch: Callable[[], None] | None = None) -> Tensor:
        """Compute advantages, run the epochs and return the iteration's metrics, on the device.

        After `capture`, replays the captures. Arguments as for `PPOUpdate.run_epochs`; nothing is read back unless
        `watch` is True and a KL limit is set.
        """
        self.rewards = self._begin()
        with self._clock.phase("update"):
            watch = watch and self.coef_values["target_kl"] != math.inf
            self.update.run_epochs(self.coefs, watch=watch, on_epoch=on_epoch)
            if self.curiosity is not None:
                self.curiosity.learn(self.update.shuffle.orders, self.coefs)
            return self._finish()

    def compute_advantages(self) -> Tensor:
        """Write the rollout's advantages and returns; return the rewards after normalisation or sign."""
        r, rewards = self._rollout, self._rollout.rewards
        if self._reward_normalizer is not None:
            self._reward_normalizer.update_from_rollout(rewards, r.done, r.valid, self.coefs.gamma)
            rewards = self._reward_normalizer(rewards)
        elif self._sign_rewards:
            rewards = rewards.sign()
        if r.valid is not None:  # a filler row's reward must not reach the row before: 0 times NaN is NaN
            rewards = torch.where(r.valid, rewards, 0.0)
        advantages, returns = self.gae(r.trajectory(rewards), self.coefs.gamma, self.coefs.gae_lambda)
        if self.curiosity is not None:
            advantages = advantages + self.curiosity.advantages(self.gae, self.coefs.gae_lambda)
        r.advantages.copy_(advantages)
        r.returns.copy_(returns)
        return rewards

    def update_obs_moments(self) -> None:
        """Add the rollout to the observation moments, for use in the next rollout."""
        encoder = self.update.policy.encoder
        if encoder.normalizer is not None:
            batch = self._rollout.batch()
            encoder.update_moments(batch.obs, batch.valid)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the discounted returns of open episodes, if rewards are normalised, and of curiosity's streams."""
        carries = {} if self._reward_normalizer is None else {"carry": self._reward_normalizer.carry}
        return carries if self.curiosity is None else {**carries, "intrinsic_carry": self.curiosity.rnd.rewards.carry}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore in place from `state_dict()`."""
        for name, carry in self.state_dict().items():
            carry.copy_(saved[name])

    def compile(self) -> None:
        """Compile the kernels; changes no state.

        Raises:
            CompileError: a kernel can't be compiled on this rank or another.
        """
        # every rank votes, because ranks may differ in the kernel
        gae = self.update.world.together(self._compile_gae, CompileError)
        self.update.compile(self._rollout.batch(), self.coefs)
        self.compile_curiosity()
        self.gae = gae

    def compile_curiosity(self) -> None:
        """Compile the steps of RND's networks, if there are any; changes no state.

        Raises:
            CompileError: they can't be compiled on this rank or another.
        """
        if self.curiosity is not None:
            self.update.shuffle.allocate(self._rollout.rewards.numel())
            self.curiosity.compile(self.update.shuffle.orders[0, 0], self.coefs)

    def fuse(self, parallel: int) -> None:
        """Update in C, and compute advantages there, or by kernels on a GPU; changes no state.

        Args:
            parallel: threads of the C code; on a GPU, programs of each kernel.

        Raises:
            CompileError: neither covers the update, on this rank or another.
        """
        self.update.fuse(self._rollout.batch(), parallel)
        if self.device.type == "cpu":
            self.gae = native_gae
            if self.update.world.size == 1:
                self._metrics.fuse()

    def capture(self) -> None:
        """Capture a call in three graphs: before the epochs, an epoch, after the epochs; later calls replay them.

        Between two graphs the host may read whether the KL stopped the update, or sample the policy. The graphs share
        one memory pool: each replay's temporary tensors are dead before the next begins.

        Raises:
            CaptureError: the capture failed.
        """
        if reason := self.update.policy.uncompilable():
            raise CaptureError(reason)
        shuffles = self.update.shuffle.generator.get_state()
        self.anneal(0.0)
        self.update.shuffle.generator.set_state(shuffles)  # permutations must not depend on capture
        moments = [] if self._reward_normalizer is None else list(self._reward_normalizer.buffers())
        moments += [] if self.curiosity is None else self.curiosity.moments()
        self.update.begin(self._rollout.batch())  # allocates what the graphs share
        pool = GraphPool(self.device)
        begin, finish = (
            capture(work, keep=keep, fresh=[], device=self.device, pool=pool, world=self.update.world)
            for work, keep in (
                (self._begin_eagerly, moments),
                (self._finish_eagerly, [*self._metrics.kept(), *self.update.adapted.values()]),
            )
        )
        self.update.capture(self.coefs, pool)
        if self.curiosity is not None:
            self.curiosity.capture(self.update.shuffle.orders[0], self.coefs, pool)

        def replay_begin() -> Tensor:
            with self._clock.phase("update"):
                return begin()

        self._begin, self._finish = replay_begin, finish

    def _compile_gae(self) -> Gae:
        if self.gae is not gae_doubling:  # where the loop was chosen, it is faster than compiled doubling
            return self.gae
        trajectory = self._rollout.trajectory(self._rollout.rewards)
        return compile_graph(self.gae, (trajectory, self.coefs.gamma, self.coefs.gae_lambda))

    def _begin_eagerly(self) -> Tensor:
        """Compute the advantages and begin the update; return the rewards [T, N] that it uses."""
        with self._clock.phase("advantages"):
            rewards = self.compute_advantages()
        with self._clock.phase("update"):
            self.update.begin(self._rollout.batch())
        return rewards

    def _finish_eagerly(self) -> Tensor:
        report = self.update.finish()
        return self._metrics.measure(report if self.curiosity is None else torch.cat((report, self.curiosity.report())))
