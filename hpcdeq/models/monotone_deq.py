"""Monotone DEQ: one fixed point whatever the weights become, without a bound on their norm (Winston and Kolter 2020).

With M = I - W of a `MonotoneWeight`, ⟨v, M v⟩ ≥ m ‖v‖², the state is the solution of z = σ(W z + s), where σ is the
proximal operator of a convex function g: of 0 ∈ M z - s + ∂g(z), which exists and is unique. Iterating σ(W z + s) itself
may well diverge. Two splittings of M and g have the same solution and contract (arXiv 2006.08591, section 3; Ryu and
Boyd 2016, A primer on monotone operator methods):

    forward-backward    z ↦ prox(z - a (M z - s)),
    Peaceman-Rachford   y ↦ (2 (I + a M)⁻¹ - I) (2 prox(y) - y) + 2 a (I + a M)⁻¹ s,  then z = prox(y),

with prox the proximal operator of a g. The solution z does not depend on the step a; how fast it is found does. That asks
for a σ whose prox is known for every a. Of ReLU, whose g is 0 or ∞, it is ReLU. Of the smooth square plus it is square
plus again. Of tanh or softplus it has no closed form, and putting those in place of prox would make the answer, and its
derivatives, depend on the step: they are not offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcdeq.deq import FixedPoint
from hpcdeq.errors import ConvergenceError, OptionError, suggestion
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import MonotoneWeight, spectral_bound

# Matrix and injection of the iteration, with the step in them, and the step.
Given = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MonotoneDeqConfig:
    """Settings of the monotone DEQ.

    Attributes
    ----------
    width
        Length of the state.
    monotonicity
        m. Nearer to zero the model says more and its solves take longer.
    initial
        Size of the recurrent weights at initialisation, as in `MonotoneWeight`.
    activation
        ``squareplus`` (smooth: second derivatives exist everywhere) or ``relu``.
    softness
        Value of square plus at zero; smaller is nearer to ReLU.
    splitting
        ``peaceman_rachford``, or ``forward_backward``, which needs about twice the iterations, and more the smaller m is.
    relaxation
        The step, in units of the one whose guaranteed contraction is the strongest. Peaceman-Rachford contracts for every
        step, forward-backward for those below 2. The guarantees are for the worst states: larger steps often need fewer
        iterations, and all lead to the same answer.
    """

    width: int = 64
    monotonicity: float = 0.3
    initial: float = 0.5
    activation: str = "squareplus"
    softness: float = 0.3
    splitting: str = "peaceman_rachford"
    relaxation: float = 1.0


class Relu(nn.Module):
    """The proximal operator of a g, for g zero where z ≥ 0 and ∞ elsewhere."""

    def forward(self, u: Tensor, step: Tensor) -> Tensor:
        return torch.relu(u)


class SquarePlus(nn.Module):
    """The proximal operator of a g for the barrier g(z) = -h² Σ log zᵢ: (u + √(u² + 4 a h²))/2 (Barron 2021, 2112.11687).

    Parameters
    ----------
    softness
        h, its value at zero where a = 1.
    """

    def __init__(self, softness: float) -> None:
        super().__init__()
        if not softness > 0:
            raise OptionError(f"softness {softness} must be positive: use the activation relu for a sharp corner")
        self.softness = softness

    def forward(self, u: Tensor, step: Tensor) -> Tensor:
        return 0.5 * (u + torch.sqrt(u.square() + step * (4 * self.softness**2)))


ACTIVATIONS: dict[str, Callable[[MonotoneDeqConfig], nn.Module]] = {
    "squareplus": lambda config: SquarePlus(config.softness),
    "relu": lambda config: Relu(),
}


def forward_backward_step(weight: Tensor) -> Tensor:
    """Return 1/ℓ, the smallest eigenvalue of the symmetric part of (I - W)⁻¹, in float64.

    Raises
    ------
    ConvergenceError
        It is not positive. A step of zero would take any state for the solution.
    """
    eye = torch.eye(len(weight), dtype=torch.float64, device=weight.device)
    inverse, _ = torch.linalg.inv_ex(eye - weight.double())
    if bool(torch.isfinite(inverse).all()):
        step = torch.linalg.eigvalsh(0.5 * (inverse + inverse.mT))[0]
        if step > 0:
            return step
    raise ConvergenceError(
        "the recurrent weight W of a monotone DEQ has no finite inverse of I - W with a positive symmetric part: its largest"
        f" entry is {float(weight.abs().max()):.3g}.\n"
        "Likely fix: where that is NaN, look at the optimiser's step; where it is huge, rounding ate the monotonicity: try"
        " --dtype float64, weight decay, or splitting = peaceman_rachford."
    )


class ForwardBackwardCell(nn.Module):
    """z ↦ prox(z (I - a M)ᵀ + a s), contracting by √(1 - m a (2 - a ℓ)) at least for a below 2/ℓ.

    1/ℓ is the smallest eigenvalue of the symmetric part of M⁻¹, so that ‖M v‖² ≤ ℓ ⟨v, M v⟩. Since 1/ℓ ≥ m/‖M‖², this step
    is never shorter than the well-known one from the Lipschitz constant alone. At a = 1/ℓ the error of a state is at most
    2 ℓ/m times its residual: for large weights ask a smaller -deq_snes_rtol, or use the other splitting.

    Parameters
    ----------
    activation
        ``activation(u, a)``: the proximal operator of a g.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def prepare(self, weight: Tensor, injection: Tensor, relaxation: float = 1.0) -> Given:
        """Return what the cell is given, computed once for all iterations; the step is no variable of a derivative.

        Parameters
        ----------
        weight
            ``(n, n)`` W.
        injection
            ``(B, n)`` s.
        relaxation
            a ℓ.
        """
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        step = relaxation * forward_backward_step(weight.detach()).to(weight)
        return eye - step * (eye - weight), step * injection, step

    def initial_state(self, given: Given) -> Tensor:
        """Return the zero state ``(B, n)``."""
        return torch.zeros_like(given[1])

    def select(self, given: Given, keep: Tensor) -> Given:
        """Return the input of some of the samples, numbered by keep ``(k,)``."""
        matrix, injection, step = given
        return matrix, injection.index_select(0, keep), step

    def solution(self, state: Tensor, given: Given) -> Tensor:
        """Return z ``(B, n)`` of the fixed state, which here it is itself."""
        return state

    def forward(self, z: Tensor, given: Given) -> Tensor:
        matrix, injection, step = given
        return self.activation(torch.addmm(injection, z, matrix.T), step)


