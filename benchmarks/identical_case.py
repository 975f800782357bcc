"""The training runs of benchmarks.identical, and the script that executes one of them.

    python benchmarks/identical_case.py --name sync --run-dir RUN --root CHECKOUT

Both versions of the code run this same file, each with its own fastppo on PYTHONPATH. It therefore uses only the public
API (Config, Trainer, resume) and, for several ranks, the command line. It imports fastppo and torch inside functions,
so that worker processes start quickly.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

SETTINGS: dict[str, Any] = {
    "env_id": "CartPole-v1",
    "vectorization": "sync",
    "n_envs": 4,
    "n_steps": 32,
    "n_minibatches": 4,
    "update_epochs": 3,
    "total_timesteps": 6 * 4 * 32,
    "learning_rate": 2.5e-3,
    "hidden_sizes": (16, 16),
    "record_ratios": 2,
    "device": "cpu",
    "threads": 1,
    "compile": "off",
}
PENDULUM: dict[str, Any] = {
    "env_id": "Pendulum-v1",
    "env_kwargs": {"max_episode_steps": 20},
    "normalize_obs": True,
    "normalize_rewards": True,
}
KL_STOP: dict[str, Any] = {"learning_rate": 0.01, "target_kl": 2e-3}  # some updates stop, others don't


class Digits(gym.Env[Any, Any]):
    """Vector observations and MultiDiscrete actions; episodes of random length terminate or are truncated."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.MultiDiscrete([3, 2])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode of 3 to 11 steps."""
        super().reset(seed=seed)
        self.steps_left = int(self.np_random.integers(3, 12))
        self.obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.obs.copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Reward each component that matches the observation."""
        reward = float(action[0] == round(1 + self.obs[0])) + 0.5 * float(action[1] == (self.obs[1] > 0))
        self.steps_left -= 1
        self.obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        over, cut = self.steps_left == 0, self.obs[2] > 0
        return self.obs.copy(), reward, bool(over and not cut), bool(over and cut), {}


class Sides(gym.Env[Any, Any]):
    """Noisy uint8 images with one bright side; the action that names it earns the reward. Episodes of five steps."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def _obs(self) -> Any:
        image = self.np_random.integers(0, 128, (36, 36, 1), np.uint8)
        self.side = int(self.np_random.integers(2))
        image[:, 18 * self.side : 18 * self.side + 18] += 127
        return image

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Reward the right side."""
        reward = 1.5 if action == self.side else -0.5
        self.steps += 1
        return self._obs(), reward, self.steps == 5, False, {}


def next_step_pendulums() -> SyncVectorEnv:
    """Return four environments in Gymnasium's own vectorisation with next-step autoreset."""
    makers = [lambda: gym.make("Pendulum-v1", max_episode_steps=20)] * 4
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)


