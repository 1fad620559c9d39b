"""One training run, from its datasets to its run directory.

Nothing heavy is imported with the module: commands import it before they understand their command line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpcdeq.config import BEGUN_WITH, EMBEDDED, TrainConfig, as_toml
from hpcdeq.errors import ConvergenceError, HpcdeqError, UsageError
from hpcdeq.startup import STARTED

if TYPE_CHECKING:
    from torch import Tensor

    from hpcdeq.data import Dataset
    from hpcdeq.optim import Iterate, Result
    from hpcdeq.record import HistoryWriter, Signals
    from hpcdeq.state import Known, State

PROGRAM = "python -m hpcdeq.train"
EMBEDDED_SAMPLES = 1000
RELEASE_SECONDS = 10.0  # from one release of unused memory to the next: pages that are used again cost time
PREFIXES = ("tao_", "deq_")  # what an option of PETSc's must begin with


class Keeping(NamedTuple):
    """When and how checkpoints are kept.

    Attributes
    ----------
    resume
        Whether to go on from one.
    first
        Whether to keep one at the first safe point, so that there is something to go on from.
    every, cache_mebibytes, wall_seconds
        As the options say.
    """

    resume: bool = False
    first: bool = False
    every: int | None = None
    cache_mebibytes: float = 1024.0
    wall_seconds: float | None = None

    @staticmethod
    def of(options: argparse.Namespace, *, resume: bool) -> Keeping:
        """Return what a command line asks for. Not collective."""
        asked = bool(vars(options).get("resume")) and not resume
        return Keeping(resume, asked, options.checkpoint_every, options.checkpoint_cache, options.wall_seconds)


class Best(NamedTuple):
    """The iterate with the best validation metric so far; of ``value`` more is better."""

    value: float
    metric: float
    iteration: int
    x: Tensor


class Training:
    """One training run. Every method is collective on MPI.COMM_WORLD.

    Parameters
    ----------
    config
        The resolved configuration.
    out
        Run directory; None: a new one below ``runs``.
    signals
        What may interrupt it.
    quiet
        Print nothing but errors.
    keeping
        When checkpoints are kept, and whether to go on from one.
    """

    def __init__(
        self, config: TrainConfig, out: str | None, signals: Signals, *, quiet: bool, keeping: Keeping | None = None
    ) -> None:
        import torch

        from hpcdeq import parallel
        from hpcdeq.record import Progress, RunDirectory, fingerprint
        from hpcdeq.tasks import make_problem

        self.comm = parallel.WORLD
        self.config = config
        self.signals = signals
        self.quiet = quiet
        self.keeping = keeping or Keeping()
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
        self.best: Best | None = None
        self.rows = 0  # of the history
        self.joules_before: float | None = 0.0
        self.released = time.monotonic()  # unused memory
        self.history: HistoryWriter | None = None

    # -------------------------------------------------------------------------------------------------- set-up

    def _new_name(self) -> str:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return str(Path("runs") / f"{stamp}-{Path(self.config.data).stem}-{self.config.optimizer.replace(':', '-')}")

    def _datasets(self) -> dict[str, Dataset]:
        from hpcdeq.tasks import read_splits

        path = self.config.data
        if path == EMBEDDED:
            from hpcdeq.builders.fields import prepare_burgers

            self.directory.create(self.comm, resume=self.keeping.resume or self.keeping.first)
            path = str(self.directory.path / f"{EMBEDDED}.h5")
            if not self.keeping.resume:
                prepare_burgers(path, EMBEDDED_SAMPLES, comm=self.comm, command=PROGRAM)
        return read_splits(path, self.config.dtype, self.comm)

    # ----------------------------------------------------------------------------------------------------- run

    def run(self) -> Result:
        """Train, write the run directory, and return the optimiser's result."""
        from hpcdeq.petsc.options import unused_options
        from hpcdeq.problem import describe_solves
        from hpcdeq.record import host_meter, read_checkpoint

        if not self.directory.writes and self.config.data != EMBEDDED:
            self.directory.create(self.comm, resume=self.keeping.resume or self.keeping.first)
        self.meter = host_meter(self.comm)
        if self.meter is not None:
            self.meter.start()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.directory)
            known = (
                stack.enter_context(read_checkpoint(self.directory.path, self.comm)) if self.keeping.resume else None
            )
            self._open(known)
            self._introduce(known)
            try:
                result = self._minimize(known)
            except ConvergenceError as error:
                raise self._leave_failed(error) from error
            finally:
                if self.history is not None:
                    self.history.close()
            self._finish(result)
        # Those that every run begins with are nobody's mistake: an explicit model has no fixed points.
        unread = [option for option in unused_options(PREFIXES) if option[1:] not in BEGUN_WITH]
        self._say(describe_solves(self.problem))
        if unread:
            self._say(f"note: given but read by no solver of this run: {', '.join(unread)}")
        return result

    def _open(self, known: Known | None) -> None:
        """Write what is known of the run before it begins or goes on."""
        from hpcdeq import parallel
        from hpcdeq.record import HistoryWriter, environment

        if known is not None:
            self._restore(known)
        with parallel.agreement(self.comm):
            if self.directory.writes:
                self.directory.write_text("config.toml", as_toml(self.config))
                now = environment(self.comm, self.config.seed)
                self.directory.write_json("environment.json", now | self.directory.earlier("environment.json", known))
                rows = None if known is None else self.rows
                self.history = HistoryWriter(self.directory.path / "history.csv", rows)
                (self.directory.path / "summary.json").unlink(missing_ok=True)

    def _introduce(self, known: Known | None) -> None:
        from hpcdeq.data.dataset import missing_classes
        from hpcdeq.tasks import headline

        self._say(headline(self.config, self.problem, {name: data.count for name, data in self.sets.items()}))
        absent = missing_classes(self.sets["train"], self.comm)
        if absent:
            self._say(
                f"note: no training sample is of class {', '.join(absent)}; the model learns never to answer it\n"
            )
        if known is not None:
            run = known["run"]
            self._say(f"resumed    at iteration {run['iteration']}, after {run['seconds']:.1f} s\n")

    def _minimize(self, known: Known | None) -> Result:
        from hpcdeq.optim import minimize
        from hpcdeq.problem.rebalancing import Rebalancing
        from hpcdeq.record import CheckpointKeeper, seconds_left
        from hpcdeq.tasks import minibatch_settings, sampling_of

        keeping = self.keeping
        used = time.monotonic() - STARTED
        left = seconds_left(os.environ, keeping.wall_seconds, used) if self.comm.rank == 0 else None
        keeper = CheckpointKeeper(
            self.comm,
            self.directory.path,
            self._state,
            self.signals,
            every=keeping.every,
            first=keeping.first,
            left=left,
            warm_bytes=int(keeping.cache_mebibytes * 2**20),
        )
        rebalancing = None
        if self.config.rebalance is not None:
            bounded = self.config.memory_per_rank is not None
            rebalancing = Rebalancing(self.problem, self.config.rebalance, lambda m: self._say(str(m)), bounded=bounded)
        return minimize(
            self.problem,
            self.config.optimizer,
            self.config.max_iterations,
            max_seconds=self.config.max_seconds,
            callback=self._record,
            minibatch=minibatch_settings(self.config),
            sampling=sampling_of(self.config),
            curvature=self.config.curvature,
            raise_on_failure=False,
            keeper=keeper,
            resume=known,
            rebalancing=rebalancing,
        )

    def _state(self) -> State:
        """Return what a checkpoint holds besides the state of the optimisation."""
        from hpcdeq import parallel
        from hpcdeq.record import over_run
        from hpcdeq.state import Block

        with parallel.agreement(self.comm):
            if self.history is not None:
                self.history.synchronise()
        best, statistics = self.best, over_run(self.statistics)
        own = {
            "rows": self.rows,
            "joules": self._joules(),
            "samples": {split: data.count for split, data in self.sets.items()},
            "fixed_point": None if statistics is None else dataclasses.asdict(statistics),
            "best": None
            if best is None
            else {**best._asdict(), "x": Block(best.x[self.problem.layout.owned].cpu().numpy())},
        }
        return {"training": own, "config": as_toml(self.config)}

    def _restore(self, known: Known) -> None:
        """Go on from a checkpoint."""
        import torch

        from hpcdeq import parallel
        from hpcdeq.problem.counts import FixedPointStatistics
        from hpcdeq.state import whole

        own = known["training"]
        with parallel.agreement(self.comm):
            for split, count in own["samples"].items():
                if count != self.sets[split].count:
                    raise UsageError(
                        f"--resume: {self.config.data} has {self.sets[split].count} {split} samples, and had {count} when the"
                        f" run in {self.directory.path} began: put the former file back, or choose another --out"
                    )
        self.rows = int(own["rows"])
        self.joules_before = own.get("joules")
        self.statistics = [FixedPointStatistics(**own["fixed_point"])] if "fixed_point" in own else []
        if "best" in own:
            x = torch.from_numpy(whole(own["best"]["x"]).copy()).to(self.problem.layout.device)
            self.best = Best(**{**own["best"], "x": x})
            self._save_best(x, self.best.iteration, self.best.metric)  # the file may be ahead of the checkpoint

    def _joules(self) -> float | None:
        """Return the energy since the run began, the same on all ranks."""
        from hpcdeq.record import job_joules

        now = job_joules(self.comm, self.meter)
        return None if now is None or self.joules_before is None else self.joules_before + now

    def _record(self, iterate: Iterate) -> None:
        from hpcdeq import parallel
        from hpcdeq.problem.memory import process_bytes, release_unused

        validation = (
            self.problem.evaluate(iterate.x, self.sets["validation"]) if self.sets["validation"].count else None
        )
        if iterate.fixed_point is not None:
            self.statistics.append(iterate.fixed_point)
        if time.monotonic() - self.released > RELEASE_SECONDS:
            release_unused()
            self.released = time.monotonic()
        memory = int(parallel.max_over_ranks(self.comm, process_bytes()))
        joules = self._joules()
        with parallel.agreement(self.comm):
            if self.history is not None:
                self.history.write(iterate, validation, memory, joules)
        self.rows += 1
        self.progress.write(iterate, validation)
        if validation is not None and validation.metric == validation.metric:
            sign = 1.0 if self.problem.loss_function.larger_is_better else -1.0
            if self.best is None or sign * validation.metric > self.best.value:
                self.best = Best(sign * validation.metric, validation.metric, iterate.iteration, iterate.x)
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
        """Evaluate the weights of the best validation metric (the last ones without validation data) and sum up.

        A run that was interrupted is summed up without: its job has little time left.
        """
        from hpcdeq import parallel
        from hpcdeq.optim import resolved_options
        from hpcdeq.petsc.options import database_options
        from hpcdeq.problem.memory import peak_bytes
        from hpcdeq.problem.phases import describe_phases, summarise_phases
        from hpcdeq.record import over_run, summary
        from hpcdeq.report import read_run, write_figures

        interrupted = result.status == "interrupted"
        if self.best is None and not interrupted:  # no validation data
            self._save_best(result.x, result.iterations, float("nan"))
        x = result.x if self.best is None else self.best.x
        found = {
            split: self.problem.evaluate(x, data) if data.count and not interrupted else None
            for split, data in self.sets.items()
        }
        seconds = result.history[-1][1]
        joules = self._joules()
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
                evaluated = result.iterations if self.best is None else self.best.iteration
                told["evaluated_iteration"] = None if interrupted else evaluated
                told["left_out"] = {split: one and one.left_out for split, one in found.items()}
                self.directory.write_json("summary.json", told)
                if not interrupted:
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
