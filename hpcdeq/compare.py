"""Compare optimizers: `mpirun -n N python -m hpcdeq.compare --data FILE.h5 --optimizers trgn,adam --seeds 3 --out DIR`.

Every method runs from the same weights, on the same data, with the same clock and counters. DIR gets a directory for each
run and a report: comparison.html, .md and .csv, and figures. The same command goes on where it was stopped. Given run
directories (or the DIR of a comparison), it compares those.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from hpcdeq.campaign.campaign import Campaign
from hpcdeq.campaign.plan import UNBOUNDED, Variant, parts_of, plan_variants, read_set, split_base
from hpcdeq.commands import CommandParser
from hpcdeq.config import EMBEDDED, EMBEDDED_SETTINGS, named_options, read_toml
from hpcdeq.config_options import KEEPING, add_keeping, add_settings, with_options
from hpcdeq.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, OptionError, suggestion
from hpcdeq.methods import learning_rate_grid
from hpcdeq.startup import PETSC_ARGUMENTS, split_arguments
from hpcdeq.train import check
from hpcdeq.training import Keeping
from hpcdeq.watchdog import HANG_SECONDS, hang_seconds, watched

PROGRAM = "python -m hpcdeq.compare"
OPTIMIZERS = ("trgn", "lbfgs", "newton", "adam")
REFERENCE = "adam"
GRID = "grid"
OWN = {"sources", "out", "reference", "quiet", "verbose", *KEEPING}  # options that go with run directories too

EPILOG = f"""\
settings of one method: --set adam:batch_size=128 --set trgn:tao_trust0=0.5, or a table in CONFIG.toml:
  [optimizers.adam]          [optimizers.trgn-wide]
  batch_size = 128           optimizer = "trgn"
                             petsc = {{ tao_trust0 = 10 }}
options of PETSc (single dash, -tao_... -deq_...) are for all methods

