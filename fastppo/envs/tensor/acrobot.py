"""Acrobot with the dynamics of Gymnasium's classic_control/acrobot.py ("book" equations; Sutton and Barto 2018)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastppo.envs.tensor.task import State

_DT, _GRAVITY = 0.2, 9.8
_MASS = _LENGTH = _INERTIA = 1.0
_CENTRE = 0.5  # distance of a link's centre of mass from its joint
_FASTEST = (4 * math.pi, 9 * math.pi)


@dataclasses.dataclass(frozen=True)
class Acrobot:
    """Acrobot. State: angles and angular velocities of both joints. Actions: torque -1, 0, +1 on the second joint."""

    n_uniforms = 4

    def reset(self, u: Tensor) -> State:
        """Sample every state variable uniformly from [-0.1, 0.1)."""
        return (u * 0.2 - 0.1).unbind(0)

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """Take one Runge-Kutta (RK4) step of 0.2 s; reward -1 until the tip is one link above the base."""
        torque = (actions - 1).to(state[0].dtype)

        def moved(by: float, slope: State) -> State:
            return tuple(s + by * k for s, k in zip(state, slope, strict=True))

        k1 = _slope(state, torque)
        k2 = _slope(moved(_DT / 2, k1), torque)
        k3 = _slope(moved(_DT / 2, k2), torque)
        k4 = _slope(moved(_DT, k3), torque)
        total = tuple(a + 2 * b + 2 * c + d for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
        theta1, theta2, speed1, speed2 = moved(_DT / 6.0, total)
        theta1, theta2 = _wrap(theta1), _wrap(theta2)
        speed1, speed2 = (x.clamp(-most, most) for x, most in zip((speed1, speed2), _FASTEST, strict=True))
        swung_up = -theta1.cos() - (theta2 + theta1).cos() > 1.0
        reward = torch.where(swung_up, 0.0, -1.0).to(theta1.dtype)
        return (theta1, theta2, speed1, speed2), reward, swung_up

    def observe(self, state: State) -> Tensor:
        """Return cosine and sine of both angles, and the angular velocities, [N, 6]."""
        theta1, theta2, speed1, speed2 = state
        return torch.stack((theta1.cos(), theta1.sin(), theta2.cos(), theta2.sin(), speed1, speed2), 1)


def _slope(state: State, torque: Tensor) -> State:
    theta1, theta2, speed1, speed2 = state
    cos2, sin2 = theta2.cos(), theta2.sin()
    reach = _MASS * _LENGTH * _CENTRE
    d1 = _MASS * _CENTRE**2 + _MASS * (_LENGTH**2 + _CENTRE**2 + 2 * _LENGTH * _CENTRE * cos2) + 2 * _INERTIA
    d2 = _MASS * (_CENTRE**2 + _LENGTH * _CENTRE * cos2) + _INERTIA
    phi2 = _MASS * _CENTRE * _GRAVITY * (theta1 + theta2 - math.pi / 2).cos()
    phi1 = (
        -reach * speed2.square() * sin2
        - 2 * reach * speed2 * speed1 * sin2
        + (_MASS * _CENTRE + _MASS * _LENGTH) * _GRAVITY * (theta1 - math.pi / 2).cos()
        + phi2
    )
    acceleration2 = (torque + d2 / d1 * phi1 - reach * speed1.square() * sin2 - phi2) / (
        _MASS * _CENTRE**2 + _INERTIA - d2.square() / d1
    )
    return speed1, speed2, -(d2 * acceleration2 + phi1) / d1, acceleration2


def _wrap(angle: Tensor) -> Tensor:
    """Wrap into [-pi, pi]; two passes suffice because the velocity limits allow less than two turns per step."""
    for _ in range(2):
        angle = torch.where(angle > math.pi, angle - 2 * math.pi, angle)
        angle = torch.where(angle < -math.pi, angle + 2 * math.pi, angle)
    return angle
