"""CartPole with the dynamics of Gymnasium's classic_control/cartpole.py (Barto, Sutton and Anderson 1983)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastppo.envs.tensor.task import State

_GRAVITY, _CART, _POLE, _HALF_LENGTH, _FORCE, _TAU = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
_TOTAL, _POLE_MOMENT = _CART + _POLE, _POLE * _HALF_LENGTH
_X_LIMIT, _ANGLE_LIMIT = 2.4, 12 * 2 * math.pi / 360


@dataclasses.dataclass(frozen=True)
class CartPole:
    """CartPole. State: position, velocity, pole angle, angular velocity. Actions: 0 left, 1 right."""

    sutton_barto_reward: bool = False
    n_uniforms = 4

    def reset(self, u: Tensor) -> State:
        """Sample every state variable uniformly from [-0.05, 0.05)."""
        return (u * 0.1 - 0.05).unbind(0)

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """Take one Euler step of 0.02 s; terminate beyond 2.4 units or 12 degrees."""
        x, x_dot, theta, theta_dot = state
        force = torch.where(actions == 1, _FORCE, -_FORCE).to(x.dtype)
        cos, sin = theta.cos(), theta.sin()
        temp = (force + _POLE_MOMENT * theta_dot.square() * sin) / _TOTAL
        theta_acc = (_GRAVITY * sin - cos * temp) / (_HALF_LENGTH * (4.0 / 3.0 - _POLE * cos.square() / _TOTAL))
        x_acc = temp - _POLE_MOMENT * theta_acc * cos / _TOTAL
        x, theta = x + _TAU * x_dot, theta + _TAU * theta_dot
        fallen = (x.abs() > _X_LIMIT) | (theta.abs() > _ANGLE_LIMIT)
        reward = torch.where(fallen, -1.0, 0.0) if self.sutton_barto_reward else torch.ones_like(x)
        return (x, x_dot + _TAU * x_acc, theta, theta_dot + _TAU * theta_acc), reward.to(x.dtype), fallen

    def observe(self, state: State) -> Tensor:
        """Return the state, [N, 4]."""
        return torch.stack(state, 1)
