"""What must be known of a Llama-family model to run it: ``ModelSpec`` has the sizes, this has the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sim.model import ModelSpec
from sim.types import ConfigError

RUNS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""``model_type`` of the configurations that can be executed."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding. ``kind``: default, linear, or llama3 (low frequencies stretched, as in Llama 3.1)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Rope:
        """From ``rope_theta`` and ``rope_scaling``, or the ``rope_parameters`` that replaced both."""
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ConfigError(f"rope_scaling: rope_type: {kind!r} is not executed; known: default, linear, llama3")
        names = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
        names["original_max_position_embeddings"] = "original_positions"
        given = {own: scaling[name] for name, own in names.items() if scaling.get(name) is not None}
        theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
        return cls(theta=float(theta), kind=kind, **given)

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per position of each pair of a head, ``[head_dim / 2]``."""
        base = self.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.kind == "default":
            return base
        if self.kind == "linear":
            return base / self.factor
        turns = self.original_positions * base / (2 * pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)
        return base * keep + base / self.factor * (1 - keep)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder of RMS norms, rotary grouped-query attention and SwiGLU or experts of it. Sizes are of one GPU."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    normalise_experts: bool = True
    first_dense_layers: int = 0

    @classmethod
    def read(cls, config: str | Path | Mapping[str, Any], dtype: str | None = None) -> Architecture:
        """From a Hugging Face ``config.json`` (file, its folder, or the mapping); ``dtype`` overrides its own."""
        spec = ModelSpec.from_config(config, dtype=dtype)
        fields = config if isinstance(config, Mapping) else _fields(Path(config))
        kind = fields.get("model_type")
        if kind not in RUNS:
            raise ConfigError(f"{spec.name}: model_type: {kind!r} is not executed; known: {', '.join(RUNS)}")
        if fields.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{spec.name}: hidden_act: {fields['hidden_act']!r} is not executed; known: silu")
        bias = bool(fields.get("attention_bias"))
        return replace(
            cls.of(spec),
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            rope=Rope.read(fields),
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias,
            mlp_bias=bool(fields.get("mlp_bias")) and kind == "llama",
            normalise_experts=bool(fields.get("norm_topk_prob", kind != "qwen3_moe")),
        )

    @classmethod
    def of(cls, spec: ModelSpec, tp: int = 1) -> Architecture:
        """The shapes of a model of the catalogue, or of one of its ``tp`` shards (rounded up): enough for step times.

        What ``ModelSpec`` does not say (norm epsilon, rotary base, q/k norm, biases) takes its default.
        """
        refused = {
            "kv_lora_rank": spec.kv_lora_rank is not None,
            "gated_mlp": not spec.gated_mlp,
            "sliding_window": spec.sliding_window is not None,
            "num_shared_experts": bool(spec.num_shared_experts),
            "weight_bytes_per_param": spec.weight_bytes_per_param is not None,
            "dtype": spec.dtype not in DTYPES,
            "kv_dtype": spec.kv_dtype not in (None, spec.dtype),
        }
        for name, wrong in refused.items():
            if wrong:
                value = getattr(spec, name)
                raise ConfigError(f"{spec.name}: {name}: {value!r} is not executed; only plain Llama-like layers are")
        inner = spec.moe_intermediate_size or spec.intermediate_size
        if spec.first_dense_layers and spec.moe_intermediate_size != spec.intermediate_size:
            raise ConfigError(f"{spec.name}: first_dense_layers: {spec.first_dense_layers} is not executed")
        return cls(
            name=spec.name,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            intermediate_size=ceil(inner / tp),
            num_heads=_whole_groups(spec, tp),
            num_kv_heads=ceil(spec.num_key_value_heads / tp),
            head_dim=spec.head_dim,
            vocab_size=ceil(spec.vocab_size / tp),
            dtype=spec.dtype,
            tied=spec.tie_word_embeddings,
            num_experts=spec.num_experts,
            experts_per_token=spec.experts_per_token,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def kv_width(self) -> int:
        """Values of one token's keys (or values) in one layer."""
        return self.num_kv_heads * self.head_dim

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Architecture:
        return cls(**{**fields, "rope": Rope(**fields["rope"])})


def _fields(path: Path) -> dict[str, Any]:
    """Of a file that ``ModelSpec`` has read before, and so found to be one JSON object."""
    fields: dict[str, Any] = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    return fields


def _whole_groups(spec: ModelSpec, tp: int) -> int:
    """Query heads of a shard, rounded up to whole groups of its key-value heads."""
    kv_heads = ceil(spec.num_key_value_heads / tp)
    return kv_heads * ceil(ceil(spec.num_attention_heads / tp) / kv_heads)
