"""Solvers of differential equations against exact solutions and against second methods, with their orders."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from test_fields import cosine_sum

from hpcdeq.builders.advection import advection_samples, departure_points
from hpcdeq.builders.darcy import DarcySolver
from hpcdeq.builders.diffusion import FiniteVolumes, at_centres, refinement
from hpcdeq.builders.field_settings import Advection, Darcy, Reaction
from hpcdeq.builders.fields import family_of
from hpcdeq.builders.random_fields import periodic_field
from hpcdeq.builders.reaction import ReactionSolver
from hpcdeq.errors import DataError

PI = np.pi
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def runge_kutta(speed: np.ndarray, time: float, steps: int) -> np.ndarray:
    """Integrate u_t + a u_x = 0 from sin 2 pi x, pseudo-spectrally on the points of ``speed`` ``(b, m)``."""
    m = speed.shape[1]
    wave = 2j * PI * np.arange(m // 2 + 1)
    wave[-1] = 0

    def change(u: np.ndarray) -> np.ndarray:
        return -time / steps * speed * np.fft.irfft(wave * np.fft.rfft(u), m)

    u = np.broadcast_to(np.sin(2 * PI * np.arange(m) / m), speed.shape)
    for _ in range(steps):
        first = change(u)
        second = change(u + first / 2)
        third = change(u + second / 2)
        u = u + (first + 2 * second + 2 * third + change(u + third)) / 6
    return u


def test_advection_equals_a_spectral_method() -> None:
    """Compare with Runge-Kutta in time on 256 points, which comes nearer with its fourth power."""
    indices = np.arange(8)
    speed, solution = advection_samples(indices, Advection(points=64), seed=1)
    logs = periodic_field(indices, 256, 1, 5)
    scale = 0.3 / np.sqrt(2 * (1 / ((2 * PI * np.arange(1, 6)) ** 2 / 25 + 1) ** 2).sum())
    fine = np.exp(scale * logs)
    assert np.allclose(fine[:, ::4], speed, rtol=1e-13)
    assert speed.min() < 0.8 and speed.max() > 1.25
    errors = [np.abs(runge_kutta(fine, 0.5, steps)[:, ::4] - solution).max() for steps in (800, 1600)]
    assert errors[1] < 1e-8
    assert 14 < errors[0] / errors[1] < 18, errors


@pytest.mark.parametrize("time", [0.3, 2.7])
def test_characteristics_of_a_known_travel_time(time: float) -> None:
    """Check tau(X) = tau(x) - T in closed form, for 1 / a = c (1 + e cos 2 pi x), past more than one period too."""
    scale, strength = np.array([[1.3], [0.7], [1.0]]), np.array([[0.5], [-0.8], [0.0]])
    grid = np.arange(256) / 256

    def travel_time(x: np.ndarray) -> np.ndarray:
        return scale * (x + strength * np.sin(2 * PI * x) / (2 * PI))

    start = departure_points(scale * (1 + strength * np.cos(2 * PI * grid)), time, 20)
    arrival = np.arange(20) / 20
    assert np.abs(travel_time(start) - travel_time(arrival) + time).max() < 1e-14 * 20
    assert np.allclose(start[2], arrival - time, atol=1e-14)
    assert (np.diff(start, axis=1) > 0).all()


def test_incomplete_series_are_refused() -> None:
    """Refuse a slowness with a kink, whose series decays slowly, and one that is not finite."""
    grid = np.arange(256) / 256
    for wrong in (1 + np.abs(grid - 0.5), np.full(256, np.inf)):
        with np.errstate(invalid="ignore"), pytest.raises(DataError, match="not complete: its last modes hold"):
            departure_points(wrong[None], 0.5, 16)


def orders(errors: list[float]) -> np.ndarray:
    """Return the orders that errors fall with, the grid refined twice each time."""
    return np.log2(np.array(errors[:-1]) / errors[1:])


def centres(cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x ``(n, 1)`` and y ``(1, n)`` of the centres of n x n cells."""
    grid = (np.arange(cells) + 0.5) / cells
    return grid[:, None], grid[None, :]


