"""Whole rollouts of tensor environments, and the critic's values, in Triton kernels: for MLPs on CUDA."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.envs.tensor.acrobot import Acrobot
from fastppo.envs.tensor.cartpole import CartPole
from fastppo.envs.tensor.mountain_car import MountainCarContinuous
from fastppo.envs.tensor.pendulum import Pendulum
from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.envs.vec_env import FinalObsBuffer, VecEnv
from fastppo.errors import first_line
from fastppo.policies.decisions import Decisions
from fastppo.policies.mlp_layout import layout, not_laid_out
from fastppo.policies.policy import Policy, PolicyState
from fastppo.ppo.kernel_gradient import in_each_precision
from fastppo.ppo.rollout import Rollout
from fastppo.runtime.compile import CompileError
from fastppo.spaces.actions import ToEnv

_TASKS = (Acrobot, CartPole, MountainCarContinuous, Pendulum)
_MOST_LAYERS, _MOST_UNITS = 3, 64  # wider ones spill registers
# of the comparison with torch; not a multiple of a program's environments
_EXAMPLE_STEPS, _EXAMPLE_ENVS = 16, 48
# of what matrix products compute, as a share of the largest number or of 1, by their precision
_OUTPUT_TOLERANCE = {"ieee": 1e-4, "tf32": 0.05}
_PHYSICS_TOLERANCE = 1e-3  # of what no matrix product computes: physics in float32, over the example's steps


def not_covered(policy: Policy, env: VecEnv) -> str | None:
    """Return why no kernel can take the rollouts of this policy in these environments, or None."""
    if not isinstance(env, TensorEnv) or type(env.task) not in _TASKS:
        return "there are kernels for the classic control tasks of vectorization=tensor alone"
    if reason := not_laid_out(policy):
        return reason
    trunk = policy.network.critic_trunk
    widths = [x.out_features for x in trunk.children() if isinstance(x, torch.nn.Linear)]  # type: ignore[union-attr]
    if len(widths) > _MOST_LAYERS or max(widths) > _MOST_UNITS:
        return f"hidden layers are more than {_MOST_LAYERS} or wider than {_MOST_UNITS}"
    if not env.obs_spec.is_plain or env.obs_spec.leaves[0].divisor != 1 or env.obs_spec.dtype != torch.float32:
        return "observations are not plain vectors"
    return None


class KernelRollout:
    """Takes the rollouts of a policy in environments for which `not_covered` is None, and computes its values.

    Actions are those of torch for the same noise up to rounding, which may turn a choice between two nearly equal
    scores.
    """

    def __init__(self, policy: Policy, env: TensorEnv, rollout: Rollout) -> None:
        """Bind policy and environments to the storage."""
        from fastppo.kernels import rollout as kernels
        from fastppo.kernels.layers import precision

        self._kernels, self._policy, self._env, self._rollout = kernels, policy, env, rollout
        self.parameters: Tensor = policy.network.actor.linear.weight.detach()  # type: ignore[union-attr,operator]
        mlp, normalizer = layout(policy, self.parameters), policy.encoder.normalizer
        shared = mlp.critic[:-1] if mlp.shared else ()
        self.precision = precision()
        self._critic = kernels.Network(
            mlp.critic, mlp.activation, self.precision, None if normalizer is None else float(normalizer.clip)
        )
        self._actor = dataclasses.replace(self._critic, layers=(*shared, *mlp.actor))
        self._actions = kernels.Actions(sum(mlp.nvec), mlp.log_std, mlp.n_params, **_bounds(env))
        (option,) = dataclasses.astuple(env.task) or (0.0,)  # type: ignore[call-overload]  # one field, or none
        self._simulation = kernels.Simulation(
            type(env.task).__name__,
            float(option),
            mlp.features,
            env.max_steps,
            len(env.final_obs_buffer.end_steps),
        )

    def begin(self) -> None:
        """Do nothing: kernels read the current parameters and moments."""

    def roll(self) -> None:
        """Take the rollout's steps from the observations in its row 0."""
        r, env = self._rollout, self._env
        self._kernels.rollout(
            self.parameters,
            self._moments(),
            (r.noise, r.obs, r.params, r.actions, r.rewards, r.terminated, r.truncated),
            env.final_obs_buffer,
            tuple(env.capturable_state.values()),
            network=self._actor,
            actions=self._actions,
            simulation=self._simulation,
        )

    def fill(self, d: Decisions) -> None:
        """Fill values and log-probabilities of a whole rollout from its observations, parameters and actions."""
        steps = len(d.noise)
        d.values.copy_(self.value(d.obs[:steps].flatten(0, 1)).view(d.values.shape))
        d.logprobs.copy_(self._policy.distribution.log_prob(d.params, d.actions))

    def value(self, obs: Tensor, state: PolicyState = (), starts: Tensor | None = None) -> Tensor:
        """Return V of each row of obs [B, features]; as `Policy.value`."""
        return self._kernels.values(self.parameters, self._moments(), obs.contiguous(), network=self._critic)

    def _moments(self) -> tuple[Tensor, Tensor]:
        normalizer = self._policy.encoder.normalizer
        if normalizer is None:
            return self.parameters, self.parameters
        return normalizer.mean, normalizer.scale


