"""Hugging Face ``config.json`` files: which architectures are known, and under which names they say what.

To add an architecture whose layers are all alike, add a row to ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.model.quantization import FILE as QUANTIZATION_FILE
from sim.model.quantization import of_config, of_modelopt
from sim.outside import is_file, read_json
from sim.types import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a ``model_type`` implies but its configuration does not say."""

    gated: bool = True
    tied: bool = False
    """Default of tie_word_embeddings."""
    mlp_factor: int | None = None
    """Default of intermediate_size, in hidden sizes."""
    norm_bias: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    """On the other matrices."""
    qk_norm: bool = False
    embedding_norm: bool = False
    extra_positions: int | None = None
    """Rows of a learned position table beyond the maximum; None: no table."""
    mla: bool = False
    relu: bool = False
    """Default of hidden_act."""


_DEEPSEEK = Family(mla=True)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "phi3": Family(),
    "gemma": Family(tied=True),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "opt": Family(
        gated=False, tied=True, norm_bias=True, qkv_bias=True, linear_bias=True, extra_positions=2, relu=True
    ),
    "gpt2": Family(
        gated=False, tied=True, mlp_factor=4, norm_bias=True, qkv_bias=True, linear_bias=True, extra_positions=0
    ),
    "bloom": Family(
        gated=False, tied=True, mlp_factor=4, norm_bias=True, qkv_bias=True, linear_bias=True, embedding_norm=True
    ),
    "gpt_neox": Family(gated=False, norm_bias=True, qkv_bias=True, linear_bias=True),
    "falcon": Family(gated=False, tied=True, mlp_factor=4, norm_bias=True),
}

DTYPES = {
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp32": "float32",
    "fp8": "float8",
    "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
}
"""Other names of dtypes."""


