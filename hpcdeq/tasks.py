"""From a configuration to a training problem: the data of each split, the model, the loss and its terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from hpcdeq import parallel
from hpcdeq.config import AUXILIARY_WEIGHT, DEFAULT_MODELS, TrainConfig
from hpcdeq.data import Dataset, SampleSource
from hpcdeq.data.dataset import column_statistics
from hpcdeq.data.schema import SPLITS
from hpcdeq.data.shards import Shards
from hpcdeq.data.shares import Shares
from hpcdeq.errors import DataError, OptionError
from hpcdeq.methods import MINIBATCH, TORCH_LBFGS
from hpcdeq.models import build_model, model_config
from hpcdeq.models.blocks import OutputScale
from hpcdeq.models.descriptors import DescriptorFeatures
from hpcdeq.optim import resolved_options
from hpcdeq.optim.sampling import Sampling
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.problem import L1, LOSSES, CrossEntropy, JacobianPenalty, Loss, TrainingProblem
from hpcdeq.problem.auxiliary import AuxiliarySource, WithAuxiliary, standardisation
from hpcdeq.problem.chunks import GIB, fitting_chunk_size
from hpcdeq.problem.terms import Term


def read_splits(path: str, dtype: str, comm: parallel.Comm) -> dict[str, Dataset]:
    """Return this rank's samples of each split.

    Collective on comm.

    Raises
    ------
    DataError
        The file is no good, or has fewer training samples than there are ranks.
    """
    shares = Shares(Path(path), comm)
    sets = {split: Dataset(shares, split, comm, getattr(torch, dtype)) for split in SPLITS}
    if sets["train"].count < comm.size:
        raise DataError(
            f"{path} has {sets['train'].count} training samples, the job {comm.size} ranks: run with at most"
            f" {sets['train'].count} (mpirun -n {max(1, sets['train'].count)}), or prepare more samples",
            agreed=True,
        )
    return sets


def resolved(config: TrainConfig, data: Dataset | Shards) -> TrainConfig:
    """Return a configuration with what it leaves to the data and to defaults: the model, all of its settings, the chunk size,
    what auxiliary numbers count.

    Not collective. They are part of what decides a run, and are saved with it.

    Raises
    ------
    OptionError
        A setting that the model does not have, or auxiliary numbers are asked for and there are none.
    """
    name = config.model or DEFAULT_MODELS[data.schema.representation]
    settings = dataclasses.asdict(model_config(name, config.model_settings))
    beside = len(data.schema.auxiliary) if "auxiliary" in settings else 0
    weight = config.auxiliary_weight
    if weight is None:
        weight = AUXILIARY_WEIGHT if beside else 0.0
    elif weight and not beside:
        lacks = "the data have no auxiliary numbers: prepare them with --auxiliary NAME,..., or"
        if data.schema.auxiliary:
            lacks = f"model {name} gives no auxiliary numbers:"
        raise OptionError(f"--auxiliary-weight {weight}: {lacks} leave the option out")
    if "auxiliary" in settings:
        settings["auxiliary"] = beside if weight else 0
    return dataclasses.replace(
        config,
        model=name,
        model_settings=settings,
        chunk_size=config.chunk_size or data.usual_chunk_size,
        auxiliary_weight=weight,
    )


def make_problem(config: TrainConfig, train: Dataset, comm: parallel.Comm) -> tuple[TrainConfig, TrainingProblem]:
    """Return the configuration as `resolved`, and what is to be minimised.

    Collective on comm. Where memory is bounded, the chunk size is one that fits, and is part of the configuration.

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
    loss: Loss = next(loss for loss in LOSSES.values() if loss.task == train.task)
    if config.label_smoothing:
        if not isinstance(loss, CrossEntropy):
            raise OptionError("--label-smoothing is for classes, the data holds numbers: leave it out", agreed=True)
        loss = CrossEntropy(config.label_smoothing)
    samples: SampleSource = train
    if config.auxiliary_weight:
        standard = standardisation(train.auxiliary, comm)
        samples = AuxiliarySource(train, standard(train.auxiliary), lambda: standard(train.auxiliary))
        loss = WithAuxiliary(loss, train.auxiliary.shape[1], config.auxiliary_weight)
    terms: list[Term] = [L1(config.l1)] if config.l1 else []
    terms += [JacobianPenalty(config.jacobian_penalty)] if config.jacobian_penalty else []
    problem = TrainingProblem(
        model,
        samples,
        loss,
        comm,
        chunk_size=config.chunk_size,
        weight_decay=config.penalty(),
        terms=terms,
        warm_start=config.warm_start,
        adaptive=config.adaptive,
        on_failure=config.on_failure,
        memory_limit=None if config.memory_per_rank is None else int(config.memory_per_rank * GIB),
    )
    if config.memory_per_rank is not None:
        products = config.optimizer not in (*MINIBATCH, TORCH_LBFGS)
        size = fitting_chunk_size(problem, train.costs, config.memory_per_rank * GIB, products=products)
        problem.visits.chunk_size = size
        config = dataclasses.replace(config, chunk_size=size)
    return config, problem


