"""MLP-DEQ: a fully connected cell, for inputs that are arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcdeq.deq import FixedPoint
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import contractive_


@dataclass(frozen=True)
class MlpDeqConfig:
    """Settings of the MLP-DEQ.

    Attributes
    ----------
    width
        Length of the state.
    contraction
        Spectral norm of the recurrent weight at initialisation; below 1 the fixed point exists and is unique, since tanh
        does not stretch.
    """

    width: int = 64
    contraction: float = 0.5


class MlpCell(nn.Module):
    """z ↦ tanh(W z + s), with the injection s computed once."""

    def __init__(self, width: int, contraction: float) -> None:
        super().__init__()
        self.recurrent = nn.Linear(width, width, bias=False)
        contractive_(self.recurrent.weight, contraction)

    def initial_state(self, injection: Tensor) -> Tensor:
        """Return the zero state ``(B, width)``."""
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + injection)


class MlpDeq(nn.Module):
    """y = C z + D x + c with z = tanh(W z + U x + b).

    Parameters
    ----------
    config
        Width and contraction.
    input_shape
        Shape of one sample; it is flattened.
    output_size
        Length of y.
    """

    def __init__(self, config: MlpDeqConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        features = math.prod(input_shape)
        self.injection = nn.Linear(features, config.width)
        self.equilibrium = FixedPoint(MlpCell(config.width, config.contraction))
        self.head = nn.Linear(config.width, output_size)
        self.skip = nn.Linear(features, output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, *input_shape)``."""
        flat = x.flatten(1)
        return self.head(self.equilibrium(self.injection(flat))) + self.skip(flat)


register("mlp_deq", ModelKind(MlpDeqConfig, "array", MlpDeq))
