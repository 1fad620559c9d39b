"""The configuration of a training run: a TOML file, the command line over it, frozen once resolved."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdeq.errors import OptionError, suggestion
from hpcdeq.methods import (
    ADAMW_DECAY,
    BATCH_SIZE,
    GROWING,
    LEARNING_RATE,
    MINIBATCH,
    TORCH_LBFGS,
    Schedule,
)

EMBEDDED = "burgers"
DEFAULT_MODELS = {"array": "mlp_deq", "graph": "graph_deq"}  # by the representation of the data
# The embedded problem is for a first look: it ends within a minute on two cores.
EMBEDDED_SETTINGS = {"max_iterations": 15}
# Fixed points to eight digits let line searches work to near the end; products need fewer. Layers on their own are
# tighter (hpcdeq.deq.forward.TOLERANCES); single precision keeps theirs. A trial point that needs more than a hundred
# iterations is better rejected.
TRAINING_OPTIONS = {"deq_snes_rtol": "1e-8", "deq_snes_max_it": "100", "deq_ksp_rtol": "1e-6"}
AUXILIARY_WEIGHT = 0.3
# Rejected, and not tried with other solvers: the optimiser's next trial point is cheaper.
NO_FALLBACK = {"deq_snes_fallback": "none"}
BEGUN_WITH = {**TRAINING_OPTIONS, **NO_FALLBACK}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run but the number of ranks.

    Attributes
    ----------
    data
        Dataset file or folder of shards; ``burgers`` for the embedded default problem.
    model
        Name of a registered model; empty: the one for the data's representation.
    model_settings
        Settings of the model that differ from its defaults.
    optimizer
        One of `hpcdeq.methods.METHODS`, or ``tao:TYPE``.
    max_iterations
        Bound on the steps (on minibatches: epochs).
    max_seconds
        Bound on the optimisation's wall time; None: none.
    batch_size, learning_rate
        Of the methods on minibatches; None: their defaults. For trgn and lbfgs the batch size is that of the first iteration,
        which grows by ``batch_growth`` (default 1.1) from one to the next; None: all samples.
    batch_growth
        See above.
    hessian_fraction
        Part of the samples that the curvature products of TAO's methods are taken on; None: all.
    curvature
        ``gauss_newton`` or ``hessian``, for ``tao:TYPE``; None: the method's own.
    schedule, warmup, learning_rate_floor
        How their learning rate changes, as in `hpcdeq.methods.Schedule`; None: its defaults.
    average
        Of the methods on minibatches: memory of a running average of the weights, which then are the result; see
        `hpcdeq.optim.stochastic.MinibatchSettings`. None: there is none.
    weight_decay
        λ of the term λ/2 ‖p‖² of the loss; for adamw its decay, which is no part of the loss. None: 0, for adamw 0.01.
    l1
        λ of the term λ Σ |p| of the loss, its kink rounded off (`hpcdeq.problem.terms.L1`).
    auxiliary_weight
        w of the auxiliary numbers that the data have beside the targets (`hpcdeq.problem.auxiliary`); None: 0.3 where they
        have some.
    label_smoothing
        Part of every class label that is shared out evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567).
    jacobian_penalty
        w of the term w/2 ‖∂f/∂z‖²_F / n of the loss, at the fixed points (`hpcdeq.problem.terms.JacobianPenalty`).
    seed
        Of the initial weights and of the minibatches.
    dtype
        ``float32`` or ``float64``.
    device
        ``cpu`` or ``cuda``.
    chunk_size
        Samples that a rank works on together; None: 512, of graphs as many as have 16,384 edges.
    memory_per_rank
        GiB that a rank may hold: chunks are made smaller where they need more; None: no bound.
    rebalance
        Iterations (of methods on minibatches: epochs) after which ranks compare how long they were busy, and samples move to
        other ranks where some are slower (`hpcdeq.problem.rebalancing`): the run then repeats itself to rounding, not to the
        last bit. None: they stay.
    on_failure
        What becomes of samples whose fixed point is not found: ``raise``, ``warn`` (their unconverged states are used) or
        ``mask`` (they are left out of the loss, and counted; an accuracy counts them as wrong).
    warm_start
        Begin the fixed point of a sample where its last one was.
    adaptive
        Solve only as accurately as the optimiser's progress asks for.
    petsc
        PETSc options, names without the dash.
    """

    data: str = EMBEDDED
    model: str = ""
    model_settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "trgn"
    max_iterations: int = 100
    max_seconds: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    batch_growth: float | None = None
    hessian_fraction: float | None = None
    curvature: str | None = None
    schedule: str | None = None
    warmup: float | None = None
    learning_rate_floor: float | None = None
    average: float | None = None
    weight_decay: float | None = None
    l1: float = 0.0
    auxiliary_weight: float | None = None
    label_smoothing: float = 0.0
    jacobian_penalty: float = 0.0
    seed: int = 0
    dtype: str = "float64"
    device: str = "cpu"
    chunk_size: int | None = None
    memory_per_rank: float | None = None
    rebalance: int | None = None
    on_failure: str = "raise"
    warm_start: bool = True
    adaptive: bool = True
    petsc: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, valid in (
            ("dtype", ("float32", "float64")),
            ("device", ("cpu", "cuda")),
            ("on_failure", ("raise", "warn", "mask")),
        ):
            if getattr(self, name) not in valid:
                raise OptionError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(valid)}")
        whole = {"max_iterations": 0, "chunk_size": 1, "batch_size": 1, "seed": 0, "rebalance": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}: give {least} or more")
        for name in ("max_seconds", "learning_rate", "memory_per_rank"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name} is {value}: give a number above 0")
        if self.learning_rate == math.inf:
            raise OptionError("learning_rate is inf: give a finite number above 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise OptionError(f"weight_decay is {self.weight_decay}: give a number that is not negative")
        for name in ("l1", "jacobian_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)}: give a finite number that is not negative")
        if self.average is not None and not 0 < self.average < 1:
            raise OptionError(f"average is {self.average}: give a number between 0 and 1, such as 0.998")
        if self.auxiliary_weight is not None and not 0 <= self.auxiliary_weight < math.inf:
            raise OptionError(f"auxiliary_weight is {self.auxiliary_weight}: give a finite number that is not negative")
        if not 0 <= self.label_smoothing < 1:
            raise OptionError(f"label_smoothing is {self.label_smoothing}: give a number from 0 to below 1")
        self.learning_rates()
        if self.optimizer in MINIBATCH or self.optimizer == TORCH_LBFGS:
            for name in ("batch_growth", "hessian_fraction", "curvature"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"--{name.replace('_', '-')} is an option of TAO's methods: leave it out with {self.optimizer}"
                    )
        if self.hessian_fraction is not None and not 0 < self.hessian_fraction <= 1:
            raise OptionError(f"hessian_fraction is {self.hessian_fraction}: give a number above 0 and at most 1")
        if self.batch_growth is not None and not (1 <= self.batch_growth < math.inf and self.batch_size is not None):
            raise OptionError(
                "batch_growth is a factor of 1 or more from an iteration to the next: give it with batch_size"
            )
        if self.curvature not in (None, "gauss_newton", "hessian"):
            raise OptionError(f"curvature is {self.curvature!r}: choose gauss_newton or hessian")
        if self.optimizer not in MINIBATCH:
            for name in ("batch_size", "learning_rate", "schedule", "warmup", "learning_rate_floor", "average"):
                if name == "batch_size" and self.optimizer in GROWING:
                    continue
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"--{name.replace('_', '-')} is an option of {', '.join(MINIBATCH)}; {self.optimizer} works on all"
                        " samples at once: leave it out, or use --optimizer adam"
                    )

    def learning_rates(self) -> Schedule:
        """Return how the learning rate changes over the run. Not collective."""
        given = {"kind": self.schedule, "warmup": self.warmup, "floor": self.learning_rate_floor}
        return Schedule(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def penalty(self) -> float:
        """Return λ of the term λ/2 ‖p‖² of the loss; adamw's decay is none. Not collective."""
        return 0.0 if self.optimizer == "adamw" or self.weight_decay is None else self.weight_decay


_TABLES = ("model_settings", "petsc")
_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "Mapping": dict}


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the settings in a TOML file.

    Not collective.

    Raises
    ------
    OptionError
        The file is missing, is no TOML, or holds a setting that does not exist or is of the wrong type.
    """
    settings = read_toml(path)
    check_settings(settings, f"configuration {path}")
    return settings


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return what a TOML file holds.

    Not collective.

    Raises
    ------
    OptionError
        The file is missing or is no TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise OptionError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"configuration {path} is no TOML: {error}") from error


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that do not exist or are of the wrong type.

    Not collective.

    Parameters
    ----------
    where
        Where they stand; begins the message.

    Raises
    ------
    OptionError
        Names the setting.
    """
    fields = {f.name: str(f.type) for f in dataclasses.fields(TrainConfig)}
    for name, value in settings.items():
        if name not in fields:
            hint = suggestion(name, fields, f"settings: {', '.join(fields)}")
            raise OptionError(f"{where}: unknown setting {name!r}: {hint}")
        wanted = _TYPES[fields[name].split("[")[0].split(" ")[0]]
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, wanted):  # type: ignore[arg-type]
            raise OptionError(f"{where}: {name} is {value!r}, which is no {fields[name].split(' ')[0]}")


