"""Measure solver settings: `python -m hpcdeq.study crossover [RUN_DIR | --data FILE.h5] --out DIR ...`.

`crossover` times forward iteration and Anderson mixing with each window and mixing on a batch of a model, and finds where
a longer window stops paying. Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdeq.commands import CommandParser
from hpcdeq.config import EMBEDDED, settings_as_toml
from hpcdeq.errors import EXIT_DONE, DataError, OptionError
from hpcdeq.startup import PETSC_ARGUMENTS, split_arguments

if TYPE_CHECKING:
    from hpcdeq.tuning import Case, Crossover

PROGRAM = "python -m hpcdeq.study"
PREFIX = "deq_"
STIFF = "stiff"
SAMPLES = 256
# What the study itself sets, and how it is asked for.
OWN_OPTIONS = {
    "snes_type": "the study measures batched_anderson: leave it out",
    "snes_anderson_m": "use --windows",
    "snes_anderson_beta": "use --mixings",
    "snes_rtol": "use --tolerance",
    "snes_atol": "the tolerance is relative: leave it out",
}

EPILOG = """\
without RUN_DIR and --data, a built-in stiff problem: a tanh cell of 256 units whose Jacobian has spectral radius 0.99
options of PETSc (single dash) hold for every solve, e.g. -deq_snes_max_it 3000