class _Reader:
    """A configuration, and the place that its errors name."""

    def __init__(self, config: Mapping[str, Any], place: str) -> None:
        self.config = config
        self.place = place

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of the names that has a value."""
        return next((self.config[name] for name in names if self.config.get(name) is not None), default)

    def typed(self, kind: type, *names: str, default: Any = None) -> Any:
        value = self.get(*names, default=default)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is int)):
            raise self.error(names[0], value, f"must be of type {kind.__name__}")
        return value

    def size(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names, default=default)
        if value is None:
            raise self.error(
                names[0], None, f"must be given (or {', '.join(names[1:])})" if names[1:] else "is required"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(names[0], value, "must be a whole number >= 1")
        return value

    def error(self, name: str, value: object, mend: str) -> ConfigError:
        return ConfigError(
            f"{self.place}: {name}: {value!r} {mend}" if value is not None else f"{self.place}: {name} {mend}"
        )


def read_config(config: str | Path | Mapping[str, Any], name: str | None, dtype: str | None) -> dict[str, Any]:
    """The fields of a ``ModelSpec``."""
    beside: Path | None = None
    if isinstance(config, Mapping):
        read = _Reader(config, name or "config")
        own_name = config.get("_name_or_path")
    else:
        path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        read = _Reader(_load(path), str(path))
        own_name = path.parent.name if path.name == "config.json" else path.stem
        beside = file if is_file(file := path.parent / QUANTIZATION_FILE) else None
    nested = read.get("text_config")
    if isinstance(nested, Mapping):
        shared = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
        outer = {key: read.config[key] for key in shared if key in read.config}
        inner = {key: value for key, value in nested.items() if value is not None}
        read = _Reader(outer | inner, f"{read.place}: text_config")
    return _fields(read, name or own_name or "model", dtype, beside)


def _load(path: Path) -> Mapping[str, Any]:
    config = read_json(path, "config.json", mend="give a Hugging Face config.json")
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must hold one JSON object; give a Hugging Face config.json")
    return config


def _fields(read: _Reader, name: str, dtype: str | None, beside: Path | None) -> dict[str, Any]:
    kind = read.typed(str, "model_type")
    if kind not in FAMILIES:
        raise read.error("model_type", kind or "(none)", f"is not known; known: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    hidden = read.size("hidden_size", "n_embd", "n_embed")
    heads = read.size("num_attention_heads", "n_head")
    shape = {
        "name": name,
        "num_layers": read.size("num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "intermediate_size": read.size(
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "ffn_hidden_size",
            default=family.mlp_factor and family.mlp_factor * hidden,
        ),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(read, kind, heads),
        "head_dim": read.size("head_dim", default=hidden // heads),
        "vocab_size": read.size("vocab_size"),
        "max_position_embeddings": read.size(
            "max_position_embeddings", "n_positions", "seq_length", default=2048 if kind == "bloom" else None
        ),
        "tie_word_embeddings": bool(read.get("tie_word_embeddings", default=family.tied)),
        "gated_mlp": family.gated,
        "relu_mlp": read.get("activation_function", "hidden_act", default="relu" if family.relu else "") == "relu",
        "sliding_window": _sliding_window(read),
    }
    if kind == "opt" and read.get("word_embed_proj_dim", default=hidden) != hidden:
        raise read.error("word_embed_proj_dim", read.get("word_embed_proj_dim"), f"must equal hidden_size {hidden}")
    shape |= _experts(read) | (_latent(read) if family.mla else {}) | _dtypes(read, dtype, beside)
    return shape | _vectors(read, family, shape)


def _kv_heads(read: _Reader, kind: str, heads: int) -> int:
    if kind == "falcon" and not read.get("new_decoder_architecture"):
        return 1 if read.get("multi_query", default=True) else heads
    return read.size("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads)


def _sliding_window(read: _Reader) -> int | None:
    """None unless every layer has the same window."""
    kinds = set(read.typed(list, "layer_types", default=[]))
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise read.error("layer_types", sorted(kinds), "must be the same for all layers, full or sliding attention")
    if kinds == {"full_attention"} or read.get("use_sliding_window") is False or read.get("sliding_window") is None:
        return None
    from_layer = read.typed(int, "max_window_layers", default=0) if read.get("use_sliding_window") else 0
    if from_layer >= read.size("num_hidden_layers", "n_layer"):
        return None
    if from_layer and not kinds:
        raise read.error("max_window_layers", from_layer, "must be 0 or num_hidden_layers: all layers alike")
    return read.size("sliding_window")


def _experts(read: _Reader) -> dict[str, Any]:
    if read.get("num_local_experts", "num_experts", "n_routed_experts") is None:
        return {}
    for name, plain in (("decoder_sparse_step", 1), ("moe_layer_freq", 1), ("mlp_only_layers", [])):
        if read.get(name, default=plain) != plain:
            raise read.error(name, read.get(name), f"is not supported; it must be {plain}")
    inner = read.size("moe_intermediate_size", "intermediate_size")
    shared = read.typed(int, "n_shared_experts", default=0)
    shared_inner = read.typed(int, "shared_expert_intermediate_size", default=shared * inner)
    if shared_inner % inner:
        raise read.error("shared_expert_intermediate_size", shared_inner, f"must be a multiple of {inner}")
    return {
        "num_experts": read.size("num_local_experts", "num_experts", "n_routed_experts"),
        "experts_per_token": read.size("num_experts_per_tok"),
        "moe_intermediate_size": inner,
        "num_shared_experts": shared_inner // inner,
        "first_dense_layers": read.typed(int, "first_k_dense_replace", default=0),
    }


def _latent(read: _Reader) -> dict[str, Any]:
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {name: read.size(name) for name in names} | {"q_lora_rank": read.typed(int, "q_lora_rank")}


def _dtypes(read: _Reader, dtype: str | None, beside: Path | None) -> dict[str, Any]:
    """The caller's dtype, else the configuration's; a checkpoint's own quantization goes before both."""
    base = dtype or read.get("dtype", "torch_dtype")
    if base is None:
        raise read.error("torch_dtype", None, "is missing; add it, or give a dtype")
    base = str(base).removeprefix("torch.")
    fields: dict[str, Any] = {"dtype": DTYPES.get(base, base)}
    quantization = read.typed(dict, "quantization_config")
    if quantization is not None:
        return fields | of_config(quantization, f"{read.place}: quantization_config")
    if beside is not None:
        return fields | of_modelopt(_load(beside), str(beside))
    return fields


def _vectors(read: _Reader, family: Family, shape: Mapping[str, Any]) -> dict[str, int]:
    """Norms and biases: under 0.1 % of a model, counted so that parameter counts come out exact."""
    hidden, inner, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    norm = 2 * hidden if family.norm_bias else hidden
    old_falcon = read.get("parallel_attn", default=True) and not read.get("new_decoder_architecture")
    layer = norm if read.get("model_type") == "falcon" and old_falcon else 2 * norm
    if family.qkv_bias or read.get("attention_bias"):
        layer += (shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]) * head_dim
    if family.linear_bias or read.get("attention_bias"):
        layer += hidden
    if family.linear_bias or read.get("mlp_bias"):
        layer += hidden + inner * (2 if family.gated else 1)
    if family.qk_norm:
        layer += 2 * head_dim
    if family.mla:
        layer += shape["kv_lora_rank"] + (shape["q_lora_rank"] or 0)
    outer = norm + (norm if family.embedding_norm else 0)
    if family.extra_positions is not None:
        outer += (shape["max_position_embeddings"] + family.extra_positions) * hidden
    return {"layer_vector_params": layer, "outer_vector_params": outer}
