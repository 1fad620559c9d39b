"""Running a comparison: one run after the other on all ranks, a report after each, from where it was stopped."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpcdeq.campaign.plan import Planned, Variant, run_of
from hpcdeq.campaign.training import ComparedTraining
from hpcdeq.config import EMBEDDED, TrainConfig, read_config
from hpcdeq.continuing import can_go_on, is_unfinished
from hpcdeq.errors import ConvergenceError, DataError, OptionError
from hpcdeq.training import EMBEDDED_SAMPLES, PREFIXES, Keeping, Training

if TYPE_CHECKING:
    from hpcdeq.report import Comparison, Run

PROGRAM = "python -m hpcdeq.compare"
NEW, BEGUN, DONE = "new", "begun", "done"  # what there is of a run
WARM_SAMPLES = 64  # of the evaluations that are thrown away before the first run


class Campaign:
    """All runs of a comparison. Every method is collective on MPI.COMM_WORLD.

    Parameters
    ----------
    variants
        The methods.
    seeds
        Each method runs with each of them.
    reference
        Method that the others are measured against.
    out
        Folder of the runs and the report.
    quiet
        Print a line for each run that ends, and no more.
    verbose
        Print the progress of each run.
    keeping
        When their checkpoints are kept.

    Attributes
    ----------
    interrupted
        Whether a signal or a limit of time ended it: the same command goes on.
    """

    def __init__(
        self,
        variants: list[Variant],
        seeds: range,
        reference: str,
        out: Path,
        *,
        quiet: bool,
        verbose: bool,
        keeping: Keeping | None = None,
    ) -> None:
        from hpcdeq import parallel
        from hpcdeq.data.shards import Shards
        from hpcdeq.record import Signals
        from hpcdeq.tasks import resolved

        self.comm = parallel.WORLD
        self.signals = Signals(speak=self.comm.rank == 0)
        self.seeds = seeds
        self.reference = reference
        self.out = out
        self.quiet, self.verbose = quiet, verbose
        self.keeping = keeping or Keeping()
        self.interrupted = False
        self._prepare(variants[0].config.data)
        with parallel.agreement(self.comm):
            self.variants = [
                dataclasses.replace(variant, config=resolved(variant.config, Shards(Path(variant.config.data))))
                for variant in variants
            ]
        self.total = sum(len(seeds) + max(0, len(variant.rates) - 1) for variant in variants)
        self.chosen: dict[str, float] = {}
        self.ended: list[Planned] = []
        self.took: dict[str, list[float]] = {}
        self.start = time.monotonic()

    def run(self) -> bool:
        """Run what is not there yet, with a report after each run; say whether any run did not diverge."""
        from hpcdeq.record import locked

        with locked(self.comm, self.out), self.signals:
            return self._run()

    def _run(self) -> bool:
        from hpcdeq import parallel

        for planned in self._known():
            self._found(planned)  # what does not fit is told before the first run starts
        good = begun = False
        for planned in self._order():
            found = self._found(planned)
            new = found != DONE
            if new:
                self.interrupted = parallel.any_rank(self.comm, bool(self.signals.caught))
                if self.interrupted:
                    break
                if not begun:
                    self._check_methods()
                    begun = True
                self._say(f"run {len(self.ended) + 1} of {self.total}: {planned.name}, {self._clock()}", always=False)
                since = time.monotonic()
                self._train(planned, resume=found == BEGUN)
                if self.interrupted:
                    break
                self.took.setdefault(planned.label, []).append(time.monotonic() - since)
            self.ended.append(planned)
            good = parallel.only_root(self.comm, functools.partial(self._report, planned, new)) or good
        if self.interrupted:
            self._say(f"interrupted after {len(self.ended)} of {self.total} runs: the same command goes on")
        else:
            self._say(f"report     {self.out / 'comparison.html'}")
        return good

    # -------------------------------------------------------------------------------------------------- set-up

    def _prepare(self, data: str) -> None:
        """Make the embedded problem in the folder where it is the data."""
        from hpcdeq import parallel
        from hpcdeq.builders.fields import prepare_burgers
        from hpcdeq.record import RunDirectory

        embedded = self.out / f"{EMBEDDED}.h5"
        if Path(data) == embedded and not parallel.from_root(self.comm, embedded.exists()):
            with RunDirectory(self.out) as folder:
                folder.create(self.comm)
                prepare_burgers(embedded, EMBEDDED_SAMPLES, comm=self.comm, command=PROGRAM)

    def _check_methods(self) -> None:
        """Refuse methods that do not fit the model and the data, and let the first calls of libraries be over."""
        import numpy as np
        import torch

        from hpcdeq.optim.minimize import check_method
        from hpcdeq.petsc.options import only_options

        warm: set[str] = set()
        for variant in self.variants:
            with only_options(variant.config.petsc, PREFIXES):
                problem = Training(variant.config, str(self.out), self.signals, quiet=True).problem
                check_method(problem, variant.config.optimizer)
                if variant.config.dtype in warm:
                    continue
                warm.add(variant.config.dtype)
                rows = np.arange(min(WARM_SAMPLES, problem.dataset.count))
                p = problem.initial()
                try:
                    problem.loss_and_gradient(p, rows)
                    for curvature in ("gauss_newton", "hessian"):
                        problem.owned_product(p, torch.ones_like(p), curvature=curvature, rows=rows)
                except ConvergenceError:  # the runs tell how it goes
                    pass

    # ---------------------------------------------------------------------------------------------------- runs

    def _known(self) -> Iterator[Planned]:
        """Yield the runs that do not wait for a scan of learning rates."""
        for variant in self.variants:
            if variant.rates:
                yield from (run_of(variant, self.seeds[0], rate) for rate in variant.rates)
            else:
                yield from (run_of(variant, seed) for seed in self.seeds)

    def _order(self) -> Iterator[Planned]:
        """Yield all runs, seed by seed, so that a machine that slows down does so for all methods alike."""
        from hpcdeq import parallel

        for seed in self.seeds:
            for variant in self.variants:
                if variant.rates and seed == self.seeds[0]:
                    yield from (run_of(variant, seed, rate) for rate in variant.rates)
                    best = functools.partial(self._best_rate, variant)
                    self.chosen[variant.label] = parallel.only_root(self.comm, best)
                else:
                    yield run_of(variant, seed, self.chosen.get(variant.label))

    def _train(self, planned: Planned, *, resume: bool) -> None:
        from hpcdeq.petsc.options import only_options

        with only_options(planned.config.petsc, PREFIXES):
            run = ComparedTraining(
                planned.config,
                str(self._path(planned)),
                self.signals,
                quiet=not self.verbose,
                keeping=self.keeping._replace(resume=resume),
            )
            try:
                self.interrupted = run.run().status == "interrupted"
            except (ConvergenceError, DataError) as error:
                if not error.agreed:
                    raise
                run.leave_failed(error)

    def _path(self, planned: Planned) -> Path:
        return self.out / "runs" / planned.name

    def _found(self, planned: Planned) -> str:
        """Say whether a run is there, or can go on; set aside what is left of one that cannot."""
        from hpcdeq import parallel

        return parallel.only_root(self.comm, lambda: self._look(planned))

    def _look(self, planned: Planned) -> str:
        path = self._path(planned)
        if is_unfinished(path):
            if can_go_on(path, self.comm.size) and not _differences(read_config(path / "config.toml"), planned.config):
                return BEGUN
            if path.exists():
                aside = path.with_name(f"{path.name}.unfinished")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            return NEW
        differs = _differences(read_config(path / "config.toml"), planned.config)
        ranks = self._read(planned).summary.get("ranks")
        if ranks != self.comm.size:
            differs.append(f"ranks {ranks} there and {self.comm.size} here (mpirun -n {ranks})")
        if differs:
            raise OptionError(
                f"{path} has been run with other settings: {'; '.join(differs)}. Repeat the former ones, choose another"
                f" --out, or remove {path} to run it anew"
            )
        return DONE

    # -------------------------------------------------------------------------------------------------- report

    def _read(self, planned: Planned) -> Run:
        from hpcdeq.report import read_run

        return read_run(self._path(planned))

    def _report(self, planned: Planned, new: bool) -> bool:
        """Write the report and print a run's line; say whether the run did not diverge."""
        from hpcdeq.report import write_comparison

        if new or len(self.ended) == self.total:
            write_comparison(self._comparison(), self.out)
        run = self._read(planned)
        metric = run.summary["metric"]
        numbers = {
            "loss": run.summary["loss"]["train"],
            **{f"{k} {metric['name']}": metric[k] for k in ("validation", "test")},
        }
        told = "  ".join(f"{name} {value:.5g}" for name, value in numbers.items() if value is not None)
        width = max(
            len(run_of(v, s, rate).name) for v in self.variants for s in self.seeds for rate in v.rates or (None,)
        )
        self._say(
            f"[{len(self.ended):>{len(str(self.total))}}/{self.total}] {planned.name:<{width}}  {run.summary['status']:<9}"
            f" {run.summary['iterations']:>6} it {run.summary['wall_seconds'] or 0.0:>8.1f} s  {told}"
            f"  ({self._clock() if new else 'done before'})"
        )
        return bool(run.summary["status"] != "diverged")

    def _comparison(self) -> Comparison:
        """Return the comparison of what has ended so far."""
        from hpcdeq.report import Comparison, Method, Trial, best_of

        runs = {planned.name: self._read(planned) for planned in self.ended}
        trials, methods = [], []
        for variant in self.variants:
            tried = [(rate, run_of(variant, self.seeds[0], rate).name) for rate in variant.rates]
            tried = [(rate, name) for rate, name in tried if name in runs]
            chosen = self.chosen.get(variant.label)
            trials += [Trial(variant.label, rate, runs[name], rate == chosen) for rate, name in tried]
            if tried and chosen is None:  # as far as the scan has come
                chosen = tried[best_of(Comparison([Method(variant.label, [runs[n] for _, n in tried])], ""))][0]
            wanted = [run_of(variant, seed, chosen).name for seed in self.seeds]
            found = [runs[name] for name in wanted if name in runs]
            if found:
                methods.append(Method(variant.label, found))
        labels = [method.name for method in methods]
        reference = self.reference if self.reference in labels else labels[-1]
        return Comparison(methods, reference, trials, self.total - len(self.ended))

    def _best_rate(self, variant: Variant) -> float:
        """Return the learning rate of the best run of a scan."""
        from hpcdeq.report import Comparison, Method, best_of

        runs = [self._read(run_of(variant, self.seeds[0], rate)) for rate in variant.rates]
        return variant.rates[best_of(Comparison([Method(variant.label, runs)], variant.label))]

    def _clock(self) -> str:
        """Return how long it took so far, and about how long the rest will take."""
        elapsed = time.monotonic() - self.start
        told = f"{_duration(elapsed)} so far"
        taken = [seconds for each in self.took.values() for seconds in each]
        bound = self.variants[0].config.max_seconds
        mean = sum(taken) / len(taken) if taken else bound
        if mean is None:
            return told
        done = {planned.name for planned in self.ended}
        rest = 0.0
        for variant in self.variants:
            own = self.took.get(variant.label, [])
            count = len(self.seeds) + max(0, len(variant.rates) - 1)
            left = count - sum(planned.label == variant.label for planned in self.ended)
            rest += left * (sum(own) / len(own) if own else mean)
        return f"{told}, about {_duration(rest)} to go" if len(done) < self.total else told

    def _say(self, text: str, *, always: bool = True) -> None:
        if self.comm.rank == 0 and (always or not self.quiet):
            print(text, flush=True)


def _differences(former: dict[str, object], wanted: TrainConfig) -> list[str]:
    """Return the settings in which a run that has ended differs from the one that is wanted."""
    from hpcdeq.report import flat

    there, here = flat(dataclasses.asdict(TrainConfig(**former))), flat(dataclasses.asdict(wanted))  # type: ignore[arg-type]
    fitted = {"chunk_size"} if wanted.memory_per_rank is not None else set()  # to the memory, by the run itself
    return [
        f"{name} {_told(there.get(name))} there and {_told(here.get(name))} here"
        for name in {**here, **there}
        if name not in fitted and there.get(name) != here.get(name)
    ]


def _told(value: object) -> str:
    return "not set" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
