"""MountainCarContinuous with the dynamics of Gymnasium's classic_control/continuous_mountain_car.py (Moore 1990)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastppo.envs.tensor.task import State

_LEFT, _RIGHT, _FASTEST, _GOAL, _POWER, _SLOPE = -1.2, 0.6, 0.07, 0.45, 0.0015, 0.0025


@dataclasses.dataclass(frozen=True)
class MountainCarContinuous:
    """MountainCarContinuous. State: position and velocity. Action: force in [-1, 1]."""

    goal_velocity: float = 0.0
    n_uniforms = 1

    def reset(self, u: Tensor) -> State:
        """Sample a position from [-0.6, -0.4), at rest."""
        position = u[0] * 0.2 - 0.6
        return position, torch.zeros_like(position)

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """Take one step; reward = 100 * goal reached - 0.1 * action^2."""
        position, speed = state
        push = actions[:, 0].to(position.dtype)
        speed = speed + (push.clamp(-1.0, 1.0) * _POWER - _SLOPE * (3 * position).cos())
        speed = speed.clamp(-_FASTEST, _FASTEST)
        position = (position + speed).clamp(_LEFT, _RIGHT)
        speed = torch.where((position == _LEFT) & (speed < 0), 0.0, speed)
        arrived = (position >= _GOAL) & (speed >= self.goal_velocity)
        return (position, speed), torch.where(arrived, 100.0, 0.0) - push.square() * 0.1, arrived

    def observe(self, state: State) -> Tensor:
        """Return the state, [N, 2]."""
        return torch.stack(state, 1)
