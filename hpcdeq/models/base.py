"""The registry of models: a name, a configuration, the kind of data, a constructor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpcdeq.errors import DataError, OptionError, suggestion


@dataclass(frozen=True)
class ModelKind:
    """What is known of a model before it is built.

    Attributes
    ----------
    config
        Frozen dataclass of its settings; every one has a default. Whole numbers are 1 or more unless a field's metadata say
        what the ``least`` is.
    representation
        The representation of data that it takes: ``array`` or ``graph``.
    build
        ``build(config, input_shape, output_size) -> nn.Module`` in float32.
    """

    config: type
    representation: str
    build: Callable[[Any, tuple[int, ...], int], nn.Module]


MODELS: dict[str, ModelKind] = {}


def register(name: str, kind: ModelKind) -> None:
    """Make a model known by name. Not collective."""
    MODELS[name] = kind


def kind_named(name: str) -> ModelKind:
    """Return a registered model.

    Not collective.

    Raises
    ------
    OptionError
        There is none of that name.
    """
    if name not in MODELS:
        hint = suggestion(name, MODELS, f"choose one of {', '.join(MODELS)}")
        raise OptionError(f"unknown model {name!r}: {hint}")
    return MODELS[name]


def model_config(name: str, settings: Mapping[str, Any]) -> Any:
    """Return a model's configuration with some settings changed.

    Not collective.

    Raises
    ------
    OptionError
        A setting that the model does not have, or of the wrong type.
    """
    kind = kind_named(name)
    fields = {f.name: f for f in dataclasses.fields(kind.config)}
    for key, value in settings.items():
        if key not in fields:
            hint = suggestion(key, fields, f"settings: {', '.join(fields)}")
            raise OptionError(f"model {name} has no setting {key!r}: {hint}")
        default: Any = fields[key].default
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(
            value, (int, float) if isinstance(default, float) else type(default)
        ):
            raise OptionError(f"model {name}: setting {key} is {value!r}, which is no {type(default).__name__}")
        least = fields[key].metadata.get("least", 1)
        if isinstance(default, int) and not isinstance(default, bool) and value < least:
            raise OptionError(f"model {name}: setting {key} is {value}: give {least} or more")
    return kind.config(**settings)


def build_model(
    name: str,
    config: Any,
    representation: str,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> nn.Module:
    """Build a model for data of a given form; the same seed gives the same weights everywhere.

    Not collective.

    Raises
    ------
    DataError
        The model does not take data of this representation.
    """
    kind = kind_named(name)
    if kind.representation != representation:
        fitting = ", ".join(other for other, k in MODELS.items() if k.representation == representation) or "none yet"
        raise DataError(
            f"model {name} takes data as {kind.representation}, the dataset holds {representation}: use --model with one of"
            f" {fitting}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.build(config, input_shape, output_size)
    return model.to(dtype=dtype, device=device)