DIR gets crossover.csv (a row a setting), residuals.csv, figures/crossover.png and environment.json.
exit codes: 0 done, 1 failed (no setting reaches the tolerance), 2 bad usage or input
"""


def _windows(text: str) -> tuple[int, ...]:
    return _each(text, int, lambda window: window >= 0, "whole numbers from 0 on, e.g. 1,2,5,10")


def _mixings(text: str) -> tuple[float, ...]:
    return _each(text, float, lambda mixing: 0 < mixing <= 2, "numbers above 0, at most 2, e.g. 1.0,0.8")


def _each(text: str, kind: type, valid: Any, wanted: str) -> tuple[Any, ...]:
    try:
        found = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(valid(value) for value in found):
        raise argparse.ArgumentTypeError(f"{text!r}: give {wanted}")
    return found


def _count(text: str) -> int:
    (count,) = _each(text, int, lambda number: number >= 1, "a whole number, 1 or more")[:1]
    return count


def _tolerance(text: str) -> float:
    (value,) = _each(text, float, lambda number: 0 < number < 1, "a number between 0 and 1, e.g. 1e-6")[:1]
    return value


def build_parser() -> CommandParser:
    """Return the parser of this command. Not collective."""
    parser = CommandParser(prog=PROGRAM, description=(__doc__ or "").strip())
    chosen = parser.add_subparsers(dest="kind", metavar="KIND", required=True, help="one of:")
    summary = "window and mixing of Anderson: where does a longer window stop paying?"
    own = chosen.add_parser("crossover", help=summary, description=summary, epilog=EPILOG)
    own.add_argument("run", nargs="?", type=Path, metavar="RUN_DIR", help="measure on the best model of this run")
    own.add_argument(
        "--data", metavar="FILE.h5", help="measure on a fresh model for these data (or the run's data, moved)"
    )
    own.add_argument("--model", metavar="NAME", help="of the fresh model (default: what the data needs)")
    own.add_argument("--problem", choices=[STIFF], help="built-in problem (the default)")
    own.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for table and figure")
    own.add_argument(
        "--config-out", type=Path, metavar="FILE.toml", help="write the choice as settings of hpcdeq.train"
    )
    own.add_argument(
        "--windows", type=_windows, default=(1, 2, 3, 5, 8, 12, 20), metavar="M,M,...", help="default 1,2,3,5,8,12,20"
    )
    own.add_argument("--mixings", type=_mixings, default=(1.0, 0.8, 0.5), metavar="B,B,...", help="default 1.0,0.8,0.5")
    own.add_argument(
        "--tolerance", type=_tolerance, default=1e-6, metavar="R", help="relative, for each sample (default 1e-6)"
    )
    own.add_argument("--samples", type=_count, default=SAMPLES, metavar="N", help=f"in the batch (default {SAMPLES})")
    own.add_argument("--repeats", type=_count, default=5, metavar="N", help="solves that the median is of (default 5)")
    own.add_argument(
        "--exhaustive", action="store_true", help="repeat every setting, not only those that may be the best"
    )
    own.add_argument("--seed", type=int, default=0, metavar="S", help="of fresh weights and of the order (default 0)")
    own.add_argument("--dtype", choices=["float32", "float64"], help="default float64, or the run's")
    own.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    own.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def main(arguments: list[str]) -> int:
    """Measure, and leave a table, a figure and perhaps a configuration behind.

    Collective on MPI.COMM_WORLD, which has to be a single rank.

    Raises
    ------
    HpcdeqError
        An option, the run or the data are no good, or no setting reaches the tolerance.
    """
    own, petsc = split_arguments(arguments)
    options = build_parser().parse_args(own)
    _check(options, petsc)
    PETSC_ARGUMENTS[:] = petsc
    from hpcdeq import parallel
    from hpcdeq.petsc.options import insert_options
    from hpcdeq.petsc.vocabulary import check_options

    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.size > 1:
            raise OptionError("a study times one process: leave out mpirun")
        check_options([word for word in petsc if word.startswith("-")], [PREFIX])
        insert_options(_paired(petsc))
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(parallel.cores_of_rank(parallel.WORLD))
    Study(options, _paired(petsc)).run()
    return EXIT_DONE


def _check(options: argparse.Namespace, petsc: list[str]) -> None:
    """Refuse options that contradict each other, before anything is imported."""
    if options.problem and (options.run or options.data):
        raise OptionError(f"--problem {options.problem} is measured without data: leave out RUN_DIR and --data")
    if options.model and not options.data:
        raise OptionError(f"--model {options.model} needs data to be built for: add --data FILE.h5")
    if options.model and options.run:
        raise OptionError(f"the run in {options.run} has its own model: leave out --model {options.model}")
    if options.seed < 0:
        raise OptionError(f"--seed {options.seed}: at least 0")
    for word in petsc:
        if word.startswith("-tao_"):
            raise OptionError(f"{word} is not for a study, which trains nothing: leave it out")
        advice = OWN_OPTIONS.get(word.removeprefix(f"-{PREFIX}"))
        if advice:
            raise OptionError(f"{word} is not for a study: {advice}")
    target = options.config_out
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        trouble = "is a folder" if target.is_dir() else f"cannot be written, there is no folder {target.parent}"
        raise OptionError(f"--config-out {target} {trouble}: give a file name, e.g. crossover.toml")


def _paired(petsc: list[str]) -> dict[str, str]:
    """Return PETSc's words of the command line as names and values; a flag has none."""
    given: dict[str, str] = {}
    name = ""
    for word in petsc:
        if word.startswith("-") and word[1:2].isalpha():
            name = word[1:]
            given[name] = ""
        else:
            given[name] = word
    return given


