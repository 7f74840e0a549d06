"""Tensor parallelism: which part of every tensor a rank of a stage has, and what ranks tell each other in a step.

As in Megatron-LM (Shoeybi et al., 2019, section 3) and vLLM: query, key, value, gate and up projections by rows (whole
heads; key-value heads are repeated where ranks outnumber them), output and down projections by columns with a sum over
the ranks after each, embedding and head by vocabulary. Experts are cut like any other MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed
from torch.nn import functional

from calibrate.execute.model.architecture import Architecture
from sim.types import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of rank ``rank`` of ``size``. ``whole`` below is the architecture of the whole model."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> slice:
        """Which of ``count`` equal things this rank has; one that others have too if there are fewer than ranks."""
        return slice(self.rank * count // self.size, -(-(self.rank + 1) * count // self.size))

    def tokens(self, vocab_size: int) -> slice:
        """Which token ids this rank has rows of, in the embedding and the head: any number of them, nobody else."""
        return slice(self.rank * vocab_size // self.size, (self.rank + 1) * vocab_size // self.size)

    def architecture(self, whole: Architecture) -> Architecture:
        """The sizes of one rank, but for the vocabulary; ``ConfigError`` if heads or MLP cannot be shared evenly."""
        counts = {"query heads": whole.num_heads, "MLP columns": whole.intermediate_size}
        uneven = {what: count for what, count in counts.items() if count % self.size}
        if whole.num_kv_heads % self.size and self.size % whole.num_kv_heads:
            uneven["key-value heads"] = whole.num_kv_heads
        for what, count in uneven.items():
            raise ConfigError(f"tp: {self.size}: {whole.name} has {count} {what}, which {self.size} GPUs cannot share")
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=whole.intermediate_size // self.size,
        )

    def cut(self, field: str, tensor: Tensor | None, whole: Architecture) -> Tensor | None:
        """This rank's part of a tensor of ``Layer`` or ``Weights``; biases that follow a sum are the first rank's."""
        if tensor is None or self.size == 1:
            return tensor
        if field in ("qkv", "qkv_bias"):
            return self._heads(tensor, whole)
        if field in ("gate_up", "gate_up_bias"):
            axis = 1 if tensor.dim() == 3 else 0  # behind the experts
            parts = [part.narrow(axis, *_span(self.share(part.shape[axis]))) for part in tensor.chunk(2, axis)]
            return torch.cat(parts, axis)
        if field in ("o", "down"):
            return tensor.narrow(-1, *_span(self.share(tensor.shape[-1]))).clone()
        if field in ("embedding", "head"):
            return tensor[self.tokens(len(tensor))].clone()
        if field in ("o_bias", "down_bias"):
            return tensor if self.rank == 0 else None
        return tensor

    def _heads(self, tensor: Tensor, whole: Architecture) -> Tensor:
        counts = [whole.num_heads, whole.num_kv_heads, whole.num_kv_heads]
        heads = torch.split(tensor.view(-1, whole.head_dim, *tensor.shape[1:]), counts)
        return torch.cat([part[self.share(len(part))] for part in heads]).flatten(0, 1)


def _span(part: slice) -> tuple[int, int]:
    return part.start, part.stop - part.start


class Ranks:
    """A rank among those of its stage. All of them must call the same methods in the same order."""

    def __init__(self, shard: Shard | None = None, group: distributed.ProcessGroup | None = None) -> None:
        """``group``: of the stage's processes by rank; None: this one is alone."""
        self.shard = shard or Shard()
        self._group = group

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's ``part``, which it overwrites."""
        if self._group is not None:
            distributed.all_reduce(part, group=self._group)
        return part

    def embed(self, tokens: Tensor, table: Tensor, vocab_size: int) -> Tensor:
        """Rows of an embedding of which each rank has its part."""
        if self.shard.size == 1:
            return functional.embedding(tokens, table)
        own = tokens - self.shard.tokens(vocab_size).start
        missing = (own < 0) | (own >= len(table))
        found = functional.embedding(own.masked_fill(missing, 0), table)
        return self.sum(found.masked_fill(missing[:, None], 0))

    def argmax(self, logits: Tensor, vocab_size: int) -> Tensor:
        """The token of the largest of ``[rows, own part of the vocabulary]`` in each row, over all ranks."""
        if self.shard.size == 1 or not len(logits):
            return logits.argmax(dim=-1)
        best, index = logits.max(dim=-1)
        found = torch.zeros(self.shard.size, 2, len(logits), dtype=torch.float64, device=logits.device)
        found[self.shard.rank, 0] = best
        found[self.shard.rank, 1] = index + self.shard.tokens(vocab_size).start
        values, tokens = self.sum(found).unbind(dim=1)
        return tokens.gather(0, values.argmax(dim=0, keepdim=True))[0].long()
