"""Layers that are known to make a loss depend on chance or on the batch."""

from __future__ import annotations

from torch import nn


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