class PeacemanRachfordCell(ForwardBackwardCell):
    """y ↦ (2 prox(y) - y) Cᵀ + 2 a s Vᵀ with V = (I + a M)⁻¹ and C = 2 V - I; the solution is z = prox(y).

    C contracts for every step a > 0, prox does not stretch: at a = 1/L with L ≥ ‖M‖ by √((1 - m/L)/(1 + m/L)) at least,
    which is nearer to one by m/L, where the forward-backward bound is so by (m/L)²/2.
    """

    def prepare(self, weight: Tensor, injection: Tensor, relaxation: float = 1.0) -> Given:
        """Return what the cell is given, computed once for all iterations; arguments as in `ForwardBackwardCell`."""
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        step = relaxation / spectral_bound((eye - weight).detach())
        resolvent = torch.linalg.inv(eye + step * (eye - weight))
        return 2 * resolvent - eye, (2 * step) * injection @ resolvent.T, step

    def solution(self, state: Tensor, given: Given) -> Tensor:
        """Return z ``(B, n)`` of the fixed state."""
        return self.activation(state, given[2])

    def forward(self, y: Tensor, given: Given) -> Tensor:
        matrix, injection, step = given
        return torch.addmm(injection, 2 * self.activation(y, step) - y, matrix.T)


SPLITTINGS: dict[str, type[ForwardBackwardCell]] = {
    "forward_backward": ForwardBackwardCell,
    "peaceman_rachford": PeacemanRachfordCell,
}


class MonotoneDeq(nn.Module):
    """y = C z + D x + c with z = σ(W z + U x + b) and I - W monotone.

    Parameters
    ----------
    config
        Sizes, activation and splitting.
    input_shape
        Shape of one sample; it is flattened.
    output_size
        Length of y.
    """

    def __init__(self, config: MonotoneDeqConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        features = math.prod(input_shape)
        for setting, known in (("activation", ACTIVATIONS), ("splitting", SPLITTINGS)):
            chosen = getattr(config, setting)
            if chosen not in known:
                hint = suggestion(chosen, known, f"choose one of {', '.join(known)}")
                raise OptionError(f"model monotone_deq: unknown {setting} {chosen!r}: {hint}")
        if not config.relaxation > 0:
            raise OptionError(f"model monotone_deq: relaxation {config.relaxation} must be positive")
        self.relaxation = config.relaxation
        self.injection = nn.Linear(features, config.width)
        self.recurrent = MonotoneWeight(config.width, config.monotonicity, config.initial)
        self.equilibrium = FixedPoint(SPLITTINGS[config.splitting](ACTIVATIONS[config.activation](config)))
        self.head = nn.Linear(config.width, output_size)
        self.skip = nn.Linear(features, output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, *input_shape)``."""
        flat, cell = x.flatten(1), self.equilibrium.cell
        assert isinstance(cell, ForwardBackwardCell)
        given = cell.prepare(self.recurrent(), self.injection(flat), self.relaxation)
        return self.head(cell.solution(self.equilibrium(given), given)) + self.skip(flat)


register("monotone_deq", ModelKind(MonotoneDeqConfig, "array", MonotoneDeq))
