"""Networks, one file each with its configuration, found by name."""

from hpcdeq.models import (
    cgcnn,
    conv_deq,
    deeponet,
    deeponet_deq,
    fno,
    fno_deq,
    graph_deq,
    graph_image,
    mlp,
    mlp_deq,
    monotone_deq,
)
from hpcdeq.models.base import MODELS, ModelKind, build_model, model_config

__all__ = [
    "MODELS",
    "ModelKind",
    "build_model",
    "cgcnn",
    "conv_deq",
    "deeponet",
    "deeponet_deq",
    "fno",
    "fno_deq",
    "graph_deq",
    "graph_image",
    "mlp",
    "mlp_deq",
    "model_config",
    "monotone_deq",
]
