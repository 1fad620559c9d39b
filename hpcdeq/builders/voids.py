"""The largest empty spheres of a periodic structure, as nodes of its graph: pores are where the atoms are not."""

from __future__ import annotations

import math

import numpy as np

from hpcdeq.builders.neighbours import nearest_of
from hpcdeq.data.graphs import GraphArrays, join_nodes

FIRST, GROWTH, FARTHEST = 6.0, 1.6, 40.0  # Å, how far around the cell atoms are looked at
APART = 1.0  # Å, centres that are nearer are of one void
FLAT = 1e-6  # Å³, the volume of a tetrahedron whose circumsphere is not to be trusted


def with_voids(graph: GraphArrays, lattice: np.ndarray, frac: np.ndarray, count: int, neighbours: int) -> GraphArrays:
    """Return the graph of one structure with its largest voids as further nodes of atomic number 0.

    Not collective. Edges go from a void's nearest atoms to the void; atoms do not see voids.

    Parameters
    ----------
    graph
        Of the atoms.
    lattice, frac
        As in `hpcdeq.builders.neighbours.neighbours_of`.
    count
        Voids, at most.
    neighbours
        Edges of a void.
    """
    positions = np.asarray(frac, float) @ lattice
    centres = voids_of(lattice, positions, count)
    target, source, vector = nearest_of(lattice, positions, centres, neighbours)
    return join_nodes(graph, np.zeros(len(centres), np.uint8), source, target, vector)


def voids_of(lattice: np.ndarray, positions: np.ndarray, count: int) -> np.ndarray:
    """Return the centres of the largest empty spheres, ``(v, 3)`` Å, ``v <= count``, the largest first.

    Not collective. The spheres that touch atoms and have none inside are those around the vertices of the Voronoi diagram,
    the circumspheres of the Delaunay tetrahedra (as in Zeo++: Willems et al. 2012, doi:10.1016/j.micromeso.2011.08.020, but
    for atoms as points). A sphere is known to be empty if it is within what was looked at around the cell.

    Parameters
    ----------
    lattice
        ``(3, 3)`` Å, one lattice vector a row.
    positions
        ``(n, 3)`` Å, of the atoms.
    count
        At most so many.
    """
    inverse = np.linalg.inv(lattice)
    spacing = 1 / np.linalg.norm(inverse, axis=0)  # of lattice planes
    frac = (positions @ inverse) % 1.0
    around = FIRST
    while True:
        centres, radius = _circumspheres(_images(frac, around / spacing) @ lattice)
        inside = centres @ inverse
        own = ((inside >= 0) & (inside < 1)).all(axis=1)
        inside, radius = inside[own], radius[own]
        if around >= FARTHEST or (radius.size and radius.max() <= around):
            break
        around *= GROWTH
    order = np.lexsort((*np.rint(1e6 * inside.T[::-1]), -np.rint(radius * 1e6)))
    kept = np.empty((0, 3))
    for centre in inside[order]:
        between = kept - centre
        if not len(kept) or np.linalg.norm((between - np.rint(between)) @ lattice, axis=1).min() >= APART:
            kept = np.vstack([kept, centre])
        if len(kept) == count:
            break
    return kept @ lattice


def _images(frac: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Return all images in the cell and a margin around it, in fractional coordinates."""
    for axis in range(3):
        reach = math.ceil(margin[axis])
        shifts = np.zeros((2 * reach + 1, 1, 3))
        shifts[:, 0, axis] = np.arange(-reach, reach + 1)
        frac = (frac + shifts).reshape(-1, 3)
        frac = frac[(frac[:, axis] >= -margin[axis]) & (frac[:, axis] < 1 + margin[axis])]
    return frac


def _circumspheres(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centres ``(t, 3)`` and radii ``(t,)`` of the circumspheres of the Delaunay tetrahedra of points."""
    from scipy.spatial import Delaunay

    corners = points[Delaunay(points).simplices]
    first, edges = corners[:, 0], corners[:, 1:] - corners[:, :1]
    solid = abs(np.linalg.det(edges)) > FLAT
    first, edges = first[solid], edges[solid]
    centres = np.linalg.solve(edges, 0.5 * (edges**2).sum(axis=2)[:, :, None])[:, :, 0]
    return first + centres, np.linalg.norm(centres, axis=1)