def minibatch_settings(config: TrainConfig) -> MinibatchSettings | None:
    """Return the settings of a method on minibatches; None for any other. Not collective."""
    if config.optimizer not in MINIBATCH:
        return None
    given = {name: getattr(config, name) for name in ("learning_rate", "batch_size", "weight_decay", "average")}
    given = {name: value for name, value in given.items() if value is not None}
    return MinibatchSettings(seed=config.seed, schedule=config.learning_rates(), **given)


def sampling_of(config: TrainConfig) -> Sampling | None:
    """Return which samples a method of TAO's works on; None: all. Not collective."""
    if config.optimizer in MINIBATCH or (config.hessian_fraction is None and config.batch_size is None):
        return None
    given = {name: getattr(config, name) for name in ("hessian_fraction", "batch_size", "batch_growth")}
    return Sampling(seed=config.seed, **{name: value for name, value in given.items() if value is not None})


def headline(config: TrainConfig, problem: TrainingProblem, counts: Mapping[str, int]) -> str:
    """Return what a run says of itself before it begins.

    Not collective.

    Parameters
    ----------
    counts
        Samples by split.
    """
    options = {**resolved_options(config.optimizer), **config.petsc}
    words = [f"-{name} {value}" for name, value in options.items()]
    if config.optimizer in MINIBATCH:
        names = ("learning_rate", "schedule", "warmup", "learning_rate_floor", "average", "batch_size")
        given = {name: getattr(config, name) for name in names}
        words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None] + words
    lines = {
        "data": f"{config.data}: {problem.loss_function.task}, "
        + ", ".join(f"{split} {count}" for split, count in counts.items()),
        "model": f"{config.model}, {problem.layout.count} weights, {config.dtype}",
        "optimizer": f"{config.optimizer} on {problem.comm.size} ranks",
        "options": " ".join(words),
    }
    if config.memory_per_rank is not None:
        lines["memory"] = f"{config.memory_per_rank:g} GiB a rank: chunks of {config.chunk_size} samples"
    return "".join(f"{name:<10} {told}\n" for name, told in lines.items())


def standardise(model: nn.Module, train: Dataset, comm: parallel.Comm) -> None:
    """Let a model begin with the training samples' statistics: of their targets where it gives numbers, of their descriptors.

    Collective on comm. They are saved with the model's weights.
    """
    scales = [module for module in model.modules() if isinstance(module, OutputScale)]
    if train.task == "regression" and scales:
        mean, deviation = column_statistics(train.targets, comm)
        for scale in scales:
            scale.set(mean, deviation)
    features = [module for module in model.modules() if isinstance(module, DescriptorFeatures)]
    if features:
        with parallel.agreement(comm):
            own = train.descriptors()
        mean, deviation = column_statistics(torch.from_numpy(own), comm)
        for module in features:
            module.set(mean, deviation)
