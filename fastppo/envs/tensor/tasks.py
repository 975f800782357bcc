"""Registry of the tasks of vectorization=tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastppo.envs.env_info import EnvInfo
from fastppo.envs.tensor.acrobot import Acrobot
from fastppo.envs.tensor.cartpole import CartPole
from fastppo.envs.tensor.catch import Catch
from fastppo.envs.tensor.mountain_car import MountainCarContinuous
from fastppo.envs.tensor.pendulum import Pendulum
from fastppo.envs.tensor.task import Task
from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.errors import ConfigError

# By Gymnasium id; env_kwargs become the task's fields
TASKS: dict[str, Callable[..., Task]] = {
    "Acrobot-v1": Acrobot,
    "CartPole-v1": CartPole,
    "MountainCarContinuous-v0": MountainCarContinuous,
    "Pendulum-v1": Pendulum,
    "fastppo/Catch-v0": Catch,
}


def make_tensor_env(env_info: EnvInfo, n_envs: int, device: torch.device) -> TensorEnv:
    """Make `n_envs` copies of the task with the environment's id.

    Raises:
        ConfigError: the id has no task, or the task does not take the keyword arguments.
    """
    assert env_info.factory is not None
    factory = env_info.factory
    if factory.make is not None or factory.env_id not in TASKS:
        name = env_info.name if factory.make is not None else factory.env_id
        raise ConfigError(f"vectorization=tensor knows {', '.join(TASKS)}, not {name}; use native, sync or pool.")
    # gymnasium.make consumes these itself; EnvInfo.max_steps holds the time limit
    kwargs = {k: v for k, v in factory.env_kwargs.items() if k not in ("max_episode_steps", "render_mode")}
    try:
        task = TASKS[factory.env_id](**kwargs)
    except TypeError:
        raise ConfigError(f"vectorization=tensor: {factory.env_id} refuses {factory.env_kwargs}.") from None
    return TensorEnv(task, n_envs, env_info.obs_spec, env_info.action_spec, max_steps=env_info.max_steps, device=device)
