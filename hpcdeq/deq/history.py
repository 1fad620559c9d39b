"""The last differences of residuals and images of each sample: what an iteration learns of I - J."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcdeq.deq.samples import Samples

# The differences span what the last iterations moved in, down to rounding; an inverse must not amplify the latter.
SECANT_RIDGE = 1e-6


class History:
    """The last differences of residuals and of images of each row, with their Gram matrices.

    Not collective, every method.

    Parameters
    ----------
    like
        ``(rows, d)`` state.
    samples
        Which rows belong together.
    window
        m.
    kind
        Type II mixing, or type I.
    ridge
        Added to the Gram matrices of the normalised differences; None: ten times the rounding unit.
    kept
        Whether samples that left before a column was filled may come back: it has to hold zeros then.
    """

    def __init__(
        self,
        like: Tensor,
        samples: Samples,
        window: int,
        kind: int = 2,
        ridge: float | None = None,
        *,
        kept: bool = False,
    ) -> None:
        self.samples = samples
        self.window = window
        self.kind = kind
        rows, d = like.shape
        make = like.new_zeros if kept else like.new_empty
        self.residuals, self.images = make(rows, window, d), make(rows, window, d)
        self.gram = torch.zeros(samples.count, self.window, self.window, dtype=torch.float64, device=like.device)
        self.filled = 0
        self._next = 0
        self._new: list[int] = []
        self.ridge = 10 * torch.finfo(like.dtype).eps if ridge is None else ridge

    def slot(self) -> int:
        """Return the column that the next differences go to, the oldest one, and count it as new."""
        slot = self._next
        self._next = (slot + 1) % self.window
        self.filled = min(self.filled + 1, self.window)
        if slot in self._new:
            self._new.remove(slot)
        self._new.append(slot)
        return slot

    def coefficients(self, residual: Tensor) -> Tensor:
        """Return γ by row, ``(rows, filled)``, of a residual ``(rows, d)``."""
        self._absorb()
        left = self.residuals[:, : self.filled]
        if self.kind == 1:
            left = self.images[:, : self.filled] - left
        return self._solve(torch.bmm(residual[:, None], left.mT)[:, 0])

    def inverse_product(self, v: Tensor, *, transpose: bool) -> Tensor:
        """Return H v, or Hᵀ v, with H ≈ (I - J)⁻¹ from the secant equations H Δr_j = -Δz_j, ``(rows, d)``.

        H = I - ΔF (ΔRᵀ ΔR)⁻¹ ΔRᵀ is the inverse of the quasi-Newton matrix behind type II mixing (Fang and Saad 2009).
        """
        if not self.filled:
            return v.clone()
        self._absorb()
        left, right = self.residuals[:, : self.filled], self.images[:, : self.filled]
        if transpose:
            left, right = right, left
        solved = self._solve(torch.bmm(v[:, None], left.mT)[:, 0], SECANT_RIDGE)
        return torch.baddbmm(v[:, None], solved[:, None], right, alpha=-1)[:, 0]

    def _absorb(self) -> None:
        """Take the new differences into the Gram matrices: one row and column each."""
        if not self._new:
            return
        filled, first, count = self.filled, self._new[0], len(self._new)
        old = self.residuals[:, :filled]
        consecutive = self._new == list(range(first, first + count))
        picked = slice(first, first + count) if consecutive else torch.tensor(self._new, device=old.device)
        new = self.residuals[:, picked]
        if self.kind == 2:
            rows = self.samples.total(torch.bmm(new, old.mT)).double()
            self.gram[:, picked, :filled] = rows
            self.gram[:, :filled, picked] = rows.mT
        else:
            states = self.images[:, picked] - new
            self.gram[:, picked, :filled] = self.samples.total(torch.bmm(states, old.mT)).double()
            states = self.images[:, :filled] - old
            self.gram[:, :filled, picked] = self.samples.total(torch.bmm(states, new.mT)).double()
        self._new.clear()

    def _solve(self, right: Tensor, ridge: float | None = None) -> Tensor:
        """Return the solutions of the Gram systems by row, right-hand sides ``(rows, filled)`` by row too."""
        ridge = self.ridge if ridge is None else ridge
        gram = self.gram[:, : self.filled, : self.filled]
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # Columns are scaled to one; an empty one has a zero here, and gets a zero coefficient.
        scale = torch.where(diagonal != 0, diagonal.abs().rsqrt(), 0.0)
        scaled = gram * (scale[:, :, None] * scale[:, None, :])
        scaled.diagonal(dim1=1, dim2=2).add_(ridge + (diagonal == 0))
        scaled_right = self.samples.total(right).double().mul_(scale)
        solved, _ = torch.linalg.solve_ex(scaled, scaled_right[:, :, None])
        coefficients = (solved.squeeze(2) * scale).nan_to_num_(0.0, 0.0, 0.0)
        return self.samples.spread(coefficients.to(right.dtype))

    def apply(self, image: Tensor, residual: Tensor, coefficients: Tensor, mixing: float) -> Tensor:
        """Return f - Σ γ_j Δf_j - (1 - β) (r - Σ γ_j Δr_j)."""
        row = coefficients[:, None]
        z = torch.baddbmm(image[:, None], row, self.images[:, : self.filled], alpha=-1)[:, 0]
        if mixing != 1.0:
            left = torch.baddbmm(residual[:, None], row, self.residuals[:, : self.filled], alpha=-1)[:, 0]
            z.sub_(left, alpha=1.0 - mixing)
        return z

    def forget(self, which: Tensor) -> None:
        """Empty the history of some samples, given by truth values ``(B,)``."""
        rows = self.samples.spread(which)
        self.residuals[rows] = 0.0
        self.images[rows] = 0.0
        self.gram[which] = 0.0

    def clear(self) -> None:
        """Empty the history of all samples."""
        self.filled = self._next = 0
        self._new.clear()

    def merge(self, part: History, names: Tensor, rows: Tensor) -> None:
        """Take over the columns of some samples from a history that was restricted to them.

        Parameters
        ----------
        part
            That history.
        names, rows
            Its samples and rows, by their numbers here.
        """
        part._absorb()  # before samples leave whose Gram matrices would never hear of the newest columns
        if part.residuals is not self.residuals:  # as they are before any restriction
            self.residuals[rows], self.images[rows], self.gram[names] = part.residuals, part.images, part.gram
        self.filled, self._next, self._new = part.filled, part._next, part._new

    def keep(self, keep: Tensor, rows: Tensor, samples: Samples) -> None:
        """Go on with some samples; arguments as in `SampleMap.restrict`."""
        self.residuals = self.residuals.index_select(0, rows)
        self.images = self.images.index_select(0, rows)
        self.gram = self.gram.index_select(0, keep)
        self.samples = samples
