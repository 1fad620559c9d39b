"""Networks, one file each with its configuration, found by name."""

from hpcdeq.models import graph_deq, mlp_deq
from hpcdeq.models.base import MODELS, ModelKind, build_model, model_config

__all__ = ["MODELS", "ModelKind", "build_model", "graph_deq", "mlp_deq", "model_config"]
