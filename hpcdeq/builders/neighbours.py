"""The graph of a crystal: each atom and its nearest neighbours over all periodic images."""

from __future__ import annotations

import math

import numpy as np

from hpcdeq.builders.samples import Skipped
from hpcdeq.builders.structures import StructureRecord
from hpcdeq.data.graphs import GraphArrays, join_graphs

SAME_DISTANCE = 1e-8  # Å, distances that round alike are ties, broken by atom and image
OVERLAP = 0.1  # Å, no two atoms are that near: the longest that is surely an error, half the least real distance
GROWTH = 1.3
ATTEMPTS = 24  # 1.3^24 = 540 times the first radius


def graph_block(records: list[StructureRecord], neighbours: int) -> tuple[list[int], GraphArrays, list[Skipped]]:
    """Build the graphs of some structures.

    Not collective: runs in workers.

    Returns
    -------
    tuple
        Which records have a graph, these graphs end to end, and the others with the reason.
    """
    kept: list[int] = []
    graphs: list[GraphArrays] = []
    skipped: list[Skipped] = []
    for place, record in enumerate(records):
        try:
            graphs.append(nearest_neighbours(record.lattice, record.atomic_number, record.frac, neighbours))
            kept.append(place)
        except ValueError as error:
            skipped.append(Skipped(record.id, str(error)))
    return kept, join_graphs(graphs), skipped


def nearest_neighbours(
    lattice: np.ndarray, atomic_number: np.ndarray, frac: np.ndarray, neighbours: int
) -> GraphArrays:
    """Find the nearest neighbours of each atom of a periodic structure.

    Not collective. Every atom gets exactly ``neighbours`` edges, ordered by distance, then by the neighbour's number,
    then by its image: the same on every machine, also where a shell is cut.

    Parameters
    ----------
    lattice
        ``(3, 3)`` Å, one lattice vector a row.
    atomic_number
        ``(n,)``.
    frac
        ``(n, 3)``, inside or outside of the cell.
    neighbours
        How many a atom, at least 1.

    Raises
    ------
    ValueError
        Two atoms overlap, or the neighbours are too far away to be found.
    """
    from pymatgen.optimization.neighbors import find_points_in_spheres

    lattice = np.ascontiguousarray(lattice, float)
    positions = np.ascontiguousarray(frac @ lattice)
    atoms = len(positions)
    volume = abs(float(np.linalg.det(lattice)))
    # A uniform crystal has neighbours + 1 points in this sphere on average, the central one included.
    radius = 1.1 * math.cbrt(3 * (neighbours + 1) * volume / (4 * math.pi * atoms)) + 0.5
    periodic = np.ones(3, np.int64)
    for _ in range(ATTEMPTS):
        target, source, image, distance = find_points_in_spheres(
            positions, positions, r=radius, pbc=periodic, lattice=lattice, tol=SAME_DISTANCE
        )
        image = np.rint(image).astype(np.int64)
        itself = (target == source) & ~image.any(axis=1)
        # Ties at the rim may be found in part only, so the last neighbour has to be clear of it.
        others = ~itself & (distance <= radius - 2 * SAME_DISTANCE)
        target, source, image, distance = target[others], source[others], image[others], distance[others]
        if np.bincount(target, minlength=atoms).min() >= neighbours:
            break
        radius *= GROWTH
    else:
        raise ValueError(f"an atom has fewer than {neighbours} neighbours within {radius / GROWTH:.3g} A")
    if distance.min() < OVERLAP:
        pair = int(np.argmin(distance))
        raise ValueError(f"atoms {target[pair]} and {source[pair]} are {distance[pair]:.3g} A apart: they overlap")
    rounded = np.rint(distance / SAME_DISTANCE)
    order = np.lexsort((image[:, 2], image[:, 1], image[:, 0], source, rounded, target))
    first = np.searchsorted(target[order], np.arange(atoms))
    chosen = order[(first[:, None] + np.arange(neighbours)).ravel()]
    target, source = target[chosen], source[chosen]
    vector = positions[source] + image[chosen] @ lattice - positions[target]
    return GraphArrays(
        np.array([0, atoms]),
        np.asarray(atomic_number, np.uint8),
        np.array([0, chosen.size]),
        source.astype(np.int32),
        target.astype(np.int32),
        vector,
    )
