"""Reaction and diffusion with sources, ``-D laplacian(u) + r u^3 = f`` on the unit square, ``u = 0`` on its boundary.

A few parameters determine the field: ``log D`` and ``log(r / D)``, and of each source, a Gaussian, its strength and place.
All enter the solution nonlinearly but for the strengths at small r. The reaction grows with u, so that there is one
solution for all parameters. Finite volumes (see `hpcdeq.builders.diffusion`) and Newton's method; with the defaults the
error is below 1e-3 of the largest value.
"""

from __future__ import annotations

import math

import numpy as np

from hpcdeq.builders.diffusion import FiniteVolumes, at_centres, refinement
from hpcdeq.builders.family import FieldFamily, centres, names_on_square
from hpcdeq.builders.field_settings import Reaction
from hpcdeq.builders.random_fields import uniform_draws
from hpcdeq.errors import ConvergenceError, DataError
from hpcdeq.petsc.sparse import SparseSystem

FINE_CELLS = 48  # least number of the solver's cells in each direction
DIFFUSION = 0.5, 2.0  # range of D
STRENGTH = 10.0, 50.0  # range of a source's peak
PLACE = 0.2, 0.8  # range of a source's x and y
WIDTH = 0.15  # standard deviation of a source
LAYER = 1.0  # least cells in the length over which reaction balances diffusion, of a field that counts as resolved


class ReactionSolver:
    """Solve for the field on n x n cells, for one set of coefficients after the other. Not collective.

    Parameters
    ----------
    cells
        n.
    """

    def __init__(self, cells: int) -> None:
        self.volumes = FiniteVolumes(cells)
        self.system = SparseSystem(self.volumes.offsets, self.volumes.columns, "reaction_")

    def solve(self, diffusion: np.ndarray | float, rate: float, source: np.ndarray) -> np.ndarray:
        """Return the field ``(n, n)``.

        Not collective.

        Parameters
        ----------
        diffusion
            D, ``(n, n)`` or the same everywhere.
        rate
            r, at least 0.
        source
            ``(n, n)`` f at the cells' centres.

        Raises
        ------
        ConvergenceError
            Newton's method failed.
        """
        n = self.volumes.cells
        entries = self.volumes.entries(np.broadcast_to(np.asarray(diffusion, float), (n, n)))
        area = 1 / n**2

        def reaction(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return area * rate * u**3, 3 * area * rate * u**2

        return self.system.solve(entries, area * source.ravel(), reaction)[0].reshape(n, n)


def parameter_ranges(settings: Reaction) -> dict[str, tuple[float, float]]:
    """Return the names of the parameters and their ranges, in the order of the input. Not collective."""
    log_rates = math.log(settings.reaction / 10), math.log(settings.reaction)
    ranges = {"log D": (math.log(DIFFUSION[0]), math.log(DIFFUSION[1])), "log(r / D)": log_rates}
    for number in range(1, settings.sources + 1):
        ranges |= {f"strength {number}": STRENGTH, f"x {number}": PLACE, f"y {number}": PLACE}
    return ranges


def sources(strength: np.ndarray, x: np.ndarray, y: np.ndarray, cells: int) -> np.ndarray:
    """Return the sum of Gaussian sources at the centres of n x n cells.

    Not collective.

    Parameters
    ----------
    strength, x, y
        ``(J,)`` peaks and places.
    cells
        n.
    """
    grid = centres(cells)
    along_x = np.exp(-((grid - x[:, None]) ** 2) / (2 * WIDTH**2))
    along_y = np.exp(-((grid - y[:, None]) ** 2) / (2 * WIDTH**2))
    return np.einsum("j,jx,jy->xy", strength, along_x, along_y)


def reaction_family(settings: Reaction, seed: int) -> FieldFamily:
    """Return the samples of a seed and their description. Not collective."""
    n = settings.points
    division = refinement(n, FINE_CELLS)
    fine = division * n
    solver = ReactionSolver(fine)
    ranges = parameter_ranges(settings)
    low, high = np.array(list(ranges.values())).T

    def sample(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs = uniform_draws(indices, seed, len(ranges))
        found = np.empty((len(indices), n * n))
        for row, index in enumerate(indices):
            physical = (low + high) / 2 + (high - low) / 2 * inputs[row]
            diffusion, ratio = np.exp(physical[:2])
            strength, x, y = physical[2:].reshape(-1, 3).T
            source = sources(strength, x, y, fine)
            try:
                field = solver.solve(diffusion, ratio * diffusion, source)
            except ConvergenceError as error:
                raise DataError(
                    f"reaction-diffusion, sample {index}: {error}; lower --reaction {settings.reaction:g}"
                ) from error
            _refuse_thin_layers(field, ratio, settings)
            found[row] = at_centres(field, division).ravel()
        return inputs, found

    return FieldFamily(
        f"reaction-diffusion -D laplacian(u) + r u^3 = f on the unit square, r / D up to {settings.reaction:g},"
        f" {settings.sources} sources of width {WIDTH:g}, {fine} x {fine} finite volumes, seed {seed}",
        sample,
        (len(ranges),),
        names_on_square("u", n),
        {
            "quantity": "parameters, scaled to -1 ... 1",
            "parameters": list(ranges),
            "low": low,
            "high": high,
            "target_grid": centres(n),
            "target_axes": "x, y",
        },
    )


def _refuse_thin_layers(field: np.ndarray, ratio: float, settings: Reaction) -> None:
    """Refuse a field whose reaction, 3 r u^2 once linearised, balances diffusion over less than `LAYER` cells."""
    steepest = 3 * ratio * float(np.abs(field).max()) ** 2
    cells = len(field) / math.sqrt(steepest) if steepest > 0 else math.inf
    if not cells >= LAYER:
        raise DataError(
            f"reaction-diffusion on {len(field)} x {len(field)} cells is not resolved: reaction balances diffusion within"
            f" {cells:.2g} cells (at least {LAYER:g}); raise --points or lower --reaction {settings.reaction:g}"
        )
