"""Kernel tables of one GPU type, for any model: GEMMs by (tokens, n, k), attention by heads, all-reduce by bytes.

``Kernels.entry`` puts a model together from them at one tensor-parallel degree. Kernels that the tables lack (norms,
rope, activation, cache write, sampler) are small: they take a launch and their memory traffic. Grouped GEMMs of
experts are a roofline whose efficiencies come from the one such kernel that was measured. Models in 8-bit floats take
16-bit attention and head, and GEMMs that were measured in 8 bits or follow from those in 16.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, exp, log

from sim.cluster import Gpu
from sim.cost.graphs import Graphs
from sim.cost.tables import Grid, HeldOut, ProfileEntry, Table
from sim.model import DTYPE_BYTES, Gemm, ModelSpec
from sim.types import ConfigError

SMALL_KERNEL_S = 2e-6
"""A norm, rope, activation or cache write over few tokens: 1.9 to 2.6 us in LLMServingSim's vLLM 0.19 tables."""
SMALL_KERNELS = 5
"""Of a layer: two norms, rope, cache write, activation."""
SAMPLER_S, SAMPLER_BYTES = 25e-6, 10
"""The greedy sampler: 25 us and 10 bytes per logit (read 16 bits, write and read 32), as in the same tables."""
MEMORY_EFFICIENCY = 0.75
"""Of peak bandwidth, for these kernels (``Roofline.memory_efficiency``)."""
COLD_EFFICIENCY = 0.8
"""Of peak bandwidth, when decodes read their KV from memory. Tables are measured with KV that may lie in the L2 cache
still; a server's does not, as all weights pass between two steps. Chosen on LLMServingSim's layers."""
CHUNK_CONTEXTS = (0, 256, 1024, 2048, 4096, 8192, 16384, 32768)
SERIAL_SPAN = (1024, 4096)
"""Prompt lengths between which one head alone shows how fast one tile of queries passes along the keys."""
EXPERT_MEMORY, EXPERT_COMPUTE, EXPERT_OVERLAP = 0.82, 0.59, 0.6
"""Of peak bandwidth and FLOP/s in a grouped GEMM, and the part of the shorter one of both that hides behind the longer:
vLLM 0.19's expert kernel for Qwen3-30B-A3B on an RTX PRO 6000 (LLMServingSim): median error 7 %, largest 24 %."""
NARROW_EFFICIENCY = 0.8
"""How much of its roofline an 8-bit GEMM reaches, of what the same one in 16 bits does, its input's quantisation
included: medians of 0.7 to 0.9 on H100 and H200, 1 to 64 rows and from 2,048 on (aiconfigurator, vLLM 0.19)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTable:
    """Seconds of ``tokens x k`` times ``k x n``, as ``seconds[n][k][tokens]``; NaN-free, all > 0."""

    tokens: tuple[int, ...]
    n: tuple[int, ...]
    k: tuple[int, ...]
    seconds: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        for name in ("tokens", "n", "k"):
            axis = getattr(self, name)
            if len(axis) < 2 or axis[0] < 1 or any(b <= a for a, b in pairwise(axis)):
                raise ConfigError(
                    f"{name} {list(axis)}: needs at least 2 whole numbers >= 1, each larger than the last"
                )
        shape = {len(row) for plane in self.seconds for row in plane}
        if len(self.seconds) != len(self.n) or {len(plane) for plane in self.seconds} != {len(self.k)}:
            raise ConfigError(f"seconds must have {len(self.n)} planes (n) of {len(self.k)} rows (k)")
        if shape != {len(self.tokens)}:
            raise ConfigError(f"every row of seconds must have {len(self.tokens)} values, one per token count")
        if not all(0 < value < float("inf") for plane in self.seconds for row in plane for value in row):
            raise ConfigError("seconds: every value must be a number > 0")

    def row(self, n: int, k: int) -> tuple[float, ...]:
        """Seconds by ``tokens`` for any shape: geometric between its neighbours in the table, in proportion beyond."""
        low_n, high_n, part_n, times_n = _place(self.n, n)
        low_k, high_k, part_k, times_k = _place(self.k, k)
        corners = [
            (self.seconds[i][j], share_n * share_k)
            for i, share_n in ((low_n, 1 - part_n), (high_n, part_n))
            for j, share_k in ((low_k, 1 - part_k), (high_k, part_k))
            if share_n * share_k
        ]
        return tuple(
            times_n * times_k * exp(sum(share * log(row[at]) for row, share in corners))
            for at in range(len(self.tokens))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTable:
    """One GPU's attention in one layer: prompts by length (no context), decodes by (sequences, context each)."""

    heads: int
    kv_heads: int
    head_dim: int
    prefill: Table
    decode: Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Measured kernels of the GPU types named, in one of ``dtypes``. ``all_reduce``: by GPUs, seconds by bytes.

    ``gemm8``: GEMMs of 8-bit floats, their inputs' quantisation included; None: they follow from ``gemm``.
    ``predicted``: scaled from those of another GPU type.
    ``beside_chunks``: a decode in a step with chunks takes this, times its query heads per KV head, as long as it
    takes alone (never less): the kernel that serves both works on whole tiles of queries of one head. 0: the same.
    ``graphs``: as in ``ProfileEntry``, of the engine that runs them.
    """

    gpus: tuple[str, ...]
    dtypes: tuple[str, ...]
    gemm: GemmTable
    attention: tuple[AttentionTable, ...]
    gemm8: GemmTable | None = None
    all_reduce: Mapping[int, Table] = field(default_factory=dict)
    beside_chunks: float = 0.0
    predicted: bool = False
    graphs: Graphs | None = None
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)

    def serves(self, model: ModelSpec) -> bool:
        """Whether models in such a dtype, with such a cache, can be put together."""
        return model.dtype in (*self.dtypes, "float8") and model.kv_bytes_per_value <= 2

    def entry(self, model: ModelSpec, tp: int, gpu: Gpu) -> ProfileEntry | None:
        """The model's operators at this degree; None for latent attention, and where layers differ."""
        if model.kv_lora_rank is not None or model.first_dense_layers:
            return None
        attention = self._attention(model, tp)
        decode = _cold(attention, gpu, model.kv_bytes_per_value) if attention is not None else None
        serial_s = self._serial_s(model)
        return ProfileEntry(
            gpus=(gpu.name,),
            model=model.name,
            num_layers=model.num_layers,
            tp=tp,
            dtypes=(model.dtype,),
            linear=self._linear(model, tp, gpu),
            head=self._head(model, tp, gpu),
            collective=self._collective(model, tp),
            attention_prefill=_chunks(attention.prefill, serial_s) if attention is not None else None,
            attention_decode=decode,
            attention_mixed=self._mixed(decode, model, serial_s) if decode is not None else None,
            predicted=self.predicted,
            graphs=self.graphs,
            held_out=self.held_out,
        )

    def with_collectives(self, entry: ProfileEntry, model: ModelSpec) -> ProfileEntry:
        """A model's measured shards, which lack what its GPUs do together: all-reduces, and gathering the logits."""
        head = None if entry.head is None else self._gathered(entry.head, model, entry.tp)
        return replace(entry, collective=self._collective(model, entry.tp), head=head)

    def _linear(self, model: ModelSpec, tp: int, gpu: Gpu) -> Table:
        gemms = model.gemms(tp)
        rows = [self._gemm_row(gemm, model, gpu) for gemm in gemms if gemm.count == 1]
        experts = [gemm for gemm in gemms if gemm.count > 1]
        heads = ceil(model.num_attention_heads / tp) + 2 * ceil(model.num_key_value_heads / tp)
        inner = model.intermediate_size
        if model.moe_intermediate_size is not None and model.experts_per_token is not None:
            inner = model.moe_intermediate_size * model.experts_per_token
        values = 8 * model.hidden_size + 3 * heads * model.head_dim + 3 * ceil(inner / tp)
        token_s = values * model.activation_bytes_per_value / (gpu.bandwidth_bytes_per_s * MEMORY_EFFICIENCY)
        seconds = [
            sum(row[at] for row in rows)
            + sum(_experts_s(gemm, count, model, gpu) for gemm in experts)
            + SMALL_KERNELS * SMALL_KERNEL_S
            + count * token_s
            for at, count in enumerate(self.gemm.tokens)
        ]
        return Table(counts=self.gemm.tokens, seconds=_rising(seconds), per="layer")

    def _gemm_row(self, gemm: Gemm, model: ModelSpec, gpu: Gpu) -> tuple[float, ...]:
        """Seconds at the token counts of ``gemm``, in the model's dtype."""
        row = self.gemm.row(gemm.n, gemm.k)
        if model.dtype in self.dtypes:
            return row
        if self.gemm8 is not None:
            narrow = self.gemm8.row(gemm.n, gemm.k)
            return tuple(_along(self.gemm8.tokens, narrow, count) for count in self.gemm.tokens)

        def least_s(tokens: int, dtype: str) -> float:
            size_bytes = DTYPE_BYTES[dtype] * gemm.n * gemm.k
            return gemm_floor_s(gemm.n, gemm.k, tokens, size_bytes, gpu.flops_for(dtype), gpu.bandwidth_bytes_per_s)

        return tuple(
            value * least_s(count, model.dtype) / least_s(count, self.dtypes[0]) / NARROW_EFFICIENCY
            for count, value in zip(self.gemm.tokens, row, strict=True)
        )

    def _head(self, model: ModelSpec, tp: int, gpu: Gpu) -> Table:
        logits = self.gemm.row(ceil(model.vocab_size / tp), model.hidden_size)
        logit_s = SAMPLER_BYTES / (gpu.bandwidth_bytes_per_s * MEMORY_EFFICIENCY)
        seqs = self.gemm.tokens
        seconds = [s + SAMPLER_S + logit_s * n * model.vocab_size for n, s in zip(seqs, logits, strict=True)]
        return self._gathered(Table(counts=seqs, seconds=_rising(seconds)), model, tp)

    def _gathered(self, head: Table, model: ModelSpec, tp: int) -> Table:
        """A head, and bringing the logits of every shard together."""
        if tp not in self.all_reduce:
            return head
        seq_bytes = model.vocab_size * model.activation_bytes_per_value
        gathers = (self._all_reduce_seconds(tp, seqs * seq_bytes) / 2 for seqs in head.counts)
        return replace(head, seconds=_rising([a + b for a, b in zip(head.seconds, gathers, strict=True)]))

    def _collective(self, model: ModelSpec, tp: int) -> Table | None:
        if tp not in self.all_reduce:
            return None
        token_bytes = model.hidden_size * model.activation_bytes_per_value
        seconds = [2 * self._all_reduce_seconds(tp, count * token_bytes) for count in self.gemm.tokens]
        return Table(counts=self.gemm.tokens, seconds=_rising(seconds), per="layer")

    def _all_reduce_seconds(self, tp: int, size_bytes: int) -> float:
        table = self.all_reduce[tp]
        return _along(table.counts, table.seconds, size_bytes)

    def _serial_s(self, model: ModelSpec) -> float:
        """Seconds a key for one tile of queries, from the fewest heads: too few to fill the GPU."""
        alone = [table for table in self.attention if table.head_dim == model.head_dim]
        if not alone:
            return 0.0
        prefill = min(alone, key=lambda table: table.heads).prefill
        low, high = (min(count, prefill.counts[-1]) for count in SERIAL_SPAN)
        if high == low:
            return 0.0
        first_s, last_s = (_along(prefill.counts, prefill.seconds, count) for count in (low, high))
        return (last_s - first_s) / (high - low)

    def _mixed(self, decode: Grid, model: ModelSpec, serial_s: float) -> Grid:
        """Decodes beside chunks: by tiles of one head each, and no sooner than one tile has seen its whole context."""
        longer = max(1.0, self.beside_chunks * model.num_attention_heads / model.num_key_value_heads)
        least_s = serial_s if self.beside_chunks else 0.0
        rows = (
            tuple(max(value * longer, least_s * context) for context, value in zip(decode.contexts, row, strict=True))
            for row in decode.seconds
        )
        return replace(decode, seconds=tuple(rows))

    def _attention(self, model: ModelSpec, tp: int) -> AttentionTable | None:
        """A table of these heads, put together from those of the same size; None where there are none."""
        heads = ceil(model.num_attention_heads / tp)
        kv_heads = ceil(model.num_key_value_heads / tp)
        tables = [table for table in self.attention if table.head_dim == model.head_dim]
        prefill, decode = _prompts(tables, heads, kv_heads), _decodes(tables, heads, kv_heads)
        if prefill is None or decode is None:
            return None
        return AttentionTable(heads=heads, kv_heads=kv_heads, head_dim=model.head_dim, prefill=prefill, decode=decode)


