"""A model in one HDF5 file: its weights and buffers, and what is needed to build it again. Nothing is ever unpickled.

Root attributes: ``format = "hpcdeq-model"``, ``version``, ``model``, ``config``, what the caller adds (``metric``,
``iteration``), and ``complete = true``, set last. ``/parameters/NAME`` and ``/buffers/NAME`` have the tensors' shapes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import torch
from torch import Tensor

from hpcdeq.data.new_file import NewFile
from hpcdeq.errors import CheckpointError
from hpcdeq.record.atomic import replaced

FORMAT = "hpcdeq-model"
VERSION = 1
OWN_ATTRIBUTES = ("format", "version", "model", "config", "complete")


class SavedModel(NamedTuple):
    """What a model file holds; ``attributes`` are the ones that the caller of `save_model` gave."""

    model_name: str
    config_text: str
    tensors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    attributes: dict[str, Any]


def save_model(
    path: str | os.PathLike[str],
    model_name: str,
    config_text: str,
    named_tensors: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    attributes: Mapping[str, float | int | str],
) -> None:
    """Write a model file by an atomic replacement.

    Not collective: one rank writes.

    Parameters
    ----------
    model_name
        Name in the registry of models.
    config_text
        The resolved configuration of the run, as text.
    named_tensors, buffers
        Weights and buffers by name, on any device.
    attributes
        Further facts: ``metric``, ``iteration``.

    Raises
    ------
    CheckpointError
        A tensor has NaN or Inf, or the file cannot be written; a former file is still there.
    """
    path = Path(path)
    taken = sorted(set(attributes) & set(OWN_ATTRIBUTES))
    if taken:
        raise CheckpointError(f"{path}: the attribute {taken[0]} is the format's own: choose another name")
    groups = {"parameters": named_tensors, "buffers": buffers}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            _require_finite(path, f"/{group}/{name}", tensor)
    try:
        with replaced(path) as temporary, NewFile(temporary) as new:
            file = new.hdf5
            own = {"format": FORMAT, "version": VERSION, "model": model_name, "config": config_text}
            file.attrs.update({**own, **attributes})
            for group, tensors in groups.items():
                folder = file.create_group(group)
                for name, tensor in tensors.items():
                    # A checksum finds a flipped bit, which would otherwise be a weight like any other.
                    checked = tensor.numel() > 0 and tensor.ndim > 0
                    folder.create_dataset(name, data=tensor.detach().cpu().numpy(), fletcher32=checked)
            file.flush()
            file.attrs["complete"] = True
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; is the disk or the quota full?") from error


def load_model(path: str | os.PathLike[str]) -> SavedModel:
    """Read a model file.

    Not collective.

    Raises
    ------
    CheckpointError
        Names the file and what is wrong with it: missing, truncated, damaged, of another format, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a run writes best.h5 once a validation metric is known")
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _read(path, file)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or no HDF5 file ({error}); take another copy or train again"
        ) from error


def _read(path: Path, file: h5py.File) -> SavedModel:
    found = dict(file.attrs)
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {found.get('format')!r}, not {FORMAT!r}: give a run's best.h5")
    if found.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {found.get('version')}, and this hpcdeq reads version {VERSION}")
    if not found.get("complete"):
        raise CheckpointError(f"{path} is not complete: its writer was stopped; take another copy or train again")
    tensors: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}}
    for group, into in tensors.items():
        # A name may contain a slash, which HDF5 reads as a folder: the datasets below it carry the full name.
        paths: list[str] = []
        file[group].visit(paths.append)
        for name in paths:
            item = file[group][name]
            if not isinstance(item, h5py.Dataset):
                continue
            into[name] = torch.from_numpy(item[...])
            _require_finite(path, f"/{group}/{name}", into[name])
    rest = {name: value for name, value in found.items() if name not in OWN_ATTRIBUTES}
    return SavedModel(found["model"], found["config"], tensors["parameters"], tensors["buffers"], rest)


def _require_finite(path: Path, name: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(f"{path}: {name} has {bad} of {tensor.numel()} numbers that are NaN or Inf")
