"""Crystals, and periodic structures of any other kind, as graphs of neighbours with a property as class or number."""

from __future__ import annotations

import os
from pathlib import Path

from hpcdeq import parallel
from hpcdeq.builders.graphs import Recipe, prepare_graphs
from hpcdeq.builders.labelling import Labelling
from hpcdeq.builders.periodic import StructureSettings, build_structures
from hpcdeq.builders.samples import Progress, Report, Shares, silent
from hpcdeq.builders.structures import source_rows

BAND_GAP = Labelling("band_gap", (0.01, 3.0), ("metal", "semiconductor", "insulator"), "eV")
SETTINGS = StructureSettings(oxidation=True)


def structure_recipe(kind: str, settings: StructureSettings) -> Recipe:
    """Return the recipe of graphs of periodic structures. Not collective."""
    return Recipe(kind, source_rows, build_structures, settings, ("pymatgen",))


def prepare_crystals(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    labels: Labelling = BAND_GAP,
    settings: StructureSettings | None = None,
    shares: Shares | None = None,
    *,
    kind: str = "crystals",
    processes: int = 1,
    comm: parallel.Comm = parallel.WORLD,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Write the crystals of a source to a dataset file, ordered train, validation, test.

    Collective on comm; see `hpcdeq.builders.graphs.prepare_graphs`.

    Parameters
    ----------
    path
        The file to make; replaced on success only.
    source
        See `hpcdeq.builders.structures.source_rows`.
    labels
        What is learned.
    settings
        How structures become graphs.
    shares
        Which rows are used, and how they are shared out.
    kind
        What `hpcdeq.prepare` calls them.

    Returns
    -------
    Report
        The same on all ranks.

    Raises
    ------
    DataError
        The source is missing or damaged, none of its rows can be used, or the file cannot be written.
    """
    return prepare_graphs(
        Path(path),
        Path(source),
        structure_recipe(kind, settings or SETTINGS),
        labels,
        shares or Shares(),
        processes=processes,
        comm=comm,
        command=command,
        progress=progress,
    )
