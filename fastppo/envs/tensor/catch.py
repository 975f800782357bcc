"""Catch from pixels: a ball falls through a grid, and a paddle in the bottom row must catch it.

Sources: Mnih et al. 2014, "Recurrent models of visual attention" (arXiv:1406.6247); bsuite (Osband et al. 2020,
arXiv:1908.03568). Frames have the size of Atari's, so the same network fits.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastppo.envs.tensor.task import State

ROWS, COLUMNS = 12, 12
CELL = 7  # pixels per cell; the frame is 84 x 84


@dataclasses.dataclass(frozen=True)
class Catch:
    """Catch. State: row and column of the ball, column of the paddle, int64. Actions: 0 left, 1 stay, 2 right."""

    n_uniforms = 1

    def reset(self, u: Tensor) -> State:
        """Place the ball in a random column of the top row and the paddle in the middle."""
        column = (u[0] * COLUMNS).long()
        return torch.zeros_like(column), column, torch.full_like(column, COLUMNS // 2)

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """Move the paddle and drop the ball by one row; in the last row the reward is 1 for a catch, -1 for a miss."""
        row, column, paddle = state
        paddle = (paddle + actions - 1).clamp(0, COLUMNS - 1)
        row = row + 1
        down = row == ROWS - 1
        reward = torch.where(down, torch.where(column == paddle, 1.0, -1.0), 0.0)
        return (row, column, paddle), reward, down

    def observe(self, state: State) -> Tensor:
        """Draw ball and paddle in white on black, uint8 [N, 1, 84, 84]."""
        row, column, paddle = (x.view(-1, 1, 1) for x in state)
        at = torch.arange(ROWS * CELL, device=row.device) // CELL
        y, x = at.view(1, -1, 1), at.view(1, 1, -1)
        lit = ((y == row) & (x == column)) | ((y == ROWS - 1) & (x == paddle))
        return (lit * 255).to(torch.uint8).unsqueeze(1)