def gemm_floor_s(n: int, k: int, tokens: int, weight_bytes: float, flops: float, bytes_per_s: float) -> float:
    """What ``tokens x k`` times ``k x n`` takes at peak: the longer of arithmetic and traffic, 16-bit in and out."""
    return max(2 * tokens * n * k / flops, (weight_bytes + 2 * tokens * (n + k)) / bytes_per_s)


def _place(axis: Sequence[int], value: int) -> tuple[int, int, float, float]:
    """(index below, index above, geometric share of the upper, factor beyond the axis)."""
    if value >= axis[-1]:
        return len(axis) - 1, len(axis) - 1, 0.0, value / axis[-1]
    if value <= axis[0]:
        return 0, 0, 0.0, 1.0
    low = bisect_right(axis, value) - 1
    return low, low + 1, log(value / axis[low]) / log(axis[low + 1] / axis[low]), 1.0


def _along(axis: Sequence[int], seconds: Sequence[float], value: float, power: float = 1.0) -> float:
    """Linear between points, held before the first; beyond the last it grows with this power of ``value``."""
    if value <= axis[0]:
        return seconds[0]
    if value >= axis[-1]:
        return seconds[-1] * float((value / axis[-1]) ** power)
    low = bisect_right(axis, value) - 1
    part = (value - axis[low]) / (axis[low + 1] - axis[low])
    return seconds[low] + part * (seconds[low + 1] - seconds[low])


