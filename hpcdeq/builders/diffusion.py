"""Finite volumes for ``-div(k grad u)`` on the unit square, ``u = 0`` on its boundary.

Cell-centred, on n x n cells: the flux through a face is the difference of the two cells' values times the harmonic mean
of their k, which is exact where k jumps at the face (Patankar, Numerical Heat Transfer and Fluid Flow, section 4.2-3);
half a cell separates the outermost centres from the boundary. Second order in u for smooth k.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def refinement(cells: int, least: int) -> int:
    """Return the smallest odd number by which n x n cells are to be divided to have ``least`` cells in each direction.

    Not collective. Odd, so that the centre of a cell is the centre of a fine one: `at_centres` takes the values there.
    """
    number = -(-least // cells)
    return number + 1 - number % 2


def at_centres(fine: np.ndarray, division: int) -> np.ndarray:
    """Return the values ``(n, n)`` at the centres of cells from those of the fine ones. Not collective."""
    return fine[division // 2 :: division, division // 2 :: division]


@dataclass(frozen=True)
class FiniteVolumes:
    """The equations of n x n cells, in the order of the cells' rows; each is integrated over its cell.

    Attributes
    ----------
    cells
        n.
    offsets, columns
        The sparsity pattern by compressed rows.
    present
        ``(n * n, 5)``: which of south (x), west (y), self, east (y) and north (x) a cell has; x runs along the rows' index.
    """

    cells: int
    offsets: np.ndarray = field(init=False)
    columns: np.ndarray = field(init=False)
    present: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n = self.cells
        number = np.arange(n * n).reshape(n, n)
        neighbours = np.full((n, n, 5), -1)
        neighbours[1:, :, 0] = number[:-1]
        neighbours[:, 1:, 1] = number[:, :-1]
        neighbours[:, :, 2] = number
        neighbours[:, :-1, 3] = number[:, 1:]
        neighbours[:-1, :, 4] = number[1:]
        flat = neighbours.reshape(-1, 5)
        present = flat >= 0
        object.__setattr__(self, "present", present)
        object.__setattr__(self, "offsets", np.concatenate([[0], np.cumsum(present.sum(axis=1))]))
        object.__setattr__(self, "columns", flat[present])

    def entries(self, k: np.ndarray) -> np.ndarray:
        """Return the matrix's entries ``(entries,)``, in the order of the pattern.

        Not collective.

        Parameters
        ----------
        k
            ``(n, n)`` diffusion coefficient of the cells, above 0.
        """
        n = self.cells
        along_x = 2 * k[1:] * k[:-1] / (k[1:] + k[:-1])
        along_y = 2 * k[:, 1:] * k[:, :-1] / (k[:, 1:] + k[:, :-1])
        stencil = np.zeros((n, n, 5))
        stencil[1:, :, 0] = -along_x
        stencil[:, 1:, 1] = -along_y
        stencil[:, :-1, 3] = -along_y
        stencil[:-1, :, 4] = -along_x
        own = -stencil.sum(axis=2)
        for side in (np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]):
            own[side] += 2 * k[side]
        stencil[:, :, 2] = own
        return stencil.reshape(-1, 5)[self.present]
