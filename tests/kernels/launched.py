"""Kernels launched as on an H100: compiled by Triton's JIT for the arguments of each call, then by its own launcher.

Run it with the library of `fake_libcuda.c`, which launches nothing. Tensors are on the CPU.
"""

import json
import sys

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver

from fastppo.functional.distributions import Categorical, Gaussian
from fastppo.functional.losses import PPOLoss
from fastppo.kernels import gae, rollout, update
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.ppo.kernel_gradient import KernelGradient, _check_step
from fastppo.ppo.kernel_rollout import KernelRollout
from fastppo.ppo.minibatches import Minibatch
from fastppo.runtime.compile import CompileError
from tests.kernels.interpreted_rollouts import Case, collector
from tests.test_fused import make_batch, make_policy
from tests.test_update import coefficients

KERNELS = {
    gae: ["_kernel"],
    rollout: ["_rollout", "_values"],
    update: ["_differentiate", "_reduce", "_decide", "_adam"],
}
ROLLOUTS = [
    Case("CartPole-v1", 500, hidden=(16,), n_envs=64),
    Case("Pendulum-v1", 6, hidden=(16,), n_envs=1, normalize=True),
]


def launch_gae(n_envs):
    """Launch GAE for `n_envs` environments."""
    numbers, flags = [torch.zeros(70, n_envs) for _ in range(3)], [torch.zeros(70, n_envs).bool() for _ in range(2)]
    gae.gae_triton((*numbers, *flags), torch.tensor(0.99), torch.tensor(0.95))


def launch_rollout(case):
    """Launch a rollout and its values."""
    collect, env, policy = collector(case)
    collect._fused = KernelRollout(policy, env, collect.rollout)
    collect()


def launch_update(distribution, features):
    """Launch a gradient and a step."""
    policy = make_policy(distribution, obs=features, widths=(16,))
    flat, batch, loss = FlatParameters(policy.network), make_batch(policy, 37), PPOLoss("max")
    gradient = KernelGradient(policy, flat, loss, scale_advantages=True, programs=3)
    gradient.pack(batch)
    minibatch = Minibatch(torch.tensor([0.0, 1.0]), torch.randperm(37), ())
    try:
        _check_step(gradient, flat, loss, minibatch, coefficients())
    except CompileError:
        pass  # as nothing was computed


def compiled():
    """Return, of every kernel that was compiled, module, name and types of its arguments."""
    found = []
    for module, names in KERNELS.items():
        for name in names:
            versions, *_ = getattr(module, name).device_caches[0]
            found += [
                {"module": module.__name__, "name": name, "types": dict(version.src.signature)}
                for version in versions.values()
            ]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    driver = CudaDriver()
    driver.get_device_capability = lambda *_: (9, 0)
    driver.get_current_device, driver.get_current_stream = lambda: 0, lambda *_: 0
    triton.runtime.driver.set_active(driver)
    for n_envs in (1, 33):
        launch_gae(n_envs)
    for case in ROLLOUTS:
        launch_rollout(case)
    for distribution, features in ((Categorical(3), 4), (Gaussian(2), 17)):
        launch_update(distribution, features)
    json.dump(compiled(), sys.stdout)
