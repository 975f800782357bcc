"""Pendulum as Gymnasium has it (classic_control/pendulum.py)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastppo.envs.tensor.task import State

_MAX_SPEED, _MAX_TORQUE, _DT, _MASS, _LENGTH = 8.0, 2.0, 0.05, 1.0, 1.0


@dataclasses.dataclass(frozen=True)
class Pendulum:
    """State: angle, 0 being upright, and its speed. Action: torque within +-2."""

    g: float = 10.0
    n_uniforms = 2

    def reset(self, u: Tensor) -> State:
        """Any angle, a speed within +-1."""
        angle, speed = (u * 2 - 1).unbind(0)
        return angle * math.pi, speed

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """One semi-implicit Euler step of 0.05 s; nothing ends it but the time limit."""
        angle, speed = state
        torque = actions[:, 0].to(angle.dtype).clamp(-_MAX_TORQUE, _MAX_TORQUE)
        off = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = off.square() + 0.1 * speed.square() + 0.001 * torque.square()
        acceleration = 3 * self.g / (2 * _LENGTH) * angle.sin() + 3.0 / (_MASS * _LENGTH**2) * torque
        speed = (speed + acceleration * _DT).clamp(-_MAX_SPEED, _MAX_SPEED)
        return (angle + speed * _DT, speed), -cost, torch.zeros_like(angle, dtype=torch.bool)

    def observe(self, state: State) -> Tensor:
        """Cosine and sine of the angle, and the speed, [N, 3]."""
        angle, speed = state
        return torch.stack((angle.cos(), angle.sin(), speed), 1)
