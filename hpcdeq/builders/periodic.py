"""Blocks of rows of periodic structures to graphs: the part of preparing crystals and frameworks that workers do."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hpcdeq.builders.labelling import Labelling, Value
from hpcdeq.builders.neighbours import OVERLAP, neighbours_of
from hpcdeq.builders.oxidation import oxidation_states
from hpcdeq.builders.samples import Skipped
from hpcdeq.builders.spool import Built
from hpcdeq.builders.structures import SourceRow, read_structure
from hpcdeq.builders.voids import with_voids
from hpcdeq.data.graphs import GraphArrays, join_graphs
from hpcdeq.errors import OptionError


@dataclass(frozen=True)
class StructureSettings:
    """How a periodic structure becomes a graph.

    Attributes
    ----------
    neighbours
        Edges an atom, to its nearest neighbours; 0: as many as are within the radius.
    radius
        Å: edges are no longer; 0: as long as it takes.
    voids
        The largest empty spheres between the atoms, so many at most, become nodes, too.
    group
        What relatives share, which are never in two splits: ``formula`` (reduced), ``family`` (of CSD refcodes), or a field
        of the source.
    oxidation
        Whether atoms have likely oxidation states as formal charges (`hpcdeq.builders.oxidation`).
    least_distance
        Å: structures with two atoms that are nearer are left out.
    """

    neighbours: int = 12
    radius: float = 0.0
    voids: int = 0
    group: str = "formula"
    oxidation: bool = False
    least_distance: float = OVERLAP

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if self.neighbours < 0 or (self.neighbours == 0 and self.radius == 0):
            raise OptionError(f"--neighbours {self.neighbours}: at least 1, or 0 with a --radius")
        if not 0 <= self.radius < math.inf:
            raise OptionError(f"--radius {self.radius}: a length in angstrom, or 0 for none")
        if self.voids < 0 or (self.voids and not self.neighbours):
            raise OptionError(
                f"--voids {self.voids}: give --voids 0, or --neighbours K, which is how many edges a void has"
            )
        if not 0 <= self.least_distance < math.inf:
            raise OptionError(f"--least-distance {self.least_distance}: a length in angstrom")


def build_structures(rows: list[SourceRow], settings: StructureSettings, labels: Labelling | None) -> Built:
    """Read some rows of a source of periodic structures and build their graphs.

    Not collective: runs in workers.
    """
    ids: list[str] = []
    values: list[Value] = []
    splits: list[str] = []
    groups: list[str] = []
    auxiliary: list[tuple[float, ...]] = []
    graphs: list[GraphArrays] = []
    skipped: list[Skipped] = []
    for row in rows:
        name, record, reason = read_structure(row, labels, settings.group)
        if record is None:
            skipped.append(Skipped(name, reason))
            continue
        try:
            graph = neighbours_of(
                record.lattice,
                record.atomic_number,
                record.frac,
                settings.neighbours,
                settings.radius,
                settings.least_distance,
            )
            if settings.oxidation:
                graph = replace(graph, formal_charge=oxidation_states(record.atomic_number))
            if settings.voids:
                graph = with_voids(graph, record.lattice, record.frac, settings.voids, settings.neighbours)
            graphs.append(graph)
        except ValueError as error:
            skipped.append(Skipped(name, str(error)))
            continue
        ids.append(name)
        values.append(record.value)
        splits.append(record.split or "")
        groups.append(record.group)
        auxiliary.append(record.auxiliary)
    return Built(ids, values, splits, groups, join_graphs(graphs), skipped, auxiliary)
