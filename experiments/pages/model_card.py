"""A model in one screen: ``phasewise models CONFIG``; parameters, bytes, KV, and the fewest GPUs that hold it."""

from __future__ import annotations

from typing import Any

from sim.cluster import Cluster, Gpu, gpus
from sim.cost import Roofline
from sim.memory import kv_blocks
from sim.model import DTYPE_BYTES, ModelSpec
from sim.policy import Limits, Problem, Workload
from sim.types import Stage

CONTEXTS = (1024, 8192, 32768, 131072)
GIB = 2**30
MOST_GPUS = 8
BLOCK_TOKENS = 16


def card(model: ModelSpec) -> dict[str, Any]:
    """Bytes are of the whole model; ``gpus``: by type the fewest GPUs of one machine, as one stage, and the tokens of
    KV that they have room for then (vLLM's memory, 0.9 of the GPU); types that cannot hold it with eight are left out.
    """
    outer = model.embedding_params * (1 if model.tie_word_embeddings else 2) + model.outer_vector_params
    total = model.weight_bytes(0, model.num_layers)
    outer_bytes = outer * model.activation_bytes_per_value
    return {
        "name": model.name,
        "params": model.params,
        "active_params": model.active_params,
        "num_layers": model.num_layers,
        "max_position_embeddings": model.max_position_embeddings,
        "dtype": model.dtype,
        "bytes_per_layer_param": model.weight_bytes_per_param or DTYPE_BYTES[model.dtype],
        "weight_bytes": {"total": total, "layers": total - outer_bytes, "embedding_and_head": outer_bytes},
        "kv_bytes_per_token": model.kv_bytes_per_token(),
        "kv_bytes": {str(tokens): model.kv_tokens(tokens) * model.kv_bytes_per_token() for tokens in CONTEXTS},
        "gpus": {gpu.name: found for gpu in gpus() if (found := fewest(model, gpu)) is not None},
        "assumed": assumed(model),
    }


def fewest(model: ModelSpec, gpu: Gpu) -> dict[str, int] | None:
    """The fewest GPUs of a machine that hold the weights and one context's worth of a block, or None."""
    for count in (1, 2, 4, MOST_GPUS):
        if model.num_attention_heads % count:
            continue
        cluster = Cluster.of(nodes=[{"gpu": gpu.name, "count": count}])
        stage = Stage(name="s", gpus=tuple(cluster.gpu_ids), first_layer=0, end_layer=model.num_layers)
        limits = Limits(block_size=BLOCK_TOKENS)
        problem = Problem(
            cluster=cluster,
            model=model,
            cost=Roofline(),
            workload=Workload(rate_per_s=1, lengths=((1, 1),)),
            limits=limits,
        )
        blocks = kv_blocks(problem, (stage,), limits)
        if blocks > 0:
            return {"count": count, "kv_tokens": blocks * BLOCK_TOKENS}
    return None


def assumed(model: ModelSpec) -> list[str]:
    """What a reader must know of these figures."""
    said = ["KV cache in 16 bits" if model.kv_dtype is None else f"KV cache in {model.kv_dtype}"]
    if model.weight_bytes_per_param is not None:
        said.append("weights are stored in fewer bits; matrices are multiplied in 16")
    if model.unquantized:
        said.append(f"{len(model.unquantized)} patterns name modules that keep 16 bits")
    if model.sliding_window is not None:
        said.append(f"every layer attends to the last {model.sliding_window:,} tokens; its KV is counted up to there")
    return said


def lines(found: dict[str, Any]) -> list[str]:
    """The card as text."""
    weights, kv = found["weight_bytes"], found["kv_bytes"]
    active = "" if found["active_params"] == found["params"] else f", {found['active_params'] / 1e9:.2f}e9 active"
    layer = f"{found['dtype']}, {found['bytes_per_layer_param']:.4g} bytes a layer's parameter"
    parts = f"layers {weights['layers'] / 1e9:.2f}, embedding and head {weights['embedding_and_head'] / 1e9:.2f}"
    contexts = ", ".join(f"{size / GIB:.2f} GiB at {int(tokens) // 1024}k" for tokens, size in kv.items())
    shown = [
        f"{found['name']}: {found['params'] / 1e9:.2f}e9 parameters{active}, {found['num_layers']} layers, context "
        f"{found['max_position_embeddings']:,}",
        f"weights  {weights['total'] / 1e9:.2f} GB ({layer}): {parts}",
        f"KV       {found['kv_bytes_per_token'] / 1024:.1f} KiB a token: {contexts}",
        "assumed  " + "; ".join(found["assumed"]),
        "",
        f"{'GPU':<16}{'fewest':>7}{'KV tokens then':>16}",
    ]
    shown += [f"{name:<16}{part['count']:>7}{part['kv_tokens']:>16,}" for name, part in found["gpus"].items()]
    return shown
