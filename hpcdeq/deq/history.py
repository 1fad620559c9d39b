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
        # Column by column: what an iteration writes lies together.
        self._residuals, self._images = make(window, rows, d), make(window, rows, d)
        self.gram = torch.zeros(samples.count, self.window, self.window, dtype=torch.float64, device=like.device)
        self.filled = 0
        self._next = 0
        self._new: list[int] = []  # columns that the Gram matrices do not have yet
        self._waiting: list[int] = []  # columns whose differences of residuals are still to be taken, from the images
        self._last_is_residual = False
        self.ridge = 10 * torch.finfo(like.dtype).eps if ridge is None else ridge

    @property
    def residuals(self) -> Tensor:
        """The columns Δr, ``(rows, m, d)``."""
        return self._residuals.transpose(0, 1)

    @property
    def images(self) -> Tensor:
        """The columns Δf, ``(rows, m, d)``."""
        return self._images.transpose(0, 1)

    def enter(self, z: Tensor, image: Tensor, before: tuple[Tensor, Tensor], *, plain: bool, soon: bool) -> Tensor:
        """Enter an iteration's differences in place of the oldest ones, and return its residual.

        Parameters
        ----------
        z, image
            ``(rows, d)`` state and its image.
        before
            Image and residual of the last iteration.
        plain
            Whether z is the last image: the residual is the difference of the images then.
        soon
            Whether the Gram matrices take the new columns in before these are overwritten: differences of residuals that
            stand in the columns of images may wait until then, to be taken all at once.
        """
        slot, previous = self._next, self._next - 1
        self._next = (slot + 1) % self.window
        self.filled = min(self.filled + 1, self.window)
        if slot in self._new:
            self._new.remove(slot)
        self._new.append(slot)
        plain = plain and self.window > 1
        if plain:
            residual = torch.sub(image, z, out=self._images[slot])
        else:
            residual = image - z
            torch.sub(image, before[0], out=self._images[slot])
        if plain and self._last_is_residual and previous >= 0 and soon:
            self._waiting.append(slot)
        else:
            torch.sub(residual, before[1], out=self._residuals[slot])
        self._last_is_residual = plain
        return residual

    def coefficients(self, residual: Tensor) -> Tensor:
        """Return γ by row, ``(rows, filled)``, of a residual ``(rows, d)``."""
        self._absorb()
        left = self.residuals[:, : self.filled]
        if self.kind == 1:
            left = self.images[:, : self.filled] - left
        return self._solve(torch.bmm(residual[:, None], left.mT)[:, 0])

    def inverse_product(self, v: Tensor, *, transpose: bool) -> Tensor:
        """Return H v, or Hᵀ v, with H ≈ (I - J)⁻¹ from the secant equations H Δr_j = -Δz_j, ``(rows, d)``.

        H = I - ΔF (Lᵀ ΔR)⁻¹ Lᵀ is the inverse of the quasi-Newton matrix behind mixing (Fang and Saad 2009), with L = ΔR for
        type II and L = ΔZ for type I.
        """
        if not self.filled:
            return v.clone()
        self._absorb()
        left, right = self.residuals[:, : self.filled], self.images[:, : self.filled]
        if self.kind == 1:
            left = right - left
        if transpose:
            left, right = right, left
        solved = self._solve(torch.bmm(v[:, None], left.mT)[:, 0], SECANT_RIDGE, transpose=transpose)
        return torch.baddbmm(v[:, None], solved[:, None], right, alpha=-1)[:, 0]

    def _absorb(self) -> None:
        """Take the new differences into the Gram matrices: one row and column each."""
        if not self._new:
            return
        while self._waiting:  # run by run: past the last column they go on with the first
            first = last = self._waiting.pop(0)
            while self._waiting and self._waiting[0] == last + 1:
                last = self._waiting.pop(0)
            torch.sub(
                self._images[first : last + 1], self._images[first - 1 : last], out=self._residuals[first : last + 1]
            )
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

    def _solve(self, right: Tensor, ridge: float | None = None, *, transpose: bool = False) -> Tensor:
        """Return the solutions of the Gram systems by row, right-hand sides ``(rows, filled)`` by row too."""
        ridge = self.ridge if ridge is None else ridge
        gram = self.gram[:, : self.filled, : self.filled]
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # Columns are scaled to one; an empty one has a zero here, and gets a zero coefficient.
        scale = torch.where(diagonal != 0, diagonal.abs().rsqrt(), 0.0)
        scaled = gram * (scale[:, :, None] * scale[:, None, :])
        scaled.diagonal(dim1=1, dim2=2).add_(ridge + (diagonal == 0))
        scaled = scaled.mT if transpose else scaled
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
        self._residuals[:, rows] = 0.0
        self._images[:, rows] = 0.0
        self.gram[which] = 0.0

    def clear(self) -> None:
        """Empty the history of all samples."""
        self.filled = self._next = 0
        self._new.clear()
        self._waiting.clear()
        self._last_is_residual = False

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
        if part._residuals is not self._residuals:  # as they are before any restriction
            filled = slice(part.filled)
            self._residuals[filled, rows], self._images[filled, rows] = part._residuals[filled], part._images[filled]
            self.gram[names] = part.gram
        self.filled, self._next = part.filled, part._next

    def keep(self, keep: Tensor, rows: Tensor, samples: Samples) -> None:
        """Go on with some samples; arguments as in `SampleMap.restrict`."""
        self._residuals = self._kept_columns(self._residuals, rows)
        self._images = self._kept_columns(self._images, rows)
        self.gram = self.gram.index_select(0, keep)
        self.samples = samples

    def _kept_columns(self, columns: Tensor, rows: Tensor) -> Tensor:
        kept = columns.new_empty(self.window, len(rows), columns.shape[2])
        torch.index_select(columns[: self.filled], 1, rows, out=kept[: self.filled])
        return kept
