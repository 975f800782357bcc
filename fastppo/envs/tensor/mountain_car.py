"""MountainCarContinuous as Gymnasium has it (classic_control/continuous_mountain_car.py), after Moore 1990."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastppo.envs.tensor.task import State

_LEFT, _RIGHT, _FASTEST, _GOAL, _POWER, _SLOPE = -1.2, 0.6, 0.07, 0.45, 0.0015, 0.0025


@dataclasses.dataclass(frozen=True)
class MountainCarContinuous:
    """State: position and speed. Action: force within +-1."""

    goal_velocity: float = 0.0
    n_uniforms = 1

    def reset(self, u: Tensor) -> State:
        """At rest between -0.6 and -0.4."""
        position = u[0] * 0.2 - 0.6
        return position, torch.zeros_like(position)

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """One step; 100 for the hilltop, less a tenth of the action's square."""
        position, speed = state
        push = actions[:, 0].to(position.dtype)
        speed = speed + (push.clamp(-1.0, 1.0) * _POWER - _SLOPE * (3 * position).cos())
        speed = speed.clamp(-_FASTEST, _FASTEST)
        position = (position + speed).clamp(_LEFT, _RIGHT)
        speed = torch.where((position == _LEFT) & (speed < 0), 0.0, speed)
        arrived = (position >= _GOAL) & (speed >= self.goal_velocity)
        return (position, speed), torch.where(arrived, 100.0, 0.0) - push.square() * 0.1, arrived

    def observe(self, state: State) -> Tensor:
        """The state, [N, 2]."""
        return torch.stack(state, 1)
