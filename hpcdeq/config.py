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

EMBEDDED = "burgers"
# Fixed points to eight digits let line searches work to near the end; products need fewer. Layers on their own are
# tighter (hpcdeq.deq.forward.TOLERANCES); single precision keeps theirs. A trial point that needs more than a hundred
# iterations is better rejected.
TRAINING_OPTIONS = {"deq_snes_rtol": "1e-8", "deq_snes_max_it": "100", "deq_ksp_rtol": "1e-6"}
# Rejected, and not tried with other solvers: the optimiser's next trial point is cheaper.
NO_FALLBACK = {"deq_snes_fallback": "none"}


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
        ``trgn``, ``lbfgs``, ``newton``, ``adam`` or ``tao:TYPE``.
    max_iterations
        Bound on the steps (epochs of adam).
    max_seconds
        Bound on the optimisation's wall time; None: none.
    batch_size, learning_rate
        Of adam only; None: adam's defaults.
    weight_decay
        λ of the term λ/2 ‖p‖².
    seed
        Of the initial weights and of adam's batches.
    dtype
        ``float32`` or ``float64``.
    device
        ``cpu`` or ``cuda``.
    chunk_size
        Samples that are evaluated together on a rank.
    on_failure
        What becomes of samples whose fixed point is not found: ``raise``, ``warn`` or ``mask``.
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
    weight_decay: float = 0.0
    seed: int = 0
    dtype: str = "float64"
    device: str = "cpu"
    chunk_size: int = 512
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
        for name, least in (("max_iterations", 0), ("chunk_size", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}: give {least} or more")
        for name in ("max_seconds", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name} is {value}: give a number above 0")
        if not self.weight_decay >= 0:
            raise OptionError(f"weight_decay is {self.weight_decay}: give a number that is not negative")
        if self.optimizer != "adam":
            for name in ("batch_size", "learning_rate"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"--{name.replace('_', '-')} is an option of adam; {self.optimizer} works on all samples at"
                        " once: leave it out, or use --optimizer adam"
                    )


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
    try:
        with open(path, "rb") as file:
            settings = tomllib.load(file)
    except OSError as error:
        raise OptionError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"configuration {path} is no TOML: {error}") from error
    fields = {f.name: str(f.type) for f in dataclasses.fields(TrainConfig)}
    for name, value in settings.items():
        if name not in fields:
            hint = suggestion(name, fields, f"settings: {', '.join(fields)}")
            raise OptionError(f"configuration {path}: unknown setting {name!r}: {hint}")
        wanted = _TYPES[fields[name].split("[")[0].split(" ")[0]]
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, wanted):  # type: ignore[arg-type]
            raise OptionError(f"configuration {path}: {name} is {value!r}, which is no {fields[name].split(' ')[0]}")
    return settings


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
