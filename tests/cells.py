"""Cells and oracles that several tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TanhCell(nn.Module):
    """z ↦ tanh(W z + U x + b) with ‖W‖₂ = norm."""

    def __init__(
        self, width: int = 5, features: int = 3, norm: float = 0.8, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        self.recurrent = nn.Linear(width, width, dtype=dtype)
        self.injection = nn.Linear(features, width, bias=False, dtype=dtype)
        nn.init.orthogonal_(self.recurrent.weight)
        with torch.no_grad():
            self.recurrent.weight.mul_(norm)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + self.injection(x))


class DeqRegressor(nn.Module):
    """A small explicit head on a fixed point: what training tests use."""

    def __init__(self, layer: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, outputs, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def unrolled(cell: nn.Module, x: Tensor, z0: Tensor, steps: int) -> Tensor:
    """Apply a cell many times: the fixed point and its derivatives by another road."""
    z = z0
    for _ in range(steps):
        z = cell(z, x)
    return z
