"""DeepONet whose branch is a deep equilibrium network: coefficients of basis functions from a fixed point."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from hpcdeq.deq import FixedPoint
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import BoundedWeight
from hpcdeq.models.deeponet import Trunk
from hpcdeq.models.grids import field_grid
from hpcdeq.models.mlp_deq import MlpCell


@dataclass(frozen=True)
class DeepOnetDeqConfig:
    """Settings of the DeepONet with an equilibrium branch.

    Attributes
    ----------
    width
        Length of the branch's state, and units of the trunk's hidden layers.
    depth
        Hidden layers of the trunk.
    basis, activation, boundary, harmonics
        As in `DeepOnetConfig`; the activation is the trunk's, the state's is tanh.
    bound, contraction
        Of the state's weight, as in `MlpDeqConfig`.
    """

    width: int = 64
    depth: int = 2
    basis: int = 40
    activation: str = "tanh"
    boundary: str = "auto"
    harmonics: int = 4
    bound: float = 0.95
    contraction: float = 0.5


class DeepOnetDeq(nn.Module):
    """u(x) = Σₖ bₖ tₖ(x) + c with b = C z + D a + d and z = tanh(W z + U a + e).

    Parameters
    ----------
    config
        Sizes, activation, coordinates and contraction.
    input_shape, output_size
        As for `DeepOnet`.

    Raises
    ------
    OptionError
        There is no such activation or boundary, or the contraction is not within what the bound allows.
    """

    def __init__(self, config: DeepOnetDeqConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        values = math.prod(input_shape)
        self.injection = nn.Linear(values, config.width)
        self.recurrent = BoundedWeight(config.width, config.bound, config.contraction)
        self.equilibrium = FixedPoint(MlpCell())
        self.head = nn.Linear(config.width, config.basis)
        self.skip = nn.Linear(values, config.basis, bias=False)
        self.trunk = Trunk(
            field_grid(input_shape, output_size),
            config.width,
            config.depth,
            config.basis,
            config.activation,
            config.boundary,
            config.harmonics,
            "deeponet_deq",
        )

    def forward(self, a: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, *input_shape)``."""
        flat = a.flatten(1)
        z = self.equilibrium((self.recurrent(), self.injection(flat)))
        return self.trunk(self.head(z) + self.skip(flat))


register("deeponet_deq", ModelKind(DeepOnetDeqConfig, "array", DeepOnetDeq))
