"""Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) on minibatches, its moments distributed like the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hpcdeq.errors import OptionError
from hpcdeq.optim.base import BUDGET, Recorder, Result
from hpcdeq.optim.tao import initial_loss_error


@dataclass(frozen=True)
class AdamSettings:
    """Settings of Adam.

    Attributes
    ----------
    learning_rate
        Step length.
    batch_size
        Samples of one step, over all ranks; None: all of them.
    seed
        Seed of the order in which samples are drawn; it does not depend on the number of ranks.
    beta1, beta2, epsilon
        As in the paper.
    """

    learning_rate: float = 1e-3
    batch_size: int | None = 64
    seed: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise OptionError(f"learning rate {self.learning_rate}: give a number above 0")
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"batch size {self.batch_size}: give 1 or more samples")


def minimize_adam(recorder: Recorder, x0: Tensor, settings: AdamSettings, max_iterations: int) -> Result:
    """Run epochs of Adam from x0 until the budget is used up.

    Collective on the problem's comm. The samples of an epoch are a permutation of all samples, the same for any number
    of ranks; each rank works on those of a batch that it holds.
    """
    problem, layout = recorder.problem, recorder.problem.layout
    block = x0[layout.owned].double().cpu().numpy().copy()
    first, second = np.zeros_like(block), np.zeros_like(block)
    count = problem.dataset.count
    size = count if settings.batch_size is None else min(settings.batch_size, count)
    steps = 0
    p = x0
    loss, gradient = problem.loss_and_gradient(p)
    if not np.isfinite(loss):
        raise initial_loss_error(loss)
    recorder.emit(0, p, loss, float(gradient.norm()), None)
    reason = "DIVERGED_MAXITS"
    for epoch in range(1, max_iterations + 1):
        order = np.random.default_rng([settings.seed, epoch]).permutation(count)
        losses, squares, batches = 0.0, 0.0, 0
        for start in range(0, count, size):
            rows = order[start : start + size]
            loss, own = problem.owned_loss_and_gradient(p, rows)
            steps += 1
            first += (1 - settings.beta1) * (own - first)
            second += (1 - settings.beta2) * (own * own - second)
            mean = first / (1 - settings.beta1**steps)
            spread = np.sqrt(second / (1 - settings.beta2**steps)) + settings.epsilon
            block -= settings.learning_rate * mean / spread
            p = layout.gather(block).to(x0)
            losses += loss
            squares += problem.sum_of_blocks(own * own)
            batches += 1
            if recorder.out_of_time():
                reason = "DIVERGED_USER"
                break
        recorder.emit(epoch, p, losses / batches, (squares / batches) ** 0.5, None)
        if reason == "DIVERGED_USER" or recorder.out_of_time():
            reason = "DIVERGED_USER"
            break
    words = "the epochs are used up; --max-iterations allows more"
    if reason == "DIVERGED_USER":
        words = "the time is up; --max-seconds allows more"
    return recorder.result(BUDGET, reason, words)
