"""What a cell is a function of: its parameters, and the tensors inside its input, whatever object holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpcdeq.errors import ShapeError

Cell = Callable[[Tensor, Any], Tensor]
StateFunction = Callable[..., Tensor]


def flatten(x: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Take the floating-point tensors out of an input, and return how to put others in their place.

    Not collective. Tensors are found in tuples, lists, dicts and dataclasses; other objects are kept as they are.
    """
    found: list[Tensor] = []

    def take(item: Any) -> Callable[[Sequence[Tensor]], Any]:
        if isinstance(item, Tensor) and (item.is_floating_point() or item.is_complex()):
            place = len(found)
            found.append(item)
            return lambda tensors: tensors[place]
        if isinstance(item, dict):
            builders = {key: take(value) for key, value in item.items()}
            return lambda tensors: {key: build(tensors) for key, build in builders.items()}
        if isinstance(item, list | tuple):
            parts = [take(value) for value in item]
            if hasattr(item, "_fields"):  # a named tuple is made from its fields
                return lambda tensors: type(item)(*(build(tensors) for build in parts))
            return lambda tensors: type(item)(build(tensors) for build in parts)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            fields = {f.name: take(getattr(item, f.name)) for f in dataclasses.fields(item) if f.init}
            return lambda tensors: dataclasses.replace(item, **{k: build(tensors) for k, build in fields.items()})
        return lambda tensors: item

    rebuild = take(x)
    return found, rebuild


def pure_function(cell: Cell, x: Any) -> tuple[list[Tensor], StateFunction]:
    """Write a cell as a function of the state and of every tensor that it depends on.

    Not collective.

    Returns
    -------
    tensors
        The cell's floating-point parameters, then the floating-point tensors inside x.
    function
        ``function(z, *tensors) -> f(z)`` without hidden arguments.
    """
    inputs, rebuild = flatten(x)
    if not isinstance(cell, nn.Module):
        return inputs, lambda z, *tensors: cell(z, rebuild(tensors))
    named = [(name, p) for name, p in cell.named_parameters() if p.is_floating_point()]
    names = [name for name, _ in named]

    def function(z: Tensor, *tensors: Tensor) -> Tensor:
        parameters = dict(zip(names, tensors[: len(names)], strict=True))
        return functional_call(cell, parameters, (z, rebuild(tensors[len(names) :])))

    return [p for _, p in named] + inputs, function


def initial_state(cell: Cell, x: Any, function: StateFunction, tensors: Sequence[Tensor]) -> Tensor:
    """Return a zero state of the shape that the cell maps to itself.

    Not collective. A cell may say it itself with a method ``initial_state(x)``. Otherwise it is the shape of x, if that
    fits, else x's with the last length replaced by a length of one of the tensors.

    Raises
    ------
    ShapeError
        No shape, or more than one, fits.
    """
    if hasattr(cell, "initial_state"):
        return cell.initial_state(x)
    if not isinstance(x, Tensor):
        raise ShapeError(
            f"the shape of the state cannot be told from an input of type {type(x).__name__}: pass z0=..., or give the cell"
            " a method initial_state(x) -> z0"
        )
    lengths = {n for p in tensors for n in p.shape} if x.dim() else set()
    others = [(*x.shape[:-1], n) for n in sorted(lengths) if n != x.shape[-1]]
    fitting: list[Tensor] = []
    for shape in (tuple(x.shape), *others):
        z = torch.zeros(shape, dtype=x.dtype, device=x.device)
        try:
            with torch.no_grad():
                fits = function(z, *tensors).shape == z.shape
        except (RuntimeError, ShapeError, IndexError):  # what torch raises for lengths that do not fit
            continue
        if fits and shape == x.shape:
            return z
        if fits:
            fitting.append(z)
    if len(fitting) != 1:
        found = ", ".join(str(tuple(z.shape)) for z in fitting) or "none"
        raise ShapeError(
            f"the shape of the state is not determined by x of shape {tuple(x.shape)} (shapes that fit: {found}): pass z0=...,"
            " or give the cell a method initial_state(x) -> z0"
        )
    return fitting[0]
