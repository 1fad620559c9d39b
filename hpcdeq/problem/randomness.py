"""What makes a loss depend on chance or on the batch: layers that are known to, and the state of the random numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def random_state(device: torch.device) -> np.ndarray:
    """Return the state of this process's random numbers, ``(s,)`` uint8; those of the device come last. Not collective."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states).numpy()


def set_random_state(state: np.ndarray, device: torch.device) -> None:
    """Go on with random numbers from a `random_state`; one that was taken on another device sets the CPU's alone.

    Not collective.
    """
    size = len(torch.get_rng_state())
    torch.set_rng_state(torch.from_numpy(state[:size].copy()))
    if device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(torch.from_numpy(state[size:].copy()), device)


def random_layer(model: nn.Module) -> str | None:
    """Name the first layer that makes the loss depend on chance or on the batch in training; None if there is none.

    Not collective. Others are found out by evaluation (`hpcdeq.problem.determinism`).
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        kind = type(module).__name__
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name} ({kind}, p = {module.p})"
        if isinstance(module, nn.modules.batchnorm._NormBase) and not kind.startswith(("InstanceNorm", "LazyInstance")):
            return f"{name} ({kind}, statistics of the batch)"
    return None
