"""Train a model on a dataset: `mpirun -n N python -m hpcdeq.train [CONFIG.toml] --data FILE.h5 ...`.

Without any argument, the embedded default problem is made and trained: Burgers' equation, under a minute on 2 cores.
Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdeq.commands import CommandParser
from hpcdeq.config import EMBEDDED, TrainConfig, as_toml, complete, named_options, read_config
from hpcdeq.config_options import add_settings, with_options
from hpcdeq.errors import EXIT_DONE, EXIT_FAILED, ConvergenceError, HpcdeqError
from hpcdeq.methods import METHODS, MINIBATCH
from hpcdeq.startup import PETSC_ARGUMENTS, split_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from hpcdeq.data import Dataset
    from hpcdeq.optim import Iterate, Result
    from hpcdeq.problem.training import Evaluation

PROGRAM = "python -m hpcdeq.train"
EMBEDDED_SAMPLES = 1000
PREFIXES = ("tao_", "deq_")  # what an option of PETSc's must begin with

EPILOG = """\
options of PETSc (single dash) go to its options database untouched:
  -tao_...                  the optimiser, e.g. -tao_gatol 1e-8 -tao_bnk_ksp_max_it 30
  -deq_snes_...             the fixed points, e.g. -deq_snes_type ngmres -deq_snes_monitor
  -deq_ksp_... -deq_pc_...  the tangent and adjoint systems, e.g. -deq_ksp_type bcgs

exit codes: 0 done, 1 failed, 2 bad usage or input
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
    add_settings(parser)
    return parser


def resolve(options: argparse.Namespace, petsc: list[str]) -> TrainConfig:
    """Return the configuration: defaults, then the file, then the command line. Not collective."""
    settings: dict[str, Any] = {} if options.config is None else read_config(options.config)
    settings = with_options(settings, options)
    settings["petsc"] = {**settings.get("petsc", {}), **named_options(petsc)}
    return complete(settings)


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

    with parallel.agreement(parallel.WORLD):
        config = resolve(options, petsc)
        PETSC_ARGUMENTS[:] = [word for name, value in config.petsc.items() for word in (f"-{name}", value) if word]
        from hpcdeq.petsc.options import insert_options

        check(config)
        insert_options(config.petsc)
    result = Training(config, options.out, quiet=options.quiet).run()
    return EXIT_FAILED if result.status == "diverged" else EXIT_DONE


def check(config: TrainConfig) -> None:
    """Refuse names and PETSc options that do not exist, before anything is made. Not collective."""
    from hpcdeq.models import model_config
    from hpcdeq.optim.presets import preset_of
    from hpcdeq.petsc.options import check_types
    from hpcdeq.petsc.vocabulary import check_options

    check_options([f"-{name}" for name in config.petsc], PREFIXES)
    check_types(config.petsc)
    preset_of(config.optimizer)
    if config.model:
        model_config(config.model, config.model_settings)