def _bounds(env: TensorEnv) -> dict[str, Any]:
    """Return what `ToEnv` does to the number that is an action; nothing for choices."""
    to_env = ToEnv(env.action_spec)
    names = ("centre", "half_width", "low", "high")
    numbers = {name: float(x) for name in names if (x := getattr(to_env, name)) is not None}
    return {**numbers, "squash": to_env.squash} if numbers else {}


def check_kernel_rollout(policy: Policy, env: TensorEnv) -> None:
    """Compare the kernels with torch in a few environments like `env`; changes no state and draws from no stream.

    Raises:
        CompileError: a kernel can't be compiled, or its results differ.
    """
    in_each_precision(lambda: _compare(policy, env))


@torch.no_grad()
def _compare(policy: Policy, env: TensorEnv) -> None:
    """Compare the kernels with torch in the precision that is set.

    The reference takes the kernel's actions, because rounding may turn a choice.

    Raises:
        CompileError: a kernel can't be compiled, or its results differ.
    """
    device, spec = env.capturable_state["seed"].device, env.obs_spec
    ours, theirs = (
        TensorEnv(env.task, _EXAMPLE_ENVS, spec, env.action_spec, max_steps=env.max_steps, device=device)
        for _ in range(2)
    )
    r, expected = (Rollout.allocate(_EXAMPLE_STEPS, x, policy, device) for x in (ours, theirs))
    for each, storage in ((ours, r), (theirs, expected)):
        each.attach(storage.transitions())
        storage.obs[0].copy_(each.reset(np.arange(_EXAMPLE_ENVS)))
        each.final_obs_buffer.clear(_EXAMPLE_STEPS)
        if each.max_steps is not None:  # time limits after 1, 2, ... steps
            ages = (each.max_steps - 1 - torch.arange(_EXAMPLE_ENVS, device=device)).clamp(min=0)
            each.capturable_state["steps"].copy_(ages)
    policy.distribution.fill_noise(r.noise, torch.Generator(device).manual_seed(0))
    try:
        kernel = KernelRollout(policy, ours, r)
        kernel.roll()
        kernel.fill(r.decisions())
    except Exception as error:
        raise CompileError(f"a kernel failed: {type(error).__name__}: {first_line(error).removesuffix('.')}") from error
    for t in range(_EXAMPLE_STEPS):
        expected.actions[t].copy_(r.actions[t])
        theirs.send(t, 0)
    output = policy(r.obs[:-1].flatten(0, 1))
    expected.params.copy_(output.params.view(r.params.shape))
    expected.values.copy_(output.values.view(r.values.shape))
    sampled = policy.distribution.sample(r.params, r.noise)
    pairs = {
        "params": (r.params, expected.params),
        "values": (r.values, expected.values),
        "actions": (r.actions, sampled),
        "obs": (r.obs, expected.obs),
        "rewards": (r.rewards, expected.rewards),
        "terminated": (r.terminated, expected.terminated),
        "truncated": (r.truncated, expected.truncated),
        **{
            f"final_{name}": (x, y)
            for name, x, y in zip(FinalObsBuffer._fields, ours.final_obs_buffer, theirs.final_obs_buffer, strict=True)
        },
        **{name: (x, theirs.capturable_state[name]) for name, x in ours.capturable_state.items()},
    }
    for name, (found, wanted) in pairs.items():
        found, wanted = found.double(), wanted.double()
        if not found.numel():
            continue
        if name in ("params", "values"):
            relative, absolute = 0.0, _OUTPUT_TOLERANCE[kernel.precision] * max(1.0, float(wanted.abs().max()))
        else:
            relative = absolute = _PHYSICS_TOLERANCE
        if not torch.allclose(found, wanted, relative, absolute):
            worst = float((found - wanted).abs().max())
            raise CompileError(f"the kernel's {name} differ from torch's by up to {worst:.1g}")