def named_options(petsc: list[str]) -> dict[str, str]:
    """Return PETSc's words of a command line as names and values; a flag has none. Not collective."""
    typed: dict[str, str] = {}
    for word in petsc:
        if word.startswith("-") and word[1:2].isalpha():
            name = word[1:]
            typed[name] = ""
        else:
            typed[name] = word
    return typed


def complete(settings: dict[str, Any]) -> TrainConfig:
    """Return the configuration of these settings, the rest by default. Not collective."""
    settings = {**settings, "petsc": {name: as_word(value) for name, value in settings.get("petsc", {}).items()}}
    if settings.get("data", EMBEDDED) == EMBEDDED:
        settings = {**EMBEDDED_SETTINGS, **settings}
    if settings.get("dtype", "float64") == "float64":
        settings["petsc"] = {**TRAINING_OPTIONS, **settings["petsc"]}
    settings["petsc"] = {**NO_FALLBACK, **settings["petsc"]}
    config = TrainConfig(**settings)
    return minibatch_resolved(config) if config.optimizer in MINIBATCH else config


def minibatch_resolved(config: TrainConfig) -> TrainConfig:
    """Return the configuration of a minibatch method with what it leaves to defaults: it is part of the run. Not collective."""
    rates = config.learning_rates()
    found = {
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "schedule": rates.kind,
        "warmup": rates.warming,
        "learning_rate_floor": rates.floor,
        "weight_decay": ADAMW_DECAY if config.optimizer == "adamw" else None,
    }
    return dataclasses.replace(config, **{k: v for k, v in found.items() if getattr(config, k) is None})  # type: ignore[arg-type]


def as_word(value: Any) -> str:
    """Return the value of a PETSc option in a TOML file as the command line has it; true is a flag."""
    return "" if value is True else "false" if value is False else str(value)


def as_toml(config: TrainConfig) -> str:
    """Return the configuration as TOML text that `read_config` takes. Not collective."""
    settings = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    return settings_as_toml(settings, "python -m hpcdeq.train config.toml --out DIR repeats this run")


def settings_as_toml(settings: Mapping[str, Any], comment: str) -> str:
    """Return some settings, by their names in `TrainConfig`, as TOML text; None is left out. Not collective."""
    lines = [f"# {comment}"]
    lines += [f"{k} = {_literal(v)}" for k, v in settings.items() if k not in _TABLES and v is not None]
    for name in _TABLES:
        if name in settings:
            lines += ["", f"[{name}]"]
            lines += [f"{json.dumps(key)} = {_literal(value)}" for key, value in sorted(settings[name].items())]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    """Return a value as TOML: JSON's, but for infinity, for DEL, and for what lies beyond ASCII."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
