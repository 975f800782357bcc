"""stable-baselines3 and sb3-contrib at CleanRL's settings on CartPole, with the time of every iteration's end."""

from __future__ import annotations

import time
from typing import Any


def iteration_ends(
    algorithm: Any,
    policy: str,
    *,
    n_envs: int,
    n_steps: int,
    epochs: int,
    minibatches: int,
    iterations: int,
    **more: Any,
) -> list[float]:
    """Train CartPole-v1 and return the time at which each iteration ended, in seconds.

    Args:
        algorithm: class of stable-baselines3 or sb3-contrib.
        policy: name of its policy.
        n_envs: N.
        n_steps: T.
        epochs: passes over each rollout.
        minibatches: of an epoch.
        iterations: rollouts with their updates.
        more: arguments of the algorithm.
    """
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    starts: list[float] = []

    class Starts(BaseCallback):
        def _on_rollout_start(self) -> None:
            starts.append(time.time())

        def _on_step(self) -> bool:
            return True

    algorithm(
        policy,
        make_vec_env("CartPole-v1", n_envs=n_envs, seed=1),
        n_steps=n_steps,
        batch_size=n_envs * n_steps // minibatches,
        n_epochs=epochs,
        learning_rate=lambda left: 2.5e-4 * left,
        ent_coef=0.01,
        vf_coef=0.25,  # its value loss is not halved
        clip_range=0.2,
        seed=1,
        device="cpu",
        **more,
    ).learn(n_envs * n_steps * iterations, callback=Starts())
    return [*starts[1:], time.time()]
