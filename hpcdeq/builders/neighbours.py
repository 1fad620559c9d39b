"""The graph of a periodic structure: each atom and its nearest neighbours over all images."""

from __future__ import annotations

import math

import numpy as np

from hpcdeq.data.graphs import GraphArrays

SAME_DISTANCE = 1e-8  # Å, distances that round alike are ties, broken by atom and image
OVERLAP = 0.1  # Å, no two atoms are that near: the longest that is surely an error, half the least real distance
GROWTH = 1.3
ATTEMPTS = 24  # 1.3^24 = 540 times the first radius


def neighbours_of(
    lattice: np.ndarray,
    atomic_number: np.ndarray,
    frac: np.ndarray,
    neighbours: int,
    radius: float = 0.0,
    least_distance: float = OVERLAP,
) -> GraphArrays:
    """Find the neighbours of each atom of a periodic structure.

    Not collective. Edges are grouped by atom, ordered by distance, then by the neighbour's number, then by its image: the
    same on every machine, also where a shell is cut.

    Parameters
    ----------
    lattice
        ``(3, 3)`` Å, one lattice vector a row.
    atomic_number
        ``(n,)``.
    frac
        ``(n, 3)``, inside or outside of the cell.
    neighbours
        How many an atom, the nearest; 0: all within the radius.
    radius
        Å: none is farther away, so that an atom may have fewer, or none; 0: every atom has them all.
    least_distance
        Å: of two atoms.

    Raises
    ------
    ValueError
        Two atoms overlap, or the neighbours are too far away to be found.
    """
    positions = np.ascontiguousarray(np.asarray(frac, float) @ lattice)
    atoms = len(positions)
    shortest = float(np.linalg.norm(lattice, axis=1).min())
    if shortest < least_distance:  # before the search, which would list thousands of images
        raise ValueError(f"a lattice vector of {shortest:.3g} A: atoms overlap with their own images")
    if radius > 0:
        target, source, image, distance = _within(lattice, positions, radius)
    else:
        target, source, image, distance = _at_least(lattice, positions, neighbours)
    if distance.size and distance.min() < least_distance:
        pair = int(np.argmin(distance))
        raise ValueError(f"atoms {target[pair]} and {source[pair]} are {distance[pair]:.3g} A apart: they overlap")
    order = _nearest_first(target, source, image, distance, neighbours)
    target, source = target[order], source[order]
    vector = positions[source] + image[order] @ lattice - positions[target]
    return GraphArrays(
        np.array([0, atoms]),
        np.asarray(atomic_number, np.uint8),
        np.array([0, order.size]),
        source.astype(np.int32),
        target.astype(np.int32),
        vector,
    )


def nearest_of(
    lattice: np.ndarray, positions: np.ndarray, centres: np.ndarray, neighbours: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the atoms that are nearest to points of the cell.

    Not collective.

    Parameters
    ----------
    lattice, positions, centres
        ``(3, 3)``, ``(n, 3)`` and ``(c, 3)`` Å.
    neighbours
        How many a point.

    Returns
    -------
    tuple
        ``(c * neighbours,)`` points, ``(c * neighbours,)`` atoms, ``(c * neighbours, 3)`` Å from one to the other; by point,
        nearest first.
    """
    target, source, image, distance = _at_least(lattice, positions, neighbours, centres)
    order = _nearest_first(target, source, image, distance, neighbours)
    target, source = target[order], source[order]
    return target, source, positions[source] + image[order] @ lattice - centres[target]


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # point, neighbour, its image, distance


def _nearest_first(
    target: np.ndarray, source: np.ndarray, image: np.ndarray, distance: np.ndarray, neighbours: int
) -> np.ndarray:
    """Return the numbers of the nearest pairs of each point (0: of all), by point and distance, ties by atom and image."""
    rounded = np.rint(distance / SAME_DISTANCE)
    order = np.lexsort((image[:, 2], image[:, 1], image[:, 0], source, rounded, target))
    if not neighbours:
        return order
    first = np.searchsorted(target[order], np.arange(target.max(initial=-1) + 1))
    return order[np.arange(order.size) - first[target[order]] < neighbours]


def _at_least(lattice: np.ndarray, positions: np.ndarray, neighbours: int, centres: np.ndarray | None = None) -> Pairs:
    """Return so many neighbours of every atom, or of other points, or more, the nearest among them."""
    atoms, points = len(positions), len(positions if centres is None else centres)
    volume = abs(float(np.linalg.det(lattice)))
    # A uniform crystal has neighbours + 1 points in this sphere on average, the central one included.
    radius = 1.1 * math.cbrt(3 * (neighbours + 1) * volume / (4 * math.pi * atoms)) + 0.5
    for _ in range(ATTEMPTS):
        found = _within(lattice, positions, radius, centres)
        # Ties at the rim may be found in part only, so the last neighbour has to be clear of it.
        clear = found[3] <= radius - 2 * SAME_DISTANCE
        if np.bincount(found[0][clear], minlength=points).min() >= neighbours:
            return found[0][clear], found[1][clear], found[2][clear], found[3][clear]
        radius *= GROWTH
    raise ValueError(f"an atom or void has fewer than {neighbours} neighbours within {radius / GROWTH:.3g} A")


def _within(lattice: np.ndarray, positions: np.ndarray, radius: float, centres: np.ndarray | None = None) -> Pairs:
    """Return all neighbours within a radius, of every atom or of other points."""
    from pymatgen.optimization.neighbors import find_points_in_spheres

    target, source, image, distance = find_points_in_spheres(
        positions,
        positions if centres is None else np.ascontiguousarray(centres),
        r=radius,
        pbc=np.ones(3, np.int64),
        lattice=np.ascontiguousarray(lattice, float),
        tol=SAME_DISTANCE,
    )
    image = np.rint(image).astype(np.int64)
    if centres is not None:
        return target, source, image, distance
    others = (target != source) | image.any(axis=1)
    return target[others], source[others], image[others], distance[others]
