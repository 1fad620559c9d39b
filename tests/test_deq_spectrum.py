"""Spectral radius and norm of the cell's Jacobian, against dense eigenvalues and singular values of each sample."""

from __future__ import annotations

import math

import pytest
import torch
from cells import TanhCell, unrolled
from torch import Tensor

from hpcdeq.deq import FixedPoint
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.probes import positions, uniform
from hpcdeq.deq.samples import Samples
from hpcdeq.deq.spectrum import contraction, norm_at, spectral_radius, spectral_radius_at
from hpcdeq.errors import ConvergenceError, OptionError


def each_its_matrix(z: Tensor, matrices: Tensor) -> Tensor:
    """A linear cell: the Jacobian of sample i is matrices[i]."""
    return torch.einsum("bij,bj->bi", matrices, z)


def radius_of(matrices: Tensor) -> Tensor:
    return torch.linalg.eigvals(matrices.double()).abs().amax(dim=-1)


def norm_of(matrices: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrices.double())[..., 0]


def random_matrices(count: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, size, size, dtype=dtype) / size**0.5


def linearised(matrices: Tensor) -> tuple[Linearisation, Samples]:
    z = torch.zeros(matrices.shape[:2], dtype=matrices.dtype)
    return Linearisation(lambda state: each_its_matrix(state, matrices), z, ()), Samples(len(matrices))


def with_spectrum(real: Tensor, pairs: list[tuple[float, float]], skewed: float) -> Tensor:
    """A matrix with these real eigenvalues and complex pairs (modulus, angle), and eigenvectors that are not orthogonal."""
    blocks = [torch.diag(real)]
    for modulus, angle in pairs:
        c, s = modulus * math.cos(angle), modulus * math.sin(angle)
        blocks.append(torch.tensor([[c, -s], [s, c]], dtype=torch.float64))
    basis = torch.eye(len(real) + 2 * len(pairs), dtype=torch.float64)
    basis += skewed * torch.randn_like(basis)
    return basis @ torch.block_diag(*blocks) @ torch.linalg.inv(basis)


# ----------------------------------------------------------------------------------------------------- dense oracles


@pytest.mark.parametrize("size", [1, 2, 3, 12, 25])
def test_a_state_no_longer_than_the_krylov_space_gives_exact_answers(size: int) -> None:
    matrices = random_matrices(7, size)
    z = torch.zeros(7, size, dtype=torch.float64)
    radius, norm = spectral_radius(each_its_matrix, matrices, z), contraction(each_its_matrix, matrices, z)
    assert radius.shape == norm.shape == (7,) and radius.dtype == norm.dtype == torch.float64
    torch.testing.assert_close(radius, radius_of(matrices), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(norm, norm_of(matrices), rtol=1e-9, atol=1e-12)
    at, samples = linearised(matrices)
    for found in (spectral_radius_at(at, samples), norm_at(at, samples)):
        assert float(found.residual.max()) == 0.0 and found.products == size


def test_the_jacobian_is_taken_at_the_given_state() -> None:
    cell, x = TanhCell(width=6, norm=1.7), torch.randn(4, 3, dtype=torch.float64)
    z = torch.randn(4, 6, dtype=torch.float64)
    slopes = 1 - cell(z, x).detach().square()
    matrices = slopes[:, :, None] * cell.recurrent.weight.detach()
    torch.testing.assert_close(spectral_radius(cell, x, z), radius_of(matrices))
    torch.testing.assert_close(contraction(cell, x, z), norm_of(matrices))


@pytest.mark.parametrize("angle", [0.01, 0.7, math.pi / 2, 3.1])
def test_a_dominant_complex_pair_is_found(angle: float) -> None:
    """60 entries, 30 steps: the largest modulus belongs to a pair, which plain power iteration never settles on."""
    matrix = with_spectrum(torch.linspace(-0.6, 0.6, 56), [(0.95, angle), (0.7, 1.1)], skewed=0.05)[None]
    at, samples = linearised(matrix)
    found = spectral_radius_at(at, samples)
    assert found.products == 30
    assert float(found.value) == pytest.approx(0.95, rel=1e-6)
    assert 0.0 < float(found.residual) < 1e-5


def test_a_negative_eigenvalue_counts_by_its_modulus() -> None:
    matrix = with_spectrum(torch.tensor([-0.9, 0.5, 0.1], dtype=torch.float64), [], skewed=0.2)[None]
    assert float(spectral_radius(each_its_matrix, matrix, torch.zeros(1, 3).double())) == pytest.approx(0.9, rel=1e-9)


# -------------------------------------------------------------------------------------------------- how far to trust


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 40])
def test_the_norm_is_approached_from_below_and_its_residual_is_honest(steps: int) -> None:
    matrices = random_matrices(5, 60)
    at, samples = linearised(matrices)
    found = norm_at(at, samples, steps=steps)
    assert found.products == steps
    assert bool((found.value <= norm_of(matrices) * (1 + 1e-12)).all())
    away = (torch.linalg.svdvals(matrices) - found.value[:, None]).abs().amin(dim=1)
    assert bool((away <= found.residual + 1e-12).all()) and bool((found.residual > 0).all())
    if steps > 2:
        assert bool((found.value >= norm_at(at, samples, steps=steps - 2).value * (1 - 1e-12)).all())
    if steps >= 20:
        torch.testing.assert_close(found.value, norm_of(matrices), rtol=0.02, atol=0)


