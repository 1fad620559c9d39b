"""The cells that the benchmarks solve, scaled so that the largest spectral radius of ∂f/∂z at the fixed points is as asked.

Not a program of its own: `bench_solves.py` and `bench_memory.py` import it.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigs
from torch import Tensor, nn

import hpcdeq
from hpcdeq.data import Dataset
from hpcdeq.errors import ConvergenceError
from hpcdeq.models.graph_deq import GraphDeq, GraphDeqConfig, MessageCell

SAMPLES_JUDGED = 16  # how many samples' spectra are computed, those whose products grow fastest
GROWTH_PRODUCTS = 120
RADIUS_ERROR = 2e-4
DENSE_LIMIT = 1000  # above this length of a sample's state, ARPACK instead of all eigenvalues
CRYSTALS = 512


class TanhCell(nn.Module):
    """z ↦ tanh(W z + x)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + x)


class ConvCell(nn.Module):
    """z ↦ tanh(w * z + x) with a 3 × 3 convolution."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.conv2d(z, self.weight, padding=1) + x)


class Counted(nn.Module):
    """A cell that measures itself: CPU seconds inside it, and rows of states evaluated.

    Methods that a solver may ask for (``select``, ``initial_state``) are the cell's.
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.seconds = 0.0
        self.rows = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("select", "initial_state"):
            return getattr(super().__getattr__("cell"), name)
        return super().__getattr__(name)

    def forward(self, z: Tensor, given: Any) -> Tensor:
        since = time.process_time()
        image = self.cell(z, given)
        self.seconds += time.process_time() - since
        self.rows += len(z)
        return image


@dataclass
class Case:
    """A cell with its input, ready to be solved.

    Attributes
    ----------
    name
        Kind and spectral radius: ``tanh-0.95``.
    target
        The spectral radius that was asked for.
    radius
        The largest one measured over the samples.
    cell, given, z0
        f(z, given) and the initial guess.
    index
        ``(rows,)`` sample of each row of the state; None: each row is one.
    """

    name: str
    target: float
    cell: nn.Module
    given: Any
    z0: Tensor
    index: Tensor | None = None
    radius: float = float("nan")

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.z0) if self.index is None else int(self.index.max()) + 1

    @property
    def sample_index(self) -> Callable[[Any], Tensor] | None:
        """What `hpcdeq.FixedPoint` takes under this name."""
        return None if self.index is None else _node_graph

    def tensors(self) -> list[Tensor]:
        """Return weights and inputs, which gradients are taken of. Not collective."""
        if isinstance(self.given, Tensor):
            return [*self.cell.parameters(), self.given]
        return [self.given.own, self.given.message, self.given.node, self.given.gate]

    def norms(self, z: Tensor) -> Tensor:
        """Return the 2-norm of each sample, ``(B,)`` float64. Not collective."""
        rows = torch.linalg.vector_norm(z.detach().flatten(1), dim=1, dtype=torch.float64)
        if self.index is None:
            return rows
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.index, rows.square()).sqrt()

    def residual(self, z: Tensor) -> float:
        """Return the largest ‖f(z_i) - z_i‖ / ‖f(z_i)‖ over the samples. Not collective."""
        with torch.no_grad():
            image = self.cell(z, self.given)
        return float((self.norms(image - z) / self.norms(image)).max())

    def to(self, dtype: torch.dtype) -> Case:
        """Return the case in another precision, its tensors marked for gradients. Not collective."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_() if tensor.is_floating_point() else tensor

        if isinstance(self.given, Tensor):
            given = cast(self.given)
            cell: nn.Module = type(self.cell)(self.cell.weight.detach().to(dtype))  # type: ignore[operator]
        else:
            values = {f.name: cast(getattr(self.given, f.name)) for f in dataclasses.fields(self.given)}
            given, cell = dataclasses.replace(self.given, **values), self.cell
        return dataclasses.replace(self, cell=cell, given=given, z0=self.z0.to(dtype))

    def alone(self, i: int) -> Case:
        """Return the case of sample i only. Not collective."""
        if self.index is None:
            return dataclasses.replace(self, given=self.given[i : i + 1], z0=self.z0[i : i + 1])
        nodes = (self.index == i).nonzero().flatten()
        edges = self.index[self.given.target] == i
        given = dataclasses.replace(
            self.given,
            node=self.given.node[nodes],
            gate=self.given.gate[edges],
            source=self.given.source[edges] - nodes[0],
            target=self.given.target[edges] - nodes[0],
            node_graph=torch.zeros(len(nodes), dtype=torch.int64),
        )
        return dataclasses.replace(self, given=given, z0=self.z0[nodes], index=given.node_graph)


def _node_graph(given: Any) -> Tensor:
    return given.node_graph


def tanh_case(scale: float, size: int = 256, batch: int = 256) -> Case:
    """Return z ↦ tanh(W z + x) with Gaussian W·√n/scale and x. Not collective."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=random, dtype=torch.float64) / size**0.5
    x = torch.randn(batch, size, generator=random, dtype=torch.float64)
    return Case("tanh", 0.0, TanhCell(scale * weight), x, torch.zeros_like(x))