def _rising(seconds: Sequence[float]) -> tuple[float, ...]:
    """Each value averaged with those after it that are lower (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in seconds:
        total, size = value, 1
        while pools and pools[-1][0] * size > total * pools[-1][1]:
            before, members = pools.pop()
            total, size = total + before, size + members
        pools.append((total, size))
    return tuple(total / size for total, size in pools for _ in range(size))


def _experts_s(gemm: Gemm, tokens: int, model: ModelSpec, gpu: Gpu) -> float:
    """One grouped GEMM over the experts that so many tokens reach if each chooses at random."""
    rows = tokens * gemm.active
    reached = gemm.count * (1 - (1 - gemm.active / gemm.count) ** tokens)
    compute_s = 2 * gemm.n * gemm.k * rows / (gpu.flops_for(model.dtype) * EXPERT_COMPUTE)
    weight_bytes = reached * gemm.n * gemm.k * DTYPE_BYTES[model.dtype]
    size_bytes = weight_bytes + rows * (gemm.n + gemm.k) * model.activation_bytes_per_value
    traffic_s = size_bytes / (gpu.bandwidth_bytes_per_s * EXPERT_MEMORY)
    return max(compute_s, traffic_s) + (1 - EXPERT_OVERLAP) * min(compute_s, traffic_s)


def _cold(table: AttentionTable, gpu: Gpu, value_bytes: int) -> Grid:
    """The decodes, no faster than a launch and reading their KV from memory.

    With values of 8 bits they take half as long beyond the launch (aiconfigurator, large decodes: 0.48 to 0.55 of 16
    bits on L40S, RTX PRO 6000 and H100, 0.73 on H200).
    """
    token_s = 2 * value_bytes * table.kv_heads * table.head_dim / (gpu.bandwidth_bytes_per_s * COLD_EFFICIENCY)
    decode = table.decode
    launch_s = decode.seconds[0][0]
    rows = (
        tuple(
            launch_s + max((value - launch_s) * value_bytes / 2, count * context * token_s)
            for context, value in zip(decode.contexts, row, strict=True)
        )
        for count, row in zip(decode.counts, decode.seconds, strict=True)
    )
    return replace(decode, seconds=tuple(rows))


def _chunks(prefill: Table, serial_s: float) -> Grid:
    """A chunk after a context costs what the longer prompt costs more, and no less than one tile's way along it."""

    def whole_s(tokens: int) -> float:
        return _along(prefill.counts, prefill.seconds, tokens, power=2.0)

    rows = tuple(
        tuple(
            max(whole_s(count) + serial_s * context, whole_s(count + context) - whole_s(context))
            for context in CHUNK_CONTEXTS
        )
        for count in prefill.counts
    )
    return Grid(counts=prefill.counts, contexts=CHUNK_CONTEXTS, seconds=rows, per="layer")


