"""What keeps a DEQ well-posed: the Jacobian's penalty, weights of bounded norm, and monotone weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cells import TanhCell
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from hpcdeq.deq import FixedPoint
from hpcdeq.deq.penalty import jacobian_penalty
from hpcdeq.deq.probes import positions, signs, uniform
from hpcdeq.deq.samples import Samples
from hpcdeq.errors import ConvergenceError, OptionError, ShapeError
from hpcdeq.models import build_model, model_config
from hpcdeq.models.blocks import (
    BoundedConvolution,
    BoundedWeight,
    MonotoneWeight,
    NormalisedWeight,
    SpectralWeight,
    spectral_bound,
)
from hpcdeq.models.monotone_deq import (
    ACTIVATIONS,
    SPLITTINGS,
    ForwardBackwardCell,
    MonotoneDeqConfig,
    PeacemanRachfordCell,
    Relu,
    SquarePlus,
    forward_backward_step,
)
from hpcdeq.optim import minimize
from hpcdeq.problem import TrainingProblem

TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "ksp_rtol": 1e-13}
SIZES = [1, 3, 16]
FACTORS = [1e-6, 1.0, 30.0, 1e6]


def norm_of(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def randomise(module: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(factor * torch.randn_like(parameter))


# ------------------------------------------------------------------------------------------------------------ probes


def test_probes_depend_on_positions_in_a_sample_alone() -> None:
    index = torch.tensor([1, 0, 1, 1, 0])
    z = torch.zeros(5, 3)
    at = positions(z, Samples.of(z, index))
    assert at[index == 0].flatten().tolist() == list(range(6)) and at[index == 1].flatten().tolist() == list(range(9))
    flat = positions(torch.zeros(4, 2, 3), Samples.of(torch.zeros(4, 2, 3), None))
    assert flat.tolist() == [list(range(6))] * 4
    one = positions(torch.zeros(7), Samples.of(torch.zeros(7), None))
    assert one.tolist() == [list(range(7))]


def test_signs_look_random() -> None:
    at = torch.arange(20000)
    vectors = torch.stack([signs(at, seed, number) for seed in (0, 1, 12345, -1) for number in range(4)])
    assert set(vectors.unique().tolist()) == {-1.0, 1.0}
    gram = vectors @ vectors.T / len(at)  # 16 vectors: correlations of independent ones are 0.007 (one sigma)
    assert float((gram - torch.eye(16).double()).abs().max()) < 0.03
    assert float(vectors.mean(dim=1).abs().max()) < 0.03
    shifted = (vectors[:, 1:] * vectors[:, :-1]).mean(dim=1)
    assert float(shifted.abs().max()) < 0.03
    values = uniform(at, 7)
    assert float(values.abs().max()) < 1.0 and float(values.square().mean()) == pytest.approx(1 / 3, rel=0.02)


def test_probes_are_these_on_every_machine() -> None:
    """The hash computed in Python's own integers."""

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    key = mixed((mixed(42) + 3) & 0xFFFFFFFF)
    expected = [1 - 2 * (mixed((i + key) & 0xFFFFFFFF) >> 31) for i in range(100)]
    assert signs(torch.arange(100), 42, 3).tolist() == expected


# ----------------------------------------------------------------------------------------------------------- penalty


