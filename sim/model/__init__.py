"""What a model costs, from its Hugging Face ``config.json`` alone: weights, KV bytes, FLOPs, GEMM shapes.

``spec.py`` has ``ModelSpec`` and the arithmetic, ``config.py`` reads configurations, ``models.toml`` is the
catalogue (configurations, abridged). Read ``ModelSpec`` first.
"""

from sim.model.spec import DTYPE_BYTES, Gemm, ModelSpec, model, models

__all__ = ["DTYPE_BYTES", "Gemm", "ModelSpec", "model", "models"]