class Study:
    """One study of window and mixing, on one rank.

    Parameters
    ----------
    options
        hpcdeq's part of the command line.
    petsc
        PETSc's part: names and values.
    """

    def __init__(self, options: argparse.Namespace, petsc: dict[str, str]) -> None:
        from hpcdeq.record import RunDirectory

        self.options = options
        self.petsc = petsc
        self.settings: dict[str, Any] = {}  # of hpcdeq.train, to which the choice is added
        self.case = self._case()
        self.directory = RunDirectory(options.out)

    def _case(self) -> Case:
        import torch

        from hpcdeq.record.restore import read_saved
        from hpcdeq.tuning import fresh_case, stiff_case, trained_case

        options = self.options
        if options.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("--device cuda: torch finds no GPU here; leave the option out")
        settings = dict(read_saved(options.run)[0].config) if options.run else None
        dtype_name = options.dtype or (settings["dtype"] if settings else None) or "float64"
        dtype = getattr(torch, dtype_name)
        if settings is not None:
            data = options.data or settings["data"]
            if data == EMBEDDED:
                data = str(options.run / f"{EMBEDDED}.h5")
            if not Path(data).exists():
                raise DataError(f"{options.run}: its data {data} are not there; say where they are with --data FILE.h5")
            self.settings = settings
            return trained_case(options.run, data, options.samples, dtype, options.device)
        if options.data:
            name = options.model or self._default_model()
            self.settings = {"data": options.data, "model": name, "seed": options.seed, "dtype": dtype_name}
            return fresh_case(options.data, name, {}, options.samples, options.seed, dtype, options.device)
        return stiff_case(samples=options.samples, seed=options.seed, dtype=dtype, device=options.device)

    def _default_model(self) -> str:
        from hpcdeq.config import DEFAULT_MODELS
        from hpcdeq.data.shards import Shards

        return DEFAULT_MODELS[Shards(Path(self.options.data)).schema.representation]

    def run(self) -> Crossover:
        """Measure, print what was found, and write it."""
        with self.directory:
            return self._measure()

    def _measure(self) -> Crossover:
        import torch

        from hpcdeq import parallel
        from hpcdeq.petsc.options import unused_options
        from hpcdeq.record import environment
        from hpcdeq.report import crossover_rows, crossover_text, residual_rows, to_csv, write_crossover_figure
        from hpcdeq.tuning import find_crossover, measure_settings, solver_of

        options = self.options
        self.directory.create(parallel.WORLD)
        self._say(f"{self.case.title}, tolerance {options.tolerance:g}")
        measurement = measure_settings(
            solver_of(self.case, options.tolerance),
            options.windows,
            options.mixings,
            options.repeats,
            exhaustive=options.exhaustive,
            threads=torch.get_num_threads() if options.device == "cpu" else 0,
            seed=options.seed,
            progress=self._say,
        )
        found = find_crossover(measurement, options.tolerance)
        measured = measurement.entries
        print(crossover_text(measured, found), flush=True)
        self.directory.write_text("crossover.csv", to_csv(crossover_rows(measured, found)))
        self.directory.write_text("residuals.csv", to_csv(residual_rows(measured)))
        self.directory.write_json("environment.json", environment(parallel.WORLD, options.seed))
        figure = self.directory.path / "figures" / "crossover.png"
        write_crossover_figure(figure, self.case.title, measured, found, options.tolerance)
        print(f"files      {self.directory.path}/crossover.csv, residuals.csv, figures/crossover.png")
        unread = unused_options((PREFIX,))
        if unread:
            self._say(f"note: given but read by no solver of this study: {', '.join(unread)}")
        if options.config_out:
            self._write_config(found)
        return found

    def _write_config(self, found: Crossover) -> None:
        from hpcdeq.record.atomic import replaced

        setting, options = found.best.setting, self.options
        chosen = {
            **{name: value for name, value in self.petsc.items() if name.startswith(f"{PREFIX}snes_anderson_")},
            f"{PREFIX}snes_type": "batched_anderson",
            f"{PREFIX}snes_anderson_m": str(setting.window),
            f"{PREFIX}snes_anderson_beta": f"{setting.mixing:g}",
        }
        settings = {**self.settings, "petsc": {**self.settings.get("petsc", {}), **chosen}}
        comment = f"{setting}: the best of a study to {options.tolerance:g} on {self.case.title}"
        try:
            with replaced(options.config_out) as temporary:
                temporary.write_text(settings_as_toml(settings, comment), encoding="utf-8")
        except OSError as error:
            raise OptionError(f"--config-out {options.config_out} cannot be written: {error.strerror}") from error
        print(f"next: mpirun -n 2 python -m hpcdeq.train {options.config_out}")

    def _say(self, text: str) -> None:
        if not self.options.quiet:
            print(text, flush=True)


if __name__ == "__main__":
    build_parser().parse_args(split_arguments(sys.argv[1:])[0])  # a wrong command line ends here, before MPI starts
    from hpcdeq.parallel import launch

    launch(main, sys.argv[1:])