@pytest.mark.parametrize("steps", [3, 8, 16])
def test_the_residual_of_the_radius_is_a_backward_error(steps: int) -> None:
    """The real, positive dominant eigenvalue θ of a matrix that differs from J by the residual: σ_min(J - θ I)."""
    matrices = torch.stack([with_spectrum(torch.linspace(0.0, 1.0, 40).double() ** 3, [], 0.03) for _ in range(4)])
    at, samples = linearised(matrices)
    found = spectral_radius_at(at, samples, steps=steps)
    shifted = matrices - found.value[:, None, None] * torch.eye(40)
    smallest = torch.linalg.svdvals(shifted)[:, -1]
    assert bool((smallest <= found.residual * (1 + 1e-9) + 1e-13).all())
    # and it is about as large as what it bounds, not just large: the pair that it belongs to has this residual
    assert bool((found.residual <= norm_of(matrices)).all())
    if steps == 16:
        torch.testing.assert_close(found.value, radius_of(matrices), rtol=1e-4, atol=0)


def test_the_residual_is_that_of_the_krylov_pair() -> None:
    """By a second road: an orthonormal basis of the same space from a QR decomposition."""
    matrix = random_matrices(1, 30)
    at, samples = linearised(matrix)
    found = spectral_radius_at(at, samples, steps=6, seed=3)
    columns = [uniform(positions(at.z, samples), 3)[0]]
    for _ in range(5):
        columns.append(matrix[0] @ columns[-1])
    basis = torch.linalg.qr(torch.stack(columns, dim=1)).Q
    ritz, vectors = torch.linalg.eig(basis.T @ matrix[0] @ basis)
    best = int(ritz.abs().argmax())
    y = basis.to(ritz.dtype) @ vectors[:, best]
    residual = torch.linalg.vector_norm(matrix[0].to(ritz.dtype) @ y - ritz[best] * y) / torch.linalg.vector_norm(y)
    assert float(found.value) == pytest.approx(float(ritz[best].abs()), rel=1e-9)
    assert float(found.residual) == pytest.approx(float(residual), rel=1e-7)


def test_the_radius_is_the_rate_of_plain_iteration() -> None:
    cell, x = TanhCell(width=5, norm=0.9), torch.randn(6, 3, dtype=torch.float64)
    layer = FixedPoint(cell, options={"snes_rtol": 1e-14, "snes_atol": 1e-15})
    with torch.no_grad():
        z = layer(x)
        start = z + 1e-2 * torch.randn_like(z)
        early = torch.linalg.vector_norm(unrolled(cell, x, start, 20) - z, dim=1)
        late = torch.linalg.vector_norm(unrolled(cell, x, start, 60) - z, dim=1)
    rate = (late / early) ** (1 / 40)  # an average: a complex pair makes single steps uneven
    torch.testing.assert_close(spectral_radius(cell, x, z), rate, rtol=0.03, atol=0)
    assert bool((contraction(cell, x, z) >= spectral_radius(cell, x, z)).all())


