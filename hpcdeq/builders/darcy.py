"""Darcy flow, ``-div(k grad u) = F`` on the unit square, ``u = 0`` on its boundary: log-permeability to pressure.

The problem of Li et al. (Fourier Neural Operator, arXiv 2010.08895) with a smooth permeability, ``log k`` a random field
of few modes, or with theirs of two values. The finite volumes (see `hpcdeq.builders.diffusion`) are finer than the cells
of input and target; with the defaults the error is about 1e-3. The input determines the target: what lies between the
centres of its cells follows from the modes, or is constant in each cell where k has two values.
"""

from __future__ import annotations

import math

import numpy as np

from hpcdeq.builders.diffusion import FiniteVolumes, at_centres, refinement
from hpcdeq.builders.family import FieldFamily, centres, names_on_square
from hpcdeq.builders.field_settings import Darcy
from hpcdeq.builders.random_fields import square_field
from hpcdeq.errors import ConvergenceError, DataError
from hpcdeq.petsc.sparse import SparseSystem

PERMEABILITIES = 12.0, 3.0  # of --binary, as in arXiv 2010.08895: where the field is positive, and elsewhere
FINE_CELLS = 64  # least number of the solver's cells in each direction
JUMP = 0.5  # largest change of log k from one of them to the next, of a smooth field that counts as resolved


class DarcySolver:
    """Solve for the pressure on n x n cells, for one permeability after the other. Not collective.

    Parameters
    ----------
    cells
        n.
    """

    def __init__(self, cells: int) -> None:
        self.volumes = FiniteVolumes(cells)
        self.system = SparseSystem(self.volumes.offsets, self.volumes.columns, "darcy_")

    def solve(self, permeability: np.ndarray, source: np.ndarray | float = 1.0) -> np.ndarray:
        """Return the pressure ``(n, n)``.

        Not collective.

        Parameters
        ----------
        permeability, source
            ``(n, n)`` k, and the right-hand side, at the cells' centres.

        Raises
        ------
        ConvergenceError
            The linear solve failed.
        """
        n = self.volumes.cells
        inflow = np.broadcast_to(np.asarray(source, float) / n**2, (n, n)).ravel()
        return self.system.solve(self.volumes.entries(permeability), inflow)[0].reshape(n, n)


def log_permeability(indices: np.ndarray, settings: Darcy, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``log k``.

    Not collective.

    Returns
    -------
    tuple
        ``(b, points, points)`` for the file, and ``(b, fine, fine)`` for the solver.

    Raises
    ------
    DataError
        A smooth field changes too much from one cell to the next.
    """
    n = settings.points
    division = refinement(n, FINE_CELLS)
    if settings.binary:
        high, low = PERMEABILITIES
        field = np.where(square_field(indices, n, seed, settings.modes) >= 0, math.log(high), math.log(low))
        return field, field.repeat(division, axis=1).repeat(division, axis=2)
    field = settings.variation * square_field(indices, n, seed, settings.modes)
    fine = settings.variation * square_field(indices, division * n, seed, settings.modes)
    jump = max(float(np.abs(np.diff(fine, axis=axis)).max(initial=0.0)) for axis in (1, 2))
    if not jump <= JUMP:
        raise DataError(
            f"Darcy on {division * n} x {division * n} cells is not resolved: log k changes by {jump:.2g} from a cell to"
            f" the next (at most {JUMP:g}); raise --points, or lower --modes or --variation {settings.variation:g}"
        )
    return field, fine


def darcy_family(settings: Darcy, seed: int) -> FieldFamily:
    """Return the samples of a seed and their description. Not collective."""
    n = settings.points
    division = refinement(n, FINE_CELLS)
    solver = DarcySolver(division * n)

    def sample(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        field, fine = log_permeability(indices, settings, seed)
        pressure = np.empty((len(indices), n * n))
        for row, index in enumerate(indices):
            try:
                pressure[row] = at_centres(solver.solve(np.exp(fine[row]), settings.source), division).ravel()
            except ConvergenceError as error:
                raise DataError(f"Darcy, sample {index}: {error}; lower --variation {settings.variation:g}") from error
        return field, pressure

    values = "k = 12 or 3" if settings.binary else f"log k of deviation {settings.variation:g}"
    return FieldFamily(
        f"Darcy flow -div(k grad u) = {settings.source:g} on the unit square, {values} with {settings.modes} x"
        f" {settings.modes} modes,"
        f" {division * n} x {division * n} finite volumes, seed {seed}",
        sample,
        (n, n),
        names_on_square("u", n),
        {"grid": centres(n), "axes": "x, y", "quantity": "log k", "target_grid": centres(n), "target_axes": "x, y"},
    )
