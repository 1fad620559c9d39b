"""A network as a function of its weights, with what terms of the objective want to know of its fixed points."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpcdeq.deq import FixedPoint
from hpcdeq.deq.samples import Samples
from hpcdeq.problem.losses import Loss
from hpcdeq.problem.terms import LayerCall, SampleTerm


def leaves(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Return the pieces as tensors to differentiate with respect to. Not collective."""
    return [piece.detach().requires_grad_() for piece in pieces]


Place = tuple[dict[str, Any], str, nn.Parameter]


def places_of(model: nn.Module, names: Sequence[str]) -> list[list[Place]]:
    """Return where each named weight stands: all modules that share it, under what key, and the model's own weight.

    Not collective. What `torch.func.functional_call` looks up at every call, which takes it as long as a small network's
    forward pass.
    """
    named = dict(model.named_parameters())
    found: dict[int, list[Place]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module._parameters, key, parameter))
    return [found[id(named[name])] for name in names]


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation of the network on a batch gives.

    Attributes
    ----------
    outputs
        ``(B, ...)``.
    features
        Each term's features, call by call of the layers.
    """

    outputs: Tensor
    features: list[tuple[SampleTerm, Tensor]]

    def total(self, loss: Loss, targets: Tensor) -> Tensor:
        """Return the sum over the batch of the loss and of all terms, a differentiable scalar. Not collective."""
        value = loss.total(self.outputs, targets)
        for term, features in self.features:
            value = value + term.total(features)
        return value


class Network:
    """Outputs of a model, and features at its fixed points, as functions of its weights.

    Not collective, every method.

    Parameters
    ----------
    model
        The model.
    names
        Of the weights, in the order in which they are given.
    layers
        The model's fixed-point layers.
    terms
        What looks at them.
    offset
        Global number of this rank's first sample.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        layers: Mapping[str, FixedPoint],
        terms: Sequence[SampleTerm],
        offset: int,
    ) -> None:
        self.model = model
        self.names = names
        self.layers = layers
        self.terms = terms
        self.offset = offset
        self._places = places_of(model, names)

    def outputs(self, weights: Sequence[Tensor], inputs: Any) -> Tensor:
        """Return the model's outputs at the given weights."""
        for places, weight in zip(self._places, weights, strict=True):
            for parameters, key, _ in places:
                parameters[key] = weight
        try:
            return self.model(inputs)
        finally:
            for places in self._places:
                for parameters, key, own in places:
                    parameters[key] = own

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let layers that differ between training and application, such as dropout, do inside the block as in application."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            yield
        finally:
            for module in training:
                module.training = True

    def evaluate(self, weights: Sequence[Tensor], inputs: Any, ids: Sequence[int]) -> Evaluated:
        """Return outputs and features at the given weights; ids are this rank's numbers of the samples."""
        if not self.terms:
            return Evaluated(self.outputs(weights, inputs), [])
        with self._watched(ids) as features:
            return Evaluated(self.outputs(weights, inputs), features)

    @contextlib.contextmanager
    def _watched(self, ids: Sequence[int]) -> Iterator[list[tuple[SampleTerm, Tensor]]]:
        """Collect the terms' features of every call of a layer inside a ``with`` block."""
        found: list[tuple[SampleTerm, Tensor]] = []

        def look(layer: FixedPoint, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> None:
            x = args[0] if args else kwargs["x"]
            samples = Samples.of(z, None if layer.sample_index is None else layer.sample_index(x))
            numbers = torch.tensor(ids) + self.offset if samples.count == len(ids) else None
            call = LayerCall(layer, x, z, samples, numbers)
            found.extend((term, term.features(call)) for term in self.terms)

        with contextlib.ExitStack() as stack:
            if self.terms:
                for layer in self.layers.values():
                    handle = layer.register_forward_hook(look, with_kwargs=True)
                    stack.callback(handle.remove)
            yield found
