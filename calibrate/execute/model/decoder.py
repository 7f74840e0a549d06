"""The decoder: one forward pass of a mixed batch (prompt chunks and decodes) over paged KV, for a range of layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from calibrate import kernels
from calibrate.execute.model.architecture import Architecture
from calibrate.execute.model.cache import PagedKv
from calibrate.execute.model.shard import Ranks
from calibrate.execute.model.weights import Layer, Weights


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Rows ``start:end`` of a batch are one prompt's; they end at ``context`` tokens, kept in the blocks ``table``."""

    start: int
    end: int
    table: Tensor
    context: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows ``start:end`` are a token each of sequences with ``contexts`` tokens in the blocks ``tables [S, M]``."""

    start: int
    end: int
    tables: Tensor
    contexts: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step on the device. ``wanted``: the rows whose next token is asked for."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    chunks: tuple[ChunkRows, ...]
    decodes: tuple[DecodeRows, ...]
    wanted: Tensor


class Decoder:
    """Layers of a model. The first stage takes tokens and others hidden states; the last one gives logits.

    With several ``ranks``, ``arch`` has the sizes of one of them, and the logits are of its part of the vocabulary.
    """

    def __init__(self, arch: Architecture, weights: Weights, device: str, ranks: Ranks | None = None) -> None:
        self.arch = arch
        self.weights = weights
        self.device = device
        self.ranks = ranks or Ranks()
        self.frequencies = arch.rope.frequencies(arch.head_dim).to(device)

    @property
    def capturable(self) -> bool:
        """Whether a decode step never waits for the device, so that a CUDA graph can hold it; several ranks do not."""
        probe = self.weights.layers[0].qkv
        return (
            self.ranks.shard.size == 1
            and probe.is_cuda
            and (self.arch.num_experts is None or kernels.grouped_gemms(probe))
        )

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: PagedKv, hidden: Tensor | None = None) -> Tensor:
        """Logits of the wanted rows (float32), or the hidden states of all rows for the next stage."""
        if hidden is None:
            assert self.weights.embedding is not None, "only the first stage takes tokens"
            hidden = self.ranks.embed(batch.tokens, self.weights.embedding, self.arch.vocab_size)
        angles = kernels.rope_angles(batch.positions, self.frequencies, hidden.dtype)
        for layer, kv in zip(self.weights.layers, cache.layers, strict=True):
            hidden = hidden + self.ranks.sum(self._attention(layer, batch, kv, hidden, angles))
            hidden = hidden + self.ranks.sum(self._mlp(layer, hidden))
        if self.weights.head is None or self.weights.final_norm is None:
            return hidden
        last = kernels.rms_norm(hidden[batch.wanted], self.weights.final_norm, self.arch.norm_eps)
        return functional.linear(last, self.weights.head).float()

    def _attention(
        self, layer: Layer, batch: Batch, kv: tuple[Tensor, ...], hidden: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        arch = self.arch
        heads, groups = arch.num_heads, arch.num_kv_heads
        x = kernels.rms_norm(hidden, layer.input_norm, arch.norm_eps)
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, arch.head_dim)
        qk, v = torch.split(qkv, [heads + groups, groups], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = torch.split(qk, [heads, groups], dim=1)
            norms = (layer.q_norm, layer.k_norm)
            qk = torch.cat([kernels.rms_norm(x, w, arch.norm_eps) for x, w in zip((q, k), norms, strict=True)], dim=1)
        q, k = torch.split(kernels.rope(qk, angles), [heads, groups], dim=1)
        kernels.scatter_kv(kv[0], batch.slots, k)
        kernels.scatter_kv(kv[1], batch.slots, v)
        out = self._attended(batch, kv, q, k, v)
        return functional.linear(out.flatten(1), layer.o, layer.o_bias)

    @staticmethod
    def _attended(batch: Batch, kv: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = kv
        parts = []
        for chunk in batch.chunks:
            rows = slice(chunk.start, chunk.end)
            if chunk.context == chunk.end - chunk.start:
                parts.append(kernels.chunk_attention(q[rows], k[rows], v[rows]))
            else:
                parts.append(kernels.paged_chunk_attention(q[rows], keys, values, chunk.table, chunk.context))
        for group in batch.decodes:
            rows = slice(group.start, group.end)
            parts.append(kernels.decode_attention(q[rows], keys, values, group.tables, group.contexts))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mlp(self, layer: Layer, hidden: Tensor) -> Tensor:
        arch = self.arch
        x = kernels.rms_norm(hidden, layer.mlp_norm, arch.norm_eps)
        if layer.router is None or arch.experts_per_token is None:
            inner = kernels.swiglu(functional.linear(x, layer.gate_up, layer.gate_up_bias))
            return functional.linear(inner, layer.down, layer.down_bias)
        logits = functional.linear(x, layer.router)
        weights, experts = kernels.route(logits, arch.experts_per_token, normalise=arch.normalise_experts)
        return kernels.expert_mlp(x, weights, experts, layer.gate_up, layer.down)
