"""Simple descriptors of samples, a row of numbers each: what a baseline is given instead of the sample, and a model beside it."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from typing import NamedTuple

import numpy as np

from hpcdeq.data.graphs import BONDS, GraphArrays, atoms_only
from hpcdeq.data.rows import HEAVIEST

# Of pymatgen's tables, with their names there.
PROPERTIES = {
    "atomic mass": "atomic_mass",
    "electronegativity": "X",
    "atomic radius": "atomic_radius",
    "ionization energy": "ionization_energy",
    "electron affinity": "electron_affinity",
    "period": "row",
    "group": "group",
    "Mendeleev number": "mendeleev_no",
    "molar volume": "molar_volume",
    "melting point": "melting_point",
}
# Electrons beyond the last noble gas, and room for more in their shells, by kind of shell (Ward et al. 2016).
SHELLS = ("s", "p", "d", "f")
VALENCE = tuple(f"{kind} {shell}" for kind in ("electrons in", "room in") for shell in SHELLS)
NOBLE = (2, 10, 18, 36, 54, 86)
ELEMENT = "fraction of element "  # and its atomic number
STATISTICS = ("mean", "least", "largest", "deviation")
SHELL = 1.2  # an atom's first shell reaches to its nearest neighbour's distance times this
PATCHES = 4  # an image is averaged over so many rows and columns of patches
STRIPES = 16  # and a line over so many pieces


class Descriptors(NamedTuple):
    """Numbers of ``b`` samples.

    Attributes
    ----------
    names
        ``d`` names.
    values
        ``(b, d)``; NaN where a sample has no such thing.
    """

    names: tuple[str, ...]
    values: np.ndarray


def descriptors_of(inputs: GraphArrays | np.ndarray) -> Descriptors:
    """Return the descriptors of some samples: `graph_descriptors` or `array_descriptors`. Not collective."""
    return graph_descriptors(inputs) if isinstance(inputs, GraphArrays) else array_descriptors(inputs)


@functools.cache
def element_properties() -> np.ndarray:
    """Return `PROPERTIES` of the elements by atomic number, ``(119, p)``; NaN where there are no data.

    Not collective. The tables are pymatgen's, in its units.
    """
    from pymatgen.core import Element

    table = np.full((HEAVIEST + 1, len(PROPERTIES)), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each number that it does not have
        for number in range(1, HEAVIEST + 1):
            element = Element.from_Z(number)
            for column, name in enumerate(PROPERTIES.values()):
                with contextlib.suppress(KeyError):  # raised for some of the heaviest
                    value = getattr(element, name)
                    table[number, column] = np.nan if value is None else float(value)
    return table


@functools.cache
def valence_electrons() -> np.ndarray:
    """Return `VALENCE` of the elements by atomic number, ``(119, 8)``; NaN where the structure is not known. Not collective."""
    from pymatgen.core import Element

    table = np.full((HEAVIEST + 1, len(VALENCE)), np.nan)
    for number in range(1, HEAVIEST + 1):
        with contextlib.suppress(KeyError):  # raised for some of the heaviest
            core = max((noble for noble in NOBLE if noble < number), default=0)
            closed = Element.from_Z(core).full_electronic_structure if core else []
            outer = [shell for shell in Element.from_Z(number).full_electronic_structure if shell not in closed]
            table[number] = 0.0
            for _, kind, electrons in outer:
                place = SHELLS.index(kind)
                table[number, place] += electrons
                table[number, len(SHELLS) + place] += 2 * (2 * place + 1) - electrons
    return table


def graph_descriptors(graphs: GraphArrays) -> Descriptors:
    """Return the descriptors of graphs of atoms.

    Not collective. Composition as in Magpie (Ward et al. 2016, doi:10.1038/npjcompumats.2016.28): fractions of the elements, and
    mean, least, largest and standard deviation over the atoms of tabulated properties, of valence electrons and of formal
    charges. Electrons of the cell: whether their number is odd (of a primitive cell: a metal, or magnetic), and whether open d
    or f shells are there. Structure: statistics of nearest
    distances, of the neighbours in an atom's first shell (up to 1.2 times its nearest distance), of electronegativity
    differences in that shell, and of the density in the sphere that an atom's neighbours fill. Molecules: bonds of each
    order, an atom and in all; formal charges. Voids are left out. Edges of no length (bonds without coordinates) have no distances.
    """
    graphs = atoms_only(graphs)
    count, number = len(graphs), graphs.atomic_number.astype(np.int64)
    owner = np.repeat(np.arange(count), np.diff(graphs.node_offset))
    atoms = np.bincount(owner, minlength=count).astype(float)
    elements = np.bincount(owner * (HEAVIEST + 1) + number, minlength=count * (HEAVIEST + 1))
    fractions = elements.reshape(count, HEAVIEST + 1)[:, 1:] / atoms[:, None]
    columns: dict[str, np.ndarray] = {"atoms": atoms, "elements": (fractions > 0).sum(axis=1).astype(float)}
    columns |= {f"{ELEMENT}{z}": fractions[:, z - 1] for z in range(1, HEAVIEST + 1)}
    properties = element_properties()[number]
    for column, name in enumerate(PROPERTIES):
        columns |= _statistics(name, properties[:, column], owner, count)
    electrons = valence_electrons()[number]
    for column, name in enumerate(VALENCE):
        columns |= _statistics(name, electrons[:, column], owner, count)
    open_shells = (electrons[:, VALENCE.index("room in d") :] > 0).any(axis=1)
    columns["open d or f shells"] = np.bincount(owner, open_shells, count) / atoms
    columns["odd electrons"] = np.bincount(owner, number, count) % 2
    charge = graphs.formal_charge.astype(float)
    columns |= _statistics("formal charge", charge, owner, count)
    columns["charge"] = np.bincount(owner, charge, count)
    columns["charged atoms"] = np.bincount(owner, charge != 0, count)
    return _table(
        columns | _edges(graphs, owner, atoms, properties[:, list(PROPERTIES).index("electronegativity")]), count
    )


def _edges(
    graphs: GraphArrays, owner: np.ndarray, atoms: np.ndarray, electronegativity: np.ndarray
) -> dict[str, np.ndarray]:
    count, nodes = len(graphs), len(owner)
    edge_owner = np.repeat(np.arange(count), np.diff(graphs.edge_offset))
    first = graphs.node_offset[edge_owner]
    target, source = graphs.edge_target + first, graphs.edge_source + first
    distance = np.sqrt(np.square(graphs.edge_vector).sum(axis=1))
    placed = distance > 0
    target, source, placed_owner, distance = target[placed], source[placed], edge_owner[placed], distance[placed]
    per_atom = segment_statistics(distance, target, nodes)
    nearest, farthest = per_atom[:, 1], per_atom[:, 2]
    near = distance <= SHELL * nearest[target]
    shell = np.bincount(target[near], minlength=nodes).astype(float)
    shell[np.isnan(nearest)] = np.nan  # without coordinates, not known
    neighbours = np.bincount(target, minlength=nodes)
    columns = {
        **_statistics("distance", distance, placed_owner, count),
        **_statistics("nearest distance", nearest, owner, count),
        **_statistics("first shell", shell, owner, count),
        **_statistics("density", (neighbours + 1) / (4 / 3 * math.pi * farthest**3), owner, count),
        **_statistics(
            "electronegativity difference",
            abs(electronegativity[target[near]] - electronegativity[source[near]]),
            placed_owner[near],
            count,
        ),
    }
    for order, name in enumerate(BONDS[1:], 1):
        own = np.bincount(edge_owner[graphs.edge_bond == order], minlength=count) / 2  # an edge each way
        columns |= {f"{name} bonds": own, f"{name} bonds an atom": own / atoms}
    return columns


def array_descriptors(x: np.ndarray) -> Descriptors:
    """Return the descriptors of arrays: statistics of each channel, and a coarse picture of it.

    Not collective.

    Parameters
    ----------
    x
        ``(b, channels, rows, columns)`` images, ``(b, rows, columns)`` of one channel, or ``(b, n)`` lines; further axes are
        taken as columns. Images are averaged over 4 x 4 patches, lines over 16 pieces.
    """
    count, axes = len(x), x.shape[1:]
    channels, rows = (axes[0], axes[1]) if len(axes) > 2 else (1, axes[0] if len(axes) == 2 else 1)
    length = math.prod(axes) // max(channels * rows, 1)
    pictures = np.asarray(x, float).reshape(count, channels, rows, length)
    flat = pictures.reshape(count, channels, rows * length)
    kinds = zip(STATISTICS, (flat.mean(axis=2), flat.min(axis=2), flat.max(axis=2), flat.std(axis=2)), strict=True)
    columns = {f"channel {c} {name}": values[:, c] for name, values in kinds for c in range(channels)}
    coarse = _averaged(_averaged(pictures, 2, PATCHES), 3, PATCHES if rows > 1 else STRIPES)
    for place in np.ndindex(coarse.shape[1:]):
        columns["channel {} patch {} {}".format(*place)] = coarse[(slice(None), *place)]
    return _table(columns, count)


def _averaged(pictures: np.ndarray, axis: int, pieces: int) -> np.ndarray:
    """Return means over so many pieces of an axis, or the axis as it is where it is shorter."""
    length = pictures.shape[axis]
    starts = np.arange(min(pieces, length)) * length // min(pieces, length)
    sizes = np.diff([*starts, length])
    shape = [1] * pictures.ndim
    shape[axis] = -1
    return np.add.reduceat(pictures, starts, axis=axis) / sizes.reshape(shape)


def segment_statistics(values: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Return mean, least, largest and standard deviation of the values of each owner.

    Not collective.

    Parameters
    ----------
    values, owner
        ``(m,)`` numbers, NaN for none, and to which of ``count`` owners each belongs.

    Returns
    -------
    numpy.ndarray
        ``(count, 4)``, NaN for owners without values.
    """
    known = ~np.isnan(values)
    values, owner = values[known], owner[known]
    if (owner[1:] < owner[:-1]).any():
        order = np.argsort(owner, kind="stable")
        values, owner = values[order], owner[order]
    number = np.bincount(owner, minlength=count)
    least, largest = np.full(count, np.inf), np.full(count, -np.inf)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    if starts.size:
        least[owner[starts]] = np.minimum.reduceat(values, starts)
        largest[owner[starts]] = np.maximum.reduceat(values, starts)
    some = np.maximum(number, 1)
    mean = np.bincount(owner, values, count) / some
    deviation = np.sqrt(np.bincount(owner, np.square(values - mean[owner]), count) / some)
    found = np.stack([mean, least, largest, deviation], axis=1)
    found[number == 0] = np.nan
    return found


def _statistics(name: str, values: np.ndarray, owner: np.ndarray, count: int) -> dict[str, np.ndarray]:
    found = segment_statistics(values, owner, count)
    return {f"{name} {kind}": found[:, column] for column, kind in enumerate(STATISTICS)}


def _table(columns: dict[str, np.ndarray], count: int) -> Descriptors:
    return Descriptors(tuple(columns), np.stack(list(columns.values()), axis=1).reshape(count, len(columns)))
