"""From a configuration to a training problem: the data of each split, the model, the loss and its terms."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from hpcdeq import parallel
from hpcdeq.config import DEFAULT_MODELS, TrainConfig
from hpcdeq.data import Dataset
from hpcdeq.data.dataset import target_statistics
from hpcdeq.data.schema import SPLITS
from hpcdeq.data.shards import Shards
from hpcdeq.errors import DataError, OptionError
from hpcdeq.methods import MINIBATCH
from hpcdeq.models import build_model, model_config
from hpcdeq.models.blocks import OutputScale
from hpcdeq.optim.sampling import Sampling
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.problem import L1, LOSSES, CrossEntropy, JacobianPenalty, TrainingProblem
from hpcdeq.problem.terms import Term


def read_splits(path: str, dtype: str, comm: parallel.Comm) -> dict[str, Dataset]:
    """Return this rank's samples of each split.

    Collective on comm.

    Raises
    ------
    DataError
        The file is no good, or has fewer training samples than there are ranks.
    """
    sets = {split: Dataset(path, split, comm, getattr(torch, dtype)) for split in SPLITS}
    if sets["train"].count < comm.size:
        raise DataError(
            f"{path} has {sets['train'].count} training samples, the job {comm.size} ranks: run with at most"
            f" {sets['train'].count} (mpirun -n {max(1, sets['train'].count)}), or prepare more samples",
            agreed=True,
        )
    return sets


def resolved(config: TrainConfig, data: Dataset | Shards) -> TrainConfig:
    """Return a configuration with what it leaves to the data and to defaults: the model, all of its settings, the chunk size.

    Not collective. They are part of what decides a run, and are saved with it.
    """
    name = config.model or DEFAULT_MODELS[data.schema.representation]
    settings = dataclasses.asdict(model_config(name, config.model_settings))
    chunk_size = config.chunk_size or data.usual_chunk_size
    return dataclasses.replace(config, model=name, model_settings=settings, chunk_size=chunk_size)


def make_problem(config: TrainConfig, train: Dataset, comm: parallel.Comm) -> tuple[TrainConfig, TrainingProblem]:
    """Return the configuration as `resolved`, and what is to be minimised.

    Collective on comm.

    Raises
    ------
    DataError, OptionError
        The model does not take the data, or there is no such model, setting or device.
    """
    with parallel.agreement(comm):
        if config.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("--device cuda: torch finds no GPU here; leave the option out")
        config = resolved(config, train)
        assert config.model is not None and config.chunk_size is not None
        model = build_model(
            config.model,
            model_config(config.model, config.model_settings),
            train.schema.representation,
            train.input_shape,
            train.output_size,
            seed=config.seed,
            dtype=getattr(torch, config.dtype),
            device=config.device,
        )
    standardise(model, train, comm)
    loss = next(loss for loss in LOSSES.values() if loss.task == train.task)
    if config.label_smoothing:
        if not isinstance(loss, CrossEntropy):
            raise OptionError("--label-smoothing is for classes, the data holds numbers: leave it out", agreed=True)
        loss = CrossEntropy(config.label_smoothing)
    terms: list[Term] = [L1(config.l1)] if config.l1 else []
    terms += [JacobianPenalty(config.jacobian_penalty)] if config.jacobian_penalty else []
    problem = TrainingProblem(
        model,
        train,
        loss,
        comm,
        chunk_size=config.chunk_size,
        weight_decay=config.penalty(),
        terms=terms,
        warm_start=config.warm_start,
        adaptive=config.adaptive,
        on_failure=config.on_failure,
    )
    return config, problem


def minibatch_settings(config: TrainConfig) -> MinibatchSettings | None:
    """Return the settings of a method on minibatches; None for any other. Not collective."""
    if config.optimizer not in MINIBATCH:
        return None
    given = {name: getattr(config, name) for name in ("learning_rate", "batch_size", "weight_decay")}
    given = {name: value for name, value in given.items() if value is not None}
    return MinibatchSettings(seed=config.seed, schedule=config.learning_rates(), **given)


def sampling_of(config: TrainConfig) -> Sampling | None:
    """Return which samples a method of TAO's works on; None: all. Not collective."""
    if config.optimizer in MINIBATCH or (config.hessian_fraction is None and config.batch_size is None):
        return None
    given = {name: getattr(config, name) for name in ("hessian_fraction", "batch_size", "batch_growth")}
    return Sampling(seed=config.seed, **{name: value for name, value in given.items() if value is not None})


def standardise(model: nn.Module, train: Dataset, comm: parallel.Comm) -> None:
    """Let a model of numbers begin with outputs of the training targets' mean and deviation, where it can.

    Collective on comm. Both are saved with the model's weights.
    """
    if train.task != "regression":
        return
    mean, deviation = target_statistics(train.targets, comm)
    for module in model.modules():
        if isinstance(module, OutputScale):
            module.set(mean, deviation)
