"""Rollouts by the kernel in Triton's interpreter and by torch, compared; run with TRITON_INTERPRET=1."""

import dataclasses
import json
import sys

import numpy as np
import torch

from fastppo.envs.make_envs import inspect_env
from fastppo.envs.tensor.tasks import TASKS
from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.policies.policy_spec import PolicySpec
from fastppo.ppo import kernel_rollout
from fastppo.ppo.collector import Collector
from fastppo.ppo.kernel_rollout import KernelRollout, check_kernel_rollout
from fastppo.ppo.rollout import Rollout
from fastppo.runtime.clock import Clock
from fastppo.runtime.compile import CompileError

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """Environments and a policy; N is no multiple of a program's 32 environments."""

    env_id: str
    max_steps: int | None
    n_envs: int = 35
    n_steps: int = 13
    kwargs: tuple = ()
    hidden: tuple = (20, 33)
    activation: str = "tanh"
    shared: bool = False
    normalize: bool = False
    state_std: bool = False
    actions: str = "gaussian"


CASES = [
    Case("CartPole-v1", 500, n_steps=30),  # episodes end by falling
    Case("CartPole-v1", 5, kwargs=(("sutton_barto_reward", True),), shared=True, activation="relu", hidden=(17,)),
    Case("CartPole-v1", None, n_envs=1, activation="gelu", hidden=(16, 8, 5)),
    Case("Acrobot-v1", 4, n_envs=33, activation="silu", normalize=True),
    Case("Pendulum-v1", 6, kwargs=(("g", 9.81),), activation="elu", normalize=True),
    Case("Pendulum-v1", 13, n_envs=3, state_std=True, actions="squashed"),
    Case("MountainCarContinuous-v0", 3, kwargs=(("goal_velocity", 0.01),), hidden=(64, 64)),
    Case("MountainCarContinuous-v0", 50, n_envs=64, shared=True, state_std=True),
]


def collector(case, seed=0):
    """Return a collector of case's environments, after a reset, and its policy."""
    torch.manual_seed(seed)
    info = inspect_env(case.env_id, dict(case.kwargs))
    action_spec = info.action_spec.with_distribution(case.actions)
    task = TASKS[case.env_id](**dict(case.kwargs))
    env = TensorEnv(task, case.n_envs, info.obs_spec, action_spec, max_steps=case.max_steps, device=CPU)
    policy = PolicySpec(
        info.obs_spec,
        action_spec,
        "mlp",
        case.hidden,
        case.activation,
        case.shared,
        case.normalize,
        2.0,
        state_dependent_std=case.state_std,
    ).build()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    if case.normalize:
        policy.encoder.update_moments(torch.randn(50, *info.obs_spec.shape) * 0.5 + 0.1, None)
    rollout = Rollout.allocate(case.n_steps, env, policy, CPU)
    collect = Collector(env, policy, rollout, torch.Generator().manual_seed(1), Clock(), torch_only=True)
    rollout.obs[-1].copy_(env.reset(np.arange(case.n_envs) * 7_654_321))
    if case.env_id.startswith("Mountain"):  # some cars are about to arrive, and some stand at the wall
        env.capturable_state["state0"].copy_(torch.linspace(-1.2, 0.44, case.n_envs))
        env.capturable_state["state1"].copy_(torch.linspace(-0.07, 0.07, case.n_envs))
        rollout.obs[-1].copy_(torch.stack([env.capturable_state[f"state{i}"] for i in range(2)], 1))
    return collect, env, policy


def tensors(collect, env):
    """Return copies of all that a rollout writes, by name."""
    found = {name: x for name, x in collect.rollout.tensors().items() if name not in ("noise", "final_obs")}
    found |= {f"final_{name}": x for name, x in env.final_obs_buffer._asdict().items()} | env.capturable_state
    return {name: x.clone() for name, x in found.items()}


def compare(case):
    """Collect two rollouts by each means, then a third by torch from the state of each; return the worst differences.

    A difference is relative to 1 + the largest number of its tensor.
    """
    (eager, env, _), (kernel, same_env, policy) = collector(case), collector(case)
    kernel._fused = KernelRollout(policy, same_env, kernel.rollout)
    worst, ends = {}, {"terminated": 0, "truncated": 0}
    for k in range(3):
        if k == 2:
            kernel._fused = None
        eager(), kernel()
        expected = tensors(eager, env)
        for name, x in tensors(kernel, same_env).items():
            y = expected[name].double()
            if x.numel():
                error = ((x.double() - y).abs().max() / (1 + y.abs().max())).item()
                worst[name] = max(worst.get(name, 0.0), error if error == error else float("inf"))
        for name in ends:
            ends[name] += int(expected[name].sum())
    return {"worst": worst, **ends}


def check(extra):
    """Return what the comparison at the start says of a kernel whose time limit is longer by `extra` steps."""

    class Changed(KernelRollout):
        def __init__(self, *args):
            super().__init__(*args)
            longer = self._simulation.max_steps + extra
            self._simulation = dataclasses.replace(self._simulation, max_steps=longer)

    _, env, policy = collector(CASES[0])
    kernel_rollout.KernelRollout = Changed
    try:
        check_kernel_rollout(policy, env)
    except CompileError as error:
        return str(error)
    return "equal"


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({"cases": [compare(case) for case in CASES], "check": [check(0), check(1)]}, sys.stdout)
