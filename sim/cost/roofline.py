"""Analytic step times: every operator takes the longer of its arithmetic and its memory traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf

from sim.cluster import Cluster, Gpu, Link
from sim.cost.links import collective_seconds
from sim.cost.pieces import Row, steeper
from sim.cost.step import Composed, Fixed, Operators
from sim.model import DTYPE_BYTES, Gemm, ModelSpec
from sim.types import PS_PER_S, ConfigError, Stage

COLLECTIVES_PER_LAYER = 2
"""All-reduces: after attention and after the MLP (Megatron-LM, arXiv 1909.08053, section 3)."""

SUSTAINED = {"T4": 0.57, "L4": 0.58}
"""Share of the data sheet's FLOP/s that cards of 70 W hold: their clocks fall under load. Prompts of LLaMA-30B in
Helix's tables (256 tokens and more); those of LLaMA-2-70B judge (experiments/fidelity/cases/left_out.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What a serving engine adds to a step outside its kernels: once, and for every sequence in it.

    Scheduling, launches, preparing inputs, taking samples back. ``overlapped``: the processor does it while the GPU
    works on the step before (asynchronous scheduling), so that a step takes the longer of the two, not their sum.
    ``slowdown``: how many times as long as in the latency model the kernels take here (clocks, memory that other
    programs use as well).
    """

    step_s: float = 0.0
    sequence_s: float = 0.0
    overlapped: bool = False
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        for name in ("step_s", "sequence_s"):
            if not 0 <= getattr(self, name) < inf:
                raise ConfigError(f"overhead: {name} is {getattr(self, name)}; it must be a number >= 0")
        if not 0 < self.slowdown < inf:
            raise ConfigError(f"overhead: slowdown is {self.slowdown}; it must be a number > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Efficiencies are shares of the peak, medians of vLLM kernels in NVIDIA's aiconfigurator tables.

    (ai-dynamo/aiconfigurator 095f58a, Apache-2.0; bfloat16, vLLM 0.14 on A100 and L40S, 0.19 on H100.)
    ``compute_efficiency``: GEMMs of 1,024 rows and more reach 0.81 A100, 0.77 H100, 0.72 L40S; less for norms and
    activations between them. ``memory_efficiency``: GEMMs of up to 16 rows: 0.68 A100, 0.79 H100, 0.80 L40S.
    ``attention_compute_efficiency``: causal prefill from 1,024 tokens: 0.50 A100, 0.48 H100, 0.43 L40S.
    ``attention_memory_efficiency``: decode over 50 MB of KV and more: 0.59 A100, 0.70 H100, 0.80 L40S.
    ``overhead_s``: scheduling, launch and sampling between steps, once a step: 1-3 ms are usual for engines
    of 2025; those of 2023 took 20-40 ms (the Splitwise profile contains its own).
    """

    name: str = "roofline"
    compute_efficiency: float = 0.7
    memory_efficiency: float = 0.75
    attention_compute_efficiency: float = 0.5
    attention_memory_efficiency: float = 0.7
    overhead_s: float = 0.002

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.endswith("_efficiency") and not 0 < getattr(self, field.name) <= 1:
                raise ConfigError(f"roofline: {field.name} is {getattr(self, field.name)}; it must be in (0, 1]")
        if not 0 <= self.overhead_s < inf:
            raise ConfigError(f"roofline: overhead_s is {self.overhead_s}; it must be a number >= 0")

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> Composed:
        return Composed(self.operators(model, stage, cluster, slow), measured=False)

    def operators(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> Operators:
        """Every operator of a stage, ready to be replaced one by one by measured ones."""
        rates = self.rates(model, stage, cluster, slow)
        first = stage.first_layer == 0
        last = stage.end_layer == model.num_layers
        decode = _decode_rows(model, stage, rates)
        return Operators(
            linear=_linear(model, stage, rates),
            collective=_collective(model, stage, rates),
            embedding=_embedding(model, rates) if first else _nothing,
            head=_head(model, rates) if last else _nothing,
            overhead_ps=round(self.overhead_s * slow * PS_PER_S) if first else 0,
            sequence_ps=0,
            chunk=_chunk_rows(model, stage, rates),
            decode=decode,
            mixed=decode,
        )

    def rates(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> Rates:
        """What one GPU of a stage achieves; the slowest one where they differ."""
        if not slow > 0 or slow == inf:
            raise ConfigError(f"stage {stage.name}: slow is {slow}; it must be a number > 0")
        gpus = [cluster.gpu(gpu_id) for gpu_id in stage.gpus]
        flops = min(sustained_flops(gpu, model.dtype) for gpu in gpus) / slow
        wide = "float32" if model.dtype == "float32" else "bfloat16"
        wide_flops = min(sustained_flops(gpu, wide) for gpu in gpus) / slow
        memory = min(gpu.bandwidth_bytes_per_s for gpu in gpus) / slow
        return Rates(
            tp=stage.tp,
            slow=slow,
            linear_flops_per_s=flops * self.compute_efficiency,
            head_flops_per_s=wide_flops * self.compute_efficiency,
            memory_bytes_per_s=memory * self.memory_efficiency,
            attention_flops_per_s=wide_flops * self.attention_compute_efficiency,
            attention_bytes_per_s=memory * self.attention_memory_efficiency,
            link=cluster.collective_link(stage.gpus),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Achieved rates of one GPU of a stage, and the link of its tensor-parallel group (``slow`` not in it).

    Layers compute in the model's dtype; head and attention in 16 bits where that is narrower.
    """

    tp: int
    slow: float
    linear_flops_per_s: float
    head_flops_per_s: float
    memory_bytes_per_s: float
    attention_flops_per_s: float
    attention_bytes_per_s: float
    link: Link


def sustained_flops(gpu: Gpu, dtype: str) -> float:
    """Peak FLOP/s, less where a card's power does not sustain it."""
    return gpu.flops_for(dtype) * SUSTAINED.get(gpu.name, 1.0)


def pair_ps(model: ModelSpec, stage: Stage, rates: Rates) -> float:
    """Arithmetic of one (token, attended token) pair in all of a stage's layers."""
    flops = model.attention_flops_per_pair * stage.num_layers / rates.tp
    return flops / rates.attention_flops_per_s * PS_PER_S


def kv_read_ps(model: ModelSpec, stage: Stage, rates: Rates) -> float:
    """Reading one cached token's KV in all of a stage's layers."""
    size = model.kv_bytes_per_token_layer_gpu(rates.tp) * stage.num_layers
    return size / rates.attention_bytes_per_s * PS_PER_S


def _nothing(_count: int) -> tuple[int, bool]:
    return 0, False


def _linear(model: ModelSpec, stage: Stage, rates: Rates) -> Fixed:
    """Every GEMM of every layer on one GPU; shards are padded as ``ModelSpec.gemms`` has them."""
    dense = max(0, min(stage.end_layer, model.first_dense_layers) - stage.first_layer)
    layers = ((dense, model.gemms(rates.tp, dense=True)), (stage.num_layers - dense, model.gemms(rates.tp)))
    weight_bytes = model.weight_bytes_per_param or DTYPE_BYTES[model.dtype]
    value_bytes = model.activation_bytes_per_value

    def linear(tokens: int) -> tuple[int, bool]:
        total_s = 0.0
        for count, gemms in layers:
            total_s += count * sum(_gemm_seconds(gemm, tokens, weight_bytes, value_bytes, rates) for gemm in gemms)
        return round(total_s * PS_PER_S), False

    return linear


def _gemm_seconds(gemm: Gemm, tokens: int, weight_bytes: float, value_bytes: int, rates: Rates) -> float:
    """The longer of arithmetic and of reading the weights touched, the inputs and writing the outputs.

    Experts are touched as if every token chose its own at random: of E, with k a token, E(1 - (1 - k/E)^tokens).
    """
    rows = tokens * gemm.active
    touched = gemm.count * (1 - (1 - gemm.active / gemm.count) ** tokens)
    compute_s = 2 * gemm.n * gemm.k * rows / rates.linear_flops_per_s
    traffic = touched * gemm.n * gemm.k * weight_bytes + rows * (gemm.n + gemm.k) * value_bytes
    return max(compute_s, traffic / rates.memory_bytes_per_s)


def _collective(model: ModelSpec, stage: Stage, rates: Rates) -> Fixed:
    count = COLLECTIVES_PER_LAYER * stage.num_layers
    token_bytes = model.hidden_size * model.activation_bytes_per_value

    def collective(tokens: int) -> tuple[int, bool]:
        one_s = collective_seconds("all_reduce", tokens * token_bytes, rates.link, rates.tp)
        return round(count * one_s * rates.slow * PS_PER_S), False

    return collective


def _embedding(model: ModelSpec, rates: Rates) -> Fixed:
    """A row read and written per token; every GPU ends with whole rows."""
    row_bytes = 2 * model.hidden_size * model.activation_bytes_per_value
    return lambda tokens: (round(tokens * row_bytes / rates.memory_bytes_per_s * PS_PER_S), False)


def _head(model: ModelSpec, rates: Rates) -> Fixed:
    """The logits of one token per sequence, gathered from the shards."""
    value_bytes = model.activation_bytes_per_value
    weights_s = model.embedding_params * value_bytes / rates.tp / rates.memory_bytes_per_s

    def head(seqs: int) -> tuple[int, bool]:
        compute_s = model.head_flops_per_token * seqs / rates.tp / rates.head_flops_per_s
        logits_bytes = seqs * model.vocab_size * value_bytes
        gather_s = collective_seconds("all_gather", logits_bytes, rates.link, rates.tp)
        return round((max(compute_s, weights_s) + gather_s * rates.slow) * PS_PER_S), False

    return head


def _chunk_rows(model: ModelSpec, stage: Stage, rates: Rates) -> Callable[[int], Row]:
    """Pairs of the chunk with its context and with itself, or one read of the context, whichever takes longer.

    A sliding window caps both; where the window ends inside the chunk that is an upper bound (at most 2x).
    """
    pair, read = pair_ps(model, stage, rates), round(kv_read_ps(model, stage, rates))
    window = model.sliding_window

    def row(tokens: int) -> Row:
        pairs = tokens * (tokens + 1) / 2
        if window is None:
            return steeper((round(pair * pairs), round(pair * tokens)), (read * tokens, read))
        inner = min(pairs, tokens * window)
        whole = steeper((round(pair * inner), round(pair * tokens)), (read * tokens, read))
        return whole.capped(max(0, window - (tokens + 1) // 2))

    return row


def _decode_rows(model: ModelSpec, stage: Stage, rates: Rates) -> Callable[[int], Row]:
    """Linear in the tokens attended to, however many sequences share them; a sliding window caps their mean."""
    per_token = round(max(pair_ps(model, stage, rates), kv_read_ps(model, stage, rates)))
    row = Row((0,), (0,), (per_token,))
    window = model.sliding_window
    if window is None:
        return lambda _seqs: row
    return lambda seqs: Row((0, window * seqs), (0, per_token * window * seqs), (per_token, 0))
