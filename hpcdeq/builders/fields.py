"""Solutions of partial differential equations as datasets: what all equations share.

An equation is a class of settings (`hpcdeq.builders.field_settings`), a module that turns them into numbered samples, and
an entry of `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcdeq import parallel
from hpcdeq.builders.advection import advection_family
from hpcdeq.builders.burgers import burgers_family
from hpcdeq.builders.darcy import darcy_family
from hpcdeq.builders.family import FieldFamily
from hpcdeq.builders.field_settings import Advection, Burgers, Darcy, FieldSettings, Reaction
from hpcdeq.builders.reaction import reaction_family
from hpcdeq.builders.samples import Progress, Report, provenance, silent
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import SPLITS, Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import OptionError

FAMILIES: dict[type[FieldSettings], Callable[[Any, int], FieldFamily]] = {
    Burgers: burgers_family,
    Advection: advection_family,
    Darcy: darcy_family,
    Reaction: reaction_family,
}
BLOCK = 100  # samples solved and written at a time: their spectra stay in the cache
SPLIT_OF_DIGIT = (0, 0, 0, 0, 0, 0, 0, 0, 1, 2)  # by the last digit of a sample's number: 80 / 10 / 10 %


def family_of(settings: FieldSettings, seed: int) -> FieldFamily:
    """Return the samples that some settings stand for.

    Not collective.

    Raises
    ------
    OptionError
        A value makes no sense.
    """
    settings.check()
    if seed < 0:
        raise OptionError(f"--seed {seed}: at least 0")
    return FAMILIES[type(settings)](settings, seed)


def prepare_field(
    path: str | os.PathLike[str],
    settings: FieldSettings,
    count: int = 1000,
    seed: int = 0,
    *,
    comm: parallel.Comm = parallel.WORLD,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Write a dataset of solutions of an equation: 80 % train, 10 % validation, 10 % test.

    Collective on comm. Rank 0 computes and writes: 1,000 samples take a few seconds. The split of a sample hangs on its
    number alone, so that a longer file holds the samples of a shorter one in the same splits.

    Parameters
    ----------
    path
        The file to make; replaced on success only.
    settings
        The equation, by its class, and what is chosen about it.
    count
        Number of samples.
    seed
        Of the family of samples.
    command
        Kept in the file's provenance.
    progress
        Wraps the blocks of samples.

    Returns
    -------
    Report
        The same on all ranks.

    Raises
    ------
    OptionError, DataError
        A value makes no sense, a solution is not resolved, or the file cannot be written.
    """
    report = Report()
    with parallel.agreement(comm):
        if comm.rank == 0:
            if count < 1:
                raise OptionError(f"--limit {count}: at least 1")
            family = family_of(settings, seed)
            schema = Schema(
                "regression",
                "array",
                target_names=family.target_names,
                target_units=("1",) * len(family.target_names),
                sample_shape=family.sample_shape,
                provenance={
                    **provenance(family.source, command, []),
                    "settings": {**dataclasses.asdict(settings), "seed": seed},
                },
            )
            indices = np.arange(count)
            splits = np.array(SPLIT_OF_DIGIT, np.uint8)[indices % 10]
            shares = [indices[splits == split] for split in range(len(SPLITS))]
            parts = [own[start : start + BLOCK] for own in shares for start in range(0, own.size, BLOCK)]
            with DatasetWriter(path, schema, array_attributes=family.attributes) as writer:
                for part in progress(parts, "solving", len(parts)):
                    inputs, targets = family.sample(part)
                    names = [f"{settings.kind}-{seed}-{index}" for index in part]
                    writer.append(SampleRows(names, targets, inputs), splits[part])
                    report.add(splits[part], targets)
    return parallel.from_root(comm, report)


def prepare_burgers(
    path: str | os.PathLike[str],
    count: int = 1000,
    points: int = Burgers.points,
    viscosity: float = Burgers.viscosity,
    time: float = Burgers.time,
    seed: int = 0,
    modes: int = Burgers.modes,
    *,
    comm: parallel.Comm = parallel.WORLD,
    command: str = "",
) -> Report:
    """Write a dataset of Burgers solutions: `prepare_field` of `Burgers`. Collective on comm."""
    settings = Burgers(points, viscosity, time, modes)
    return prepare_field(path, settings, count, seed, comm=comm, command=command)
