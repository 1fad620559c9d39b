"""Whether a model gives the same loss and gradient twice, found out by evaluating it; and which layer does not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpcdeq.deq import FixedPoint, Help
from hpcdeq.deq.arguments import CellFunction, flatten, initial_state
from hpcdeq.errors import HpcdeqError
from hpcdeq.problem.network import leaves
from hpcdeq.problem.training import TrainingProblem

# Samples of each rank that are evaluated, and how often: a layer that follows a running statistic may need two calls.
SAMPLES, EVALUATIONS = 4, 3
# Differences of so many roundings (or residuals of a fixed point) are none: sums on several threads or on a GPU are not
# always taken in the same order.
ALLOWED = 1e3
# Adjoints of fixed points are solved to a tolerance of their own.
ALLOWED_ADJOINT = 1e-2
# How far from its initial state a cell is probed: a factor of chance does not show at zero.
PROBE = 0.1


@dataclass(frozen=True)
class _Call:
    """One call: copies of the tensors that went in and came out, and the relative error that these may have.

    ``module`` is None for what is no call of a module: the loss of the outputs, and the gradient.
    """

    module: str | None
    kind: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    allowed: float

    @property
    def told(self) -> str:
        if self.module is None:
            return self.kind
        return f"layer {self.module} ({self.kind})" if self.module else f"the model itself ({self.kind})"


@dataclass
class _Trace:
    """The calls of one evaluation in the order in which they ended, and the buffers that it changed, by module."""

    calls: list[_Call] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    complete: bool = False


class _Enough(Exception):
    """What is left of an evaluation is of no use."""


def nondeterminism(problem: TrainingProblem, p: Tensor) -> str | None:
    """Say what makes loss or gradient change from one evaluation to the next at the same weights; None if nothing does.

    Not collective: each rank looks at a few of its own samples, a rank without samples at none. Fixed points begin cold.
    Random number generators of torch's, buffers and counters are left as they were.

    Parameters
    ----------
    problem
        What is evaluated.
    p
        ``(n,)`` weights.
    """
    count = min(SAMPLES, len(problem.dataset))
    if not count:
        return None
    inputs, targets = problem.visits.move(*problem.dataset.batch(slice(0, count)))
    with problem.accounts.paused(), _undisturbed(problem):
        first = _evaluated(problem, p, inputs, targets)
        calls = None if first.complete else len(first.calls)
        others = [_evaluated(problem, p, inputs, targets, calls) for _ in range(EVALUATIONS - 1)]
    for other in others:
        told = _difference(first, other)
        if told is not None:
            return told
    return None


@contextlib.contextmanager
def _undisturbed(problem: TrainingProblem) -> Iterator[None]:
    """Leave buffers, random numbers and what fixed-point layers remember of earlier solves as they are."""
    device = problem.layout.device
    kept = [(m, name, b, b.clone()) for m in problem.model.modules() for name, b in m.named_buffers(recurse=False)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    setattr(module, name, buffer.copy_(value))
            for layer in problem.guidance.layers.values():
                layer.help = Help()
                layer.take_amplification()


def _evaluated(problem: TrainingProblem, p: Tensor, inputs: Any, targets: Tensor, calls: int | None = None) -> _Trace:
    """Return the trace of one evaluation of loss and gradient as far as it comes; no fixed point is sought after some calls."""
    for layer in problem.guidance.layers.values():
        layer.help = Help(1)
    watch = _Watch(problem.model, calls)
    before = _buffers(problem.model)
    weights = leaves(problem.layout.unflatten(p))
    with contextlib.suppress(Exception), watch, torch.enable_grad():
        # Whatever is wrong beyond that, a fixed point that is not found included: the first evaluation proper raises it,
        # on all ranks.
        found = problem.local.network.evaluate(weights, inputs, range(len(targets)))
        total = found.total(problem.loss_function, targets)
        gradient = problem.layout.flatten(torch.autograd.grad(total, weights, allow_unused=True))
        outputs = _copies([found.outputs, *(features for _, features in found.features)])
        watch.record(None, f"the loss ({type(problem.loss_function).__name__})", outputs, [total])
        allowed = ALLOWED_ADJOINT if problem.guidance.layers else 0.0
        watch.record(None, "the gradient", _copies([total]), [gradient], allowed)
        watch.trace.complete = True
    after = _buffers(problem.model)
    for (owner, name), value in before.items():
        if _gap([value], [after[owner, name]]) > 0:
            watch.trace.changed.setdefault(owner, f"the buffer {owner}.{name}" if owner else f"the buffer {name}")
    return watch.trace


def _buffers(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    return {
        (owner, name): buffer.clone()
        for owner, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
    }


class _Watch:
    """Records the calls of all modules of a model inside a ``with`` block.

    A fixed-point layer calls its cell many times: its inside is not recorded, one call of the cell before it is.
    """

    def __init__(self, model: nn.Module, calls: int | None) -> None:
        self.model = model
        self.most_calls = calls
        self.trace = _Trace()
        self._names: dict[nn.Module, str] = {}  # of those that can be watched
        self._stack: list[tuple[nn.Module, list[Tensor]]] = []
        self._inside = 0
        self._accuracy = 0.0
        self._handles = contextlib.ExitStack()

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self._names[module] = name
            for handle in (
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, with_kwargs=True),
            ):
                self._handles.callback(handle.remove)

    def __exit__(self, *_: object) -> None:
        self._handles.close()

    def record(
        self, module: str | None, kind: str, inputs: list[Tensor], outputs: Sequence[Tensor], allowed: float = 0.0
    ) -> None:
        """Record a call with copies of its inputs made before it."""
        rounding = max((torch.finfo(t.dtype).eps for t in outputs if _is_real(t)), default=0.0)
        allowed = max(ALLOWED * rounding, ALLOWED * self._accuracy, allowed)
        self.trace.calls.append(_Call(module, kind, inputs, _copies(outputs), allowed))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside:
            self._stack.append((module, _copies((args, kwargs))))
        if isinstance(module, FixedPoint):
            if not self._inside:
                self._probe(module, *args, **kwargs)
                if self.most_calls is not None and len(self.trace.calls) >= self.most_calls:
                    raise _Enough
            self._inside += 1

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if isinstance(module, FixedPoint):
            self._inside -= 1
            if not self._inside and module.solution is not None:
                size = module.solution.value.abs().max() if module.solution.value.numel() else torch.tensor(1.0)
                self._accuracy = max(self._accuracy, float(module.solution.residual.max() / size.clamp(min=1e-30)))
        if not self._inside:
            begun, inputs = self._stack.pop()
            while begun is not module:  # one that ended by an exception, which the model caught
                begun, inputs = self._stack.pop()
            self.record(self._names[module], type(module).__name__, inputs, _tensors(outputs))

    def _probe(self, layer: FixedPoint, x: Any, z0: Tensor | None = None) -> None:
        """Call a layer's cell once, at a state away from zero."""
        if z0 is None:
            try:
                function = CellFunction(layer.cell, x)
                self._inside += 1
                z0 = initial_state(layer.cell, x, function, function.tensors)
            except HpcdeqError:  # the layer itself says it
                return
            finally:
                self._inside -= 1
        away = PROBE * torch.cos(torch.arange(z0.numel(), dtype=z0.dtype, device=z0.device)).reshape(z0.shape)
        with torch.no_grad():
            layer.cell(z0 + away, x)


