"""Networks of functions: what they compute, checked by direct sums, and what they promise of shifts and of any weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hpcdeq.errors import DataError, OptionError
from hpcdeq.models import build_model, model_config
from hpcdeq.models.blocks import spectral_bound
from hpcdeq.models.deeponet import DeepOnet
from hpcdeq.models.fno_deq import BoundedFourierWeights, FourierCell, Injection
from hpcdeq.models.grids import grid_features
from hpcdeq.models.mlp import Perceptron
from hpcdeq.models.spectral import FourierModes, SpectralConvolution, spectral_linear

TINY: dict[str, dict[str, object]] = {
    "mlp": {"width": 4},
    "deeponet": {"width": 4, "basis": 3},
    "fno": {"width": 2, "modes": 2, "layers": 2, "projection": 3},
    "deeponet_deq": {"width": 4, "basis": 3},
    "fno_deq": {"width": 2, "modes": 2, "lifting": 3, "projection": 3},
}
EXPLICIT = ["mlp", "deeponet", "fno"]
FIELDS = ["fno", "fno_deq"]
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "ksp_rtol": 1e-13, "ksp_atol": 1e-14}


def built(
    name: str, shape: tuple[int, ...], outputs: int | None = None, *, defaults: bool = False, **settings: object
) -> nn.Module:
    config = model_config(name, settings if defaults else {**TINY[name], **settings})
    model = build_model(name, config, "array", shape, math.prod(shape) if outputs is None else outputs)
    if hasattr(model, "equilibrium"):
        model.equilibrium.options.given |= TIGHT
    return model


def fields(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64)


def count_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------ sizes


def affine(*sizes: int) -> int:
    """Weights of the affine maps between these sizes."""
    return sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "expected"),
    [
        ("mlp", (8,), 64, affine(8, 64, 64, 64)),
        ("deeponet", (64,), 64, 18_257),
        ("deeponet", (64,), 64, affine(64, 64, 64, 40) + affine(8, 64, 64, 40) + 1),
        ("deeponet", (8, 8), 64, affine(64, 64, 64, 40) + affine(2, 64, 64, 40) + 1),  # two coordinates
        ("fno", (64,), 64, affine(3, 12) + 3 * (affine(12, 12) + 6 * 144 * 2) + affine(12, 32, 1)),
        ("fno", (16, 16), 256, affine(3, 12) + 3 * (affine(12, 12) + 66 * 144 * 2) + affine(12, 32, 1)),
        ("deeponet_deq", (64,), 64, affine(64, 64) + 64 * 64 + affine(64, 40) + 64 * 40 + affine(8, 64, 64, 40) + 1),
        ("fno_deq", (64,), 64, affine(3, 32, 12) + 144 + 6 * 144 * 2 + affine(12, 32, 1)),
    ],
)
def test_the_defaults_have_as_many_weights_as_told(
    name: str, shape: tuple[int, ...], outputs: int, expected: int
) -> None:
    assert count_of(built(name, shape, outputs, defaults=True)) == expected


@pytest.mark.parametrize(
    ("name", "shape", "outputs"),
    [(name, shape, outputs) for name in TINY for shape, outputs in (((6,), 6), ((4, 5), 20))]
    + [(name, shape, 7) for name in TINY if name not in FIELDS for shape in ((3,), (2, 3), (2, 3, 2))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_maps_a_batch_of_any_size(name: str, shape: tuple[int, ...], outputs: int, dtype: torch.dtype) -> None:
    model = build_model(name, model_config(name, TINY[name]), "array", shape, outputs, dtype=dtype)
    x = torch.randn(3, *shape, dtype=dtype)
    found = model(x).detach()
    assert found.shape == (3, outputs) and found.dtype == dtype and bool(torch.isfinite(found).all())
    assert float((found[0] - found[1]).abs().max()) > 0
    torch.testing.assert_close(model(x[1:2]), found[1:2], rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-7)
    assert model(x[:0]).shape == (0, outputs)


# ------------------------------------------------------------------------------------------------------------ grids


def test_points_are_the_cell_centres_the_last_axis_fastest() -> None:
    assert grid_features((4,), periodic=False).tolist() == [[0.125], [0.375], [0.625], [0.875]]
    found = grid_features((2, 3), periodic=False).reshape(2, 3, 2)
    for i in range(2):
        for j in range(3):
            assert found[i, j].tolist() == pytest.approx([(i + 0.5) / 2, (j + 0.5) / 3], abs=1e-15)


def test_periodic_features_are_harmonics_of_each_coordinate() -> None:
    found = grid_features((3, 4), periodic=True, harmonics=2)
    x = grid_features((3, 4), periodic=False).numpy()
    columns = [f(2 * np.pi * k * x[:, axis]) for axis in (0, 1) for f in (np.cos, np.sin) for k in (1, 2)]
    np.testing.assert_allclose(found.numpy(), np.stack(columns, axis=1), atol=1e-14)


@pytest.mark.parametrize(
    ("boundary", "shape", "outputs", "features"),
    [
        ("auto", (6,), 6, 4),
        ("auto", (2, 3), 6, 2),
        ("auto", (2, 3), 5, 4),
        ("open", (6,), 6, 1),
        ("periodic", (2, 3), 6, 8),
    ],
)
def test_a_trunk_sees_the_grid_of_its_output(
    boundary: str, shape: tuple[int, ...], outputs: int, features: int
) -> None:
    model = built("deeponet", shape, outputs, boundary=boundary, harmonics=2)
    assert model.trunk.places.values.shape == (outputs, features)


def test_coordinates_are_exact_in_both_precisions() -> None:
    """What is stored in float32 and read in float64 would be wrong in the eighth digit."""
    model = built("deeponet", (7,))
    expected = np.cos(2 * np.pi * (np.arange(7) + 0.5) / 7)
    np.testing.assert_allclose(model.trunk.places.values[:, 0].numpy(), expected, rtol=0, atol=1e-15)
    modes = built("fno", (7,)).layers[0].convolution.modes
    waves = np.exp(-2j * np.pi * np.arange(7) / 7) / np.sqrt(7)
    np.testing.assert_allclose(modes.last[1].numpy() + 1j * modes.last[3].numpy(), waves, rtol=0, atol=1e-15)


# -------------------------------------------------------------------------------------------------------- DeepONet


def test_a_deeponet_is_a_sum_of_basis_functions() -> None:
    model, a = built("deeponet", (5,), 4, harmonics=1), fields(3, 5)
    assert isinstance(model, DeepOnet)
    with torch.no_grad():
        model.trunk.bias.fill_(0.3)
        found = model(a)
        for sample in range(3):
            coefficients = model.branch(a[sample])
            for point in range(4):
                x = 2 * math.pi * (point + 0.5) / 4
                basis = model.trunk.network(torch.tensor([math.cos(x), math.sin(x)], dtype=torch.float64))
                assert float(found[sample, point]) == pytest.approx(float(coefficients @ basis) + 0.3, abs=1e-12)


def test_the_basis_of_a_trunk_goes_through_the_activation() -> None:
    """With a last layer that is affine, many weights would be the same network."""
    model = built("deeponet", (5,))
    with torch.no_grad():
        model.trunk.network.layers[-1].bias.fill_(100.0)
        coefficients = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(model.trunk(coefficients), torch.ones(3, 5, dtype=torch.float64))


def test_coefficients_of_a_deeponet_come_from_the_fixed_point() -> None:
    model, a = built("deeponet_deq", (5,)), fields(3, 5)
    with torch.no_grad():
        found = model(a)
        z, weight = model.equilibrium.solution.value, model.recurrent()
        torch.testing.assert_close(torch.tanh(z @ weight.T + model.injection(a)), z)
        coefficients = z @ model.head.weight.T + model.head.bias + a @ model.skip.weight.T
        basis = model.trunk.network(grid_features((5,), periodic=True, harmonics=4))
        torch.testing.assert_close(found, coefficients @ basis.T + model.trunk.bias)


class Watched(TorchFunctionMode):
    """Notes the shapes of what ``linear`` and `spectral_linear` are given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear: list[tuple[int, ...]] = []
        self.spectral: list[tuple[int, ...]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is functional.linear:
            self.linear.append(tuple(args[0].shape))
        if function is spectral_linear:
            self.spectral.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_basis_functions_are_evaluated_once_a_batch() -> None:
    model = built("deeponet", (5,), 9)
    with Watched() as seen:
        model(fields(16, 5))
    assert [shape[0] for shape in seen.linear] == [16] * 3 + [9] * 3


def test_products_of_an_fno_can_be_watched() -> None:
    model = built("fno", (6, 8))
    with Watched() as seen:
        watched = model(fields(3, 6, 8))
    assert seen.linear == [(3, 48, 3)] + [(3, 48, 2)] * 3 + [(3, 48, 3)]
    assert seen.spectral == [(6, 3, 2, 2)] * 2
    torch.manual_seed(1234)
    torch.testing.assert_close(watched, model(fields(3, 6, 8)), rtol=0, atol=0)


def test_a_perceptron_is_its_layers() -> None:
    network, x = Perceptron(3, 5, 2, 2, torch.tanh, last=True).double(), fields(4, 3)
    first, second, third = ((layer.weight, layer.bias) for layer in network.layers)
    hidden = torch.tanh(torch.tanh(x @ first[0].T + first[1]) @ second[0].T + second[1])
    torch.testing.assert_close(network(x), torch.tanh(hidden @ third[0].T + third[1]))
    network.last = False
    torch.testing.assert_close(network(x), hidden @ third[0].T + third[1])


# --------------------------------------------------------------------------------------------------------- spectra


def complex_of(parts: Tensor, dim: int) -> np.ndarray:
    real, imaginary = parts.detach().unbind(dim)
    return real.numpy() + 1j * imaginary.numpy()


@pytest.mark.parametrize(
    ("grid", "modes", "period"),
    [((8,), 3, None), ((7,), 4, None), ((6,), 1, (9,)), ((6, 8), 3, None), ((5, 4), 2, (7, 6)), ((7, 9), 4, None)],
)
def test_modes_are_those_of_numpy_s_transform(
    grid: tuple[int, ...], modes: int, period: tuple[int, ...] | None
) -> None:
    transform = FourierModes(grid, modes, period)
    field = fields(2, math.prod(grid), 3)
    padded = np.zeros((2, *(period or grid), 3))
    padded[(slice(None), *(slice(n) for n in grid))] = field.reshape(2, *grid, 3).numpy()
    expected = np.fft.fftn(padded, axes=range(1, 1 + len(grid)), norm="ortho")
    found = complex_of(transform.analyse(field), dim=2)
    assert transform.count == (modes if len(grid) == 1 else modes * (2 * modes - 1)) == len(transform.wave_numbers)
    for place, wave in enumerate(transform.wave_numbers.tolist()):
        assert max(wave) < modes and min(wave) > -modes
        np.testing.assert_allclose(found[place], expected[(slice(None), *wave)], atol=1e-13)
    assert len({tuple(wave) for wave in transform.wave_numbers.tolist()}) == transform.count


@pytest.mark.parametrize(
    ("grid", "modes", "period"), [((8,), 3, None), ((6,), 4, (9,)), ((6, 8), 3, None), ((5, 4), 3, (7, 6))]
)
def test_a_spectral_convolution_is_that_of_numpy_s_transforms(
    grid: tuple[int, ...], modes: int, period: tuple[int, ...] | None
) -> None:
    transform = FourierModes(grid, modes, period)
    convolution = SpectralConvolution(transform, 3, 2).double()
    field, whole = fields(2, math.prod(grid), 3), period or grid
    padded = np.zeros((2, *whole, 3))
    inside = (slice(None), *(slice(n) for n in grid))
    padded[inside] = field.reshape(2, *grid, 3).numpy()
    axes = tuple(range(1, 1 + len(grid)))
    spectrum = np.fft.rfftn(padded, axes=axes)
    kept = np.zeros((*spectrum.shape[:-1], 2), complex)
    for wave, matrix in zip(transform.wave_numbers.tolist(), complex_of(convolution.weight, dim=3), strict=True):
        kept[(slice(None), *wave)] = spectrum[(slice(None), *wave)] @ matrix
    expected = np.fft.irfftn(kept, s=whole, axes=axes)[inside].reshape(2, -1, 2)
    np.testing.assert_allclose(convolution(field).detach().numpy(), expected, atol=1e-12)


def test_a_band_limited_field_is_its_modes() -> None:
    for grid in ((9,), (7, 9)):
        transform, rows = FourierModes(grid, 3), math.prod(grid)
        band = transform.synthesise(transform.analyse(fields(2, rows, 4)))
        torch.testing.assert_close(transform.synthesise(transform.analyse(band)), band)
        high = fields(2, rows, 4)
        high = high - transform.synthesise(transform.analyse(high))
        assert float(high.norm()) > 1.0  # the modes left out are orthogonal to the ones kept
        torch.testing.assert_close(transform.analyse(high), torch.zeros_like(transform.analyse(high)))


def test_each_mode_has_its_complex_matrix() -> None:
    spectrum, weight = fields(5, 4, 2, 3), fields(5, 3, 2, 2)
    found = complex_of(spectral_linear(spectrum, weight), dim=2)
    expected = np.einsum("mbi,mio->mbo", complex_of(spectrum, dim=2), complex_of(weight, dim=3))
    np.testing.assert_allclose(found, expected, atol=1e-13)
    given = (spectrum.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(spectral_linear, given) and torch.autograd.gradgradcheck(spectral_linear, given)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("grid", [(9,), (8, 6)])
def test_a_periodic_operator_commutes_with_shifts(name: str, grid: tuple[int, ...]) -> None:
    shift, axes = (4, 3)[: len(grid)], tuple(range(1, 1 + len(grid)))
    a = fields(2, *grid)
    moved = a.roll(shift, axes)
    with torch.no_grad():
        model = built(name, grid, boundary="periodic", coordinates=False)
        expected = model(a).reshape(a.shape).roll(shift, axes)
        assert float((expected - model(a).reshape(a.shape)).abs().max()) > 1e-4
        torch.testing.assert_close(model(moved).reshape(a.shape), expected, rtol=0, atol=1e-10)
        for other in ({"boundary": "periodic"}, {"boundary": "open", "coordinates": False}):  # each breaks the symmetry
            model = built(name, grid, **other)
            expected = model(a).reshape(a.shape).roll(shift, axes)
            assert float((model(moved).reshape(a.shape) - expected).abs().max()) > 1e-5


def convolved(modes: FourierModes, weight: Tensor, field: Tensor) -> Tensor:
    """A spectral convolution of real fields on a periodic grid by a sum over all modes and points."""
    axes = [torch.arange(n, dtype=torch.float64) / n for n in modes.grid]
    places = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    total = torch.zeros(*field.shape[:2], weight.shape[2], dtype=torch.float64)
    for wave, matrix in zip(modes.wave_numbers.double(), torch.view_as_complex(weight.contiguous()), strict=True):
        phases = torch.exp(2j * math.pi * (places @ wave))
        coefficient = torch.einsum("p,bpi->bi", phases.conj(), field.to(phases.dtype)) / len(places) @ matrix
        total += (1 if wave[-1] == 0 else 2) * torch.einsum("p,bo->bpo", phases, coefficient).real
    return total


@pytest.mark.parametrize("grid", [(7,), (4, 5)])
def test_an_fno_is_its_layers(grid: tuple[int, ...]) -> None:
    model, a = built("fno", grid, boundary="periodic", activation="tanh"), fields(3, *grid)
    with torch.no_grad():
        places = grid_features(grid, periodic=True)[None].expand(3, -1, -1)
        v = functional.linear(torch.cat([a.flatten(1)[..., None], places], dim=2), *model.lifting.map.parameters())
        for place, layer in enumerate(model.layers):
            convolution = convolved(layer.convolution.modes, layer.convolution.weight, v)
            v = convolution + v @ layer.pointwise.weight.T + layer.pointwise.bias
            v = torch.tanh(v) if place == 0 else v  # none after the last of two
        hidden, last = model.projection.layers
        expected = torch.tanh(v @ hidden.weight.T + hidden.bias) @ last.weight.T + last.bias
        torch.testing.assert_close(model(a), expected[..., 0])


@pytest.mark.parametrize("grid", [(7,), (4, 5)])
def test_an_equilibrium_is_a_fourier_layer_s(grid: tuple[int, ...]) -> None:
    model, a = built("fno_deq", grid, boundary="periodic"), fields(3, *grid)
    given = seized(model, a)
    with torch.no_grad():
        z = model.equilibrium.solution.value
        layer = convolved(model.equilibrium.cell.modes, given.spectral, z) + z @ given.pointwise.T
        torch.testing.assert_close(torch.tanh(layer + given.field), z)
        hidden, last = model.projection.layers
        expected = functional.gelu(z @ hidden.weight.T + hidden.bias) @ last.weight.T + last.bias
        torch.testing.assert_close(model(a), expected[..., 0])
        assert float(layer.abs().max()) > 1e-3


def test_an_fno_is_a_function_of_the_field_not_of_its_grid() -> None:
    """With the same weights on a grid twice as fine: layers see band-limited fields alike, but for what tanh aliases."""
    x = {n: (torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (32, 64)}
    outputs = {}
    for n, place in x.items():
        model = built("fno", (n,), activation="tanh")
        outputs[n] = functional_call(
            model,
            dict(built("fno", (32,), activation="tanh").named_parameters()),
            (torch.sin(2 * np.pi * place)[None],),
        )
    coarse = FourierModes((32,), 6).analyse(outputs[32][..., None])[:, 0, :, 0]
    fine = FourierModes((64,), 6).analyse(outputs[64][..., None])[:, 0, :, 0]
    # Cell centres of the grids differ by a quarter of a coarse cell; orthonormal spectra by the root of two.
    phase = torch.exp(1j * 2 * np.pi * torch.arange(6) * (0.5 / 32 - 0.5 / 64))
    found = torch.view_as_complex(fine.contiguous()) * phase / math.sqrt(2)
    torch.testing.assert_close(found, torch.view_as_complex(coarse.contiguous()), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", EXPLICIT)
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu"])
def test_first_and_second_derivatives_are_right(name: str, shape: tuple[int, ...], activation: str) -> None:
    model = built(name, shape, activation=activation)
    names = [parameter for parameter, _ in model.named_parameters()]
    a = fields(1, *shape)
    weights = tuple(0.5 * torch.randn_like(p).requires_grad_() for p in model.parameters())
    projection = fields(1, math.prod(shape))

    def function(*given: Tensor) -> Tensor:
        return (functional_call(model, dict(zip(names, given, strict=True)), (a,)) * projection).sum()

    leaves = tuple(w.detach().requires_grad_() for w in weights)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(("name", "shape"), [("deeponet_deq", (4,)), ("fno_deq", (5,)), ("fno_deq", (3, 4))])
def test_derivatives_of_an_equilibrium_are_right(name: str, shape: tuple[int, ...]) -> None:
    model, a = built(name, shape), fields(2, *shape)
    names = [parameter for parameter, _ in model.named_parameters()]
    projection = fields(2, math.prod(shape))

    def function(*given: Tensor) -> Tensor:
        return (functional_call(model, dict(zip(names, given, strict=True)), (a,)) * projection).sum()

    leaves = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# ---------------------------------------------------------------------------------------------------- well-posedness


def seized(model: nn.Module, a: Tensor) -> Injection:
    """Return what the cell of a model is given."""
    seen: list[Injection] = []
    hook = model.equilibrium.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(a)
    hook.remove()
    return seen[0]


def norm_of_layer(modes: FourierModes, pointwise: Tensor, spectral: Tensor) -> float:
    """Return the 2-norm of W + K from its dense matrix on real fields."""
    points, width = math.prod(modes.grid), len(pointwise)
    basis = torch.eye(points * width, dtype=torch.float64).reshape(-1, points, width)
    image = modes.synthesise(spectral_linear(modes.analyse(basis), spectral)) + basis @ pointwise.T
    return float(torch.linalg.matrix_norm(image.reshape(points * width, -1), 2))


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    ("grid", "period"), [((8,), None), ((6,), (9,)), ((6, 7), None), ((5, 5), (7, 8))], ids=["1d", "1d0", "2d", "2d0"]
)
def test_a_fourier_layer_keeps_its_bound(grid: tuple[int, ...], period: tuple[int, ...] | None, factor: float) -> None:
    modes = FourierModes(grid, 3, period)
    weights = BoundedFourierWeights(modes.count, 4, bound=0.9, initial=0.4).double()
    with torch.no_grad():
        initial = norm_of_layer(modes, *weights())
        assert 0.1 < initial <= 0.4 + 1e-6
        for parameter in weights.parameters():
            parameter.copy_(factor * torch.randn_like(parameter))
        pointwise, spectral = weights()
        norm = norm_of_layer(modes, pointwise, spectral)
        told = norm_of_layer(modes, weights.pointwise, weights.spectral), float(weights.norm_bound())
    assert norm <= 0.9 and told[0] <= told[1]
    if (
        factor >= 1
    ):  # near to it: the bound costs at most (4 numbers each of all matrices)^(1/32), and what is imaginary
        assert norm > 0.5 * 0.9
    torch.testing.assert_close(spectral / spectral.norm(), (weights.spectral / weights.spectral.norm()).detach())
    torch.testing.assert_close(pointwise / spectral.norm(), (weights.pointwise / weights.spectral.norm()).detach())


def test_the_bound_is_the_norm_at_the_mode_where_it_is_largest() -> None:
    """W and R of one direction add up: a bound on the norms of either alone would not see it."""
    weights = BoundedFourierWeights(3, 2, bound=0.9, initial=0.4).double()
    with torch.no_grad():
        weights.pointwise.copy_(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        weights.spectral.zero_()
        weights.spectral[1, 1, 0, 0] = 3.0  # modes are multiplied from the right: the transpose of W's place
        assert float(weights.norm_bound()) == pytest.approx(5.0, rel=0.05)
        assert norm_of_layer(FourierModes((8,), 3), weights.pointwise, weights.spectral) == pytest.approx(5.0)
        weights.spectral[1, 1, 0, 0] = -3.0
        assert float(weights.norm_bound()) == pytest.approx(2.0, rel=0.1)
        weights.spectral.zero_()
        weights.spectral[:, 1, 0, 0] = -2.0  # nothing is left of the modes that are kept, and all of the others
        assert norm_of_layer(FourierModes((8,), 3), weights.pointwise, weights.spectral) == pytest.approx(2.0)
        assert float(weights.norm_bound()) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("shape", [(8,), (5, 6)])
@pytest.mark.parametrize("name", ["fno_deq", "deeponet_deq"])
def test_there_is_a_fixed_point_whatever_the_weights_become(name: str, shape: tuple[int, ...]) -> None:
    model, a = built(name, shape, bound=0.9, contraction=0.3), fields(3, *shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1e3 * torch.randn_like(parameter))
        for parameter in model.injection.parameters():
            parameter.mul_(1e-7 if name == "fno_deq" else 1e-4)  # some units stay where tanh is steep
    given, cell = seized(model, a), model.equilibrium.cell
    assert model.equilibrium.solution.reason.startswith("CONVERGED_")
    z = model.equilibrium.solution.value
    assert float(z.abs().min()) < 0.9
    for distance in (1e-3, 1.0, 100.0):
        other = z + distance * torch.randn_like(z)
        with torch.no_grad():
            moved = (cell(other, given) - cell(z, given)).flatten(1).norm(dim=1)
        assert bool((moved <= 0.9 * (other - z).flatten(1).norm(dim=1)).all())
    with torch.no_grad():
        torch.testing.assert_close(cell(z, given), z, rtol=0, atol=1e-10)


def test_samples_may_leave_the_batch() -> None:
    model, a = built("fno_deq", (5, 6)), fields(4, 5, 6)
    given, keep = seized(model, a), torch.tensor([0, 3])
    cell = model.equilibrium.cell
    assert isinstance(cell, FourierCell)
    fewer, z = cell.select(given, keep), torch.randn_like(given.field)
    with torch.no_grad():
        torch.testing.assert_close(cell(z[keep], fewer), cell(z, given)[keep])
    assert fewer.spectral is given.spectral and fewer.pointwise is given.pointwise


def test_a_bound_is_smooth_where_modes_cross() -> None:
    """Equal matrices at all modes: the largest norm among them has a corner there, the bound none."""
    equal = torch.eye(2, dtype=torch.float64).expand(3, 2, 2).clone().requires_grad_()
    assert torch.autograd.gradcheck(spectral_bound, equal) and torch.autograd.gradgradcheck(spectral_bound, equal)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "settings", "error", "told"),
    [
        (
            "fno",
            (4, 4, 4),
            64,
            {},
            DataError,
            r"fno maps fields on a grid of one or two axes.*shape \(4, 4, 4\).*deeponet",
        ),
        ("fno", (8,), 9, {}, DataError, r"fno maps fields .* shape \(8,\) and 9 outputs: use --model deeponet or mlp"),
        ("fno_deq", (), 1, {}, DataError, r"fno_deq maps fields .* shape \(\) and 1 outputs"),
        ("fno", (8,), 8, {"modes": 5}, OptionError, "modes 5: 8 points have 1 to 4 modes"),
        ("fno_deq", (9, 4), 36, {"modes": 4, "padding": 0.0}, OptionError, "modes 4: 4 points have 1 to 2 modes"),
        ("fno", (8, 8), 64, {"padding": -0.1}, OptionError, "model fno: padding -0.1 must lie between 0 and 4"),
        ("fno", (8, 8), 64, {"padding": float("nan")}, OptionError, "model fno: padding nan must lie between 0 and 4"),
        (
            "fno",
            (8,),
            8,
            {"activation": "gelo"},
            OptionError,
            r"model fno: unknown activation 'gelo': did you mean gelu\?",
        ),
        ("mlp", (8,), 8, {"activation": "relu"}, OptionError, "model mlp: unknown activation 'relu': "),
        (
            "deeponet",
            (8,),
            8,
            {"activation": "q"},
            OptionError,
            "deeponet: unknown activation 'q': choose one of tanh, gelu, ",
        ),
        (
            "fno_deq",
            (8,),
            8,
            {"boundary": "opne"},
            OptionError,
            r"fno_deq: unknown boundary 'opne': did you mean open\?",
        ),
        (
            "deeponet_deq",
            (8,),
            8,
            {"boundary": "q"},
            OptionError,
            "deeponet_deq: unknown boundary 'q': choose one of auto, ",
        ),
        ("fno_deq", (8,), 8, {"contraction": 0.95}, OptionError, "contraction 0.95 .* between 0 and the bound 0.95"),
        ("deeponet_deq", (8,), 8, {"contraction": 2.0}, OptionError, "contraction 2.0 .* between 0 and "),
    ],
)
def test_what_cannot_be_built_is_refused(
    name: str, shape: tuple[int, ...], outputs: int, settings: dict[str, object], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        built(name, shape, outputs, **settings)


def test_the_help_of_training_names_every_model() -> None:
    from hpcdeq.models import MODELS
    from hpcdeq.train import build_parser

    told = " ".join(build_parser().format_help().split())
    assert all(f" {name}," in told or f" {name} " in told for name in MODELS)