def test_the_residual_of_the_norm_is_that_of_the_krylov_pair() -> None:
    matrix = random_matrices(1, 30)
    at, samples = linearised(0.01 * matrix)
    found = norm_at(at, samples, steps=4, seed=3)
    gram = matrix[0].T @ matrix[0]
    columns = [uniform(positions(at.z, samples), 3)[0]]
    for _ in range(3):
        columns.append(gram @ columns[-1])
    basis = torch.linalg.qr(torch.stack(columns, dim=1)).Q
    squares, vectors = torch.linalg.eigh(basis.T @ gram @ basis)
    y, value = basis @ vectors[:, -1], float(squares[-1].sqrt())
    assert float(found.value) == pytest.approx(0.01 * value, rel=1e-9)
    assert float(found.residual) == pytest.approx(0.01 * float((gram @ y - value**2 * y).norm()) / value, rel=1e-7)


def test_nearly_a_multiple_of_the_identity() -> None:
    """All but a hundred-millionth of each product lies in the space already: one orthogonalisation is not enough."""
    matrices = torch.eye(40).double() + 1e-8 * torch.randn(2, 40, 40, dtype=torch.float64)
    at, samples = linearised(matrices)
    for steps in (20, 40):
        torch.testing.assert_close(
            spectral_radius_at(at, samples, steps=steps).value, radius_of(matrices), rtol=1e-8, atol=0
        )
        torch.testing.assert_close(norm_at(at, samples, steps=steps).value, norm_of(matrices), rtol=1e-8, atol=0)


def test_samples_of_very_different_size_are_each_exact() -> None:
    matrices = random_matrices(4, 10) * torch.tensor([1.0, 1e-20, 1e12, 1e-3]).double()[:, None, None]
    at, samples = linearised(matrices)
    torch.testing.assert_close(spectral_radius_at(at, samples).value, radius_of(matrices), rtol=1e-9, atol=0)
    torch.testing.assert_close(norm_at(at, samples).value, norm_of(matrices), rtol=1e-9, atol=0)


def test_other_seeds_agree() -> None:
    matrices = random_matrices(3, 20)
    at, samples = linearised(matrices)
    for seed in (1, 2**31, -5):
        torch.testing.assert_close(spectral_radius_at(at, samples, seed=seed).value, radius_of(matrices))


# ------------------------------------------------------------------------------------------------- samples and shapes


def ragged(index: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """A dense matrix on all entries of a state ``(rows, columns)`` that couples those of the same sample only."""
    owner = index.repeat_interleave(columns)
    same = owner[:, None] == owner[None, :]
    return torch.randn(len(owner), len(owner), dtype=torch.float64) * same, owner


def test_samples_of_several_rows_have_their_own_spectra() -> None:
    index = torch.tensor([2, 0, 2, 4, 0, 2, 1])  # rows in no order; sample 3 has none
    matrix, owner = ragged(index, columns=3)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return (x @ z.flatten()).reshape(z.shape)

    z = torch.zeros(7, 3, dtype=torch.float64)
    radius = spectral_radius(cell, matrix, z, sample_index=lambda x: index)
    norm = contraction(cell, matrix, z, sample_index=lambda x: index)
    assert radius.shape == norm.shape == (5,)
    for i in range(5):
        block = matrix[owner == i][:, owner == i]
        if i == 3:
            assert float(radius[i]) == float(norm[i]) == 0.0
        else:
            torch.testing.assert_close(radius[i], radius_of(block), rtol=1e-8, atol=0)
            torch.testing.assert_close(norm[i], norm_of(block), rtol=1e-8, atol=0)


@pytest.mark.parametrize("steps", [4, 30])
def test_an_answer_does_not_depend_on_the_batch(steps: int) -> None:
    """To rounding also where the Krylov space is far from exhausted: the first vectors are the same."""
    cell = TanhCell(width=12, norm=1.2)
    x, z = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    for estimate in (spectral_radius, contraction):
        together = estimate(cell, x, z, steps=steps)
        alone = torch.cat([estimate(cell, x[i : i + 1], z[i : i + 1], steps=steps) for i in range(5)])
        backwards = estimate(cell, x.flip(0), z.flip(0), steps=steps).flip(0)
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=0)
        torch.testing.assert_close(together, backwards, rtol=1e-9, atol=0)