DIR gets comparison.html (one file, with its figures), comparison.md, comparison.csv, figures/ and runs/METHOD-SEED/.
Jobs beside each other: --part 0/9, --part 1/9, ... each work in DIR/parts/K, and the report of all is made by
  {PROGRAM} DIR/parts/* --out DIR
without --data, the embedded default problem
SIGTERM, SIGUSR1 and the wall-time limit leave the run of the moment with a checkpoint; the same command goes on with it
exit codes: {EXIT_DONE} done, {EXIT_FAILED} failed (all runs diverged), 2 bad usage or input, {EXIT_INTERRUPTED} interrupted
"""


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: give names with commas between, e.g. trgn,lbfgs,adam")
    return names


def _rates(text: str) -> tuple[float, ...]:
    if text == GRID:
        return learning_rate_grid()
    try:
        rates = tuple(sorted({float(word) for word in text.split(",")}))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        grid = ",".join(f"{rate:g}" for rate in learning_rate_grid())
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers above 0, e.g. {grid}, or {GRID} for these")
    return rates


def _seeds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give how many, 1 or more")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: give which of how many, from 0 on, e.g. 0/9")
    return int(number), int(count)


def build_parser() -> CommandParser:
    """Return the parser of this command. Not collective."""
    parser = CommandParser(prog=PROGRAM, description=(__doc__ or "").strip(), epilog=EPILOG)
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        metavar="CONFIG.toml|RUN_DIR",
        help="settings, or finished runs to compare",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the runs and the report")
    parser.add_argument(
        "--optimizers", type=_names, metavar="NAME,...", help=f"methods to compare (default {','.join(OPTIMIZERS)})"
    )
    parser.add_argument("--seeds", type=_seeds, metavar="N", help="runs of each method (default 3)")
    parser.add_argument(
        "--learning-rates",
        type=_rates,
        metavar=f"R,...|{GRID}",
        help="try these with the first seed of adam, adamw, rmsprop; the best on validation data goes on",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD:SETTING=VALUE", help="a setting of one method; repeatable"
    )
    parser.add_argument(
        "--reference", metavar="NAME", help=f"method that times are measured against (default {REFERENCE}, or the last)"
    )
    parser.add_argument(
        "--part", type=_part, metavar="K/N", help="do one run of the N, the K-th from 0; those of a scan are one part"
    )
    parser.add_argument("--quiet", action="store_true", help="print a line for each run that ends, and errors")
    parser.add_argument("--verbose", action="store_true", help="print the progress of every run")
    add_keeping(parser)
    add_settings(parser)
    return parser


def main(arguments: list[str]) -> int:
    """Run what is still to be run, and leave a report behind.

    Collective on MPI.COMM_WORLD.

    Raises
    ------
    HpcdeqError
        Agreed on all ranks, wherever it came from.
    """
    own, petsc = split_arguments(arguments)
    options = build_parser().parse_args(own)
    PETSC_ARGUMENTS[:] = petsc
    from hpcdeq import parallel

    given = [path for path in options.sources if path.suffix != ".toml"]
    if given:
        import hpcdeq.report  # noqa: F401 (initialises PETSc, which all ranks have to do together)

        parallel.only_root(parallel.WORLD, lambda: _compare_directories(given, options, petsc))
        return EXIT_DONE
    # One rank reads CONFIG.toml: if it changes meanwhile, the ranks would not agree on what to do next.
    variants, seeds = parallel.only_root(parallel.WORLD, lambda: _plan(options, petsc))
    with parallel.agreement(parallel.WORLD):
        patience = hang_seconds(options.hang_seconds, HANG_SECONDS)
        reference = _reference(options.reference, {v.label: v.config.optimizer for v in variants})
        for variant in variants:
            check(variant.config)
        out = options.out
        if options.part is not None:
            number, count = options.part
            variants, seeds = _part_of(variants, seeds, number, count)
            out = out / "parts" / str(number)
    keeping = Keeping.of(options, resume=False)
    with watched(patience):
        campaign = Campaign(
            variants, seeds, reference, out, quiet=options.quiet, verbose=options.verbose, keeping=keeping
        )
        good = campaign.run()
    return EXIT_INTERRUPTED if campaign.interrupted else EXIT_DONE if good else EXIT_FAILED


def _check_alone(options: argparse.Namespace, petsc: list[str]) -> None:
    """Refuse options of training beside run directories."""
    others = [str(path) for path in options.sources if path.suffix == ".toml"]
    others += [f"--{name.replace('_', '-')}" for name, value in vars(options).items() if name not in OWN and value]
    if others or petsc:
        word = (others + petsc)[0]
        raise OptionError(f"{word}: runs that have ended are compared as they are; leave it out, or leave out the runs")


def _compare_directories(paths: list[Path], options: argparse.Namespace, petsc: list[str]) -> None:
    """Write the report of runs that have ended."""
    _check_alone(options, petsc)
    from hpcdeq.report import Comparison, group_runs, read_run, write_comparison

    found: list[Path] = []
    for path in paths:
        inside = sorted(summary.parent for summary in path.glob("runs/*/summary.json"))
        found += inside if inside and not (path / "summary.json").exists() else [path]
    twice = [path for number, path in enumerate(found) if path.resolve() in [p.resolve() for p in found[:number]]]
    if twice:
        raise OptionError(f"{twice[0]} is given twice: leave one out")
    methods = group_runs(read_run(path) for path in found)
    _make(options.out)
    # Where one optimizer has several settings, the one with most seeds is what a scan has chosen.
    ranked = sorted(methods, key=lambda method: len(method.runs))
    reference = _reference(options.reference, {m.name: str(m.runs[0].summary["optimizer"]) for m in ranked})
    write_comparison(Comparison(methods, reference), options.out)
    print(f"report     {options.out / 'comparison.html'}", flush=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out {folder} cannot be made ({error.strerror}): choose another") from error


def _reference(name: str | None, optimizers: dict[str, str]) -> str:
    """Return the method that the others are measured against, of all methods and their optimizers."""
    if name is None:
        usual = [label for label, optimizer in optimizers.items() if optimizer == REFERENCE]
        return (usual or list(optimizers))[-1]
    if name not in optimizers:
        hint = suggestion(name, optimizers, f"choose one of {', '.join(optimizers)}")
        raise OptionError(f"--reference {name} is not compared: {hint}")
    return name


def _part_of(variants: list[Variant], seeds: range, number: int, count: int) -> tuple[list[Variant], range]:
    """Return what one of the jobs that share a comparison does."""
    parts = parts_of(variants, seeds)
    if count != len(parts):
        raise OptionError(
            f"--part {number}/{count}: this comparison has {len(parts)} parts; in Slurm, sbatch --array=0-{len(parts) - 1}"
        )
    variant, own = parts[number]
    return [variant], own


def _plan(options: argparse.Namespace, petsc: list[str]) -> tuple[list[Variant], range]:
    """Return the methods with their settings, and the seeds."""
    if len(options.sources) > 1:
        raise OptionError(f"{options.sources[1]}: one CONFIG.toml at most; the settings of a method have a table in it")
    base: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for path in options.sources:
        base, tables = split_base(read_toml(path), f"configuration {path}")
    base = with_options(base, options)
    base["petsc"] = {**base.get("petsc", {}), **named_options(petsc)}
    base.pop("optimizer", None)
    first = base.pop("seed", 0)
    if base.get("data", EMBEDDED) == EMBEDDED:
        base["data"] = str(options.out / f"{EMBEDDED}.h5")
        if base.get("max_seconds") is None:
            base = {**EMBEDDED_SETTINGS, **base}
    if base.get("max_seconds") is not None:
        base.setdefault("max_iterations", UNBOUNDED)
    labels = options.optimizers or tuple(tables) or OPTIMIZERS
    variants = plan_variants(labels, base, (tables, read_set(options.set)), options.learning_rates or ())
    return variants, range(first, first + (options.seeds or 3))


if __name__ == "__main__":
    build_parser().parse_args(split_arguments(sys.argv[1:])[0])  # a wrong command line ends here, before MPI starts
    from hpcdeq.parallel import launch

    launch(main, sys.argv[1:])
