"""A trained model out of its run directory, ready to be called: `hpcdeq.load(RUN_DIR)`."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hpcdeq.data.schema import Schema
from hpcdeq.deq import FixedPoint
from hpcdeq.errors import CheckpointError, DataError
from hpcdeq.models import build_model, model_config
from hpcdeq.record.best import SavedModel, load_model

BEST = "best.h5"


@dataclass(frozen=True)
class Saved:
    """What a model file says besides the weights.

    Attributes
    ----------
    model
        Name in the registry of models.
    config
        The run's resolved settings, as in config.toml.
    schema
        Of the data that it was trained on: classes, targets and units, and from what and how samples were made.
    iteration, metric
        When its weights were reached, and the validation metric then (NaN without validation data).
    """

    model: str
    config: Mapping[str, Any]
    schema: Schema
    iteration: int
    metric: float


def read_saved(run_dir: str | os.PathLike[str]) -> tuple[Saved, SavedModel]:
    """Return what a run's best.h5 says, and its tensors.

    Not collective.

    Raises
    ------
    DataError, CheckpointError
        There is no such run, or its best.h5 is missing, damaged, or made by an earlier hpcdeq.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run directory")
    path = folder / BEST
    found = load_model(path)
    try:
        config = tomllib.loads(found.config_text)
    except tomllib.TOMLDecodeError as error:
        raise CheckpointError(f"{path}: its configuration is no TOML ({error})") from error
    try:
        schema = Schema.from_json(found.attributes["schema"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say what data it was trained on ({error}): train again, or read it with the hpcdeq that made it"
        ) from error
    attributes = found.attributes
    return (
        Saved(found.model_name, config, schema, int(attributes["iteration"]), float(attributes["metric"])),
        found,
    )


def load(run_dir: str | os.PathLike[str], device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """Return a run's best model, in evaluation mode.

    Not collective. Its fixed-point layers have the run's own solver options (``-deq_...``); those of this process's command
    line win over them.

    Parameters
    ----------
    run_dir
        The run's directory.
    device, dtype
        Where to, and in which precision (default: that of the training).

    Returns
    -------
    torch.nn.Module
        `saved_of` tells what else its file says.

    Raises
    ------
    DataError, CheckpointError
        There is no such run, or its best.h5 is missing, damaged or does not fit the model.
    """
    saved, found = read_saved(run_dir)
    config, schema = saved.config, saved.schema
    model = build_model(
        saved.model,
        model_config(saved.model, config.get("model_settings", {})),
        schema.representation,
        schema.sample_shape,
        schema.output_size,
        dtype=dtype or getattr(torch, config["dtype"]),
        device=device,
    )
    try:
        model.load_state_dict({**found.tensors, **found.buffers})
    except RuntimeError as error:
        raise CheckpointError(f"{Path(run_dir) / BEST} does not fit its model {saved.model}: {error}") from error
    for layer in model.modules():
        if isinstance(layer, FixedPoint):
            # In the file, a flag is an empty text.
            layer.add_options({name: value or None for name, value in config.get("petsc", {}).items()})
    model.saved = saved  # type: ignore[assignment]
    return model.eval()


def saved_of(model: nn.Module) -> Saved:
    """Return what the file of a model of `load` says besides the weights. Not collective."""
    return cast(Saved, model.saved)
