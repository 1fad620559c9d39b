"""How accurately fixed points and adjoints are solved while an optimiser is still far from its goal."""

from __future__ import annotations

import numpy as np

from hpcdeq.state import Known, State

# Largest relative tolerance of a solve, and the one it starts with, for a gradient that is as large as the first.
LOOSEST, BEGINNING = 2e-2, 1e-3
# Relative error of the gradient that is allowed, as measured on a chunk of samples every so many iterates.
ALLOWED_ERROR, CHECK_EVERY = 1e-2, 10
# It is measured at once where adjoints have grown by this factor over their right-hand sides since the last time.
GROWN = 1.5
# The loss may be wrong by a tenth of its last relative decrease, so that descent is still told from noise.
PART_OF_DECREASE = 0.1


class Accuracy:
    """Relative tolerances of forward and derivative solves that follow an optimiser's progress.

    η = θ min(1, ‖g‖ / ‖g₀‖, d / 0.1) with d the relative decrease of the loss in the last iteration: loose while steps are
    large, as tight as the options say in the end (η below theirs has no effect). θ is adjusted so that the gradient's
    relative error, measured against tight solves on a chunk of samples at the first iterate and at every tenth, stays
    below one in a hundred. Between two measurements that bound rests on the error being proportional to η and to the
    square of ‖u‖ / ‖g‖, which bounds ‖(I - J)⁻¹‖ from below: θ follows its growth at once, and beyond 1.5 times the error
    is measured anew. Not collective, every method.

    Parameters
    ----------
    noisy
        Gradients are those of minibatches: they differ from each other by more than the error that is allowed until the end, and
        losses rise and fall. Then η = θ.
    """

    def __init__(self, *, noisy: bool = False) -> None:
        self.noisy = noisy
        self.factor = BEGINNING
        self.tolerance = self._looser = BEGINNING
        self.measured: list[tuple[int, float, float]] = []  # (iterate, tolerance, relative error of the gradient)
        self._first: float | None = None
        self._loss: float | None = None
        self._amplification = 0.0
        self._known = 0.0  # the amplification at the last measurement
        self._count = 0

    def update(self, loss: float, gradient_norm: float, amplification: float) -> bool:
        """Take in an iterate, and say whether the gradient's error is to be measured now.

        Parameters
        ----------
        loss, gradient_norm
            At the iterate.
        amplification
            Largest ‖u_i‖ / ‖g_i‖ of the adjoints since the last iterate.
        """
        self._count += 1
        self._amplification = amplification
        if self._first is None or self._loss is None:
            self._first, self._loss = gradient_norm, loss
            return True
        decrease = (self._loss - loss) / abs(loss) if loss else 0.0
        progress = min(1.0, gradient_norm / self._first if self._first else 0.0, max(decrease, 0.0) / PART_OF_DECREASE)
        self._loss = loss
        if self.noisy:
            progress = 1.0
        grown = max(amplification / self._known, 1.0) if self._known else 1.0
        self.tolerance = self.factor * progress / grown**2
        return self.tolerance > 0 and (self._count % CHECK_EVERY == 0 or grown > GROWN)

    def describe(self) -> str:
        """Return in a line which accuracy was found to suffice."""
        error = max((e for _, _, e in self.measured), default=float("nan"))
        last = self.tolerance or self._looser
        return (
            f"accuracy of solves: relative tolerance {last:.1e} in the last steps, error of the gradient measured"
            f" {len(self.measured)} times, at most {error:.1e}; final losses, and --no-adaptive, as the options say"
        )

    def state(self) -> State:
        """Return all that it knows."""
        return {**vars(self), "measured": np.array(self.measured, dtype=float).reshape(-1, 3)}

    def restore(self, known: Known) -> None:
        """Go on from a state."""
        vars(self).update({name: known.get(name) for name in vars(self)})
        self.measured = [(int(count), tolerance, error) for count, tolerance, error in known["measured"].tolist()]

    def stop(self) -> None:
        """Ask for full accuracy from here on."""
        self._looser = self.tolerance or self._looser
        self.factor = self.tolerance = 0.0

    def learn(self, error: float) -> None:
        """Take in the relative error of a gradient that was solved for with the present tolerance."""
        self.measured.append((self._count, self.tolerance, error))
        before = self.factor
        self._known = self._amplification
        if error > 0.5 * ALLOWED_ERROR:
            self.factor *= max(0.25 * ALLOWED_ERROR / error, 1e-3)
        elif error < 0.25 * ALLOWED_ERROR:
            self.factor = min(self.factor * min(0.25 * ALLOWED_ERROR / max(error, 1e-16), 3.0), LOOSEST)
        self.tolerance *= self.factor / before if before else 0.0
