"""torchdeq 0.1.0 at its best: each of its solvers with the fewest iterations that solve every sample, the fastest taken.

Not a program of its own: `bench_solves.py` imports it. What is done so that the peer wastes nothing:

- It is told in advance, outside the timing, the number of iterations after which every sample satisfies the criterion
  (``f_max_iter``, ``b_max_iter``), found from the true residuals of the states that it would return. Its tolerance is
  zero: it neither stops too early, by its own estimate of the residual, nor goes on for a sample that is done. (With a
  tolerance instead, its traces are padded to ``max_iter``, which costs time, and its residual is that of the state
  before the one that it returns.)
- Anderson's window m, ridge lam (absolute, so that its default of 1e-4 averages instead of extrapolating near the
  answer) and damping tau, and Broyden's memory, are tried over a grid, forward and backward. ``get_deq`` passes none of
  them to the backward solver; variants are made known under names of their own by ``register_solver``, which is public.
- Plain iteration without any bookkeeping (``simple_fixed_point_iter``) is measured too, apart from the others: it is no
  solver with a test of convergence, only a loop of a length that nobody knows in advance.
- The implicit backward pass is tried by ``autograd.Function`` and by hook (which evaluates the cell once less).
- A graph's atoms are tried as one sample for the whole batch, as samples of their own, and padded to a batch of crystals.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench_cells import Case
from torch import Tensor, nn

with warnings.catch_warnings():  # its docstrings have escapes that Python deprecates
    warnings.simplefilter("ignore")
    import torchdeq
    from torchdeq.solver import get_solver, register_solver

Function = Callable[[Tensor], Tensor]
Accepts = Callable[[Tensor, Tensor], bool]
FIRST_LIMIT, LAST_LIMIT = 32, 512  # of the iterations tried; beyond it a solver counts as failed
PLAIN_LIMIT = 20_000
CONTENDERS = 3  # variants whose times are compared more than once
HOPELESS = 2.0  # a run that took this many times the best variant's seconds without an answer is the variant's last


@dataclass(frozen=True)
class Variant:
    """One of torchdeq's solvers with its settings, registered under a name of its own."""

    solver: str
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """Under which ``get_deq`` finds it."""
        return " ".join([self.solver, *(f"{key}={value:g}" for key, value in self.settings)])

    def register(self) -> Callable[..., Any]:
        """Make the variant known to torchdeq, and return it. Not collective."""
        if self.settings:
            register_solver(self.name, functools.partial(get_solver(self.solver), **dict(self.settings)))
        return get_solver(self.name)


@dataclass(frozen=True)
class Layout:
    """How a state is given to torchdeq, whose samples are the leading rows."""

    name: str
    wrap: Function
    unwrap: Function
    plain: bool = False  # a state as it is


@dataclass(frozen=True)
class Choice:
    """A variant, in a layout, with the iterations it needs and the seconds it took."""

    variant: Variant
    layout: Layout
    iterations: int
    seconds: float

    def __str__(self) -> str:
        where = f", {self.layout.name}" if self.layout.name else ""
        return f"{self.variant.name} ({self.iterations}{where})"

    def solver(self) -> Callable[..., Any]:
        """Return what runs it: ``solver(f, z0)``. Not collective."""
        run = self.variant.register()
        return lambda f, z0: run(lambda z, tau=1.0: f(z), z0, max_iter=self.iterations, tol=0.0, stop_mode="rel")


def variants(quick: bool) -> Iterator[Variant]:
    """Yield the solvers to try. Not collective."""
    yield Variant("fixed_point_iter")
    yield Variant("anderson")
    yield Variant("broyden")
    for m, lam in itertools.product((6,) if quick else (6, 10, 20), (1e-12, 1e-16) if quick else (1e-8, 1e-12, 1e-16)):
        yield Variant("anderson", (("m", m), ("lam", lam)))
    if quick:
        return
    yield Variant("anderson", (("m", 10),))
    yield Variant("anderson", (("m", 6), ("lam", 1e-12), ("tau", 0.8)))
    yield Variant("anderson", (("m", 20), ("lam", 1e-12), ("tau", 0.8)))
    for memory in (10, 30):
        yield Variant("broyden", (("LBFGS_thres", memory),))


def layouts(case: Case) -> list[Layout]:
    """Return the ways to lay out a state. Not collective."""
    if case.index is None:
        return [Layout("", lambda z: z, lambda z: z, plain=True)]
    index, shape = case.index, case.z0.shape
    sizes = torch.bincount(index)
    place = torch.arange(len(index)) - (sizes.cumsum(0) - sizes)[index] + index * int(sizes.max())
    padded = (case.count, int(sizes.max()), shape[1])

    def pad(z: Tensor) -> Tensor:
        return z.new_zeros(padded[0] * padded[1], shape[1]).index_copy(0, place, z).view(padded)

    return [
        Layout("atoms as samples", lambda z: z, lambda z: z, plain=True),
        Layout("one sample", lambda z: z.reshape(1, -1), lambda z: z.reshape(shape)),
        Layout("padded", pad, lambda z: z.reshape(-1, shape[1]).index_select(0, place)),
    ]