def conv_case(scale: float, channels: int = 32, side: int = 16, batch: int = 32) -> Case:
    """Return z ↦ tanh(w * z + x) with a Gaussian 3 × 3 convolution. Not collective."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, generator=random, dtype=torch.float64) / (9 * channels) ** 0.5
    x = torch.randn(batch, channels, side, side, generator=random, dtype=torch.float64)
    return Case("conv", 0.0, ConvCell(scale * weight), x, torch.zeros_like(x))


def graph_cases(source: Path, folder: Path) -> Callable[[float], Case]:
    """Return scale ↦ message passing in real crystals, prepared from a source file into a folder. Not collective."""
    out = folder / "crystals.h5"
    command = [sys.executable, "-m", "hpcdeq.prepare", "crystals", str(source), "--out", str(out), "--quiet"]
    done = subprocess.run([*command, "--limit", str(2 * CRYSTALS)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    batch = Dataset(out, "train").batch(slice(0, CRYSTALS))[0]
    torch.manual_seed(0)
    model = GraphDeq(GraphDeqConfig(), (), 3).double()
    with torch.no_grad():
        given = model.inject(batch, model.edges(batch))  # type: ignore[arg-type]

    def case(scale: float) -> Case:
        scaled = dataclasses.replace(given, own=scale * given.own, message=scale * given.message)
        return Case("graph", 0.0, MessageCell(), scaled, torch.zeros_like(given.node), given.node_graph)

    return case


def solved(case: Case, rtol: float = 1e-9) -> Tensor:
    """Return the fixed points of a case. Not collective."""
    return hpcdeq.solve_fixed_point(
        case.cell,
        case.given,
        case.z0,
        options={"snes_rtol": rtol, "snes_atol": 0.0, "snes_max_it": 2000},
        sample_index=case.sample_index,
    ).value


def transposed_product(case: Case, z: Tensor) -> Callable[[Tensor], Tensor]:
    """Return v ↦ Jᵀ v, all samples at once; Jᵀ has the spectrum of J. Not collective."""
    at = z.detach().requires_grad_()
    with torch.enable_grad():
        image = case.cell(at, case.given)
    return lambda v: torch.autograd.grad(image, at, v, retain_graph=True)[0]


def growth(case: Case, z: Tensor) -> Tensor:
    """Return ``(B,)`` rates at which repeated products with J grow: nearly each sample's spectral radius. Not collective."""
    product = transposed_product(case, z)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    logarithm = torch.zeros(case.count, dtype=torch.float64)
    for k in range(GROWTH_PRODUCTS):
        norms = case.norms(v)
        spread = norms if case.index is None else norms[case.index]
        v = product(v / spread.to(z.dtype).view(-1, *(1 for _ in z.shape[1:])))
        if k >= GROWTH_PRODUCTS // 2:
            logarithm += case.norms(v).log()
    return (logarithm / (GROWTH_PRODUCTS - GROWTH_PRODUCTS // 2)).exp()


def spectral_radius(case: Case, z: Tensor) -> float:
    """Return the largest spectral radius of J over the samples, from the spectra of those that grow fastest.

    Not collective.
    """
    radii = []
    for i in growth(case, z).argsort(descending=True)[:SAMPLES_JUDGED].tolist():
        one = case.alone(i)
        product = transposed_product(one, z[i : i + 1] if case.index is None else z[case.index == i])
        shape, size = one.z0.shape, one.z0.numel()

        def flat(v: np.ndarray, product: Any = product, shape: Any = shape) -> np.ndarray:
            return product(torch.from_numpy(np.ascontiguousarray(v, dtype=float)).reshape(shape)).flatten().numpy()

        if size <= DENSE_LIMIT:
            dense = torch.from_numpy(np.stack([flat(row) for row in np.eye(size)]))
            radii.append(float(torch.linalg.eigvals(dense).abs().max()))
        else:
            operator = LinearOperator((size, size), matvec=flat, dtype=float)
            values = eigs(operator, k=4, tol=1e-4, v0=np.ones(size), return_eigenvectors=False)
            radii.append(float(np.abs(values).max()))
    return max(radii)


def scaled_to(build: Callable[[float], Case], target: float) -> Case:
    """Return the case whose largest spectral radius is ``target``: regula falsi (Illinois) on the scale of the weights.

    Not collective. A scale without fixed points within reach counts as too large.
    """

    def excess(scale: float) -> float:
        case = build(scale)
        try:
            case.radius = spectral_radius(case, solved(case))
        except ConvergenceError:
            return float("inf")
        seen[scale] = case
        return case.radius - target

    seen: dict[float, Case] = {}
    low, high = 0.0, 1.0
    at_low, at_high = -target, excess(1.0)
    while at_high < 0:
        low, at_low = high, at_high
        high *= 1.25
        at_high = excess(high)
    kept = 0  # which end the last step kept: -1 low, 1 high
    for _ in range(40):
        best = min(seen, key=lambda scale: abs(seen[scale].radius - target))
        if abs(seen[best].radius - target) <= RADIUS_ERROR:
            break
        known = at_high < float("inf")
        middle = (low * at_high - high * at_low) / (at_high - at_low) if known else (low + high) / 2
        value = excess(middle)
        if value > 0:
            at_low *= 0.5 if kept == -1 else 1.0
            high, at_high, kept = middle, value, -1
        else:
            at_high *= 0.5 if kept == 1 else 1.0
            low, at_low, kept = middle, value, 1
    else:
        raise SystemExit(f"no scale found for which the spectral radius is {target}")
    case = seen[best]
    return dataclasses.replace(case, name=f"{case.name}-{target:.2f}", target=target)