def two_heads() -> Any:
    """Return a custom network for CartPole."""
    import torch
    from torch import nn

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.actor, self.critic = nn.Linear(4, 12), nn.Linear(12, 2), nn.Linear(12, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = torch.nn.functional.silu(self.body(x))
            return self.actor(features), self.critic(features).squeeze(-1)

    return TwoHeads()


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        settings: Config fields that differ from SETTINGS.
        make_env: makes one environment, or a vector environment.
        policy: makes the custom network.
        stop_after: iterations before the run is interrupted and resumed; 0: not interrupted.
        ranks: processes under torchrun; two or more run the command line.
        logs: a tag that the run must log, as evidence that it tests what its name says.
    """

    settings: dict[str, Any]
    make_env: Callable[[], Any] | None = None
    policy: Callable[[], Any] | None = None
    stop_after: int = 0
    ranks: int = 1
    logs: str = "losses/policy_loss"


CASES: dict[str, Case] = {
    "sync": Case({}),
    "pool": Case({"vectorization": "pool", "workers": 2}),
    "pool-halves": Case({"vectorization": "pool", "workers": 2, "half_batches": True}),
    "native": Case({"vectorization": "native"}),
    "tensor": Case({"vectorization": "tensor"}),
    "box-normalised": Case(PENDULUM),
    "multi-discrete": Case({}, make_env=Digits),
    "image": Case({"network": "cnn", "n_minibatches": 2, "update_epochs": 2, "sign_rewards": True}, make_env=Sides),
    "discrete-obs": Case({"env_id": "FrozenLake-v1"}),
    "kl-stop-epoch": Case({**KL_STOP, "kl_stop": "epoch"}, logs="losses/stop_kl"),
    "kl-stop-minibatch": Case({**KL_STOP, "kl_stop": "minibatch"}, logs="losses/stop_kl"),
    "value-clip-off": Case({"value_clip": "off"}),
    "value-clip-max": Case({"value_clip": "max", "value_clip_coef": 0.05}),
    "value-clip-only": Case({"value_clip": "clipped_only", "value_clip_coef": 0.05}),
    "advantages-batch": Case({"normalize_advantages": "batch"}),
    "schedules": Case(
        {"learning_rate": "cosine:2.5e-3:1e-4", "anneal_lr": False, "anneal_clip": True, "ent_coef": "linear:0.01:0"}
    ),
    "shared-trunk": Case({"shared_trunk": True, "activation": "relu"}),
    "custom-network": Case({}, policy=two_heads),
    "bf16": Case({"precision": "bf16"}),
    "next-step-autoreset": Case(
        {k: PENDULUM[k] for k in ("normalize_obs", "normalize_rewards")}, make_env=next_step_pendulums
    ),
    "evaluation": Case({"eval_every": 256, "eval_episodes": 3}, logs="eval/return_mean"),
    "resumed": Case(PENDULUM, stop_after=3),
    "resumed-pool": Case({"vectorization": "pool", "workers": 2, **KL_STOP}, stop_after=3),
    "two-ranks": Case(PENDULUM, ranks=2),
    "compiled": Case({"compile": "on", **KL_STOP}, logs="losses/stop_kl"),
    "compiled-box": Case({**PENDULUM, "vectorization": "tensor", "compile": "on"}),
}


def run(name: str, run_dir: Path) -> None:
    """Train the case `name` into `run_dir`, in this process."""
    import torch

    from fastppo import Config, Trainer, resume

    case = CASES[name]
    # checkpoints store the global generators, so a difference shows that one version draws from them
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator
    torch.manual_seed(1)
    settings = SETTINGS | case.settings
    if case.ranks > 1:
        sys.argv = ["fastppo", "train", *_flags(settings), "--run-dir", str(run_dir)]
        runpy.run_module("fastppo", run_name="__main__", alter_sys=True)
        return
    policy = None if case.policy is None else case.policy()
    trainer = Trainer(Config(**settings, run_dir=run_dir), make_env=case.make_env, policy=policy)
    if not case.stop_after:
        trainer.run()
        return
    for stats in trainer.iterations():
        if stats.iteration == case.stop_after:
            break
    resume(run_dir, make_env=case.make_env, policy=policy).run()


def _flags(settings: dict[str, Any]) -> list[str]:
    """Return settings as command-line flags."""
    out: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        out.append("--" + name.replace("_", "-"))
        out += [json.dumps(x) if isinstance(x, dict) else str(x) for x in values]
    return out


def main(name: str, run_dir: Path, root: Path) -> None:
    """Train the case `name` into `run_dir` with the fastppo of the checkout `root`; under torchrun if it has ranks."""
    import fastppo

    assert Path(fastppo.__file__).is_relative_to(root), f"{fastppo.__file__} was imported; expected the one in {root}"
    ranks = CASES[name].ranks
    if ranks > 1 and "RANK" not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launch, __file__, "--name", name, "--run-dir", str(run_dir), "--root", str(root)]
        raise SystemExit(subprocess.run(command).returncode)
    run(name, run_dir)


if __name__ == "__main__":
    tyro.cli(main)
