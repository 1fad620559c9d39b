"""Predict with a trained model on raw files: `python -m hpcdeq.predict RUN_DIR SOURCE --out predictions.csv`.

The source is what `hpcdeq.prepare` takes for the kind of data that the model was trained on; properties are not needed.
Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdeq.commands import CommandParser
from hpcdeq.errors import EXIT_DONE, DataError, OptionError
from hpcdeq.startup import split_arguments

if TYPE_CHECKING:
    from torch import nn

    from hpcdeq.builders.samples import Skipped
    from hpcdeq.data.schema import Schema
    from hpcdeq.inference import Predictions

PROGRAM = "python -m hpcdeq.predict"


def build_parser() -> CommandParser:
    """Return the parser of this command. Not collective."""
    parser = CommandParser(
        prog=PROGRAM,
        description="Predict with a trained model on raw files, as hpcdeq.prepare takes them; properties are not needed.",
        epilog="options of the fixed points (single dash) win over the run's own: -deq_snes_rtol 1e-8, ...\n\n"
        "One row a sample: id, class and probabilities (or values), whether the fixed point was found, and its residual.\n"
        "Rows that cannot be read are listed in OUT.skipped.csv.\n\n"
        "On many ranks: mpirun -n 4 python -m hpcdeq.predict RUN_DIR SOURCE --out predictions.csv",
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="run directory of hpcdeq.train")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="raw files, as for hpcdeq.prepare")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.csv", help="replaced on success only")
    parser.add_argument("--limit", type=int, metavar="N", help="first N rows of the source")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


@dataclass(frozen=True)
class Block:
    """What is found of some rows: predictions (None without any), and the rows that could not be read."""

    predictions: Predictions | None
    skipped: list[Skipped]


class Samples:
    """Batches of a source's samples, made as the training data of a model were. Not collective.

    Parameters
    ----------
    schema
        Of the training data.
    source
        Raw files.
    limit
        Use the first rows only; None for all.

    Raises
    ------
    OptionError
        The training data do not say how they were made, or not from files.
    """

    def __init__(self, schema: Schema, source: Path, limit: int | None) -> None:
        from hpcdeq.builders.makers import maker_named

        origin = schema.provenance
        if "kind" not in origin:
            raise OptionError(
                "the model was trained on data that were not made from raw files by hpcdeq.prepare (crystals, frameworks,"
                " molecules or images): call hpcdeq.load(RUN_DIR) in Python"
            )
        self.maker = maker_named(origin["kind"], origin["settings"])
        self.source = source
        self.limit = limit

    def blocks(self, rank: int, ranks: int) -> Iterator[tuple[int, list[Any]]]:
        """Yield every ranks-th block of rows from this rank's own on, with its number among all."""
        from hpcdeq.builders.samples import blocks

        rows = itertools.islice(self.maker.rows(self.source), self.limit)
        yield from itertools.islice(enumerate(blocks(rows)), rank, None, ranks)


def main(arguments: list[str]) -> int:
    """Predict, and write the table.

    Collective on MPI.COMM_WORLD.

    Raises
    ------
    HpcdeqError
        The run, the source or the output is no good; raised on all ranks.
    """
    begin = time.perf_counter()
    own, petsc = split_arguments(arguments)
    options = build_parser().parse_args(own)
    from hpcdeq import parallel
    from hpcdeq.inference import open_model
    from hpcdeq.record.restore import saved_of

    comm = parallel.WORLD
    with parallel.agreement(comm):
        if options.limit is not None and options.limit < 1:
            raise OptionError(f"--limit {options.limit}: at least 1")
        if options.out.is_dir() or not options.out.absolute().parent.is_dir():
            raise DataError(f"--out {options.out}: give a file name in a folder that exists")
    model = open_model(options.run, options.device, petsc, "a prediction")
    with parallel.agreement(comm):
        samples = Samples(saved_of(model).schema, options.source, options.limit)
    started = time.perf_counter()
    with parallel.agreement(comm):
        found = {number: _of_block(model, samples, rows) for number, rows in samples.blocks(comm.rank, comm.size)}
    every = parallel.to_root(comm, found)
    with parallel.agreement(comm):
        if comm.rank == 0:
            table = {number: part for own in every for number, part in own.items()}
            in_order = [table[number] for number in sorted(table)]
            _finish(options, model, in_order, started - begin, time.perf_counter() - started)
    return EXIT_DONE


def _of_block(model: nn.Module, samples: Samples, rows: list[Any]) -> Block:
    """Return what the model says of the rows of a block that can be read, and the others."""
    import numpy as np
    import torch

    from hpcdeq.data.batches import graph_batch
    from hpcdeq.inference import predict_batch

    ids, inputs, skipped = samples.maker.make(rows)
    if not ids:
        return Block(None, skipped)
    dtype = next(model.parameters()).dtype
    batch = torch.from_numpy(inputs) if isinstance(inputs, np.ndarray) else graph_batch(inputs, slice(None), dtype)
    return Block(predict_batch(model, ids, batch), skipped)


def _finish(options: argparse.Namespace, model: nn.Module, blocks: list[Block], setup: float, work: float) -> None:
    """Write the table and say what is in it."""
    from hpcdeq.builders.samples import list_skipped, refuse_if_none
    from hpcdeq.record.atomic import cannot_write, replaced
    from hpcdeq.record.restore import saved_of

    schema = saved_of(model).schema
    parts = [block.predictions for block in blocks if block.predictions is not None]
    skipped = [row for block in blocks for row in block.skipped]
    count = sum(len(part.ids) for part in parts)
    refuse_if_none(options.source, count, skipped)
    labelled = schema.task == "classification"
    names = schema.classes if labelled else schema.target_names
    head = ["id", *(["class"] if labelled else []), *(f"p_{name}" if labelled else name for name in names)]
    try:
        with replaced(options.out) as path, path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([*head, "converged", "residual"])
            for part in parts:
                for place, name in enumerate(part.ids):
                    values = part.outputs[place]
                    chosen = [names[int(values.argmax())]] if labelled else []
                    numbers = [f"{value:.6g}" for value in values]
                    ended = [str(bool(part.converged[place])).lower(), f"{part.residual[place]:.3g}"]
                    table.writerow([name, *chosen, *numbers, *ended])
    except OSError as error:
        raise cannot_write(options.out, error) from error
    listing = list_skipped(options.out, skipped)
    if options.quiet:
        return
    lost = count - sum(int(part.converged.sum()) for part in parts)
    print(f"{options.out}: {count} predictions in {work:.1f} s, {count / work:.0f} a second (start-up {setup:.1f} s)")
    if lost:
        print(f"  without fixed point {lost:>7}  (column converged)")
    if skipped:
        print(f"  skipped    {len(skipped):>7}  (all in {listing})")
        for row in skipped[:5]:
            print(f"    {row.row}: {row.reason}")


if __name__ == "__main__":
    build_parser().parse_args(split_arguments(sys.argv[1:])[0])  # a wrong command line ends here, before MPI starts
    from hpcdeq.parallel import launch

    launch(main, sys.argv[1:])