def inside(function: Function, layout: Layout) -> Function:
    """Return a function of states as a function in a layout. Not collective."""
    if layout.plain:
        return function
    return lambda z: layout.wrap(function(layout.unwrap(z)))


def fewest_iterations(
    variant: Variant, function: Function, z0: Tensor, accepts: Accepts, patience: float = float("inf")
) -> int | None:
    """Return the smallest ``max_iter`` whose answer is accepted; None: none within the limits.

    Not collective. ``accepts(z, f(z))``. The states that every ``max_iter`` would return are what torchdeq's own
    ``indexing`` gives from one run; they only get better, which a bisection uses. A run that took more seconds than
    ``patience`` without an answer is the last.
    """
    solver = variant.register()
    since = time.process_time()
    if variant.solver.endswith("fixed_point_iter"):
        z = z0
        for k in range(PLAIN_LIMIT):
            image = function(z)
            if k and accepts(z, image):
                return k
            if time.process_time() - since > patience:
                return None
            z = image
        return None
    # The first state that is listed is that of max_iter = 3 (anderson) or 1 (broyden).
    first, offset = (3, 0) if variant.solver == "anderson" else (1, 1)
    limit = FIRST_LIMIT
    while limit <= LAST_LIMIT:
        since = time.process_time()
        try:
            states = solver(function, z0, max_iter=limit, tol=0.0, stop_mode="rel", indexing=range(limit + 1 + offset))[
                1
            ]
        except torch.linalg.LinAlgError:  # a singular system of mixing coefficients
            return None
        seconds = time.process_time() - since
        if accepts(states[-1], function(states[-1])):
            return first + bisect.bisect_left(states, True, key=lambda z: accepts(z, function(z)))
        if seconds > patience or not bool(torch.isfinite(states[-1]).all()):
            return None
        limit *= 2
    return None


@torch.no_grad()
def fastest(
    tried: Iterable[Variant],
    layout: Layout,
    function: Function,
    z0: Tensor,
    accepts: Accepts,
    say: Callable[[str], None],
    best: float = float("inf"),
) -> Choice | None:
    """Return the fastest way to solve z = f(z), with the smallest number of iterations that is accepted.

    Not collective. None: there is none.

    Parameters
    ----------
    tried, layout
        Variants, and the layout to try them in.
    function, z0
        In the case's own layout.
    accepts
        ``accepts(z, f(z))`` on states in the case's own layout.
    say
        Where what was found goes.
    best
        Seconds of the best variant in other layouts.
    """
    g, start = inside(function, layout), layout.wrap(z0)
    found: list[Choice] = []
    for variant in tried:
        best = min([best, *(choice.seconds for choice in found)])
        count = fewest_iterations(
            variant, g, start, lambda z, image: accepts(layout.unwrap(z), layout.unwrap(image)), HOPELESS * best
        )
        if count is None:
            say(f"{variant.name} {layout.name}: never, or not in {HOPELESS:g} times the best one's time")
            continue
        found.append(_timed(Choice(variant, layout, count, 0.0), g, start))
        say(f"{found[-1]}: {found[-1].seconds:.4f} s")
    found.sort(key=lambda choice: choice.seconds)
    again = [_timed(choice, g, start) for choice in found[:CONTENDERS] * 3]
    return min(again, key=lambda choice: choice.seconds, default=None)


def _timed(choice: Choice, function: Function, z0: Tensor) -> Choice:
    solver = choice.solver()
    since = time.process_time()
    solver(function, z0)
    return replace(choice, seconds=time.process_time() - since)


def adjoint_function(function: Function, z: Tensor, cotangent: Tensor) -> Function:
    """Return y ↦ Jᵀ y + cotangent at z, as torchdeq's backward pass makes it. Not collective."""
    at = z.detach().requires_grad_()
    with torch.enable_grad():
        image = function(at)
    return lambda y: torch.autograd.grad(image, at, y, retain_graph=True)[0] + cotangent


def forward_model(choice: Choice) -> nn.Module:
    """Return the DEQ that only solves. Not collective."""
    name = choice.variant.name
    deq = torchdeq.get_deq(f_solver=name, f_max_iter=choice.iterations, f_tol=0.0, f_stop_mode="rel")
    return deq.eval()


def training_model(choice: Choice, backward: Choice, *, hook: bool) -> nn.Module:
    """Return the DEQ that is differentiated implicitly. Not collective."""
    return torchdeq.get_deq(
        f_solver=choice.variant.name,
        f_max_iter=choice.iterations,
        f_tol=0.0,
        f_stop_mode="rel",
        b_solver=backward.variant.name,
        b_max_iter=backward.iterations,
        b_tol=0.0,
        b_stop_mode="rel",
        ift=not hook,
        hook_ift=hook,
    ).train()
