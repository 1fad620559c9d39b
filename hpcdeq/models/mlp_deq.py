"""MLP-DEQ: a fully connected cell, for inputs that are arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcdeq.deq import FixedPoint
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import BoundedWeight


@dataclass(frozen=True)
class MlpDeqConfig:
    """Settings of the MLP-DEQ.

    Attributes
    ----------
    width
        Length of the state.
    bound
        Bound on the spectral norm of the recurrent weight. Below 1 the fixed point exists and is unique whatever the
        weights become, since tanh does not stretch; nearer to 1 the model says more and its solves take longer.
    contraction
        That norm at initialisation.
    """

    width: int = 64
    bound: float = 0.95
    contraction: float = 0.5


class MlpCell(nn.Module):
    """z ↦ tanh(W z + s), with the weight W and the injection s computed once for all iterations."""

    def initial_state(self, given: tuple[Tensor, Tensor]) -> Tensor:
        """Return the zero state ``(B, width)``."""
        return torch.zeros_like(given[1])

    def select(self, given: tuple[Tensor, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is given for some samples."""
        return given[0], given[1].index_select(0, keep)

    def forward(self, z: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
        weight, injection = given
        return torch.tanh(torch.addmm(injection, z, weight.T))


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
        self.recurrent = BoundedWeight(config.width, config.bound, config.contraction)
        self.equilibrium = FixedPoint(MlpCell())
        self.head = nn.Linear(config.width, output_size)
        self.skip = nn.Linear(features, output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, *input_shape)``."""
        flat = x.flatten(1)
        return self.head(self.equilibrium((self.recurrent(), self.injection(flat)))) + self.skip(flat)


register("mlp_deq", ModelKind(MlpDeqConfig, "array", MlpDeq))
