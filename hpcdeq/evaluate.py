"""Evaluate a classifier: `mpirun -n N python -m hpcdeq.evaluate RUN_DIR [--data FILE.h5] [--split test] [--out DIR]`.

The best model of a run beside two baselines on the same samples: the most frequent class, and gradient boosting on simple
descriptors. Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpcdeq.commands import CommandParser
from hpcdeq.errors import EXIT_DONE, DataError, OptionError
from hpcdeq.startup import split_arguments

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from hpcdeq.data import Dataset
    from hpcdeq.data.schema import Schema
    from hpcdeq.inference import Predictions
    from hpcdeq.record import RunDirectory
    from hpcdeq.report.baselines import Baseline

PROGRAM = "python -m hpcdeq.evaluate"
SPLITS = ("train", "validation", "test")

EPILOG = f"""\
options of the fixed points (single dash) win over the run's own: -deq_snes_rtol 1e-8, -deq_snes_max_it 1000, ...
gradient boosting needs scikit-learn: pip install hpcdeq[baselines]

DIR gets evaluation.json (all numbers), evaluation.md, predictions.csv, figures/confusion.png and figures/calibration.png.
exit codes: {EXIT_DONE} done, 1 failed, 2 bad usage or input
"""


def build_parser() -> CommandParser:
    """Return the parser of this command. Not collective."""
    parser = CommandParser(prog=PROGRAM, description=(__doc__ or "").strip(), epilog=EPILOG)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="run directory of hpcdeq.train")
    parser.add_argument("--data", metavar="FILE.h5", help="dataset with the samples (default: that of the training)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which samples (default test)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default RUN_DIR/evaluation)")
    parser.add_argument("--no-baselines", action="store_true", help="the model alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    return parser


@dataclass(frozen=True)
class Found:
    """What one rank found for its samples.

    Attributes
    ----------
    predictions
        A batch each.
    labels
        ``(b,)`` true classes.
    descriptors
        ``(b, d)`` descriptors and ``(b,)`` classes by split; empty without baselines.
    """

    predictions: list[Predictions]
    labels: np.ndarray
    descriptors: dict[str, tuple[np.ndarray, np.ndarray]]


def main(arguments: list[str]) -> int:
    """Evaluate, and leave a report behind.

    Collective on MPI.COMM_WORLD.

    Raises
    ------
    HpcdeqError
        The run, the data or the output is no good; agreed on all ranks.
    """
    own, petsc = split_arguments(arguments)
    options = build_parser().parse_args(own)
    import torch

    from hpcdeq import parallel
    from hpcdeq.data import Dataset
    from hpcdeq.inference import open_model
    from hpcdeq.record import RunDirectory
    from hpcdeq.record.restore import saved_of

    comm = parallel.WORLD
    model = open_model(options.run, options.device, petsc, "an evaluation")
    with parallel.agreement(comm):
        saved = saved_of(model)
        if saved.schema.task != "classification":
            raise OptionError(
                f"{options.run} is a regression: hpcdeq.evaluate is for classifications; its errors are in"
                f" {options.run / 'summary.json'}"
            )
        path = _data_of(options, saved.config["data"], saved.schema)
    directory = RunDirectory(options.out or options.run / "evaluation")
    dtype = getattr(torch, saved.config["dtype"])
    wanted = (options.split,) if options.no_baselines else tuple(dict.fromkeys(("train", "validation", options.split)))
    sets = {split: Dataset(path, split, comm, dtype) for split in wanted}
    if not sets[options.split].count:
        raise DataError(f"{path} has no {options.split} samples: choose another --split", agreed=True)
    facts = {
        "run": str(options.run),
        "iteration": saved.iteration,
        "data": str(path),
        "split": options.split,
    }
    with directory:
        directory.create(comm)
        with parallel.agreement(comm):
            found = Found(
                _predictions(model, sets[options.split], int(saved.config["chunk_size"])),
                sets[options.split].targets.numpy(),
                {}
                if options.no_baselines
                else {split: (data.descriptors(), data.targets.numpy()) for split, data in sets.items()},
            )
        every = parallel.to_root(comm, found)
        table = parallel.only_root(comm, lambda: _report(every, saved.model, saved.schema, facts, directory))
    if comm.rank == 0:
        print(f"{sets[options.split].count} {options.split} samples of {path}\n\n{table}\n")
        print(f"report     {directory.path / 'evaluation.md'}", flush=True)
    return EXIT_DONE


def _data_of(options: argparse.Namespace, trained_on: str, schema: Schema) -> Path:
    """Return the dataset to evaluate on, whose samples have to be of the kind that the model was trained on."""
    from hpcdeq.data.shards import Shards

    path = Path(options.data or trained_on)
    if not options.data and not path.exists():
        raise DataError(f"{options.run}: its data {path} are not there; say where they are with --data FILE.h5")
    given = Shards(path).schema
    other = schema.difference(given)
    if other:
        raise DataError(
            f"{path} does not fit the model in {options.run}: {other} is {getattr(given, other)} there, and"
            f" {getattr(schema, other)} in the data that it was trained on; give --data of the same kind"
        )
    return path


def _predictions(model: nn.Module, data: Dataset, chunk_size: int) -> list[Predictions]:
    """Return what the model says of this rank's samples, batch by batch."""
    from hpcdeq.inference import predict_batch

    found = []
    for start in range(0, len(data), chunk_size):
        rows = slice(start, min(start + chunk_size, len(data)))
        found.append(predict_batch(model, data.ids[rows], data.batch(rows)[0]))
    return found


def _report(every: list[Found], model: str, schema: Schema, facts: dict[str, object], directory: RunDirectory) -> str:
    """Join what the ranks found, fit the baselines and write the report, on one rank."""
    import numpy as np

    from hpcdeq.report.evaluation import Evaluated, write_evaluation

    parts = [part for found in every for part in found.predictions]
    evaluated = Evaluated(
        model,
        schema.classes,
        [name for part in parts for name in part.ids],
        np.concatenate([found.labels for found in every]),
        np.concatenate([part.outputs for part in parts]),
        np.concatenate([part.converged for part in parts]),
        _baselines(every, str(facts["split"]), len(schema.classes)),
        facts,
    )
    return write_evaluation(evaluated, directory)


def _baselines(every: list[Found], split: str, classes: int) -> list[Baseline]:
    import numpy as np

    from hpcdeq.report.baselines import Labelled, gradient_boosting, majority_class

    if not every[0].descriptors:
        return []
    joined = {
        name: Labelled(*(np.concatenate([found.descriptors[name][item] for found in every]) for item in (0, 1)))
        for name in every[0].descriptors
    }
    train, values = joined["train"], joined[split].values
    return [
        majority_class(train.labels, classes, len(values)),
        gradient_boosting(train, joined["validation"], values, classes),
    ]


if __name__ == "__main__":
    build_parser().parse_args(split_arguments(sys.argv[1:])[0])  # a wrong command line ends here, before MPI starts
    from hpcdeq.parallel import launch

    launch(main, sys.argv[1:])
