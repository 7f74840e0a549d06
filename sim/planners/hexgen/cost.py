"""HexGen's cost model (ICML 2024; arXiv 2311.11514): seconds and bytes of a stage, from its GPUs' peaks and links.

The paper's form as second-hand texts give it; collective and hop terms, and the memory, are those of its authors'
scheduler scripts (public copies). Their 12 H^2 weights a layer are the model's own here; KV is divided by the
tensor-parallel degree, which the scripts leave out, and ``output_tokens`` are generated, where the scripts count the
prompt among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sim.model import ModelSpec


class Wire(NamedTuple):
    """Between two GPUs: ``latency_s`` is the paper's alpha, ``bytes_per_s`` its beta."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float) -> float:
        return self.latency_s + size_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of batches of so many requests; all times are for one layer, or one hop."""

    layer_params: float
    hidden_size: int
    kv_values: int
    """Of a token in a layer, keys and values."""
    value_bytes: float
    batch: int
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, model: ModelSpec, input_tokens: int, output_tokens: int, batch: int = 1) -> Costs:
        return cls(
            layer_params=model.active_layer_params, hidden_size=model.hidden_size,
            kv_values=round(model.kv_bytes_per_token() / model.num_layers / model.kv_bytes_per_value),
            value_bytes=model.activation_bytes_per_value, batch=batch,
            input_tokens=input_tokens, output_tokens=output_tokens,
        )  # fmt: skip

    # ------------------------------------------------------------ seconds

    def compute_s(self, tokens: int, tp: int, flops: float, bytes_per_s: float) -> float:
        """Weights are read once, and each token goes through all of them; shared by ``tp`` GPUs."""
        weights_s = self.layer_params * self.value_bytes / bytes_per_s
        return (weights_s + 2 * self.batch * tokens * self.layer_params / flops) / tp

    def collectives_s(self, tokens: int, tp: int, wire: Wire) -> float:
        """Two all-reduces in rings of 2 (tp - 1) steps."""
        return 4 * (tp - 1) * wire.seconds(self.activation_bytes(tokens) / tp)

    def hop_s(self, tokens: int, wire: Wire, next_tp: int = 1, next_wire: Wire | None = None) -> float:
        """To the next stage's leader, who tells the others of its group."""
        told_s = 0.0
        if next_tp > 1 and next_wire is not None:
            told_s = 2 * (next_tp - 1) * next_wire.seconds(self.activation_bytes(tokens) / next_tp)
        return wire.seconds(self.activation_bytes(tokens)) + told_s

    def activation_bytes(self, tokens: int) -> float:
        return self.batch * tokens * self.hidden_size * self.value_bytes

    # ------------------------------------------------------------ memory

    def memory_bytes(self, layers: int, tp: int) -> float:
        """Of each GPU of a stage: weights, KV of the batch, and four activations of all its tokens."""
        tokens = self.batch * (self.input_tokens + self.output_tokens)
        values = (self.layer_params + tokens * self.kv_values) / tp * layers
        return (values + 4 * tokens * self.hidden_size) * self.value_bytes