def manufactured(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return u, k and -div(k grad u) for u = sin pi x sin 2 pi y, k = exp(sin(3 x) cos(2 y) + x / 2)."""
    u = np.sin(PI * x) * np.sin(2 * PI * y)
    k = np.exp(np.sin(3 * x) * np.cos(2 * y) + x / 2)
    k_x, k_y = k * (3 * np.cos(3 * x) * np.cos(2 * y) + 0.5), -2 * k * np.sin(3 * x) * np.sin(2 * y)
    u_x, u_y = PI * np.cos(PI * x) * np.sin(2 * PI * y), 2 * PI * np.sin(PI * x) * np.cos(2 * PI * y)
    return u, k, 5 * PI**2 * k * u - k_x * u_x - k_y * u_y


def test_darcy_is_of_second_order_for_variable_permeability() -> None:
    """Solve for a manufactured solution on 16 to 128 cells in each direction."""
    errors = []
    for cells in (16, 32, 64, 128):
        u, k, source = manufactured(*centres(cells))
        errors.append(float(np.abs(DarcySolver(cells).solve(k, source) - u).max()))
    assert np.all(np.abs(orders(errors) - 2) < 0.1), (errors, orders(errors))
    assert errors[-1] < 1e-3


def test_darcy_is_of_second_order_where_permeability_jumps() -> None:
    """Let k jump by a factor of 100 between cells: u = sin 2 pi x sin pi y / k has a continuous flux."""
    errors = []
    for cells in (16, 32, 64):
        x, y = centres(cells)
        k = np.where(x < 0.5, 1.0, 100.0) + 0 * y
        u = np.sin(2 * PI * x) * np.sin(PI * y) / k
        found = DarcySolver(cells).solve(k, 5 * PI**2 * k * u)
        errors.append(float(np.abs((found - u) * k).max()))
    assert np.all(np.abs(orders(errors) - 2) < 0.1), (errors, orders(errors))


def test_constant_permeability_equals_the_fourier_series() -> None:
    """Compare k = 2 with the series of -laplacian u = 1/2, 0.5 * 0.0736713 in the middle of the square."""
    x, y = centres(75)
    odd = np.arange(1, 200, 2)
    along_x, along_y = np.sin(PI * odd[:, None] * x.T), np.sin(PI * odd[:, None] * y)
    squares = odd[:, None] ** 2 + odd[None, :] ** 2
    exact = 0.5 * along_x.T @ (16 / (PI**4 * odd[:, None] * odd[None, :] * squares)) @ along_y
    assert abs(exact[37, 37] - 0.5 * 0.0736713) < 1e-7
    assert np.abs(DarcySolver(75).solve(np.full((75, 75), 2.0)) - exact).max() < 2e-5  # h^2 / 16


def test_finite_volumes_balance_cell_by_cell() -> None:
    """Compare the matrix with fluxes summed over the faces of each cell in turn; it is symmetric and definite."""
    n = 5
    k = np.exp(np.random.default_rng(0).standard_normal((n, n)))
    volumes = FiniteVolumes(n)
    matrix = np.zeros((n * n, n * n))
    rows = np.repeat(np.arange(n * n), np.diff(volumes.offsets))
    assert all(
        (np.diff(volumes.columns[a:b]) > 0).all() for a, b in zip(volumes.offsets, volumes.offsets[1:], strict=False)
    )
    matrix[rows, volumes.columns] = volumes.entries(k)
    assert np.array_equal(matrix, matrix.T) and np.linalg.eigvalsh(matrix).min() > 0
    u = np.random.default_rng(1).standard_normal((n, n))
    outflow = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            for di, dj in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                a, b = i + di, j + dj
                if 0 <= a < n and 0 <= b < n:
                    # Two half cells in series between the centres.
                    outflow[i, j] += (u[i, j] - u[a, b]) / (0.5 / k[i, j] + 0.5 / k[a, b])
                else:
                    outflow[i, j] += u[i, j] / (0.5 / k[i, j])
    assert np.allclose(matrix @ u.ravel(), outflow.ravel(), rtol=1e-13)


@pytest.mark.parametrize(
    ("cells", "least", "number"), [(24, 64, 3), (10, 48, 5), (64, 64, 1), (32, 64, 3), (5, 48, 11)]
)
def test_refinement_keeps_the_centres(cells: int, least: int, number: int) -> None:
    assert refinement(cells, least) == number
    fine = np.broadcast_to(centres(cells * number)[0], (cells * number,) * 2)
    assert np.allclose(at_centres(fine, number), np.broadcast_to(centres(cells)[0], (cells, cells)), rtol=1e-14)


def test_reaction_is_of_second_order() -> None:
    """Solve -div(k grad u) + r u^3 = f for a manufactured solution on 16 to 128 cells in each direction."""
    errors = []
    for cells in (16, 32, 64, 128):
        u, k, source = manufactured(*centres(cells))
        found = ReactionSolver(cells).solve(k, 20.0, source + 20 * u**3)
        errors.append(float(np.abs(found - u).max()))
    assert np.all(np.abs(orders(errors) - 2) < 0.1), (errors, orders(errors))
    assert errors[-1] < 1e-3


def test_reaction_balances_cell_by_cell() -> None:
    """Put the solution of a strong reaction into the discrete equations, with a dense matrix."""
    u, k, source = manufactured(*centres(16))
    solver = ReactionSolver(16)
    found = solver.solve(k, 500.0, source)
    matrix = np.zeros((256, 256))
    rows = np.repeat(np.arange(256), np.diff(solver.volumes.offsets))
    matrix[rows, solver.volumes.columns] = solver.volumes.entries(k)
    diffusion, reaction = 256 * (matrix @ found.ravel()).reshape(16, 16), 500 * found**3
    assert np.abs(diffusion + reaction - source).max() < 1e-8 * np.abs(source).max()
    assert min(np.abs(diffusion).max(), np.abs(reaction).max()) > 0.2 * np.abs(source).max()
    assert np.abs(found - u).max() > 0.1
    assert solver.system.snes.getIterationNumber() <= 7  # quadratic at the end: the Jacobian is the right one


def nodal(k: Field, ratio: float, source: Field, intervals: int) -> np.ndarray:
    """Solve -div(k grad u) + ratio k u^3 = source on the nodes inside the square, with dense matrices.

    A second discretisation: unknowns at nodes that include the boundary, k at midpoints between them.
    """
    m, h = intervals - 1, 1 / intervals
    x, y = (np.arange(1, intervals) * h)[:, None], (np.arange(1, intervals) * h)[None, :]
    matrix = np.zeros((m, m, m, m))
    i, j = np.indices((m, m))
    for di, dj in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        weight = k(x + di * h / 2 + 0 * y, y + dj * h / 2 + 0 * x) / h**2
        matrix[i, j, i, j] += weight
        inside = (i + di >= 0) & (i + di < m) & (j + dj >= 0) & (j + dj < m)
        matrix[i[inside], j[inside], i[inside] + di, j[inside] + dj] -= weight[inside]
    flat, b = matrix.reshape(m * m, m * m), source(x, y).ravel()
    rate = (ratio * k(x + 0 * y, y + 0 * x)).ravel()
    u = np.zeros(m * m)
    for _ in range(30 if ratio else 1):
        step = np.linalg.solve(flat + np.diag(3 * rate * u**2), flat @ u + rate * u**3 - b)
        u -= step
        if np.abs(step).max() < 1e-10 * np.abs(u).max():
            break
    return u.reshape(m, m)


def test_darcy_samples_equal_a_second_discretisation() -> None:
    """Solve for two samples on 48 x 48 nodal intervals, log k summed mode by mode."""
    family = family_of(Darcy(points=8, source=1.0), 6)
    inputs, targets = family.sample(np.array([2, 5]))
    for row, number in enumerate((2, 5)):
        assert np.allclose(cosine_sum(number, 6, 4, *centres(8)), inputs[row], atol=1e-13)
        second = nodal(lambda x, y, i=number: np.exp(cosine_sum(i, 6, 4, x, y)), 0.0, lambda x, y: 1 + 0 * x * y, 48)
        first = targets[row].reshape(8, 8)
        assert np.abs(second[2::6, 2::6] - first).max() < 5e-3 * first.max()
        assert not np.allclose(first, first.T, rtol=0.05)  # x and y are told apart


def test_binary_darcy_has_one_permeability_a_cell() -> None:
    """Compare with finite volumes on the file's own cells, five times finer each."""
    inputs, targets = family_of(Darcy(points=8, binary=True, source=1.0), 6).sample(np.array([2]))
    sign = cosine_sum(2, 6, 4, *centres(8)) >= 0
    assert np.array_equal(np.exp(inputs[0]).round(12), np.where(sign, 12.0, 3.0)) and 0 < sign.mean() < 1
    fine = DarcySolver(120).solve(np.kron(np.exp(inputs[0]), np.ones((15, 15))))
    assert np.abs(at_centres(fine, 15) - targets[0].reshape(8, 8)).max() < 5e-3 * fine.max()


def test_reaction_samples_equal_a_second_discretisation() -> None:
    """Turn the inputs into coefficients by hand, and solve on 40 x 40 nodal intervals."""
    inputs, targets = family_of(Reaction(points=4, reaction=30.0), 1).sample(np.array([3, 4]))
    assert inputs.shape == (2, 8) and np.abs(inputs).max() < 1
    for unit, found in zip((inputs + 1) / 2, targets, strict=True):
        diffusion, ratio = 0.5 * 4 ** unit[0], 3 * 10 ** unit[1]
        places = [(10 + 40 * q, 0.2 + 0.6 * a, 0.2 + 0.6 * b) for q, a, b in (unit[2:5], unit[5:8])]

        def source(x: np.ndarray, y: np.ndarray, places: list[tuple[float, float, float]] = places) -> np.ndarray:
            return sum(q * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 0.15**2)) for q, a, b in places)  # type: ignore[return-value]

        second = nodal(lambda x, y, d=diffusion: d + 0 * x * y, ratio, source, 40)
        linear = nodal(lambda x, y, d=diffusion: d + 0 * x * y, 0.0, source, 40)
        first = found.reshape(4, 4)
        assert np.abs(second[4::10, 4::10] - first).max() < 5e-3 * first.max()
        assert np.abs(linear[4::10, 4::10] - first).max() > 0.1 * first.max()  # the reaction matters
