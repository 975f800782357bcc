"""Curiosity by random network distillation: intrinsic rewards for a rollout, and the updates of what computes them.

The learner calls `Curiosity.advantages` between rollout and update, and `learn` after the policy's epochs. Both work on
static tensors, read nothing back and draw nothing: `learn` takes the minibatches that the policy's update has drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from fastppo.functional.diagnostics import explained_variance
from fastppo.functional.distillation import distillation_loss, novelty
from fastppo.functional.gae import Gae, Trajectory
from fastppo.functional.losses import Coefficients
from fastppo.functional.optimizer import Optimizer, clip_by_norm
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.rnd import RandomNetworkDistillation
from fastppo.ppo.rollout import Rollout
from fastppo.runtime.compile import CompileError, compile_graph
from fastppo.runtime.distributed import World
from fastppo.runtime.graphs import GraphPool, capture

_CHUNK = 2**22  # numbers of flattened observations per pass over a rollout: 32 MiB in float64


class CuriosityState(NamedTuple):
    """The tensors that a minibatch changes.

    Attributes:
        params: [P] of predictor and critic, flat.
        optimizer: the optimiser's state, a NamedTuple of tensors.
        sums: [3] losses of the predictor and of the critic, summed over the steps taken in an update; their number.
    """

    params: Tensor
    optimizer: Any
    sums: Tensor


class Curiosity:
    """Gives the policy an intrinsic advantage for reaching observations that the predictor doesn't know yet.

    The intrinsic reward of step t is the novelty of the observation that follows it, obs[t + 1], divided by the running
    standard deviation of its discounted sum. Its return goes on where an episode ends: what lies beyond the end is new
    or not, too, and a return that ended there would teach the policy to fear ends. So each environment is one endless
    stream, in which the first observation of an episode follows the last step of the one before, and a filler row is a
    step like any other.

        A = A_extrinsic + coef A_intrinsic

    Predictor and critic minimise

        L = mean((p - t)^2) + vf_coef 0.5 mean((V_intrinsic - R_intrinsic)^2)

    over the policy's minibatches, in all epochs, with a gradient clipping and an optimiser of their own. They share no
    parameters with the policy, so that this is the sum of losses of the paper, except that the KL of the policy stops
    its own epochs alone and that norms are clipped apart. The first mean is over a share of the rows.

    Attributes:
        rnd: networks and moments.
        parameters: those of predictor and critic, as one vector.
        gamma: [] discount factor of the intrinsic return.
        rewards: [T, N] scaled intrinsic rewards of the last rollout.
        returns: [T, N] targets of the critic.
        report_names: names of the figures that `report` returns.

    Source: Burda et al. 2018, section 2 (arXiv:1810.12894).
    """

    report_names = ("rnd_loss", "intrinsic_value_loss", "intrinsic_explained_variance", "intrinsic_reward")

    def __init__(
        self,
        rnd: RandomNetworkDistillation,
        parameters: FlatParameters,
        rollout: Rollout,
        optimizer: Optimizer,
        *,
        coef: float,
        gamma: float,
        proportion: float,
        minibatch_size: int,
        world: World,
    ) -> None:
        """Allocate the state and initialise the optimiser.

        Args:
            rnd: networks and moments, on the device of the rollout.
            parameters: of its predictor and critic.
            rollout: the storage; row t + 1 of its observations follows step t.
            optimizer: of predictor and critic.
            coef: weight of the intrinsic advantage.
            gamma: discount factor of the intrinsic return.
            proportion: share of each minibatch that the predictor learns from, in (0, 1].
            minibatch_size: B, rows of a minibatch.
            world: the ranks that share each minibatch.
        """
        self.rnd, self._rollout, self._world, self._coef = rnd, rollout, world, coef
        self._optimizer, self.parameters, vector = optimizer, parameters, parameters.vector
        self.state = CuriosityState(vector, optimizer.init(vector), vector.new_zeros(3))
        self.gamma = vector.new_full((), gamma)
        self.rewards, self._values, self._next_values, self.returns = (
            torch.zeros_like(rollout.rewards) for _ in range(4)
        )
        self._never = torch.zeros_like(rollout.done)
        self._obs = rollout.obs.flatten(0, 1)
        # evenly spaced: the order of the rows is random, but with memory all first steps of sequences come first
        share = max(1, round(proportion * minibatch_size))
        self._share = torch.arange(share, device=vector.device) * minibatch_size // share
        trained = {id(p) for p in self.parameters.parameters}
        self._trained = [name for name, p in rnd.named_parameters() if id(p) in trained]
        fixed = {name: p for name, p in rnd.named_parameters() if id(p) not in trained} | dict(rnd.named_buffers())
        self._fixed, self._constants = list(fixed), tuple(x.detach() for x in fixed.values())
        self._gradient: Callable[..., Tensor] = self._compute_gradient
        self._apply: Callable[[CuriosityState, Tensor, Tensor, Tensor], None] = self._take_step
        self._epoch: Callable[[Tensor, Coefficients], None] = self._run_epoch

    @torch.no_grad()
    def advantages(self, gae: Gae, gae_lambda: Tensor) -> Tensor:
        """Update the moments from the rollout, and return `coef` times its intrinsic advantages, [T, N].

        Args:
            gae: the kernel that computes advantages and returns.
            gae_lambda: [] of the policy's advantages.
        """
        r, rnd, n = self._rollout, self.rnd, self._rollout.rewards.shape[1]
        chunk = max(1, _CHUNK // rnd.n_features)
        for rows in torch.split(self._obs[n:], chunk):
            rnd.update_moments(rows)
        outputs = [rnd(rows, rows) for rows in torch.split(self._obs, chunk)]
        values = torch.cat([x.values for x in outputs]).view(-1, n)
        new = torch.cat([novelty(x.predictions, x.targets) for x in outputs]).view(-1, n)[1:]
        rnd.rewards.update_from_rollout(new, self._never, None, self.gamma)
        self.rewards.copy_(rnd.rewards(new))
        self._values.copy_(values[:-1])
        self._next_values.copy_(values[1:])
        stream = Trajectory(self.rewards, self._values, self._next_values, self._never, self._never)
        advantages, returns = gae(stream, self.gamma, gae_lambda)
        self.returns.copy_(returns)
        return self._coef * advantages.view_as(r.advantages)

    def learn(self, orders: Tensor, coefs: Coefficients) -> None:
        """Take a step on each minibatch.

        Args:
            orders: [E, M, B] rows of the minibatches of each epoch.
            coefs: this iteration's coefficients: learning rate, value coefficient, largest norm of the gradient.
        """
        self.state.sums.zero_()
        for order in orders:
            self._epoch(order, coefs)

    def report(self) -> Tensor:
        """Return the values of `report_names` for the last update, over the rows of all ranks, on the device."""
        losses = self.state.sums[:2] / self.state.sums[2]
        explained = explained_variance(self._values, self.returns, None, self._world.pool)
        reward = self._world.sum_(self.rewards.mean()) / self._world.size
        return torch.cat((losses, torch.stack((explained, reward))))

    def compile(self, rows: Tensor, coefs: Coefficients) -> None:
        """Compile the step for minibatches like `rows` [B]; changes no state.

        Raises:
            CompileError: it can't be compiled on this rank or another; it stays eager on all.
        """

        def compile_both() -> tuple[Callable[..., Tensor], Callable[..., None]]:
            example = self._gradient_arguments(rows, coefs)
            limits = coefs.learning_rate, coefs.max_grad_norm
            total = torch.zeros(self.parameters.size + 2, device=rows.device)
            return (
                compile_graph(self._compute_gradient, example),
                compile_graph(self._take_step, (self.state, total, *limits)),
            )

        # every rank the same, as in `PPOUpdate.compile`
        self._gradient, self._apply = self._world.together(compile_both, CompileError)

    def capture(self, rows: Tensor, coefs: Coefficients, pool: GraphPool) -> None:
        """Capture an epoch over minibatches like `rows` [M, B]; later epochs replay it, with these `coefs`.

        Raises:
            CaptureError: the capture failed.
        """
        own = rows.clone()
        replay = capture(
            lambda: self._run_epoch(own, coefs),
            keep=[*self.kept(), self.state.sums],
            fresh=[own],
            device=rows.device,
            pool=pool,
            world=self._world,
        )

        def epoch(order: Tensor, coefs: Coefficients) -> None:
            own.copy_(order)
            replay()

        self._epoch = epoch

    def step(self, rows: Tensor, coefs: Coefficients) -> None:
        """Take one step on a minibatch, rows [B] of the rollout."""
        total = self._world.sum_(self._gradient(*self._gradient_arguments(rows, coefs)))
        self._apply(self.state, total, coefs.learning_rate, coefs.max_grad_norm)

    def kept(self) -> list[Tensor]:
        """List the tensors that `learn` changes and its next call reads."""
        return [self.state.params, *self.state.optimizer]

    def moments(self) -> list[Tensor]:
        """List the tensors that `advantages` changes and its next call reads."""
        return list(self.rnd.buffers())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the optimiser's state; networks and moments are part of the model."""
        state: dict[str, Tensor] = self.state.optimizer._asdict()
        return state

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore in place from `state_dict()`.

        Raises:
            ValueError: a tensor has another shape.
        """
        for name, tensor in self.state_dict().items():
            if saved[name].shape != tensor.shape:
                raise ValueError(f"{name} of RND has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(saved[name])

    def _run_epoch(self, order: Tensor, coefs: Coefficients) -> None:
        """Take a step on each minibatch of `order` [M, B]."""
        for rows in order:
            self.step(rows, coefs)

    def _gradient_arguments(self, rows: Tensor, coefs: Coefficients) -> tuple[Any, ...]:
        return self.state.params, rows, self._obs, self.returns, coefs.vf_coef, self._constants

    def _compute_gradient(
        self, params: Tensor, rows: Tensor, obs: Tensor, returns: Tensor, vf_coef: Tensor, constants: tuple[Tensor, ...]
    ) -> Tensor:
        """Return gradient and both losses of the rows [B] of this rank, as shares of the means over all ranks, [P + 2].

        Args:
            params: [P].
            rows: [B] int64, t * N + n.
            obs: [(T + 1) N, *obs].
            returns: [T, N].
            vf_coef: [] weight of the critic's loss.
            constants: the random network, and moments.
        """
        following = obs.index_select(0, rows.index_select(0, self._share) + returns.shape[1])
        with torch.enable_grad():
            leaves = [view.detach().requires_grad_() for view in self.parameters.views(params)]
            by_name = dict(zip([*self._trained, *self._fixed], [*leaves, *constants], strict=True))
            out = functional_call(self.rnd, by_name, (obs.index_select(0, rows), following))
            distillation = distillation_loss(out.predictions, out.targets)
            target = returns.flatten().index_select(0, rows)
            critic = 0.5 * (out.values - target).square().mean()
            gradients = torch.autograd.grad(distillation + vf_coef * critic, leaves)
        losses = torch.stack((distillation.detach(), critic.detach()))
        return torch.cat((self.parameters.flatten(gradients), losses)) / self._world.size

    def _take_step(self, state: CuriosityState, total: Tensor, learning_rate: Tensor, max_grad_norm: Tensor) -> None:
        """Write the step along the gradient in `total` [P + 2] into `state`, unless the gradient is not finite."""
        clipped, norm = clip_by_norm(total[:-2], max_grad_norm)
        params, optimizer = self._optimizer.step(state.params, clipped, state.optimizer, learning_rate)
        take = norm.isfinite()
        for old, new in zip((state.params, *state.optimizer), (params, *optimizer), strict=True):
            old.copy_(torch.where(take, new, old))
        figures = torch.cat((total[-2:], torch.ones_like(total[:1])))
        state.sums.copy_(state.sums + torch.where(take, figures, 0.0))