class Training:
    """One training run. Every method is collective on MPI.COMM_WORLD.

    Parameters
    ----------
    config
        The resolved configuration.
    out
        Run directory; None: a new one below ``runs``.
    quiet
        Print nothing but errors.
    """

    def __init__(self, config: TrainConfig, out: str | None, *, quiet: bool) -> None:
        import torch

        from hpcdeq import parallel
        from hpcdeq.record import Progress, RunDirectory, fingerprint
        from hpcdeq.tasks import make_problem

        self.comm = parallel.WORLD
        self.config = config
        self.quiet = quiet
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(parallel.cores_of_rank(self.comm))
        self.directory = RunDirectory(out or parallel.from_root(self.comm, self._new_name()))
        self.sets = self._datasets()
        self.config, self.problem = make_problem(config, self.sets["train"], self.comm)
        self.progress = Progress(self.problem.loss_function.metric, quiet=quiet or self.comm.rank != 0, interval=0.5)
        # What the summary says of the run besides its result.
        self.facts = {
            "samples": {split: data.count for split, data in self.sets.items()},
            "initial_weights": fingerprint(self.problem.initial()),
        }
        self.statistics: list[Any] = []
        self.best: tuple[float, Iterate, Evaluation] | None = None

    # -------------------------------------------------------------------------------------------------- set-up

    def _new_name(self) -> str:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return str(Path("runs") / f"{stamp}-{Path(self.config.data).stem}-{self.config.optimizer.replace(':', '-')}")

    def _datasets(self) -> dict[str, Dataset]:
        from hpcdeq.tasks import read_splits

        path = self.config.data
        if path == EMBEDDED:
            from hpcdeq.builders.fields import prepare_burgers

            self.directory.create(self.comm)
            path = str(self.directory.path / f"{EMBEDDED}.h5")
            prepare_burgers(path, EMBEDDED_SAMPLES, comm=self.comm, command=PROGRAM)
        return read_splits(path, self.config.dtype, self.comm)

    # ----------------------------------------------------------------------------------------------------- run

    def run(self) -> Result:
        """Train, write the run directory, and return the optimiser's result."""
        from hpcdeq import parallel
        from hpcdeq.data.dataset import missing_classes
        from hpcdeq.optim import minimize
        from hpcdeq.petsc.options import unused_options
        from hpcdeq.problem import describe_solves
        from hpcdeq.record import HistoryWriter, environment, host_meter

        if not self.directory.writes and self.config.data != EMBEDDED:
            self.directory.create(self.comm)
        self.meter = host_meter(self.comm)
        if self.meter is not None:
            self.meter.start()
        with parallel.agreement(self.comm):
            if self.directory.writes:
                self.directory.write_text("config.toml", as_toml(self.config))
                self.directory.write_json("environment.json", environment(self.comm, self.config.seed))
        self._say(self._headline())
        if self.config.memory_per_rank is not None:
            self._say(
                f"memory     {self.config.memory_per_rank:g} GiB a rank: chunks of {self.config.chunk_size} samples\n"
            )
        absent = missing_classes(self.sets["train"], self.comm)
        if absent:
            self._say(
                f"note: no training sample is of class {', '.join(absent)}; the model learns never to answer it\n"
            )
        self.history = HistoryWriter(self.directory.path / "history.csv") if self.directory.writes else None
        try:
            result = minimize(
                self.problem,
                self.config.optimizer,
                self.config.max_iterations,
                max_seconds=self.config.max_seconds,
                callback=self._record,
                minibatch=self._minibatch_settings(),
                sampling=self._sampling(),
                curvature=self.config.curvature,
                raise_on_failure=False,
            )
        except ConvergenceError as error:
            raise self._leave_failed(error) from error
        finally:
            if self.history is not None:
                self.history.close()
        unread = unused_options(PREFIXES)
        self._finish(result)
        self._say(describe_solves(self.problem))
        if unread:
            self._say(f"note: given but read by no solver of this run: {', '.join(unread)}")
        return result

    def _headline(self) -> str:
        from hpcdeq.optim import resolved_options

        counts = ", ".join(f"{split} {data.count}" for split, data in self.sets.items())
        preset = " ".join(
            f"-{k} {v}" for k, v in {**resolved_options(self.config.optimizer), **self.config.petsc}.items()
        )
        if self.config.optimizer in MINIBATCH:
            names = ("learning_rate", "schedule", "warmup", "learning_rate_floor", "average", "batch_size")
            given = {name: getattr(self.config, name) for name in names}
            told = [f"--{k.replace('_', '-')} {v}" for k, v in given.items() if v is not None]
            preset = " ".join([*told, preset])
        return (
            f"data       {self.config.data}: {self.sets['train'].task}, {counts}\n"
            f"model      {self.config.model}, {self.problem.layout.count} weights, {self.config.dtype}\n"
            f"optimizer  {self.config.optimizer} on {self.comm.size} ranks\n"
            f"options    {preset}\n"
        )

    def _minibatch_settings(self) -> Any:
        from hpcdeq.optim.stochastic import MinibatchSettings

        config = self.config
        if config.optimizer not in MINIBATCH:
            return None
        given = {name: getattr(config, name) for name in ("learning_rate", "batch_size", "weight_decay", "average")}
        given = {name: value for name, value in given.items() if value is not None}
        return MinibatchSettings(seed=config.seed, schedule=config.learning_rates(), **given)

    def _sampling(self) -> Any:
        from hpcdeq.optim.sampling import Sampling

        config = self.config
        if config.optimizer in MINIBATCH or (config.hessian_fraction is None and config.batch_size is None):
            return None
        given = {name: getattr(config, name) for name in ("hessian_fraction", "batch_size", "batch_growth")}
        return Sampling(seed=config.seed, **{name: value for name, value in given.items() if value is not None})

    def _record(self, iterate: Iterate) -> None:
        from hpcdeq import parallel
        from hpcdeq.problem.memory import process_bytes
        from hpcdeq.record import job_joules

        validation = (
            self.problem.evaluate(iterate.x, self.sets["validation"]) if self.sets["validation"].count else None
        )
        if iterate.fixed_point is not None:
            self.statistics.append(iterate.fixed_point)
        memory = int(parallel.max_over_ranks(self.comm, process_bytes()))
        joules = job_joules(self.comm, self.meter)
        with parallel.agreement(self.comm):
            if self.history is not None:
                self.history.write(iterate, validation, memory, joules)
        self.progress.write(iterate, validation)
        if validation is not None and validation.metric == validation.metric:
            sign = 1.0 if self.problem.loss_function.larger_is_better else -1.0
            if self.best is None or sign * validation.metric > self.best[0]:
                self.best = (sign * validation.metric, iterate, validation)
                self._save_best(iterate.x, iterate.iteration, validation.metric)

    def _save_best(self, x: Tensor, iteration: int, metric: float) -> None:
        from hpcdeq import parallel
        from hpcdeq.record import save_model

        with parallel.agreement(self.comm):
            if self.directory.writes:
                layout = self.problem.layout
                save_model(
                    self.directory.path / "best.h5",
                    self.config.model,
                    as_toml(self.config),
                    dict(zip(layout.names, layout.unflatten(x), strict=True)),
                    dict(self.problem.model.named_buffers()),
                    {"iteration": iteration, "metric": metric, "schema": self.sets["train"].schema.as_json()},
                )

    def _finish(self, result: Result) -> None:
        """Evaluate the weights of the best validation metric (the last ones without validation data) and sum up."""
        from hpcdeq import parallel
        from hpcdeq.optim import resolved_options
        from hpcdeq.petsc.options import database_options
        from hpcdeq.problem.memory import peak_bytes
        from hpcdeq.problem.phases import describe_phases, summarise_phases
        from hpcdeq.record import job_joules, over_run, summary
        from hpcdeq.report import read_run, write_figures

        if self.best is None:  # no validation data
            self._save_best(result.x, result.iterations, float("nan"))
        x = result.x if self.best is None else self.best[1].x
        found = {split: self.problem.evaluate(x, data) if data.count else None for split, data in self.sets.items()}
        seconds = result.history[-1][1]
        joules = job_joules(self.comm, self.meter)
        peak = int(parallel.max_over_ranks(self.comm, peak_bytes()))
        times = self.problem.phases.over_ranks(self.comm)
        with parallel.agreement(self.comm):
            if self.directory.writes:
                used = {**resolved_options(self.config.optimizer), **database_options()}
                lines = [f"-{name} {value}".rstrip() for name, value in sorted(used.items())]
                self.directory.write_text("petsc_options.txt", "\n".join(lines) + "\n")
                told = summary(
                    result,
                    task=self.sets["train"].task,
                    model=self.config.model,
                    optimizer=self.config.optimizer,
                    metric_name=self.problem.loss_function.metric,
                    fixed_point=over_run(self.statistics),
                    wall_seconds=seconds,
                    ranks=self.comm.size,
                    dtype=self.config.dtype,
                    device=self.config.device,
                    seed=self.config.seed,
                    energy_joules=joules,
                    peak_memory_bytes=peak,
                    **found,
                )
                told |= self.facts | summarise_phases(times, result.counts, result.iterations, self.sets["train"].count)
                told["evaluated_iteration"] = result.iterations if self.best is None else self.best[1].iteration
                self.directory.write_json("summary.json", told)
                write_figures(read_run(self.directory.path))
        self.progress.finish(result, wall_seconds=seconds, run_directory=self.directory.path, **found)
        self._say(describe_phases(times))

    def _leave_failed(self, error: ConvergenceError) -> HpcdeqError:
        """Return the error with what a user needs to know of what is left in the run directory."""
        told = f"{error}\nThe run directory {self.directory.path} holds the history up to here and no summary."
        return ConvergenceError(told, record=error.record, agreed=error.agreed)

    def _say(self, text: str) -> None:
        if self.comm.rank == 0 and not self.quiet:
            print(text, flush=True)


if __name__ == "__main__":
    build_parser().parse_args(split_arguments(sys.argv[1:])[0])  # a wrong command line ends here, before MPI starts
    from hpcdeq.parallel import launch

    launch(main, sys.argv[1:])
