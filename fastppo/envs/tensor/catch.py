"""Catch, in pictures: a ball falls through a grid, a paddle at the bottom must be under it.

After Mnih et al. 2014, "Recurrent models of visual attention" (arXiv:1406.6247), and bsuite's version (Osband et al.
2020, arXiv:1908.03568), drawn at the size of an Atari frame so that the same network reads it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastppo.envs.tensor.task import State

ROWS, COLUMNS = 12, 12
CELL = 7  # pixels: 84 x 84


@dataclasses.dataclass(frozen=True)
class Catch:
    """State: the ball's row and column, the paddle's column, int64. Actions: 0 left, 1 stay, 2 right."""

    n_uniforms = 1

    def reset(self, u: Tensor) -> State:
        """The ball at the top in any column, the paddle in the middle."""
        column = (u[0] * COLUMNS).long()
        return torch.zeros_like(column), column, torch.full_like(column, COLUMNS // 2)

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """The ball falls a row; in the last one it is caught (1) or not (-1)."""
        row, column, paddle = state
        paddle = (paddle + actions - 1).clamp(0, COLUMNS - 1)
        row = row + 1
        down = row == ROWS - 1
        reward = torch.where(down, torch.where(column == paddle, 1.0, -1.0), 0.0)
        return (row, column, paddle), reward, down

    def observe(self, state: State) -> Tensor:
        """Ball and paddle white on black, uint8 [N, 1, 84, 84]."""
        row, column, paddle = (x.view(-1, 1, 1) for x in state)
        at = torch.arange(ROWS * CELL, device=row.device) // CELL
        y, x = at.view(1, -1, 1), at.view(1, 1, -1)
        lit = ((y == row) & (x == column)) | ((y == ROWS - 1) & (x == paddle))
        return (lit * 255).to(torch.uint8).unsqueeze(1)
