"""A trained model applied to samples: what `hpcdeq.predict` and `hpcdeq.evaluate` share."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.config import named_options
from hpcdeq.data import GraphBatch
from hpcdeq.deq import FixedPoint
from hpcdeq.errors import OptionError
from hpcdeq.petsc.options import check_types, insert_options
from hpcdeq.petsc.vocabulary import check_options
from hpcdeq.record.restore import load, saved_of

PREFIXES = ("deq_",)


def open_model(run: Path, device: str, petsc: list[str], purpose: str) -> nn.Module:
    """Return the best model of a run for a command that trains nothing.

    Collective on MPI.COMM_WORLD.

    Parameters
    ----------
    run
        Run directory of `hpcdeq.train`.
    device
        ``cpu`` or ``cuda``.
    petsc
        Options of its fixed points, as words of the command line; they win over the run's own.
    purpose
        What the model is wanted for, such as "a prediction".

    Raises
    ------
    OptionError
        An option that does not exist or has no place here, or no such device.
    DataError, CheckpointError
        The run has no model that can be read.
    """
    with parallel.agreement(parallel.WORLD):
        given = named_options(petsc)
        foreign = [name for name in given if not name.startswith(PREFIXES)]
        if foreign:
            raise OptionError(f"-{foreign[0]} is not for {purpose}, which trains nothing: leave it out")
        check_options([f"-{name}" for name in given], PREFIXES)
        check_types(given)
        insert_options(given)
        if device == "cuda" and not torch.cuda.is_available():
            raise OptionError("--device cuda: torch finds no GPU here; leave the option out")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(parallel.cores_of_rank(parallel.WORLD))
        return load(run, device)


@dataclass(frozen=True)
class Predictions:
    """What a model says of some samples.

    Attributes
    ----------
    ids
        ``b`` names.
    outputs
        ``(b, classes)`` probabilities, or ``(b, targets)`` values.
    converged, residual
        ``(b,)`` whether all fixed points were found, and the largest ‖f(z) - z‖ of them (0 for an explicit network).
    """

    ids: list[str]
    outputs: np.ndarray
    converged: np.ndarray
    residual: np.ndarray


def predict_batch(model: nn.Module, ids: list[str], inputs: Tensor | GraphBatch) -> Predictions:
    """Return what a model of `hpcdeq.load` says of a batch. Not collective."""
    weight = next(model.parameters())
    layers = [layer for layer in model.modules() if isinstance(layer, FixedPoint)]
    for layer in layers:
        layer.on_failure = "warn"  # the table says which
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model(inputs.to(dtype=weight.dtype, device=weight.device))
        if saved_of(model).schema.task == "classification":
            outputs = torch.softmax(outputs, dim=1)
    solutions = [layer.solution for layer in layers if layer.solution is not None]
    converged, residual = np.ones(len(ids), bool), np.zeros(len(ids))
    for solution in solutions:
        converged &= solution.converged.cpu().numpy()
        residual = np.maximum(residual, solution.residual.double().cpu().numpy())
    return Predictions(ids, outputs.double().cpu().numpy(), converged, residual)
