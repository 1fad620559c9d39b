"""Fixed-point problems to measure solvers on: the layer of a fresh or trained model on a batch, or a stiff one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.data import Dataset
from hpcdeq.deq import FixedPoint
from hpcdeq.errors import DataError, OptionError
from hpcdeq.models import build_model, model_config
from hpcdeq.record.restore import load, saved_of


@dataclass(frozen=True)
class Case:
    """A cell, its input for a batch of samples, and how a layer would solve for its fixed point.

    Attributes
    ----------
    title
        What it is, in a line.
    cell, given
        The problem: z = cell(z, given).
    samples
        Number of samples in the batch.
    prefix, options, sample_index
        As in `hpcdeq.FixedPoint`.
    """

    title: str
    cell: Callable[[Tensor, Any], Tensor]
    given: Any
    samples: int
    prefix: str = "deq_"
    options: Mapping[str, Any] = field(default_factory=dict)
    sample_index: Callable[[Any], Tensor] | None = None


class _Reached(Exception):
    """The layer was called: what it was given is known, and its solve is not needed."""


def layer_case(model: nn.Module, batch: Any, samples: int, title: str) -> Case:
    """Return the first fixed point that a model computes for a batch.

    Not collective. The model runs up to that layer.

    Raises
    ------
    OptionError
        The model has no such layer.
    """
    found: list[tuple[FixedPoint, Any]] = []

    def seize(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, FixedPoint)
        found.append((layer, arguments[0]))
        raise _Reached

    hooks = [part.register_forward_pre_hook(seize) for part in model.modules() if isinstance(part, FixedPoint)]
    try:
        with torch.no_grad():
            model(batch)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise OptionError(f"{title}: the model {type(model).__name__} computes no fixed point; give a DEQ")
    layer, given = found[0]
    return Case(title, layer.cell, given, samples, layer.options.prefix, dict(layer.options.given), layer.sample_index)


class TanhCell(nn.Module):
    """z ↦ tanh(W z + x).

    Parameters
    ----------
    weight
        ``(n, n)`` W.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the image of states ``(B, n)`` for inputs ``(B, n)``."""
        return torch.tanh(torch.addmm(x, z, self.weight.T))


def stiff_case(
    width: int = 256,
    samples: int = 256,
    radius: float = 0.99,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    """Return a problem whose Jacobian at the fixed point has a given spectral radius ρ in every sample.

    Not collective. The fixed points are chosen first, z_i = s_i ∘ r with magnitudes r and random signs s_i, and the
    inputs made to fit: x_i = artanh(z_i) - W z_i. The Jacobian there is D W with D = diag(1 - r²), the same in all
    samples. W = D^(-1/2) Q Λ Qᵀ D^(-1/2), Q random and orthogonal, gives it the eigenvalues Λ = 1 - τ with rates τ from
    1 - ρ to 1, evenly spaced in their logarithm: no few directions are to blame for slow convergence. With r² ≤ 1 - ρ the
    norm of W is at most 1, so that no other fixed point exists.

    Parameters
    ----------
    width
        n.
    radius
        ρ, in (0, 1).
    seed
        Of Q, r and s.
    """
    random = torch.Generator().manual_seed(seed)
    slowest = 1.0 - radius
    magnitudes = slowest**0.5 * (0.1 + 0.9 * torch.rand(width, generator=random, dtype=torch.float64))
    slopes = 1.0 - magnitudes**2
    rates = torch.logspace(math.log10(slowest), 0.0, width, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64)).Q
    weight = (basis * (1.0 - rates)) @ basis.T / (slopes[:, None] * slopes).sqrt()
    signs = 2.0 * torch.randint(0, 2, (samples, width), generator=random).to(torch.float64) - 1.0
    fixed = signs * magnitudes
    given = torch.atanh(fixed) - fixed @ weight.T
    title = f"tanh cell {width} x {width}, spectral radius {radius:g} at the fixed point, {samples} samples"
    return Case(title, TanhCell(weight.to(device, dtype)), given.to(device, dtype), samples)


def fresh_case(
    data: str,
    name: str,
    settings: Mapping[str, Any],
    samples: int,
    seed: int,
    dtype: torch.dtype,
    device: str,
) -> Case:
    """Return the fixed point of a model that was just initialised, on the first training samples of a dataset.

    Not collective.

    Parameters
    ----------
    data
        Dataset file or folder.
    name, settings
        Of the model.
    samples
        Number of samples, or all there are.
    """
    source = Dataset(data, "train", parallel.SELF, dtype)
    return _case(source, _built(source, name, settings, seed, dtype, device), name, samples, device, "fresh")


def trained_case(run_dir: Path, data: str, samples: int, dtype: torch.dtype, device: str) -> Case:
    """Return the fixed point of a trained model, on the first training samples of a dataset.

    Not collective. The run's own options of the layer hold.

    Raises
    ------
    DataError
        The data are not of the form that the model was trained on.
    CheckpointError
        The run left no model, or a damaged one.
    """
    source = Dataset(data, "train", parallel.SELF, dtype)
    model = load(run_dir, device, dtype)
    saved = saved_of(model)
    own, given = saved.schema, source.schema
    if (own.representation, own.sample_shape) != (given.representation, given.sample_shape):
        raise DataError(
            f"{run_dir} was trained on data as {own.representation} {own.sample_shape or ''}, {data} holds"
            f" {given.representation} {given.sample_shape or ''}: give the --data of the run"
        )
    return _case(source, model, saved.model, samples, device, f"trained in {run_dir}")


def _built(
    source: Dataset, name: str, settings: Mapping[str, Any], seed: int, dtype: torch.dtype, device: str
) -> nn.Module:
    return build_model(
        name,
        model_config(name, settings),
        source.schema.representation,
        source.input_shape,
        source.output_size,
        seed=seed,
        dtype=dtype,
        device=device,
    )


def _case(source: Dataset, model: nn.Module, name: str, samples: int, device: str, state: str) -> Case:
    if not len(source):
        raise DataError(f"{source.path} has no training samples to measure on: prepare more")
    batch = source.batch(slice(0, min(samples, len(source))))[0].to(device=device)
    return layer_case(model, batch, len(batch), f"{name} {state}, {len(batch)} samples of {source.path}")
