"""What a layer's solves cost, counted in units of one sample."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Work:
    """Counters that only grow, but for the fixed-point statistics, which `take_statistics` resets.

    Attributes
    ----------
    cell_evaluations, cell_jvps, cell_vjps
        Evaluations of f, products J v and Jᵀ u (with respect to the state or the parameters), times samples.
    solves
        Fixed points computed.
    iterations_sum, iterations_max
        Forward iterations over the samples since the statistics were last taken.
    unconverged
        Samples whose fixed point was not reached, since the statistics were last taken.
    """

    cell_evaluations: int = 0
    cell_jvps: int = 0
    cell_vjps: int = 0
    solves: int = 0
    iterations_sum: int = field(default=0, repr=False)
    iterations_max: int = field(default=0, repr=False)
    unconverged: int = field(default=0, repr=False)
    _solves_taken: int = field(default=0, repr=False)

    @property
    def statistics(self) -> tuple[int, int, int, int]:
        """(solves, sum of iterations, largest, unconverged) since the statistics were last taken."""
        return (self.solves - self._solves_taken, self.iterations_sum, self.iterations_max, self.unconverged)

    def take_statistics(self) -> tuple[int, int, int, int]:
        """Return (solves, sum of iterations, largest, unconverged) since the last call. Not collective."""
        taken = self.statistics
        self._solves_taken = self.solves
        self.iterations_sum = self.iterations_max = self.unconverged = 0
        return taken