def _difference(first: _Trace, second: _Trace) -> str | None:
    """Say in which call the same inputs gave other outputs; None if in none of them."""
    for a, b in zip(first.calls, second.calls, strict=False):
        if (a.module, a.kind) != (b.module, b.kind):
            return f"{a.told} is called in one evaluation where {b.told} is called in another"
        if _gap(a.inputs, b.inputs) > a.allowed:
            continue  # what came before is to blame, or what called it
        gap = _gap(a.outputs, b.outputs)
        if gap <= max(a.allowed, b.allowed):
            continue
        if a.module is not None:
            inside = a.module + "." if a.module else ""
            for owner, buffer in {**first.changed, **second.changed}.items():
                if owner == a.module or owner.startswith(inside):
                    return f"{a.told} updates {buffer} at every evaluation in training mode, and changes with it"
        return f"{a.told} changes by {gap:.1e} of its size from one evaluation to the next, for the same inputs"
    return None


def _gap(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of its tensor; infinite where shapes or NaN differ."""
    if [(t.shape, t.dtype) for t in first] != [(t.shape, t.dtype) for t in second]:
        return float("inf")
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        apart = (a != b) & ~(a.isnan() & b.isnan())
        if not bool(apart.any()):
            continue
        if not _is_real(a):
            return float("inf")
        gap = float((a[apart] - b[apart]).abs().max())
        size = float(a[a.isfinite()].abs().sum()) and float(a[a.isfinite()].abs().max())
        largest = max(largest, gap / size if size and gap == gap else float("inf"))
    return largest


def _is_real(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _tensors(x: Any) -> list[Tensor]:
    return flatten(x, whole=True)[0]


def _copies(x: Any) -> list[Tensor]:
    return [t.detach().clone() for t in _tensors(x)]