def _prompts(tables: Sequence[AttentionTable], heads: int, kv_heads: int) -> Table | None:
    """By query heads: between two, in proportion beyond the most. KV heads hardly matter: of the nearest number."""
    nearest_last = sorted(tables, key=lambda table: -abs(log(table.kv_heads / kv_heads)))
    shapes = {table.heads: table.prefill for table in nearest_last}
    if not shapes or heads < min(shapes):
        return None
    most = max(shapes)
    if heads > most:
        return replace(shapes[most], seconds=tuple(value * heads / most for value in shapes[most].seconds))
    low, high, part = _around(shapes, heads)
    return replace(shapes[high], seconds=_blend(shapes[low].seconds, shapes[high].seconds, part))


def _decodes(tables: Sequence[AttentionTable], heads: int, kv_heads: int) -> Grid | None:
    """By query heads of these KV heads; else those of fewer KV heads with as many query heads each, more sequences.

    A decode kernel's unit of work is one KV head of one sequence with all of its query heads: 8 KV heads from tables of
    4 and fewer are 1 to 2 % off in the median (A100, L40S, RTX PRO 6000, H100).
    """
    shapes = {table.heads: table.decode for table in tables if table.kv_heads == kv_heads}
    if shapes and min(shapes) <= heads <= max(shapes):
        low, high, part = _around(shapes, heads)
        rows = zip(shapes[low].seconds, shapes[high].seconds, strict=True)
        return replace(shapes[high], seconds=tuple(_blend(a, b, part) for a, b in rows))
    alike = [table for table in tables if table.heads * kv_heads == heads * table.kv_heads < heads * kv_heads]
    if not alike:
        return None
    nearest = max(alike, key=lambda table: table.kv_heads)
    return _times_sequences(nearest.decode, kv_heads / nearest.kv_heads)


def _times_sequences(grid: Grid, factor: float) -> Grid:
    """Every count of sequences takes what ``factor`` times as many did."""
    columns = list(zip(*grid.seconds, strict=True))
    rows = (tuple(_along(grid.counts, column, count * factor) for column in columns) for count in grid.counts)
    return replace(grid, seconds=tuple(rows))


def _around(known: Collection[int], heads: int) -> tuple[int, int, float]:
    """The nearest number that is no more, the nearest that is no less, and how far it is from the one to the other."""
    low = max(count for count in known if count <= heads)
    high = min(count for count in known if count >= heads)
    return low, high, (heads - low) / (high - low) if high > low else 0.0


def _blend(low: Sequence[float], high: Sequence[float], part: float) -> tuple[float, ...]:
    return tuple(a + part * (b - a) for a, b in zip(low, high, strict=True))
