"""The torch kernels of a Llama-family decoder over a paged KV cache: what the engine runs and the bench measures.

Shapes: T tokens of a step, S sequences, H query heads, G key-value heads, D head size, N blocks of B tokens. A KV
cache is one ``[N, B, G, D]`` tensor each for keys and values of a layer; its flat view ``[N * B, G, D]`` has *slots*.
Every function runs on the CPU and on CUDA, never waits for the device and allocates by shape alone (so that a CUDA
graph can capture it), except ``expert_mlp`` where it says so.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

QUANTISED_GROUP = 64
"""Values that share a scale and a zero in 4-bit KV."""
CPU_GATHER_BYTES = 1 << 20
"""Of keys, gathered at once for decode attention on the CPU."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32 inside (Zhang, Sennrich, NeurIPS 2019)."""
    return functional.rms_norm(x, weight.shape, weight, eps)  # one kernel on CUDA


def rope_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine ``[T, 1, D]`` of the rotation at each position, as ``rope`` wants them; once a step."""
    angles = positions.float()[:, None, None] * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of ``[T, heads, D]``; the halves of a head form the pairs, as in Hugging Face models."""
    cos, sin = angles
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of ``[..., 2 I]``, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


# ---------------------------------------------------------------- paged KV


def scatter_kv(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    """Write ``[T, G, D]`` to the slots ``[T]`` of a cache ``[N, B, G, D]``."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)


def gather_kv(cache: Tensor, tables: Tensor) -> Tensor:
    """The blocks ``[S, M]`` of a cache ``[N, B, G, D]`` as contiguous ``[S, M * B, G, D]``."""
    sequences, blocks = tables.shape
    found = cache.index_select(0, tables.reshape(-1))
    return found.view(sequences, blocks * cache.shape[1], *cache.shape[2:])


def without_plans() -> None:
    """Leave cuDNN's attention out: it plans every new shape for milliseconds, and prompts come in all lengths."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def chunk_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one prompt's chunk ``[T, H, D]`` over all its keys ``[L, G, D]``: the last T of them are its own."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
    mask = causal_lower_right(query.shape[0], keys.shape[0])
    grouped = query.shape[1] != keys.shape[1]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def paged_chunk_attention(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, context: int) -> Tensor:
    """As ``chunk_attention``, over the first ``context`` tokens of the blocks ``[M]`` (the chunk's own included)."""
    gathered = (gather_kv(cache, table[None])[0, :context] for cache in (keys, values))
    return chunk_attention(query, *gathered)


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor) -> Tensor:
    """Attention of one new token ``[S, H, D]`` per sequence over its first ``contexts[s]`` tokens in paged KV.

    ``tables``: blocks ``[S, M]``, padded with any valid block. With triton on CUDA each sequence's blocks are read
    where they lie. Elsewhere all sequences are gathered and padded to M * B tokens, so give sequences of similar length
    together. The query heads that share a key head take the place of query tokens, so that no key is copied per query
    head. On the CPU a few sequences at a time, so that what is gathered stays in the processor's cache (and is not
    fresh memory from the system each time, which takes ten times as long).
    """
    if reads_in_place(query):
        from calibrate import paged_attention

        return paged_attention.decode(query, keys, values, tables, contexts)
    if query.is_cuda:
        return _decode_together(query, keys, values, tables, contexts)
    row_bytes = tables.shape[1] * keys[0].numel() * keys.element_size()
    rows = max(1, CPU_GATHER_BYTES // row_bytes)
    parts = zip(*(torch.split(x, rows) for x in (query, tables, contexts)), strict=True)
    return torch.cat([_decode_together(some, keys, values, blocks, lengths) for some, blocks, lengths in parts])


def reads_in_place(x: Tensor) -> bool:
    """Whether ``decode_attention`` on such values takes time by the contexts alone, however wide the tables are."""
    return x.is_cuda and _triton_runs(x.device)


@cache
def _triton_runs(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _decode_together(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor) -> Tensor:
    sequences, heads, size = query.shape
    groups = keys.shape[2]
    k, v = (gather_kv(cache, tables).transpose(1, 2) for cache in (keys, values))
    mask = torch.arange(k.shape[2], device=query.device) < contexts[:, None]
    q = query.view(sequences, groups, heads // groups, size)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    return out.reshape(sequences, heads, size)


# ---------------------------------------------------------------- 4-bit KV for transfers


def quantise_4bit(x: Tensor, group: int = QUANTISED_GROUP) -> tuple[Tensor, Tensor]:
    """``[n, F]`` to nibbles ``[n, F / 2]`` (uint8) and float16 scale and zero ``[n, F / group, 2]``.

    Each group of values keeps its smallest one and a sixteenth-level step: the error of a value is half a step, plus
    the float16 rounding of step and smallest (up to 2^-11 of the group's range and of its largest magnitude). F must
    be a multiple of ``group``, ``group`` even, and values within float16's range.
    """
    grouped = x.float().view(x.shape[0], -1, group)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    zero = low.half()
    step = ((high - low) / 15).half()
    levels = (grouped - zero.float()) / step.float().clamp_min(torch.finfo(torch.float16).tiny)
    nibbles = levels.round_().clamp_(0, 15).to(torch.uint8).flatten(-2)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), torch.cat((step, zero), dim=-1)


def dequantise_4bit(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``quantise_4bit``: ``[n, F]`` of ``dtype``."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    step, zero = scales.float().chunk(2, dim=-1)
    grouped = nibbles.view(*scales.shape[:2], -1).float()
    return (grouped * step + zero).flatten(-2).to(dtype)


# ---------------------------------------------------------------- mixture of experts


def route(logits: Tensor, per_token: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """(weights, expert numbers), each ``[T, per_token]``: softmax over all experts, the largest kept."""
    weights, experts = logits.float().softmax(dim=-1).topk(per_token, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), experts


def expert_mlp(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each token's experts on ``[T, E]``, weighted and added: ``gate_up [X, 2 I, E]``, ``down [X, E, I]``.

    bfloat16 on CUDA runs grouped GEMMs. Elsewhere a loop over the experts in use, which waits for the device to learn
    how many tokens each has.
    """
    tokens, per_token = experts.shape
    chosen, order = experts.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(gate_up.shape[0], device=x.device), right=True)
    by_expert = x[order // per_token]
    if grouped_gemms(x):
        inner = swiglu(functional.grouped_mm(by_expert, gate_up.transpose(1, 2), offs=ends.int()))
        parts = functional.grouped_mm(inner, down.transpose(1, 2), offs=ends.int())
    else:
        parts = _one_by_one(by_expert, ends.tolist(), gate_up, down)
    by_token = torch.empty_like(parts).index_copy_(0, order, parts).view(tokens, per_token, -1)
    return (by_token * weights[..., None]).sum(dim=1)


def grouped_gemms(x: Tensor) -> bool:
    """Whether ``expert_mlp`` on such values never waits for the device: torch's grouped GEMM of Hopper and Blackwell.

    On other GPUs torch runs it as a loop, which does wait.
    """
    known = x.is_cuda and x.dtype == torch.bfloat16 and hasattr(functional, "grouped_mm")
    return known and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _one_by_one(x: Tensor, ends: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    parts = [
        functional.linear(swiglu(functional.linear(x[start:end], gate_up[expert])), down[expert])
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        if end > start
    ]
    return torch.cat(parts)
