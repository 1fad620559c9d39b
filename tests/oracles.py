"""Second computations that tests of fixed-point and linear solvers compare with, and the cells that they are tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcdeq.deq import Solution, solve_fixed_point
from hpcdeq.errors import ConvergenceError
from hpcdeq.models.graph_deq import Injection


class Watched:
    """A cell, and every state that it is evaluated at."""

    def __init__(self, cell: Callable[[Tensor, Any], Tensor]) -> None:
        self.cell, self.states = cell, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cell, name)

    def __call__(self, z: Tensor, x: Any) -> Tensor:
        self.states.append(z.detach().clone())
        return self.cell(z, x)

    @property
    def rows(self) -> list[int]:
        return [len(z) for z in self.states]


def zeros(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width, dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def affine(z: Tensor, x: tuple[Tensor, Tensor]) -> Tensor:
    return torch.einsum("bij,bj->bi", x[0], z) + x[1]


def bounded(z: Tensor, x: tuple[Tensor, Tensor]) -> Tensor:
    return torch.tanh(affine(z, x))


def matrices(*norms: float, d: int = 8) -> tuple[Tensor, Tensor]:
    drawn = randn(len(norms), d, d)
    scale = torch.tensor(norms, dtype=torch.float64) / torch.linalg.matrix_norm(drawn, 2)
    return scale[:, None, None] * drawn, randn(len(norms), d)


def failing(cell: Any, x: Any, z0: Tensor, match: str = "not reached", **options: Any) -> Solution:
    with pytest.raises(ConvergenceError, match=match) as caught:
        solve_fixed_point(cell, x, z0=z0, options=options)
    return caught.value.record


def mixed(f, z, steps, *, m, beta, period, type, delay, restart, growth):  # noqa: A002
    """Return the iterates of one sample by least squares on the last m differences, one by one."""
    found, pairs, before, since, best, mixings = [], [], None, 0, np.inf, 0
    plain, expanding, stretch = False, False, 0.0
    for k in range(steps):
        found.append(z)
        image = f(z)
        r, norm = image - z, np.linalg.norm(image - z)
        if before is not None:
            expanding |= bool(plain and period > 1 and norm > 2 * stretch)
            pairs, since = [*pairs, (r - before[1], image - before[0])][max(0, len(pairs) + 1 - m) :], since + 1
        before, best, stretch = (image, r), min(best, norm), stretch if plain else norm
        due = since >= period or k == delay > 0
        if not pairs or k < delay or not (due or expanding):
            z, plain = z + beta * r, beta == 1
            continue
        if norm > growth * best:
            pairs, best = [], norm
        g = f_part = r_part = 0.0
        if pairs:
            dr, df = (np.stack(columns, axis=1) for columns in zip(*pairs, strict=True))
            test = dr if type == 2 else df - dr
            g = np.linalg.lstsq(dr, r)[0] if type == 2 else np.linalg.lstsq(test.T @ dr, test.T @ r)[0]
            f_part, r_part = df @ g, dr @ g
        z, plain = image - f_part - (1 - beta) * (r - r_part), False
        if due:
            since, mixings = 0, mixings + 1
            pairs = [] if restart and mixings % restart == 0 else pairs
    return np.stack(found)


def krylov_states(a: np.ndarray, b: np.ndarray, z: np.ndarray, steps: int, galerkin: bool) -> tuple[list, list]:
    """Return GMRES's (or, full orthogonalisation's) states for (I - A) z = b, and GMRES's norms, by Arnoldi."""
    matrix, r = np.eye(len(b)) - a, b - z + a @ z
    basis, h, states, norms = [r / np.linalg.norm(r)], np.zeros((steps + 1, steps)), [z], [np.linalg.norm(r)]
    for k in range(steps):
        w = matrix @ basis[k]
        for _ in range(2):
            for j in range(k + 1):
                h[j, k] += (along := basis[j] @ w)
                w = w - along * basis[j]
        h[k + 1, k] = np.linalg.norm(w)
        basis.append(w / h[k + 1, k])
        right = np.linalg.norm(r) * np.eye(k + 2)[0]
        y = np.linalg.lstsq(h[: k + 2, : k + 1], right)[0]
        norms.append(np.linalg.norm(right - h[: k + 2, : k + 1] @ y))
        y = np.linalg.solve(h[: k + 1, : k + 1], right[:-1]) if galerkin else y
        states.append(z + np.stack(basis[: k + 1], axis=1) @ y)
    return states, norms


def graphs(sizes: list[int], width: int = 4, norm: float = 0.45) -> Injection:
    """Rings of atoms, each also bound to its second neighbour."""
    node_graph = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    first = np.cumsum([0, *sizes])[:-1]
    source = [f + i for f, n in zip(first, sizes, strict=True) for i in range(n) for _ in range(2)]
    target = [f + (i + hop) % n for f, n in zip(first, sizes, strict=True) for i in range(n) for hop in (1, 2)]
    own, message = (norm * torch.nn.init.orthogonal_(zeros(width, width)) for _ in range(2))
    gate = torch.tanh(randn(len(source), width)) / 2
    return Injection(
        3 * randn(sum(sizes), width), gate, torch.tensor(source), torch.tensor(target), node_graph, own, message
    )
