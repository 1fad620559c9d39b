"""Molecules with a property, as graphs of atoms with bonds and, where there are coordinates, distances."""

from __future__ import annotations

import os
from pathlib import Path

from hpcdeq import parallel
from hpcdeq.builders.graphs import Recipe, prepare_graphs
from hpcdeq.builders.labelling import Labelling
from hpcdeq.builders.molecular import MoleculeSettings, build_molecules
from hpcdeq.builders.molecule_sources import source_rows
from hpcdeq.builders.samples import Progress, Report, Shares, silent

# Near the median of QM9.
DIPOLE = Labelling("mu", (2.5,), ("weakly polar", "strongly polar"), "debye")


def molecule_recipe(settings: MoleculeSettings) -> Recipe:
    """Return the recipe of graphs of molecules. Not collective."""
    return Recipe("molecules", source_rows, build_molecules, settings, ("rdkit",), settings.places)


def prepare_molecules(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    labels: Labelling = DIPOLE,
    settings: MoleculeSettings | None = None,
    shares: Shares | None = None,
    *,
    processes: int = 1,
    comm: parallel.Comm = parallel.WORLD,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Write the molecules of a source to a dataset file, ordered train, validation, test.

    Collective on comm; see `hpcdeq.builders.graphs.prepare_graphs`.

    Parameters
    ----------
    path
        The file to make; replaced on success only.
    source
        See `hpcdeq.builders.molecule_sources.source_rows`.
    labels
        What is learned.
    settings
        How molecules become graphs.
    shares
        Which rows are used, and how they are shared out.

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
        molecule_recipe(settings or MoleculeSettings()),
        labels,
        shares or Shares(),
        processes=processes,
        comm=comm,
        command=command,
        progress=progress,
    )
