"""Train a model on a dataset: `mpirun -n N python -m hpcdeq.train [CONFIG.toml] --data FILE.h5 ...`.

Without any argument, the embedded default problem is made and trained: Burgers' equation, under a minute on 2 cores.
Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdeq.commands import CommandParser
from hpcdeq.config import EMBEDDED, NO_FALLBACK, TRAINING_OPTIONS, TrainConfig, as_toml, read_config
from hpcdeq.errors import EXIT_DONE, EXIT_FAILED, ConvergenceError, DataError, HpcdeqError, OptionError
from hpcdeq.startup import PETSC_ARGUMENTS, split_arguments

if TYPE_CHECKING:
    from hpcdeq.data import Dataset
    from hpcdeq.optim import Iterate, Result
    from hpcdeq.problem import TrainingProblem
    from hpcdeq.problem.training import Evaluation

PROGRAM = "python -m hpcdeq.train"
DEFAULT_MODELS = {"array": "mlp_deq", "graph": "graph_deq"}
# The embedded problem is for a first look: it ends within a minute on two cores.
EMBEDDED_SETTINGS = {"max_iterations": 15}
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
    parser.add_argument("--data", metavar="FILE.h5", help="dataset of hpcdeq.prepare (default: the embedded problem)")
    parser.add_argument(
        "--model", metavar="NAME", help="mlp_deq, monotone_deq, conv_deq or graph_deq (default: by the data)"
    )
    parser.add_argument("--optimizer", metavar="NAME", help="trgn (default), lbfgs, newton, adam or tao:TYPE")
    parser.add_argument("--out", metavar="DIR", help="run directory (default: a new one below runs/)")
    parser.add_argument("--max-iterations", type=int, metavar="N", help="steps, or epochs of adam (default 100)")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="of the optimisation (default: no bound)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of adam, over all ranks (default 64)")
    parser.add_argument("--learning-rate", type=float, metavar="R", help="of adam (default 0.001)")
    parser.add_argument("--weight-decay", type=float, metavar="R", help="L2 penalty R/2 |weights|^2 (default 0)")
    parser.add_argument("--seed", type=int, metavar="S", help="of weights and batches (default 0)")
    parser.add_argument("--dtype", metavar="float32|float64", help="default float64")
    parser.add_argument("--device", metavar="cpu|cuda", help="default cpu")
    parser.add_argument(
        "--on-failure",
        metavar="POLICY",
        help="samples without fixed point: raise (default), warn, mask (leave them out)",
    )
    for name, told in (
        ("warm-start", "begin fixed points at the last ones"),
        ("adaptive", "solve as progress asks for"),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=f"{told} (default)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def resolve(options: argparse.Namespace, petsc: list[str]) -> TrainConfig:
    """Return the configuration: defaults, then the file, then the command line. Not collective."""
    settings: dict[str, Any] = {} if options.config is None else read_config(options.config)
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    settings |= {name: value for name, value in vars(options).items() if name in names and value is not None}
    typed: dict[str, str] = {}
    for word in petsc:
        if word.startswith("-") and word[1:2].isalpha():
            name = word[1:]
            typed[name] = ""
        else:
            typed[name] = word
    settings["petsc"] = {**{name: _as_word(value) for name, value in settings.get("petsc", {}).items()}, **typed}
    if settings.get("data", EMBEDDED) == EMBEDDED:
        settings = {**EMBEDDED_SETTINGS, **settings}
    if settings.get("dtype", "float64") == "float64":
        settings["petsc"] = {**TRAINING_OPTIONS, **settings["petsc"]}
    settings["petsc"] = {**NO_FALLBACK, **settings["petsc"]}
    return TrainConfig(**settings)


def _as_word(value: Any) -> str:
    """Return the value of a PETSc option in a TOML file as the command line has it; true is a flag."""
    return "" if value is True else "false" if value is False else str(value)


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
        from hpcdeq.models import model_config
        from hpcdeq.optim.presets import preset_of
        from hpcdeq.petsc.options import check_types, insert_options
        from hpcdeq.petsc.vocabulary import check_options

        check_options([f"-{name}" for name in config.petsc], PREFIXES)
        check_types(config.petsc)
        insert_options(config.petsc)
        preset_of(config.optimizer)
        if config.model:
            model_config(config.model, config.model_settings)
    result = Training(config, options.out, quiet=options.quiet).run()
    return EXIT_FAILED if result.status == "diverged" else EXIT_DONE


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
        from hpcdeq.record import Progress, RunDirectory

        self.comm = parallel.WORLD
        self.config = config
        self.quiet = quiet
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(parallel.cores_of_rank(self.comm))
        self.directory = RunDirectory(out or parallel.from_root(self.comm, self._new_name()))
        self.sets = self._datasets()
        self.problem = self._problem()
        self.progress = Progress(self.problem.loss_function.metric, quiet=quiet or self.comm.rank != 0, interval=0.5)
        self.statistics: list[Any] = []
        self.best: tuple[float, Iterate, Evaluation] | None = None

    # -------------------------------------------------------------------------------------------------- set-up

    def _new_name(self) -> str:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return str(Path("runs") / f"{stamp}-{Path(self.config.data).stem}-{self.config.optimizer.replace(':', '-')}")

    def _datasets(self) -> dict[str, Dataset]:
        import torch

        from hpcdeq.data import Dataset

        path = self.config.data
        if path == EMBEDDED:
            from hpcdeq.builders.fields import prepare_burgers

            self.directory.create(self.comm)
            path = str(self.directory.path / f"{EMBEDDED}.h5")
            prepare_burgers(path, EMBEDDED_SAMPLES, comm=self.comm, command=PROGRAM)
        dtype = getattr(torch, self.config.dtype)
        sets = {split: Dataset(path, split, self.comm, dtype) for split in ("train", "validation", "test")}
        if sets["train"].count < self.comm.size:
            raise DataError(
                f"{path} has {sets['train'].count} training samples, the job {self.comm.size} ranks: run with at most"
                f" {sets['train'].count} (mpirun -n {max(1, sets['train'].count)}), or prepare more samples",
                agreed=True,
            )
        return sets

    def _problem(self) -> TrainingProblem:
        import torch

        from hpcdeq import parallel
        from hpcdeq.models import build_model, model_config
        from hpcdeq.problem import LOSSES, TrainingProblem

        config, train = self.config, self.sets["train"]
        with parallel.agreement(self.comm):
            if config.device == "cuda" and not torch.cuda.is_available():
                raise OptionError("--device cuda: torch finds no GPU here; leave the option out")
            self.model_name = config.model or DEFAULT_MODELS[train.schema.representation]
            settings = model_config(self.model_name, config.model_settings)
            model = build_model(
                self.model_name,
                settings,
                train.schema.representation,
                train.input_shape,
                train.output_size,
                seed=config.seed,
                dtype=getattr(torch, config.dtype),
                device=config.device,
            )
        # What was left to the defaults is part of what decides the run, and is saved with it.
        self.config = dataclasses.replace(config, model=self.model_name, model_settings=dataclasses.asdict(settings))
        loss = next(loss for loss in LOSSES.values() if loss.task == train.task)
        return TrainingProblem(
            model,
            train,
            loss,
            self.comm,
            chunk_size=config.chunk_size,
            weight_decay=config.weight_decay,
            warm_start=config.warm_start,
            adaptive=config.adaptive,
            on_failure=config.on_failure,
        )

    # ----------------------------------------------------------------------------------------------------- run

    def run(self) -> Result:
        """Train, write the run directory, and return the optimiser's result."""
        from hpcdeq import parallel
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
        self.history = HistoryWriter(self.directory.path / "history.csv") if self.directory.writes else None
        try:
            result = minimize(
                self.problem,
                self.config.optimizer,
                self.config.max_iterations,
                max_seconds=self.config.max_seconds,
                callback=self._record,
                adam=self._adam_settings(),
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
        return (
            f"data       {self.config.data}: {self.sets['train'].task}, {counts}\n"
            f"model      {self.model_name}, {self.problem.layout.count} weights, {self.config.dtype}\n"
            f"optimizer  {self.config.optimizer} on {self.comm.size} ranks\n"
            f"options    {preset}\n"
        )

    def _adam_settings(self) -> Any:
        from hpcdeq.optim.adam import AdamSettings

        if self.config.optimizer != "adam":
            return None
        given = AdamSettings(seed=self.config.seed)
        if self.config.learning_rate is not None:
            given = dataclasses.replace(given, learning_rate=self.config.learning_rate)
        if self.config.batch_size is not None:
            given = dataclasses.replace(given, batch_size=self.config.batch_size)
        return given

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
                self._save_best(iterate, validation.metric)

    def _save_best(self, iterate: Iterate, metric: float) -> None:
        from hpcdeq import parallel
        from hpcdeq.record import save_model

        with parallel.agreement(self.comm):
            if self.directory.writes:
                layout = self.problem.layout
                save_model(
                    self.directory.path / "best.h5",
                    self.model_name,
                    as_toml(self.config),
                    dict(zip(layout.names, layout.unflatten(iterate.x), strict=True)),
                    dict(self.problem.model.named_buffers()),
                    {
                        "iteration": iterate.iteration,
                        "metric": metric,
                        "classes": ",".join(self.sets["train"].schema.classes),
                    },
                )

    def _finish(self, result: Result) -> None:
        """Evaluate the weights of the best validation metric (the last ones without validation data) and sum up."""
        from hpcdeq import parallel
        from hpcdeq.optim import resolved_options
        from hpcdeq.petsc.options import database_options
        from hpcdeq.problem.memory import peak_bytes
        from hpcdeq.record import job_joules, over_run, summary
        from hpcdeq.report import read_run, write_figures

        x = result.x if self.best is None else self.best[1].x
        found = {split: self.problem.evaluate(x, data) if data.count else None for split, data in self.sets.items()}
        seconds = result.history[-1][1]
        joules = job_joules(self.comm, self.meter)
        peak = int(parallel.max_over_ranks(self.comm, peak_bytes()))
        with parallel.agreement(self.comm):
            if self.directory.writes:
                used = {**resolved_options(self.config.optimizer), **database_options()}
                lines = [f"-{name} {value}".rstrip() for name, value in sorted(used.items())]
                self.directory.write_text("petsc_options.txt", "\n".join(lines) + "\n")
                told = summary(
                    result,
                    task=self.sets["train"].task,
                    model=self.model_name,
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
                told["evaluated_iteration"] = result.iterations if self.best is None else self.best[1].iteration
                self.directory.write_json("summary.json", told)
                write_figures(read_run(self.directory.path))
        self.progress.finish(result, wall_seconds=seconds, run_directory=self.directory.path, **found)

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
