"""DeepONet: a network of the input function times a network of the place (Lu et al. 2021, arXiv 1910.03193)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.grids import GridFeatures, field_grid, is_periodic
from hpcdeq.models.mlp import Perceptron, activation_named


@dataclass(frozen=True)
class DeepOnetConfig:
    """Settings of the DeepONet; with the defaults it has 18,257 weights on 64 points.

    Attributes
    ----------
    width
        Units of a hidden layer, of both networks.
    depth
        Hidden layers of each.
    basis
        Functions that the output is a sum of.
    activation
        ``tanh``, ``gelu`` or ``silu``.
    boundary
        ``periodic``: the trunk sees cosines and sines of the coordinates; ``open``: the coordinates; ``auto``: periodic
        where the output has one axis.
    harmonics
        Cosines and sines of each coordinate.
    """

    width: int = 64
    depth: int = 2
    basis: int = 40
    activation: str = "tanh"
    boundary: str = "auto"
    harmonics: int = 4


class Trunk(nn.Module):
    """Basis functions at the points of a grid: a perceptron of each point's features, the last layer activated as well.

    Without that activation, the trunk's last layer times any invertible matrix, and the branch's times its inverse, would
    be the same network: as many directions as the matrix has entries in which a loss is flat.

    Parameters
    ----------
    grid
        Points along each axis.
    width, depth, basis, activation, boundary, harmonics
        As in `DeepOnetConfig`.
    model
        Name of the model in what errors say.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        width: int,
        depth: int,
        basis: int,
        activation: str,
        boundary: str,
        harmonics: int,
        model: str,
    ) -> None:
        super().__init__()
        self.places = GridFeatures(grid, is_periodic(boundary, len(grid), model), harmonics)
        features = self.places.values.shape[1]
        self.network = Perceptron(features, width, depth, basis, activation_named(activation, model), last=True)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, coefficients: Tensor) -> Tensor:
        """Return Σₖ cₖ tₖ(x) + bias ``(B, points)`` from the coefficients ``(B, basis)``; t is evaluated once a batch."""
        return coefficients @ self.network(self.places(coefficients)).mT + self.bias


class DeepOnet(nn.Module):
    """u(x) = Σₖ bₖ(a) tₖ(x) + c for an input function a given by its values on a grid.

    Parameters
    ----------
    config
        Sizes, activation and coordinates.
    input_shape
        Shape of a, which is flattened. It is also the grid of u if u has as many points; otherwise u has one axis.
    output_size
        Points of u.

    Raises
    ------
    OptionError
        There is no such activation or boundary.
    """

    def __init__(self, config: DeepOnetConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        activation = activation_named(config.activation, "deeponet")
        self.branch = Perceptron(math.prod(input_shape), config.width, config.depth, config.basis, activation)
        self.trunk = Trunk(
            field_grid(input_shape, output_size),
            config.width,
            config.depth,
            config.basis,
            config.activation,
            config.boundary,
            config.harmonics,
            "deeponet",
        )

    def forward(self, a: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, *input_shape)``."""
        return self.trunk(self.branch(a.flatten(1)))


register("deeponet", ModelKind(DeepOnetConfig, "array", DeepOnet))
