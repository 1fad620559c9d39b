"""What a cell is a function of: its parameters, and the tensors inside its input, whatever object holds them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpcdeq.errors import ShapeError

# How far from the state, relative to it and to one, a cell on fewer samples is compared with the cell on all.
PROBE = 0.1
Cell = Callable[[Tensor, Any], Tensor]
StateFunction = Callable[..., Tensor]


def flatten(x: Any, *, whole: bool = False) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Take the floating-point tensors out of an input, and return how to put others in their place.

    Not collective. Tensors are found in tuples, lists, dicts and dataclasses; other objects are kept as they are.

    Parameters
    ----------
    x
        Any object.
    whole
        Take tensors of whole numbers and truth values too.
    """
    found: list[Tensor] = []

    def take(item: Any) -> Callable[[Sequence[Tensor]], Any]:
        if isinstance(item, Tensor) and (whole or item.is_floating_point() or item.is_complex()):
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


class CellFunction:
    """A cell as a function of the state and of every tensor that it depends on, without hidden arguments.

    Parameters
    ----------
    cell
        ``cell(z, x) -> z``.
    x
        The cell's second argument.

    Attributes
    ----------
    tensors
        The cell's floating-point parameters, then the floating-point tensors inside x.
    """

    def __init__(self, cell: Cell, x: Any) -> None:
        inputs, self._rebuild = flatten(x)
        named = []
        if isinstance(cell, nn.Module):
            named = [(name, p) for name, p in cell.named_parameters() if p.is_floating_point()]
        self.cell = cell
        self._names = [name for name, _ in named]
        self._own = [p for _, p in named]
        self.tensors = self._own + inputs

    def __call__(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """Return f(z) with the tensors in place of `tensors`. Not collective."""
        x = self._rebuild(tensors[len(self._names) :])
        if not self._names:
            return self.cell(z, x)
        parameters = dict(zip(self._names, tensors[: len(self._names)], strict=True))
        return functional_call(self.cell, parameters, (z, x))  # type: ignore[arg-type]

    def bind(self, tensors: Sequence[Tensor], *, now: bool) -> BoundCell:
        """Return z ↦ f(z, tensors) for evaluations without derivatives.

        Not collective.

        Parameters
        ----------
        tensors
            In the place of `tensors`.
        now
            Whether it is used before this call of the layer returns: the module then still holds the weights that it was
            called with. (A caller may have put others in their place for the call alone, as ``functional_call`` does.)
        """
        given, rest = tensors[: len(self._names)], [t.detach() for t in tensors[len(self._names) :]]
        # Where the module holds these very weights it is called as it is: a functional call costs as much as a small cell.
        held = now and all(a is b for a, b in zip(given, self._own, strict=True))
        parameters = None if held else {n: t.detach() for n, t in zip(self._names, given, strict=True)}
        return BoundCell(self.cell, parameters, self._rebuild(rest))


class BoundCell:
    """z ↦ f(z) with weights and input fixed, for all samples of the input or for some.

    Parameters
    ----------
    cell, given
        What is called as ``cell(z, given)``.
    parameters
        Weights by name; None: those that the module holds.
    """

    def __init__(self, cell: Cell, parameters: dict[str, Tensor] | None, given: Any) -> None:
        self.cell = cell
        self.parameters = parameters
        self.given = given
        self.checked = 0  # samples evaluated to see whether the restriction to these is right

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z). Not collective."""
        if self.parameters is None:
            return self.cell(z, self.given)
        return functional_call(self.cell, self.parameters, (z, self.given))  # type: ignore[arg-type]

    def restrict(self, keep: Tensor, rows: Tensor, count: int, z: Tensor) -> BoundCell | None:
        """Return the function for some of its samples; None where the cell cannot be restricted.

        Not collective. A cell says what its input is for fewer samples with a method ``select(given, keep)``. Without
        one, every tensor whose first length is the number of samples is taken to have a row for each; the first time that
        an input of some form is restricted, both are evaluated near the state and compared.

        Parameters
        ----------
        keep
            ``(k,)`` increasing sample numbers.
        rows
            Rows of the state that belong to them.
        count
            Number of samples so far.
        z
            A state of all samples so far.
        """
        select = getattr(self.cell, "select", None)
        form = "select" if select is not None else _form(self.given, count)
        if form is None or (select is None and len(rows) != len(keep)):
            return None
        # Batch normalisation makes samples depend on each other in one mode of the module, and not in the other.
        modes = tuple(m.training for m in self.cell.modules()) if isinstance(self.cell, nn.Module) else ()
        kind = (form, modes)
        given = _narrowed(self.given, keep, count) if select is None else select(self.given, keep)
        fewer = BoundCell(self.cell, self.parameters, given)
        trusted = _trusted(self.cell)
        if kind not in trusted:
            # Away from the state, where samples that depend on each other differ from what they are on their own: at a
            # state of zeros, say, the mean over a batch is that over any part of it.
            steps = torch.arange(z.numel(), dtype=torch.float64, device=z.device).cos().reshape(z.shape)
            probe = z + (PROBE * (1 + z.abs()) * steps).to(z.dtype)
            image = self(probe).index_select(0, rows)
            try:
                again = fewer(probe.index_select(0, rows))
            except Exception:  # lengths that do not fit: RuntimeError by torch, anything by other libraries
                return None
            rounding = torch.finfo(image.dtype).eps ** 0.5 * image.abs().amax()
            if again.shape != image.shape or not bool((again - image).abs().amax() <= rounding):
                return None
            trusted.add(kind)
            fewer.checked = count + len(keep)
        return fewer


# By cell: the kinds of input whose restriction to fewer samples was seen to be right.
_TRUSTED: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def _trusted(cell: Cell) -> set[Any]:
    try:
        return _TRUSTED.setdefault(cell, set())
    except TypeError:  # an object that has no weak references: it is looked at each time
        return set()


def _form(given: Any, count: int) -> tuple[Any, ...] | None:
    """Say what an input looks like, apart from the number of samples; None if nothing in it is as long as that."""
    tensors, _ = flatten(given, whole=True)
    form = tuple((t.dim() > 0 and t.shape[0] == count, t.shape[1:]) for t in tensors)
    return form if any(long for long, _ in form) else None


def _narrowed(given: Any, keep: Tensor, count: int) -> Any:
    tensors, rebuild = flatten(given, whole=True)
    return rebuild([t.index_select(0, keep) if t.dim() and t.shape[0] == count else t for t in tensors])


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
    # One sample tells as much as all of them, where the cell takes it.
    one = len(x) > 1 and x.dim() > 1 and bool(tensors) and tensors[-1] is x
    for given in [[*tensors[:-1], x[:1]], tensors] if one else [tensors]:
        for shape in (tuple(x.shape), *others):
            z = torch.zeros(shape if given is tensors else (1, *shape[1:]), dtype=x.dtype, device=x.device)
            try:
                with torch.no_grad():
                    fits = function(z, *given).shape == z.shape
            except (RuntimeError, ShapeError, IndexError, ValueError):  # what torch raises for lengths that do not fit
                continue
            whole = torch.zeros(shape, dtype=x.dtype, device=x.device)
            if fits and shape == x.shape:
                return whole
            if fits:
                fitting.append(whole)
        if fitting:
            break
    if len(fitting) != 1:
        found = ", ".join(str(tuple(z.shape)) for z in fitting) or "none"
        raise ShapeError(
            f"the shape of the state is not determined by x of shape {tuple(x.shape)} (shapes that fit: {found}): pass z0=...,"
            " or give the cell a method initial_state(x) -> z0"
        )
    return fitting[0]
