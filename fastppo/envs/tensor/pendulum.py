"""Pendulum with the dynamics of Gymnasium's classic_control/pendulum.py."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastppo.envs.tensor.task import State

_MAX_SPEED, _MAX_TORQUE, _DT, _MASS, _LENGTH = 8.0, 2.0, 0.05, 1.0, 1.0


@dataclasses.dataclass(frozen=True)
class Pendulum:
    """Pendulum. State: angle (0 is upright) and angular velocity. Action: torque in [-2, 2]."""

    g: float = 10.0
    n_uniforms = 2

    def reset(self, u: Tensor) -> State:
        """Sample the angle from [-pi, pi) and the angular velocity from [-1, 1)."""
        angle, speed = (u * 2 - 1).unbind(0)
        return angle * math.pi, speed

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """Take one semi-implicit Euler step of 0.05 s; never terminates, so only the time limit ends an episode.

        Reward = -(angle^2 + 0.1 * velocity^2 + 0.001 * torque^2), with the angle wrapped into [-pi, pi).
        """
        angle, speed = state
        torque = actions[:, 0].to(angle.dtype).clamp(-_MAX_TORQUE, _MAX_TORQUE)
        off = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = off.square() + 0.1 * speed.square() + 0.001 * torque.square()
        acceleration = 3 * self.g / (2 * _LENGTH) * angle.sin() + 3.0 / (_MASS * _LENGTH**2) * torque
        speed = (speed + acceleration * _DT).clamp(-_MAX_SPEED, _MAX_SPEED)
        return (angle + speed * _DT, speed), -cost, torch.zeros_like(angle, dtype=torch.bool)

    def observe(self, state: State) -> Tensor:
        """Return cosine and sine of the angle, and the angular velocity, [N, 3]."""
        angle, speed = state
        return torch.stack((angle.cos(), angle.sin(), speed), 1)
