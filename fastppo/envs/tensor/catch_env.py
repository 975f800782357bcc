"""Catch as a single Gymnasium environment, for evaluation, videos and the CPU vectorizations."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from fastppo.envs.tensor.catch import CELL, COLUMNS, ROWS, Catch

_Array = np.ndarray[Any, Any]


class CatchEnv(gym.Env[_Array, np.int64]):
    """Catch in 84 x 84 pixels: move the paddle under the ball. Episodes last 11 steps and end with reward +1 or -1."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 - as Gymnasium declares it
    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(0, 255, (1, ROWS * CELL, COLUMNS * CELL), np.uint8)

    def __init__(self, render_mode: str | None = None) -> None:
        """Create the environment; `render_mode` is "rgb_array" or None."""
        self.render_mode = render_mode
        self._task = Catch()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[_Array, dict[str, Any]]:
        """Start an episode with the ball in the top row."""
        super().reset(seed=seed)
        self._state = self._task.reset(torch.from_numpy(self.np_random.random((self._task.n_uniforms, 1))))
        return self._picture(), {}

    def step(self, action: np.int64) -> tuple[_Array, float, bool, bool, dict[str, Any]]:
        """Move the paddle and drop the ball by one row."""
        self._state, reward, ended = self._task.step(self._state, torch.tensor([int(action)]))
        return self._picture(), reward.item(), bool(ended), False, {}

    def render(self) -> Any:  # noqa: ANN401 - Gymnasium's RenderFrame
        """Return the frame as RGB, uint8 [84, 84, 3]."""
        return np.repeat(self._picture()[0, :, :, None], 3, 2)

    def _picture(self) -> _Array:
        picture: _Array = self._task.observe(self._state)[0].numpy()
        return picture
