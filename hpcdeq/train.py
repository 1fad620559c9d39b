"""Train a model on a dataset: `mpirun -n N python -m hpcdeq.train [CONFIG.toml] --data FILE.h5 ...`.

Without any argument, the embedded default problem is made and trained: Burgers' equation, under a minute on 2 cores.
Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hpcdeq.commands import CommandParser
from hpcdeq.config import TrainConfig, as_word, complete, named_options, read_config
from hpcdeq.config_options import add_keeping, add_settings, with_options
from hpcdeq.continuing import Held, held_in, refuse_changes
from hpcdeq.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, UsageError
from hpcdeq.methods import METHODS
from hpcdeq.startup import PETSC_ARGUMENTS, split_arguments
from hpcdeq.training import PREFIXES, PROGRAM, Keeping, Training
from hpcdeq.watchdog import HANG_SECONDS, hang_seconds, watched

EPILOG = """\
options of PETSc (single dash) go to its options database untouched:
  -tao_...                  the optimiser, e.g. -tao_gatol 1e-8 -tao_bnk_ksp_max_it 30
  -deq_snes_...             the fixed points, e.g. -deq_snes_type ngmres -deq_snes_monitor
  -deq_ksp_... -deq_pc_...  the tangent and adjoint systems, e.g. -deq_ksp_type bcgs

SIGTERM, SIGUSR1 and the wall-time limit (Slurm's, or --wall-seconds) stop a run at its next safe point, with a checkpoint;
a second signal stops at once. The same command with --out DIR --resume begins a run, goes on with it, or says that it ended.

A run whose launcher or one of whose ranks is killed ends, and goes on from its last checkpoint; one job at a time works in DIR.

exit codes: 0 done, 1 failed, 2 bad usage or input, 75 interrupted: --resume goes on
"""


def build_parser() -> CommandParser:
    """Return the parser of this command. Not collective."""
    parser = CommandParser(prog=PROGRAM, description=(__doc__ or "").strip(), epilog=EPILOG)
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="settings; options on the command line win")
    parser.add_argument(
        "--optimizer", metavar="NAME", help=f"{METHODS[0]} (default), {', '.join(METHODS[1:])} or tao:TYPE"
    )
    parser.add_argument("--out", metavar="DIR", help="run directory (default: a new one below runs/)")
    parser.add_argument("--seed", type=int, metavar="S", help="of weights and batches (default 0)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out DIR, on any number of ranks; begin it if there is none yet",
    )
    add_keeping(parser)
    add_settings(parser)
    return parser


def given_settings(options: argparse.Namespace, petsc: list[str]) -> dict[str, Any]:
    """Return the settings of the file and, over them, of the command line; defaults are left out. Not collective."""
    settings: dict[str, Any] = {} if options.config is None else read_config(options.config)
    settings = with_options(settings, options)
    typed = {**settings.get("petsc", {}), **named_options(petsc)}
    settings["petsc"] = {name: as_word(value) for name, value in typed.items()}
    return settings


def resolve(options: argparse.Namespace, petsc: list[str]) -> tuple[Held, TrainConfig]:
    """Return what a run directory holds, and the configuration: what is given, over the defaults or over that of a run there.

    Not collective.

    Raises
    ------
    HpcdeqError
        A file cannot be read, a setting does not exist or may not change, or the run cannot go on.
    """
    given = given_settings(options, petsc)
    if not options.resume:
        return Held(), complete(given)
    if options.out is None:
        raise UsageError("--resume goes on with the run in a directory: give it, with --out DIR")
    held = held_in(Path(options.out), given)
    former = held.settings
    if former is None:
        return held, complete(given)
    refuse_changes(Path(options.out), former, given)
    tables = {name: {**former.get(name, {}), **given.get(name, {})} for name in ("model_settings", "petsc")}
    return held, complete({**former, **given, **tables, "data": former["data"]})


def main(arguments: list[str]) -> int:
    """Train and leave a run directory behind.

    Collective on MPI.COMM_WORLD.

    Raises
    ------
    HpcdeqError
        Agreed on all ranks, wherever it came from.
    """
    own, petsc = split_arguments(arguments)
    options = build_parser().parse_args(own)
    from hpcdeq import parallel

    # One rank reads CONFIG.toml: if it changes meanwhile, the ranks would not agree on what to do next.
    held, config = parallel.only_root(parallel.WORLD, lambda: resolve(options, petsc))
    with parallel.agreement(parallel.WORLD):
        patience = hang_seconds(options.hang_seconds, HANG_SECONDS)
        PETSC_ARGUMENTS[:] = [word for name, value in config.petsc.items() for word in (f"-{name}", value) if word]
        from hpcdeq.petsc.options import insert_options

        check(config)
        insert_options(config.petsc)
    if held.ended:
        if parallel.WORLD.rank == 0 and not options.quiet:
            print(held.ended, flush=True)
        return exit_code(held.status)
    keeping = Keeping.of(options, resume=held.settings is not None)
    from hpcdeq.record import Signals

    with watched(patience), Signals(speak=parallel.WORLD.rank == 0) as signals:
        result = Training(config, options.out, signals, quiet=options.quiet, keeping=keeping).run()
    if (
        result.status == "diverged" and options.quiet and parallel.WORLD.rank == 0
    ):  # an error, which is printed in any case
        sys.stderr.write(f"diverged: {result.message}\n")
    return exit_code(result.status)


def exit_code(status: str) -> int:
    """Return the exit code of a run that ended so. Not collective."""
    return {"diverged": EXIT_FAILED, "interrupted": EXIT_INTERRUPTED}.get(status, EXIT_DONE)


def check(config: TrainConfig) -> None:
    """Refuse names and PETSc options that do not exist, before anything is made. Not collective."""
    from hpcdeq.models import model_config
    from hpcdeq.optim.presets import check_rebalancing, preset_of
    from hpcdeq.petsc.options import check_types
    from hpcdeq.petsc.vocabulary import check_options

    check_options([f"-{name}" for name in config.petsc], PREFIXES)
    check_types(config.petsc)
    preset_of(config.optimizer)
    if config.rebalance is not None:
        check_rebalancing(config.optimizer)
    if config.model:
        model_config(config.model, config.model_settings)


if __name__ == "__main__":
    build_parser().parse_args(split_arguments(sys.argv[1:])[0])  # a wrong command line ends here, before MPI starts
    from hpcdeq.parallel import launch

    launch(main, sys.argv[1:])
