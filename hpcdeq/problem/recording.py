"""Which weights a network applies to what: the inputs and outputs of its linear maps, read while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hpcdeq.models.spectral import spectral_linear

LINEAR, CONVOLUTION, EMBEDDING, SPECTRAL = KINDS = ("linear", "convolution", "embedding", "spectral")
# A weight that is computed from a parameter (bounded, normalised) is a few operations away from it.
FARTHEST = 100


@dataclass(frozen=True)
class Call:
    """One application of a weight.

    Attributes
    ----------
    kind
        One of `KINDS`.
    weight, bias
        Numbers of the parameters among those recorded for; bias is None where there is none.
    scale
        The weight that was applied over the parameter that it is a multiple of; 1 for the parameter itself.
    given
        Input of the map, detached.
    output
        Its output, in the graph.
    settings
        Of a convolution: keywords of `torch.nn.functional.unfold`.
    """

    kind: str
    weight: int
    bias: int | None
    scale: float
    given: Tensor
    output: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)


class Recording(TorchFunctionMode):
    """Notes applications of parameters inside a ``with`` block.

    Linear maps (``functional.linear``, ``x @ W.T``, ``addmm``), two-dimensional convolutions without groups, embeddings, and
    the maps between Fourier modes of `hpcdeq.models.spectral` are recognised, by a parameter itself or by a weight that was
    computed from the parameters of one module, among which one has the weight's shape. Everything else passes unseen.

    Parameters
    ----------
    names, parameters
        What to look for; the very tensors that the network is run with.

    Attributes
    ----------
    calls
        What was seen, in order.
    active
        Whether anything is noted.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.active = True
        self._modules = [name.rpartition(".")[0] for name in names]
        self._parameters = list(parameters)
        self._numbers = {id(parameter): i for i, parameter in enumerate(parameters)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, and note it if it applies a weight."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        reader = _READERS.get(func) if self.active else None
        if reader is not None:
            seen = reader(*args, **kwargs)
            if seen is not None:
                self._note(*seen, output)
        return output

    def _note(
        self, kind: str, given: Tensor, weight: Tensor, bias: Tensor | None, settings: dict[str, Any], output: Tensor
    ) -> None:
        found = self._origin(weight)
        if found is None or not output.requires_grad:
            return
        number, scale = found
        self.calls.append(Call(kind, number, self._numbers.get(id(bias)), scale, given.detach(), output, settings))

    def _origin(self, weight: Tensor) -> tuple[int, float] | None:
        """Return the parameter that a weight is, or is computed from, and their ratio."""
        if id(weight) in self._numbers:
            return self._numbers[id(weight)], 1.0
        sources = self._sources(weight)
        alike = [i for i in sources if self._parameters[i].shape == weight.shape]
        if len(alike) != 1 or len({self._modules[i] for i in sources}) != 1:
            return None
        parameter = self._parameters[alike[0]].detach()
        square = float((parameter * parameter).sum())
        return alike[0], float((weight.detach() * parameter).sum()) / square if square else 1.0

    def _sources(self, weight: Tensor) -> set[int]:
        """Return the parameters that a tensor is computed from; empty where they are too far away to be a weight's."""
        found: set[int] = set()
        seen = set()
        ahead = [weight.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if len(seen) > FARTHEST:
                return set()
            if hasattr(node, "variable"):
                number = self._numbers.get(id(node.variable))
                if number is None:
                    return set()
                found.add(number)
            ahead += [nearer for nearer, _ in node.next_functions]
        return found


Seen = tuple[str, Tensor, Tensor, Tensor | None, dict[str, Any]]


def _linear(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Seen:
    return LINEAR, given, weight, bias, {}


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Seen | None:
    if groups != 1 or isinstance(padding, str):
        return None
    settings = {"kernel_size": tuple(weight.shape[2:]), "stride": stride, "padding": padding, "dilation": dilation}
    return CONVOLUTION, input, weight, bias, settings


def _product(given: Tensor, weight: Tensor) -> Seen | None:
    """Return what x Wᵀ applies: a transposed view says that its base is a weight."""
    base = weight._base
    if base is None or weight.dim() != 2 or base.shape != weight.mT.shape or given.dim() < 2:
        return None
    return LINEAR, given, base, None, {}


def _added_product(added: Tensor, given: Tensor, weight: Tensor) -> Seen | None:
    return _product(given, weight)


def _embedding(input: Tensor, weight: Tensor, *settings: Any, **more: Any) -> Seen:
    return EMBEDDING, input, weight, None, {}


def _spectral(spectrum: Tensor, weight: Tensor) -> Seen:
    return SPECTRAL, spectrum, weight, None, {}


_READERS: dict[Callable[..., Any], Callable[..., Seen | None]] = {
    functional.linear: _linear,
    torch.addmm: _added_product,
    torch.matmul: _product,
    Tensor.matmul: _product,
    Tensor.__matmul__: _product,
    functional.conv2d: _convolution,
    functional.embedding: _embedding,
    torch.embedding: lambda weight, input, *settings: _embedding(input, weight),
    spectral_linear: _spectral,
}