def test_an_answer_does_not_depend_on_the_batch_where_samples_have_several_rows() -> None:
    index = torch.tensor([1, 0, 1, 1, 0])
    matrix, owner = ragged(index, columns=4)
    at = Linearisation(lambda z: (matrix @ z.flatten()).reshape(z.shape), torch.zeros(5, 4, dtype=torch.float64), ())
    together = spectral_radius_at(at, Samples.of(at.z, index), steps=3).value
    for i in (0, 1):
        block = matrix[owner == i][:, owner == i]
        rows = int((index == i).sum())
        z = torch.zeros(rows, 4, dtype=torch.float64)
        own = Linearisation(lambda z, block=block: (block @ z.flatten()).reshape(z.shape), z, ())
        alone = spectral_radius_at(own, Samples.of(z, torch.zeros(rows, dtype=torch.int64)), steps=3).value
        torch.testing.assert_close(together[i], alone[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (3, 2, 2)])
def test_states_of_any_shape(shape: tuple[int, ...]) -> None:
    """Up to one dimension the state is one sample, as everywhere in hpcdeq."""
    samples = shape[0] if len(shape) > 1 else 1
    each = math.prod(shape) // samples
    matrices = random_matrices(samples, each)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return each_its_matrix(z.reshape(samples, each), x).reshape(z.shape)

    z = torch.zeros(shape, dtype=torch.float64)
    torch.testing.assert_close(spectral_radius(cell, matrices, z), radius_of(matrices))
    torch.testing.assert_close(contraction(cell, matrices, z), norm_of(matrices))


def test_a_flat_state_of_many_samples() -> None:
    index = torch.tensor([0, 1, 1])
    slopes = torch.tensor([0.5, -0.25, 0.1], dtype=torch.float64)
    found = spectral_radius(lambda z, x: x * z, slopes, torch.zeros(3).double(), sample_index=lambda x: index)
    assert found.tolist() == pytest.approx([0.5, 0.25])


def test_single_precision() -> None:
    matrices = random_matrices(4, 15, torch.float32)
    z = torch.zeros(4, 15)
    torch.testing.assert_close(spectral_radius(each_its_matrix, matrices, z), radius_of(matrices), rtol=1e-4, atol=0)
    torch.testing.assert_close(contraction(each_its_matrix, matrices, z), norm_of(matrices), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("matrix", "radius", "norm"),
    [
        (torch.zeros(40, 40), 0.0, 0.0),
        (0.5 * torch.eye(40), 0.5, 0.5),
        (torch.diag(torch.arange(40) % 3 - 1.0), 1.0, 1.0),
        (0.75 * torch.ones(40, 40).double() / 40, 0.75, 0.75),
    ],
)
def test_a_krylov_space_that_ends_early(matrix: Tensor, radius: float, norm: float) -> None:
    """One sample's space ends after a few steps, the other's goes on."""
    other = random_matrices(1, 40)
    matrices = torch.cat([matrix.double()[None], other])
    at, samples = linearised(matrices)
    radii, norms = spectral_radius_at(at, samples, steps=40), norm_at(at, samples, steps=40)
    assert float(radii.value[0]) == pytest.approx(radius, abs=1e-12) and float(radii.residual[0]) == 0.0
    assert float(norms.value[0]) == pytest.approx(norm, abs=1e-12) and float(norms.residual[0]) == 0.0
    torch.testing.assert_close(radii.value[1:], radius_of(other), rtol=1e-8, atol=0)
    torch.testing.assert_close(norms.value[1:], norm_of(other), rtol=1e-8, atol=0)


def test_a_batch_without_samples() -> None:
    nothing = torch.zeros(0, 4, dtype=torch.float64)
    assert spectral_radius(each_its_matrix, torch.zeros(0, 4, 4).double(), nothing).shape == (0,)
    assert contraction(each_its_matrix, torch.zeros(0, 4, 4).double(), nothing).shape == (0,)


def test_a_cell_that_ignores_its_state_has_no_spectrum_but_zero() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    assert spectral_radius(lambda z, x: x, x, torch.zeros_like(x)).tolist() == [0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_jacobian_that_is_not_finite_is_refused_with_the_sample() -> None:
    matrices = random_matrices(3, 4)
    matrices[1, 2, 3] = float("nan")
    with pytest.raises(ConvergenceError, match="^the Jacobian of sample 1 has entries that are not finite"):
        spectral_radius(each_its_matrix, matrices, torch.zeros(3, 4, dtype=torch.float64))


def test_no_steps_are_refused() -> None:
    with pytest.raises(OptionError, match="^steps is 0: give 1 or more$"):
        contraction(each_its_matrix, random_matrices(1, 2), torch.zeros(1, 2).double(), steps=0)