def dense_jacobians(cell: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    return torch.stack([torch.func.jacrev(lambda s, i=i: cell(s[None], x[i : i + 1])[0])(z[i]) for i in range(len(z))])


def cell_and_point(width: int = 6) -> tuple[TanhCell, Tensor, Tensor]:
    cell = TanhCell(width)
    nn.init.normal_(cell.recurrent.weight)  # of an orthogonal one, signs give the norm without any error
    return cell, torch.randn(4, 3, dtype=torch.float64), torch.randn(4, width, dtype=torch.float64)


def test_unit_probes_give_the_frobenius_norm_exactly() -> None:
    cell, x, z = cell_and_point()
    units = math.sqrt(6) * torch.eye(6, dtype=torch.float64)[:, None, :].expand(6, 4, 6)
    expected = dense_jacobians(cell, x, z).square().sum(dim=(1, 2)) / 6
    torch.testing.assert_close(jacobian_penalty(cell, x, z, probes=units), expected)


def test_signs_give_it_in_the_mean() -> None:
    cell, x, z = cell_and_point()
    cell.requires_grad_(False)
    jacobians = dense_jacobians(cell, x, z)
    expected = jacobians.square().sum(dim=(1, 2)) / 6
    count = 2000
    found = jacobian_penalty(cell, x, z, probes=count)
    gram = jacobians @ jacobians.mT  # the variance of vᵀ G v over signs v: twice the squares off the diagonal
    variance = 2 * (gram.square().sum(dim=(1, 2)) - gram.diagonal(dim1=1, dim2=2).square().sum(dim=1)) / 36
    assert bool(((found - expected).abs() < 4 * (variance / count).sqrt()).all())
    assert float(((found - expected).abs() / expected).max()) > 1e-6  # an estimate it is


def test_a_sample_s_penalty_does_not_depend_on_its_batch_and_is_the_same_each_time() -> None:
    cell, x, z = cell_and_point()
    cell.requires_grad_(False)
    together = jacobian_penalty(cell, x, z, probes=2)
    torch.rand(3)
    assert torch.equal(jacobian_penalty(cell, x, z, probes=2), together)
    alone = torch.cat([jacobian_penalty(cell, x[i : i + 1], z[i : i + 1], probes=2) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=0)
    backwards = jacobian_penalty(cell, x.flip(0), z.flip(0), probes=2).flip(0)
    torch.testing.assert_close(together, backwards, rtol=1e-13, atol=0)
    other = jacobian_penalty(cell, x, z, probes=2, seed=1)
    assert float((other - together).abs().min()) > 1e-6


def test_samples_of_several_rows_are_penalised_each() -> None:
    index = torch.tensor([1, 0, 1, 3, 0])  # sample 2 has no rows
    owner = index.repeat_interleave(2)
    matrix = torch.randn(10, 10, dtype=torch.float64) * (owner[:, None] == owner[None, :])

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return (x @ z.flatten()).reshape(z.shape)

    z = torch.zeros(5, 2, dtype=torch.float64)
    found = jacobian_penalty(cell, matrix, z, sample_index=lambda x: index, probes=3, seed=5)
    for sample, rows in ((0, 2), (1, 2), (3, 1)):
        block = matrix[owner == sample][:, owner == sample]
        vectors = torch.stack([signs(torch.arange(2 * rows), 5, number) for number in range(3)])
        expected = (vectors @ block).square().sum() / 3 / (2 * rows)
        torch.testing.assert_close(found[sample], expected)
    assert float(found[2]) == 0.0 and found.shape == (4,)


def test_the_penalty_s_derivatives() -> None:
    cell, x, z = cell_and_point(width=3)
    names = [name for name, _ in cell.named_parameters()]

    def function(x: Tensor, z: Tensor, *weights: Tensor) -> Tensor:
        wrapped = Penalised(cell)
        return functional_call(wrapped, {f"cell.{n}": w for n, w in zip(names, weights, strict=True)}, (x, z))

    arguments = [t.detach().requires_grad_() for t in (x[:2], z[:2], *cell.parameters())]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


class Penalised(nn.Module):
    """The mean penalty of a cell at a state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return jacobian_penalty(self.cell, x, z, probes=2).mean()


def test_the_penalty_at_a_fixed_point_is_differentiated_through_it() -> None:
    layer = FixedPoint(TanhCell(3, norm=0.8), options=TIGHT)
    x = torch.randn(2, 3, dtype=torch.float64)
    names = [name for name, _ in layer.cell.named_parameters()]

    def function(*weights: Tensor, stop: bool = False) -> Tensor:
        model = AtFixedPoint(layer, stop)
        return functional_call(model, {f"layer.cell.{n}": w for n, w in zip(names, weights, strict=True)}, (x,))

    weights = tuple(p.detach().clone().requires_grad_() for p in layer.cell.parameters())
    assert torch.autograd.gradcheck(function, weights)
    assert torch.autograd.gradgradcheck(function, weights, atol=1e-4)
    through = torch.autograd.grad(function(*weights), weights)
    stopped = torch.autograd.grad(function(*weights, stop=True), weights)
    assert max(float((a - b).abs().max()) for a, b in zip(through, stopped, strict=True)) > 1e-3


class AtFixedPoint(nn.Module):
    def __init__(self, layer: FixedPoint, stop: bool) -> None:
        super().__init__()
        self.layer = layer
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return jacobian_penalty(self.layer.cell, x, z.detach() if self.stop else z).mean()


def test_training_on_the_penalty_makes_the_jacobian_smaller() -> None:
    cell, x, z = cell_and_point()
    z = torch.zeros_like(z)
    before = dense_jacobians(cell, x, z).square().sum().detach()
    optimiser = torch.optim.SGD(cell.parameters(), lr=0.5)
    for _ in range(20):
        optimiser.zero_grad()
        jacobian_penalty(cell, x, z, probes=4).mean().backward()
        optimiser.step()
    cell.requires_grad_(False)
    assert float(dense_jacobians(cell, x, z).square().sum()) < 0.5 * float(before)


@pytest.mark.parametrize(
    ("probes", "error", "told"),
    [
        (0, OptionError, "^probes is 0: give 1 or more$"),
        (torch.zeros(3, 6), ShapeError, r"^probes have shape \(3, 6\), the state \(4, 6\): give probes of shape \(P, "),
        (torch.zeros(0, 4, 6), ShapeError, r"^probes have shape \(0, 4, 6\)"),
    ],
)
def test_probes_that_are_none_are_refused(probes: int | Tensor, error: type[Exception], told: str) -> None:
    cell, x, z = cell_and_point()
    with pytest.raises(error, match=told):
        jacobian_penalty(cell, x, z, probes=probes)


def test_a_cell_of_another_shape_is_refused_by_the_penalty() -> None:
    with pytest.raises(ShapeError, match=r"maps a state of shape \(2, 3\) to shape \(2, 2\)"):
        jacobian_penalty(lambda z, x: z[:, :2], None, torch.zeros(2, 3))


# --------------------------------------------------------------------------------------------------- bounded weights


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (4, 6, 2), (2, 3, 4, 4)])
@pytest.mark.parametrize("order", [4, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("factor", [1e-5, 1.0, 1e5])
def test_the_spectral_bound_is_the_schatten_norm(
    shape: tuple[int, ...], order: int, dtype: torch.dtype, factor: float
) -> None:
    matrices = factor * torch.randn(shape, dtype=dtype)
    values = torch.linalg.svdvals(matrices).double().flatten()
    largest = values.max()
    found = spectral_bound(matrices, order)
    expected = largest * ((values / largest) ** order).sum() ** (1 / order)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    assert float(found) >= float(largest) * (1 - 1e-6)


def blocks() -> dict[str, Callable[[], nn.Module]]:
    return {
        "bounded": lambda: BoundedWeight(4, 0.9, 0.5),
        "spectral": lambda: SpectralWeight(4, 3, 0.9),
        "normalised": lambda: NormalisedWeight(4, 4, 0.5, bound=0.9),
        "weight_norm": lambda: NormalisedWeight(3, 4, 0.5),
        "convolution": lambda: BoundedConvolution(2, 3, 2, 0.9, 0.5),
        "monotone": lambda: MonotoneWeight(3, 0.2, 0.5),
    }


@pytest.fixture(params=sorted(blocks()))
def block(request: pytest.FixtureRequest) -> nn.Module:
    return blocks()[request.param]().double()


def test_a_block_has_no_state_but_its_parameters(block: nn.Module) -> None:
    """A spectral norm by power iteration is another number each time, and no objective for TAO."""
    assert not list(block.buffers())
    first = block()
    for _ in range(3):
        assert torch.equal(block(), first)


def test_a_block_has_exact_first_and_second_derivatives(block: nn.Module) -> None:
    """At initialisation: singular values of orthogonal parameters coincide, where a plain spectral norm has a kink."""
    names = [name for name, _ in block.named_parameters()]

    def function(*weights: Tensor) -> Tensor:
        return functional_call(block, dict(zip(names, weights, strict=True)), ())

    weights = tuple(p.detach().clone().requires_grad_() for p in block.parameters())
    assert torch.autograd.gradcheck(function, weights)
    assert torch.autograd.gradgradcheck(function, weights)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 17), (40, 8)])
def test_a_spectral_weight_has_its_norm_whatever_its_parameter_is(shape: tuple[int, int], factor: float) -> None:
    weight = SpectralWeight(*shape, norm=0.8).double()
    for _ in range(2):  # first as initialised, then at random
        assert 0.8 * min(shape) ** (-1 / 32) * (1 - 1e-9) <= norm_of(weight()) <= 0.8 * (1 + 1e-12)
        randomise(weight, factor)
    ratio = weight() / weight.parameter
    torch.testing.assert_close(ratio, ratio[0, 0].expand(shape))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 17), (40, 8)])
def test_a_normalised_weight_stays_below_its_bound(shape: tuple[int, int], factor: float) -> None:
    weight = NormalisedWeight(*shape, initial=0.5, bound=0.8).double()
    assert 0.5 * min(shape) ** (-1 / 32) * (1 - 1e-6) <= norm_of(weight()) <= 0.5 * (1 + 1e-6)
    randomise(weight, factor)
    assert norm_of(weight()) <= 0.8 * (1 + 1e-12)
    if factor >= 1.0:
        assert norm_of(weight()) >= 0.5  # nor is it crushed


def test_a_normalised_weight_is_gain_times_direction() -> None:
    weight = NormalisedWeight(5, 7, initial=0.5).double()
    randomise(weight, 3.0)
    expected = weight.gain[:, None] * functional.normalize(weight.direction, dim=1)
    torch.testing.assert_close(weight(), expected)
    with torch.no_grad():
        weight.direction.mul_(torch.tensor([1e-3, 1.0, 2.0, 1e3, 5.0])[:, None])
    torch.testing.assert_close(weight(), expected)  # lengths of directions do not count
    with torch.no_grad():
        weight.direction[2] = 0.0
    assert weight()[2].tolist() == [0.0] * 7


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: NormalisedWeight(3, 3, 0.9, bound=0.9),
            "^NormalisedWeight: contraction 0.9 at initialisation must lie",
        ),
        (
            lambda: BoundedConvolution(3, 3, 3, 0.9, -0.1),
            "^BoundedConvolution: contraction -0.1 at initialisation must",
        ),
        (lambda: SpectralWeight(3, 3, 0.0), "^SpectralWeight: norm 0.0 must be positive$"),
        (lambda: MonotoneWeight(3, 0.0, 0.5), "^monotonicity 0.0 must be positive: at zero there may be no fixed"),
        (lambda: MonotoneWeight(3, 0.1, 0.0), "^MonotoneWeight: initial 0.0 must be positive, or A would never"),
        (lambda: SquarePlus(0.0), "^softness 0.0 must be positive: use the activation relu"),
    ],
)
def test_settings_that_bound_nothing_are_refused(make: Callable[[], nn.Module], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        make()


# ------------------------------------------------------------------------------------------------------ convolutions

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def dense_convolution(kernel: Tensor, image: tuple[int, ...], padding: str, stride: int = 1) -> Tensor:
    """The matrix of a convolution, from the images of all unit vectors; outside the image is zero or its continuation."""
    inputs, axes = kernel.shape[1], len(image)
    unit = torch.eye(inputs * math.prod(image), dtype=kernel.dtype).reshape(-1, inputs, *image)
    sides = [s for k in reversed(kernel.shape[2:]) for s in ((k - 1) // 2, k // 2)]
    if padding == "circular":
        for axis, k in enumerate(kernel.shape[2:], start=2):  # by hand: torch refuses kernels larger than the image
            length = unit.shape[axis]
            wrapped = torch.arange(-((k - 1) // 2), length + k // 2) % length
            unit = unit.index_select(axis, wrapped)
    else:
        unit = functional.pad(unit, sides)
    return CONVOLUTIONS[axes](unit, kernel, stride=stride).flatten(1).T


@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "taps", "image"),
    [
        (1, 1, 3, (7,)),
        (3, 2, 4, (5,)),
        (2, 2, 1, (3, 3)),
        (2, 3, 2, (4, 5)),
        (3, 3, 3, (6, 6)),
        (2, 2, 5, (3, 8)),
        (2, 1, 3, (3, 3, 3)),
    ],
)
def test_a_convolution_stays_below_its_bound(
    inputs: int, outputs: int, taps: int, image: tuple[int, ...], padding: str
) -> None:
    block = BoundedConvolution(inputs, outputs, taps, 0.9, 0.6, axes=len(image)).double()
    start = norm_of(dense_convolution(block(), image, padding))
    assert 0.3 < start <= 0.6 * (1 + 1e-6)
    for factor in FACTORS:
        randomise(block, factor)
        assert block().shape == (outputs, inputs, *(taps,) * len(image))
        exact = norm_of(dense_convolution(block.parameter, image, padding))
        bound = float(block.norm_bound().detach())
        assert 0.4 * bound < exact <= bound * (1 + 1e-12)
        assert norm_of(dense_convolution(block(), image, padding)) <= 0.9 * (1 + 1e-12)
        if factor == 1e-6:
            torch.testing.assert_close(block(), block.parameter)


def test_a_stride_does_not_stretch() -> None:
    block = BoundedConvolution(2, 2, 3, 0.9, 0.6).double()
    randomise(block, 100.0)
    assert norm_of(dense_convolution(block(), (6, 6), "zeros", stride=2)) <= 0.9


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_the_bound_on_a_convolution_by_its_definition(taps: int) -> None:
    """The symbol on the grid, one frequency after the other, and what a polynomial can do in between."""
    block = BoundedConvolution(3, 2, taps, 0.9, 0.6).double()
    kernel, n, values = block.parameter.detach(), 4 * taps, []
    for p in range(n):
        for q in range(n // 2 + 1):
            phase = torch.tensor([[p * i + q * j for j in range(taps)] for i in range(taps)]).double()
            symbol = (kernel * torch.exp(-2j * math.pi * phase / n)).sum(dim=(2, 3))
            values += torch.linalg.svdvals(symbol).tolist()
    grid = sum(v**32 for v in values) ** (1 / 32)
    between = 1 / math.cos(math.pi * (taps - 1) / (2 * n)) ** 2
    assert float(block.norm_bound().detach()) == pytest.approx(between * grid, rel=1e-12)


def test_a_polynomial_exceeds_its_values_on_the_grid_by_the_factor_at_most() -> None:
    """cos(d (ω - half a step)) does so exactly: the factor cannot be left out, or be smaller."""
    degree, n = 1, 12
    ring = torch.arange(n) * 2 * math.pi / n
    on_grid = torch.cos(degree * (ring - math.pi / n)).abs().max()
    assert 1.0 / float(on_grid) == pytest.approx(1 / math.cos(math.pi * degree / n))


# ---------------------------------------------------------------------------------------------------- monotone weights


@pytest.mark.parametrize("monotonicity", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("size", SIZES)
def test_a_monotone_weight_is_monotone_whatever_its_parameters_become(size: int, monotonicity: float) -> None:
    weight = MonotoneWeight(size, monotonicity, 0.5).double()
    for factor in (None, 1e-6, 1.0, 100.0):
        if factor is not None:
            randomise(weight, factor)
        operator = torch.eye(size).double() - weight().detach()
        eigenvalues = torch.linalg.eigvalsh(0.5 * (operator + operator.T))
        assert float(eigenvalues[0]) >= monotonicity - 1e-13 * float(eigenvalues[-1])
    skew, symmetric = weight.skew.detach(), weight.symmetric.detach()
    expected = (1 - monotonicity) * torch.eye(size) - symmetric.T @ symmetric + skew - skew.T
    torch.testing.assert_close(weight().detach(), expected)


def test_every_monotone_operator_can_be_written_so() -> None:
    operator = torch.randn(5, 5, dtype=torch.float64)
    operator = operator @ operator.T + 0.2 * torch.eye(5) + operator - operator.T
    lowest = 0.9 * float(torch.linalg.eigvalsh(0.5 * (operator + operator.T))[0])
    weight = MonotoneWeight(5, lowest, 0.5).double()
    symmetric = 0.5 * (operator + operator.T) - lowest * torch.eye(5)
    with torch.no_grad():
        weight.symmetric.copy_(torch.linalg.cholesky(symmetric).T)
        weight.skew.copy_(-0.25 * (operator - operator.T))
    torch.testing.assert_close(torch.eye(5).double() - weight().detach(), operator)


@pytest.mark.parametrize("step", [0.01, 1.0, 30.0])
def test_activations_are_proximal_operators(step: float) -> None:
    """argmin of a g(z) + ½‖z - u‖², from its derivative, for the same g at every step."""
    u = torch.linspace(-8, 8, 41, dtype=torch.float64)
    a = torch.tensor(step, dtype=torch.float64)
    z = SquarePlus(0.3)(u, a)
    torch.testing.assert_close(z - u, step * 0.09 / z, rtol=1e-9, atol=1e-12)
    assert bool((z > 0).all())
    assert float(SquarePlus(0.3)(torch.zeros(1), torch.ones(1))) == pytest.approx(0.3)
    assert torch.equal(Relu()(u, a), u.clamp(min=0))


# ------------------------------------------------------------------------------------------------------ monotone cells


def monotone_weight(size: int, scale: float, monotonicity: float = 0.2) -> Tensor:
    weight = MonotoneWeight(size, monotonicity, 0.5).double()
    randomise(weight, scale)
    return weight().detach()


def activation(name: str) -> nn.Module:
    return ACTIVATIONS[name](MonotoneDeqConfig())


@pytest.fixture(params=sorted(SPLITTINGS))
def splitting(request: pytest.FixtureRequest) -> type[ForwardBackwardCell]:
    return SPLITTINGS[request.param]


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("size", SIZES)
def test_a_forward_backward_step_contracts(size: int, scale: float) -> None:
    m = 0.2
    weight = monotone_weight(size, scale, m)
    operator = torch.eye(size).double() - weight
    length = float(forward_backward_step(weight))
    assert length >= m / norm_of(operator) ** 2 * (1 - 1e-9)  # never shorter than the textbook's
    v = torch.randn(size, 1000, dtype=torch.float64)
    image = operator @ v
    assert bool((length * image.square().sum(dim=0) <= (v * image).sum(dim=0) * (1 + 1e-9)).all())
    for relaxation in (0.5, 1.0, 1.9):
        matrix, shift, step = ForwardBackwardCell(Relu()).prepare(weight, torch.ones(2, size).double(), relaxation)
        factor = math.sqrt(1 - m * relaxation * length * (2 - relaxation))
        assert norm_of(matrix) <= factor * (1 + 1e-12) < 1.0
        torch.testing.assert_close(shift, torch.full((2, size), relaxation * length).double())
        assert float(step) == pytest.approx(relaxation * length)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("size", SIZES)
def test_peaceman_rachford_contracts_for_every_step(size: int, scale: float) -> None:
    weight = monotone_weight(size, scale)
    slope = 0.2 * size ** (-1 / 32) / norm_of(torch.eye(size).double() - weight)
    for relaxation in (0.1, 1.0, 10.0):
        matrix, _, step = PeacemanRachfordCell(Relu()).prepare(weight, torch.ones(2, size).double(), relaxation)
        assert norm_of(matrix) < 1.0 - 1e-12 * scale
        if relaxation == 1.0:
            assert norm_of(matrix) <= math.sqrt((1 - slope) / (1 + slope))


def direct_residual(z: Tensor, weight: Tensor, injection: Tensor, name: str) -> float:
    """Of the equation z = σ(W z + s) itself, relative."""
    image = activation(name)(z @ weight.T + injection, torch.tensor(1.0).double())
    return float((z - image).norm() / z.norm())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_answer_depends_neither_on_the_step_nor_on_the_splitting(name: str) -> None:
    weight, injection = monotone_weight(8, 0.5), torch.randn(5, 8, dtype=torch.float64)
    answers = []
    for splitting in SPLITTINGS.values():
        for relaxation in (0.5, 1.0, 1.9, 3.0):
            cell = splitting(activation(name))
            given = cell.prepare(weight, injection, relaxation)
            with torch.no_grad():
                answers.append(cell.solution(FixedPoint(cell, options=TIGHT)(given), given))
            assert direct_residual(answers[-1], weight, injection, name) < 1e-10
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_huge_weights_have_one_answer_wherever_the_solve_begins(
    name: str, splitting: type[ForwardBackwardCell]
) -> None:
    weight, injection = monotone_weight(8, 30.0), torch.randn(4, 8, dtype=torch.float64)
    assert norm_of(weight) > 5000
    with torch.no_grad():  # z ↦ σ(W z + s) itself explodes
        z = torch.ones(4, 8, dtype=torch.float64)
        for _ in range(10):
            z = activation(name)(z @ weight.T + injection, torch.tensor(1.0).double())
    assert not bool(z.isfinite().all()) or float(z.abs().max()) > 1e20
    cell = splitting(activation(name))
    # The residual is short by the step, ‖z - z*‖ ≤ 2 (ℓ/m) ‖f(z) - z‖: Newton gets as far as rounding allows.
    newton = {"snes_type": "newtonls", "snes_linesearch_type": "basic", "snes_rtol": 1e-15, "snes_max_it": 100}
    layer = FixedPoint(cell, options={**TIGHT, **newton})
    given = cell.prepare(weight, injection)
    with torch.no_grad():
        answers = [
            cell.solution(layer(given, z0=scale * torch.randn(4, 8, dtype=torch.float64)), given)
            for scale in (0.0, 1.0, 100.0)
        ]
    assert direct_residual(answers[0], weight, injection, name) < 1e-6
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=1e-7 * float(answers[0].abs().max()))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_derivatives_through_the_monotone_layer(name: str, splitting: type[ForwardBackwardCell]) -> None:
    block = MonotoneWeight(3, 0.4, 0.5).double()
    injection = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    cell = splitting(activation(name))
    layer = FixedPoint(cell, options=TIGHT)

    def function(injection: Tensor, symmetric: Tensor, skew: Tensor) -> Tensor:
        weight = functional_call(block, {"symmetric": symmetric, "skew": skew}, ())
        given = cell.prepare(weight, injection)
        return cell.solution(layer(given), given)

    arguments = (injection, *(p.detach().clone().requires_grad_() for p in block.parameters()))
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_derivatives_do_not_depend_on_the_step() -> None:
    weight = monotone_weight(6, 0.5).requires_grad_()
    injection = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for splitting in SPLITTINGS.values():
        for relaxation in (1.0, 1.7):
            cell = splitting(SquarePlus(0.2))
            given = cell.prepare(weight, injection, relaxation)
            z = cell.solution(FixedPoint(cell, options=TIGHT)(given), given)
            (gradient,) = torch.autograd.grad(z.square().sum(), weight, create_graph=True)
            (second,) = torch.autograd.grad(gradient.sin().sum(), weight)
            found.append((gradient.detach(), second))
    for gradient, second in found[1:]:
        torch.testing.assert_close(gradient, found[0][0], rtol=0, atol=1e-9)
        torch.testing.assert_close(second, found[0][1], rtol=0, atol=1e-8)
    # and against the equation z = σ(W z + s) itself: (I - D W)ᵀ u = 2 z, W̄ = Σ (D u) zᵀ
    z = z.detach()
    u = torch.linalg.solve(torch.eye(6) - slopes(z)[:, None, :] * weight.detach().T, 2 * z)
    expected = torch.einsum("bi,bj->ij", slopes(z) * u, z)
    torch.testing.assert_close(found[0][0], expected, rtol=0, atol=1e-9)


def slopes(z: Tensor, softness: float = 0.2) -> Tensor:
    """σ' of square plus where its value is z, from z - u = h²/z."""
    return 1 / (1 + softness**2 / z.square())


def test_samples_leave_a_monotone_batch(splitting: type[ForwardBackwardCell]) -> None:
    cell = splitting(SquarePlus(0.3))
    given = cell.prepare(monotone_weight(4, 0.5), torch.randn(5, 4, dtype=torch.float64))
    z, keep = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 3])
    torch.testing.assert_close(cell(z[keep], cell.select(given, keep)), cell(z, given)[keep])
    assert cell.initial_state(cell.select(given, keep)).shape == (3, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = monotone_weight(3, 0.5)
    weight[1, 2] = bad
    with pytest.raises(ConvergenceError, match="^the recurrent weight W of a monotone DEQ has no finite inverse"):
        ForwardBackwardCell(Relu()).prepare(weight, torch.zeros(1, 3).double())


def test_a_weight_that_is_not_monotone_is_refused() -> None:
    """A step of zero would make every state a fixed point."""
    with pytest.raises(ConvergenceError, match="with a positive symmetric part: its largest entry is 2"):
        ForwardBackwardCell(Relu()).prepare(2.0 * torch.eye(3).double(), torch.zeros(1, 3).double())


# ------------------------------------------------------------------------------------------------------ monotone model


def built(**settings: object) -> nn.Module:
    config = model_config("monotone_deq", {"width": 6, **settings})
    return build_model("monotone_deq", config, "array", (2, 3), 4)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("kind", sorted(SPLITTINGS))
def test_the_model_has_outputs_whatever_its_weights_become(name: str, kind: str) -> None:
    model = built(activation=name, splitting=kind)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for factor in (None, 1e-3, 3.0):
        if factor is not None:
            randomise(model, factor)
        found = model(x)
        assert found.shape == (5, 4) and bool(found.isfinite().all())
        assert model.equilibrium.solution.reason.startswith("CONVERGED_")


def test_all_settings_of_the_iteration_give_the_same_outputs() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    outputs = []
    for kind in SPLITTINGS:
        for relaxation in (1.0, 1.6):
            model = built(splitting=kind, relaxation=relaxation)
            model.equilibrium.options.given |= TIGHT
            outputs.append(model(x).detach())
    for found in outputs[1:]:
        torch.testing.assert_close(found, outputs[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", sorted(SPLITTINGS))
def test_a_short_step_takes_longer(kind: str) -> None:
    x, counts = torch.randn(5, 2, 3, dtype=torch.float64), []
    for relaxation in (0.2, 1.0):
        model = built(splitting=kind, relaxation=relaxation)
        model(x)
        counts.append(int(model.equilibrium.solution.iterations.max()))
    assert counts[0] > 1.2 * counts[1]


def test_gradients_reach_every_parameter() -> None:
    model = built()
    model(torch.randn(5, 2, 3, dtype=torch.float64)).square().sum().backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and float(value.grad.abs().sum()) > 0, parameter


def test_gradients_of_the_model_are_its_slope() -> None:
    """Along a random direction of all weights, against a central difference."""
    model, x = built(), torch.randn(5, 2, 3, dtype=torch.float64)
    model.equilibrium.options.given |= TIGHT
    model(x).sin().sum().backward()
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction, strict=True))
    values = []
    with torch.no_grad():
        for distance in (1e-5, -2e-5):
            for p, d in zip(model.parameters(), direction, strict=True):
                p.add_(d, alpha=distance)
            values.append(float(model(x).sin().sum()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_an_output_does_not_depend_on_the_batch() -> None:
    model, x = built(), torch.randn(5, 2, 3, dtype=torch.float64)
    model.equilibrium.options.given |= TIGHT
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in x])
        torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-10)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (built_with_seed(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in first)


def built_with_seed(seed: int) -> nn.Module:
    return build_model("monotone_deq", model_config("monotone_deq", {"width": 6}), "array", (2, 3), 4, seed=seed)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_model_trains_with_second_derivatives(name: str) -> None:
    x = torch.randn(40, 2, 3, dtype=torch.float64)
    targets = torch.stack([x.sum(dim=(1, 2)).sin(), x[:, 0, 0] * x[:, 1, 2]], dim=1)
    config = model_config("monotone_deq", {"width": 8, "activation": name})
    problem = TrainingProblem(build_model("monotone_deq", config, "array", (2, 3), 2), (x, targets), loss="mse")
    start = problem.loss(problem.initial())
    for method in ("trgn", "newton"):
        result = minimize(problem, method=method, max_iterations=8)
        assert result.loss < 0.3 * start, method


def test_the_model_in_single_precision() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    single = build_model(
        "monotone_deq", model_config("monotone_deq", {"width": 6}), "array", (2, 3), 4, dtype=torch.float32
    )
    torch.testing.assert_close(single(x.float()).double(), built()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"activation": "tanh"}, "^model monotone_deq: unknown activation 'tanh': choose one of squareplus, relu$"),
        ({"splitting": "forward-backward"}, "unknown splitting 'forward-backward': did you mean forward_backward\\?$"),
        ({"relaxation": 0.0}, "^model monotone_deq: relaxation 0.0 must be positive$"),
        ({"monotonicity": -1.0}, "^monotonicity -1.0 must be positive"),
        ({"softness": 0.0}, "^softness 0.0 must be positive"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        built(**settings)
