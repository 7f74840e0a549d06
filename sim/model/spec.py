"""``ModelSpec``: the shape of a decoder-only transformer, and what follows from it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, inf
from pathlib import Path
from typing import Any

from sim.cluster import did_you_mean
from sim.model.config import read_config
from sim.model.quantization import matcher
from sim.outside import exists
from sim.types import ConfigError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1}

_SIZES = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_MOE = ("num_experts", "experts_per_token", "moe_intermediate_size")
_MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True, slots=True)
class Gemm:
    """``count`` weight matrices of n x k; each token goes through ``active`` of them."""

    name: str
    n: int
    k: int
    count: int = 1
    active: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer: dense or mixture of experts; full, grouped or latent attention (MLA).

    ``dtype`` is that of weights and GEMMs. Embedding, head, activations and KV stay at 16 bits or more
    unless ``kv_dtype`` says otherwise, as in vLLM. ``weight_bytes_per_param``: of weight-only quantized
    layers; None: ``dtype``'s. What differs between layers is told for the layers that repeat: the first
    ``first_dense_layers`` of a mixture of experts have an ordinary MLP of ``intermediate_size``.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    gated_mlp: bool = True
    """SwiGLU and its like have three MLP matrices; OPT, BLOOM and GPT-2 two."""
    relu_mlp: bool = False
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    weight_bytes_per_param: float | None = None
    unquantized: tuple[str, ...] = ()
    """Modules of a quantized checkpoint's layers that keep 16 bits, by name or pattern."""
    sliding_window: int | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    first_dense_layers: int = 0
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    layer_vector_params: int = 0
    """Norms and biases of a layer."""
    copied_layer_params: int = 0
    """Of a layer, whole on every GPU of a stage, beside the GEMMs (contextual sparsity's predictors)."""
    outer_vector_params: int = 0
    """Learned positions and the norms outside the layers; held with the embedding."""

    def __post_init__(self) -> None:
        optional = (*_MOE, *_MLA, "q_lora_rank", "sliding_window")
        for name in (*_SIZES, *(name for name in optional if getattr(self, name) is not None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{self.name}: {name}: {value!r} must be a whole number >= 1")
        if not 0 <= self.first_dense_layers < self.num_layers:
            raise ConfigError(
                f"{self.name}: first_dense_layers: {self.first_dense_layers} must be >= 0 and below {self.num_layers}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.name}: num_key_value_heads: {self.num_key_value_heads} must divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for dtype in (self.dtype, self.kv_dtype or self.dtype):
            if dtype not in DTYPE_BYTES:
                raise ConfigError(f"{self.name}: dtype: {did_you_mean(dtype, DTYPE_BYTES)}")
        for group in (_MOE, _MLA):
            missing = [name for name in group if getattr(self, name) is None]
            if missing and len(missing) < len(group):
                raise ConfigError(f"{self.name}: {missing[0]}: missing; {', '.join(group)} go together")
        if self.num_experts and self.experts_per_token and self.experts_per_token > self.num_experts:
            raise ConfigError(f"{self.name}: experts_per_token: {self.experts_per_token} > {self.num_experts} experts")

    @classmethod
    def from_config(
        cls, config: str | Path | Mapping[str, Any], name: str | None = None, dtype: str | None = None
    ) -> ModelSpec:
        """From a Hugging Face ``config.json`` (file, its folder, or the mapping itself).

        ``ConfigError`` names the file, the field, the value and the mend; an architecture that is not
        known is refused, never guessed. ``dtype`` overrides the configuration's, except that a quantized
        checkpoint stays quantized. Vision towers and multi-token-prediction layers are left out.
        """
        return cls(**read_config(config, name, dtype))

    # ------------------------------------------------------------ weights

    def gemms(self, tp: int = 1, *, dense: bool = False) -> tuple[Gemm, ...]:
        """The GEMMs of a layer on one of ``tp`` GPUs; shards are rounded up (padded).

        ``dense``: of one of the ``first_dense_layers``. Experts are cut like any MLP. In MLA, ``qkv_a`` and
        ``router`` in a mixture of experts are copied to every GPU.
        """
        return self._attention_gemms(tp) + self._mlp_gemms(tp, dense)

    def _attention_gemms(self, tp: int) -> tuple[Gemm, ...]:
        heads = ceil(self.num_attention_heads / tp)
        hidden = self.hidden_size
        if self.kv_lora_rank is None or self.qk_nope_head_dim is None or self.v_head_dim is None:
            kv_heads = ceil(self.num_key_value_heads / tp)
            return (
                Gemm("qkv", (heads + 2 * kv_heads) * self.head_dim, hidden),
                Gemm("o", hidden, heads * self.head_dim),
            )
        query = heads * self.qk_head_dim
        latent = self.kv_lora_rank + (self.qk_rope_head_dim or 0)
        return (
            *(
                (Gemm("q", query, hidden), Gemm("kv_a", latent, hidden))
                if self.q_lora_rank is None
                else (Gemm("qkv_a", self.q_lora_rank + latent, hidden), Gemm("q_b", query, self.q_lora_rank))
            ),
            Gemm("kv_b", heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank),
            Gemm("o", hidden, heads * self.v_head_dim),
        )

    def _mlp_gemms(self, tp: int, dense: bool) -> tuple[Gemm, ...]:
        hidden, wide = self.hidden_size, 2 if self.gated_mlp else 1
        if dense or self.num_experts is None or self.experts_per_token is None or self.moe_intermediate_size is None:
            inner = ceil(self.intermediate_size / tp)
            return Gemm("gate_up", wide * inner, hidden), Gemm("down", hidden, inner)
        inner = ceil(self.moe_intermediate_size / tp)
        gemms = [
            Gemm("router", self.num_experts, hidden),
            Gemm("moe_gate_up", wide * inner, hidden, self.num_experts, self.experts_per_token),
            Gemm("moe_down", hidden, inner, self.num_experts, self.experts_per_token),
        ]
        if self.num_shared_experts:
            inner = ceil(self.num_shared_experts * self.moe_intermediate_size / tp)
            gemms += [Gemm("shared_gate_up", wide * inner, hidden), Gemm("shared_down", hidden, inner)]
        return tuple(gemms)

    @property
    def layer_params(self) -> int:
        return self._layer_params(self.num_layers - 1)

    @property
    def active_layer_params(self) -> int:
        """What one token goes through; less than ``layer_params`` in a mixture of experts only."""
        return sum(gemm.n * gemm.k * gemm.active for gemm in self.gemms()) + self.layer_vector_params

    @property
    def embedding_params(self) -> int:
        """Token embedding; the head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def params(self) -> int:
        layers = sum(self._layer_params(layer) for layer in range(self.num_layers))
        return layers + self.outer_vector_params + self.embedding_params * (1 if self.tie_word_embeddings else 2)

    @property
    def active_params(self) -> int:
        """``params``, with the experts that a token goes through only."""
        experts = self.num_layers - self.first_dense_layers
        return self.params - experts * (self.layer_params - self.active_layer_params)

    def weight_bytes(self, first_layer: int, end_layer: int, tp: int = 1) -> int:
        """Of the layers ``first_layer <= layer < end_layer``, over all ``tp`` GPUs of the stage.

        The embedding comes with the first layer and the head with the last; tied, they are one matrix if a
        stage holds both and two if the model is split.
        """
        if not 0 <= first_layer < end_layer <= self.num_layers:
            raise ConfigError(f"{self.name}: layers {first_layer} to {end_layer} are not within 0 to {self.num_layers}")
        first, last = first_layer == 0, end_layer == self.num_layers
        dense = max(0, min(end_layer, self.first_dense_layers) - first_layer)
        layers = (end_layer - first_layer - dense) * self.layer_params + (dense * self._layer_params(0) if dense else 0)
        layers += (end_layer - first_layer) * tp * self.copied_layer_params
        matrices = 1 if first and last and self.tie_word_embeddings else first + last
        outer = matrices * self.embedding_params + first * self.outer_vector_params
        layer_bytes = self.weight_bytes_per_param or DTYPE_BYTES[self.dtype]
        kept = _unquantized(self) * (end_layer - first_layer) // self.num_layers if self.unquantized else 0
        return ceil((layers - kept) * layer_bytes) + (outer + kept) * self.activation_bytes_per_value

    def _layer_params(self, layer: int) -> int:
        gemms = self.gemms(dense=layer < self.first_dense_layers)
        return sum(gemm.n * gemm.k * gemm.count for gemm in gemms) + self.layer_vector_params

    # ------------------------------------------------------------ KV cache

    @property
    def activation_bytes_per_value(self) -> int:
        return max(2, DTYPE_BYTES[self.dtype])

    @property
    def kv_bytes_per_value(self) -> int:
        return DTYPE_BYTES[self.kv_dtype] if self.kv_dtype else self.activation_bytes_per_value

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Key and value of one token, all heads; with MLA the latent vector and the rope part."""
        return self.kv_bytes_per_token_layer_gpu(1)

    def kv_bytes_per_token(self, num_layers: int | None = None) -> int:
        return self.kv_bytes_per_token_layer * (self.num_layers if num_layers is None else num_layers)

    def kv_bytes_per_token_layer_gpu(self, tp: int) -> int:
        """On one of ``tp`` GPUs: no less than one head each, and with MLA the whole latent on every GPU."""
        if self.kv_lora_rank is not None:
            return (self.kv_lora_rank + (self.qk_rope_head_dim or 0)) * self.kv_bytes_per_value
        return 2 * ceil(self.num_key_value_heads / tp) * self.head_dim * self.kv_bytes_per_value

    def kv_tokens(self, context_tokens: int) -> int:
        """Tokens whose KV is kept; a sliding window forgets the rest."""
        return context_tokens if self.sliding_window is None else min(context_tokens, self.sliding_window)

    # ------------------------------------------------------------ arithmetic (a multiply-add is 2 FLOPs)

    @property
    def qk_head_dim(self) -> int:
        if self.qk_nope_head_dim is None or self.qk_rope_head_dim is None:
            return self.head_dim
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def linear_flops_per_token_layer(self) -> int:
        return 2 * sum(gemm.n * gemm.k * gemm.active for gemm in self.gemms())

    @property
    def attention_flops_per_pair(self) -> int:
        """Scores and weighted sum for one (token, attended token) pair in one layer.

        MLA counts its expanded form, as prefill runs it. Decode kernels fold ``kv_b`` into the query and
        do about three times as much, still less time than reading the KV takes.
        """
        return 2 * self.num_attention_heads * (self.qk_head_dim + (self.v_head_dim or self.head_dim))

    def attention_flops(self, new_tokens: int, context_tokens: int) -> int:
        """Of one layer and sequence: each new token attends to the context, the new ones before it and itself."""
        window = inf if self.sliding_window is None else self.sliding_window
        growing = int(max(0, min(new_tokens, window - context_tokens)))
        pairs = growing * context_tokens + growing * (growing + 1) // 2
        if growing < new_tokens:
            pairs += (new_tokens - growing) * int(window)
        return pairs * self.attention_flops_per_pair

    @property
    def head_flops_per_token(self) -> int:
        return 2 * self.embedding_params


# ---------------------------------------------------------------- catalogue


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    with Path(__file__).with_name("models.toml").open("rb") as file:
        return tomllib.load(file)


def models() -> tuple[ModelSpec, ...]:
    """Every model of the catalogue, in the file's order."""
    return tuple(model(name) for name in _catalogue())


def model(name_or_path: str, dtype: str | None = None) -> ModelSpec:
    """A model by catalogue name (in upper or lower case), or from the path of a ``config.json``.

    ``dtype`` overrides the configuration's. ``ConfigError`` names the nearest catalogue name.
    """
    config = _catalogue().get(str(name_or_path).lower())
    if config is not None:
        return ModelSpec.from_config(config, name=str(name_or_path).lower(), dtype=dtype)
    if exists(name_or_path) or str(name_or_path).endswith(".json"):
        return ModelSpec.from_config(name_or_path, dtype=dtype)
    raise ConfigError(f"model: {did_you_mean(name_or_path, _catalogue())}; or give the path of a config.json")


@cache
def _unquantized(model: ModelSpec) -> int:
    """Parameters of all layers that keep 16 bits; spread over the layers evenly where stages cut them."""
    matches = [matcher(pattern) for pattern in model.unquantized]
    return sum(
        params
        for layer in range(model.num_layers)
        for module, params in _modules(model, dense=layer < model.first_dense_layers)
        if any(match(f"model.layers.{layer}.{module}") for match in matches)
    )


def _modules(model: ModelSpec, *, dense: bool) -> list[tuple[str, int]]:
    """A layer's matrices under the names of Hugging Face's modules, and their parameters."""
    found: list[tuple[str, int]] = []
    for gemm in model.gemms(dense=dense):
        names, rows = _named(model, gemm.name, gemm.n)
        for name, n in zip(names, rows, strict=True):
            found.append((name, n * gemm.k * gemm.count))
    return found


def _named(model: ModelSpec, gemm: str, n: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The modules that make up a GEMM, and the rows of each."""
    kv = model.num_key_value_heads * model.head_dim
    half = (n // 2, n - n // 2)
    one = {
        "q": "self_attn.q_proj", "kv_a": "self_attn.kv_a_proj_with_mqa", "q_b": "self_attn.q_b_proj",
        "kv_b": "self_attn.kv_b_proj", "o": "self_attn.o_proj", "down": "mlp.down_proj", "router": "mlp.gate",
        "moe_down": "mlp.experts.0.down_proj", "shared_down": "mlp.shared_experts.down_proj",
    }  # fmt: skip
    if gemm == "qkv":
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (n - 2 * kv, kv, kv)
    if gemm == "qkv_a":
        rank = model.q_lora_rank or 0
        return ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), (rank, n - rank)
    pairs = {"gate_up": "mlp", "moe_gate_up": "mlp.experts.0", "shared_gate_up": "mlp.shared_experts"}
    if gemm in pairs:
        if not model.gated_mlp:
            return (f"{pairs[gemm]}.up_proj",), (n,)
        return (f"{pairs[gemm]}.gate_proj", f"{pairs[gemm]}.up_proj"), half
    return (one[gemm],), (n,)
