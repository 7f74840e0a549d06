"""The limits of a calibration, and the shapes that one GPU of a tensor-parallel group sees of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import ceil

from calibrate.bench.family import Point
from sim.model import DTYPE_BYTES, ModelSpec
from sim.types import ConfigError

BLOCK_TOKENS = 16
"""Tokens of a KV block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest shapes measured: tokens of a step (and of a chunk), sequences that decode, context of each."""

    tokens: int
    sequences: int
    context_tokens: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 64:
                raise ConfigError(f"calibrate: at most {getattr(self, field.name)} {field.name}; give 64 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One layer of ``spec`` on one of ``tp`` GPUs."""

    spec: ModelSpec
    tp: int

    def __post_init__(self) -> None:
        spec = self.spec
        if spec.kv_lora_rank is not None or spec.first_dense_layers:
            raise ConfigError(
                f"{spec.name}: has latent attention, or first layers of another kind, which calibrate does not "
                "measure; such models are priced by the roofline"
            )
        if spec.weight_bytes_per_param is not None or spec.dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError(
                f"{spec.name}: dtype: {spec.dtype} or quantized weights are not measured; give --dtype bfloat16"
            )
        if self.tp < 1 or spec.num_attention_heads % self.tp:
            raise ConfigError(f"--tp: {self.tp} must divide the {spec.num_attention_heads} heads of {spec.name}")

    @property
    def heads(self) -> int:
        return self.spec.num_attention_heads // self.tp

    @property
    def kv_heads(self) -> int:
        return ceil(self.spec.num_key_value_heads / self.tp)

    @property
    def head_dim(self) -> int:
        return self.spec.head_dim

    @property
    def value_bytes(self) -> int:
        return DTYPE_BYTES[self.spec.dtype]

    @property
    def kv_token_values(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Of one expert in a mixture."""
        return ceil((self.spec.moe_intermediate_size or self.spec.intermediate_size) / self.tp)

    @property
    def vocabulary(self) -> int:
        return ceil(self.spec.vocab_size / self.tp)

    @property
    def normed_heads(self) -> bool:
        """Whether queries and keys are normed: the layer's vectors are then two norms and one of each per head."""
        return self.spec.layer_vector_params == 2 * self.spec.hidden_size + 2 * self.spec.head_dim


def blocks(tokens: int) -> int:
    return ceil(tokens / BLOCK_TOKENS)


def linear_in(name: str, factor: float, constant: float = 0.0) -> Callable[[Point], float]:
    """``factor * point[name] + constant``: FLOPs or bytes that grow with one axis."""
    return lambda point: factor * point[name] + constant
