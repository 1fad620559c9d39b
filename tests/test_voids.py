"""The largest empty spheres of periodic structures: known crystals, a search on a grid, and the pores of real frameworks."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pytest
from conftest import DATA

from hpcdeq.builders.neighbours import neighbours_of
from hpcdeq.builders.voids import voids_of, with_voids
from hpcdeq.data.graphs import atoms_only, join_graphs

MOFS = DATA / "mofs" / "mofs_small.jsonl.gz"


def clearance(lattice: np.ndarray, positions: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the distance of each point from the nearest atom, over all images around, by enumeration."""
    shifts = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ lattice
    images = (positions[None] + shifts[:, None]).reshape(-1, 3)
    return np.array([np.linalg.norm(images - point, axis=1).min() for point in points])


def cell(seed: int, atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a skew cell, and atoms in it and around it, in fractional coordinates."""
    random = np.random.default_rng(seed)
    return np.diag([7.0, 9.0, 8.0]) + random.uniform(-1.5, 1.5, (3, 3)), random.uniform(-1, 2, (atoms, 3))


CUBIC = {  # atoms, the largest sphere's radius over the lattice constant, how many there are in a cell
    "simple": ([[0, 0, 0]], np.sqrt(3) / 2, 1),
    "body-centred": ([[0, 0, 0], [0.5, 0.5, 0.5]], np.sqrt(5) / 4, 12),
    "face-centred": ([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], 0.5, 4),
}


@pytest.mark.parametrize("name", sorted(CUBIC))
@pytest.mark.parametrize("constant", [3.0, 20.0])  # the largest sphere within the first look around, and not
def test_holes_of_cubic_crystals(name: str, constant: float) -> None:
    atoms, ratio, number = CUBIC[name]
    lattice = constant * np.eye(3)
    positions = np.array(atoms, float) @ lattice
    centres = voids_of(lattice, positions, 100)
    radius = clearance(lattice, positions, centres)
    assert radius[0] == pytest.approx(ratio * constant, rel=1e-9)
    assert (np.diff(radius) <= 1e-6).all()
    if constant > 10:  # in the small cell, some of them are nearer than two voids can be
        assert np.isclose(radius, ratio * constant, rtol=1e-9).sum() == number


@pytest.mark.parametrize(("seed", "atoms"), [(0, 1), (1, 4), (2, 30)])
def test_spheres_are_empty_touch_four_atoms_and_none_is_larger(seed: int, atoms: int) -> None:
    lattice, frac = cell(seed, atoms)
    positions = frac @ lattice
    centres = voids_of(lattice, positions, 5)
    wrapped = (frac % 1) @ lattice
    radius = clearance(lattice, wrapped, centres)
    images = (wrapped[None] + (np.array(list(itertools.product(range(-2, 3), repeat=3))) @ lattice)[:, None]).reshape(
        -1, 3
    )
    for centre, own in zip(centres, radius, strict=True):
        assert (abs(np.linalg.norm(images - centre, axis=1) - own) < 1e-8).sum() >= 4
    steps = (np.array(list(itertools.product(range(12), repeat=3))) + 0.5) / 12
    assert clearance(lattice, wrapped, steps @ lattice).max() <= radius[0]
    between = (centres[:, None] - centres)[~np.eye(len(centres), dtype=bool)] @ np.linalg.inv(lattice)
    if between.size:
        assert np.linalg.norm((between - between.round()) @ lattice, axis=1).min() >= 1.0


def test_the_order_of_atoms_and_their_images_do_not_matter() -> None:
    lattice, frac = cell(3, 12)
    centres = voids_of(lattice, frac @ lattice, 6)
    other = np.random.default_rng(0).permutation(frac % 1.0) + [1, -2, 0]
    np.testing.assert_allclose(voids_of(lattice, other @ lattice, 6), centres, atol=1e-6)


def test_voids_become_nodes_with_edges_from_their_nearest_atoms() -> None:
    lattice, frac = cell(4, 9)
    number = np.arange(1, 10)
    plain = neighbours_of(lattice, number, frac, 5)
    graph = with_voids(plain, lattice, frac, 3, 5)
    assert graph.atomic_number.tolist() == [*number, 0, 0, 0]
    assert graph.edge_target[-15:].tolist() == np.repeat([9, 10, 11], 5).tolist()
    centres = voids_of(lattice, frac @ lattice, 3)
    length = np.linalg.norm(graph.edge_vector[-15:], axis=1).reshape(3, 5)
    np.testing.assert_allclose(length[:, 0], clearance(lattice, (frac % 1) @ lattice, centres))
    np.testing.assert_allclose(length[:, :4], length[:, :1].repeat(4, axis=1))
    assert (np.diff(length, axis=1) >= -1e-8).all()
    away = graph.edge_vector[-15:] + centres.repeat(5, axis=0) - (frac @ lattice)[graph.edge_source[-15:]]
    np.testing.assert_allclose(away @ np.linalg.inv(lattice), np.rint(away @ np.linalg.inv(lattice)), atol=1e-9)
    again = atoms_only(join_graphs([graph, plain, graph]))
    expected = join_graphs([plain, plain, plain])
    for name in ("node_offset", "atomic_number", "edge_offset", "edge_source", "edge_target", "edge_vector"):
        np.testing.assert_array_equal(getattr(again, name), getattr(expected, name), name)


@pytest.mark.real_data
def test_the_largest_void_of_a_framework_is_its_largest_cavity() -> None:
    """Zeo++'s largest cavity takes atoms with their radii: what is left after the free sphere's is nearly constant."""
    from pymatgen.core import Lattice

    known, found = [], []
    with gzip.open(MOFS, "rt") as file:
        for line in itertools.islice(file, 0, None, 60):
            row = json.loads(line)
            if row["disorder"] or row["dmin"] < 0.5:
                continue
            lattice = Lattice.from_parameters(*row["cell"]).matrix
            positions = np.reshape(row["frac"], (-1, 3)) @ lattice
            centres = voids_of(lattice, positions, 1)
            known.append(row["LCD"])
            found.append(2 * clearance(lattice, (np.reshape(row["frac"], (-1, 3)) % 1) @ lattice, centres)[0])
    assert len(known) > 20
    assert np.corrcoef(known, found)[0, 1] > 0.97
    assert np.median(np.subtract(found, known)) == pytest.approx(2 * 1.2, abs=0.8)  # Å, radii of H to C
