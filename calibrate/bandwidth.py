"""What share of a device's memory bandwidth whole decode steps reach: ``python -m calibrate.bandwidth``."""

from __future__ import annotations

import json
from statistics import median
from typing import Annotated, Any

import torch
import typer

from calibrate.bench.device import Target, target
from calibrate.bench.family import Runs
from calibrate.bench.timer import timed
from calibrate.execute.model.architecture import Architecture
from calibrate.execute.model.cache import cache_bytes
from calibrate.execute.model.weights import num_bytes, tensors_of
from calibrate.execute.step_cost import MeasuredStage, MeasuredSteps
from sim.model import model as find_model
from sim.types import Work

CONTEXT_TOKENS = 2048
SEQUENCES = (1, 64)
REPEATS = 15
BLOCK_TOKENS = 16
COPY_BYTES = {True: 1 << 30, False: 1 << 26}
"""By whether it is CUDA."""
MEMORY_SHARE = 0.8


def achieved(name: str, device: str, context: int = CONTEXT_TOKENS) -> dict[str, Any]:
    """Bytes/s of a copy (read and written), and of decode steps (weights and KV, once each), from shapes to tokens."""
    here = target(device)
    copy_bytes_per_s = _copied(here)
    arch = Architecture.of(find_model(name))
    free = MEMORY_SHARE * here.free_bytes() - num_bytes(arch, 0, arch.num_layers)
    wanted = max(SEQUENCES) * -(-context // BLOCK_TOKENS)
    blocks = max(1, min(wanted, int(free / cache_bytes(arch, arch.num_layers, 0, BLOCK_TOKENS))))
    steps = MeasuredSteps(device=str(here.torch_device), kv_blocks=blocks, block_size=BLOCK_TOKENS)
    stage = MeasuredStage(steps, arch, 0, arch.num_layers)
    weights = stage.stage.decoder.weights
    embedding = 0 if arch.tied or weights.embedding is None else weights.embedding.nbytes
    read = sum({id(tensor): tensor.nbytes for tensor in tensors_of(weights)}.values()) - embedding
    token_bytes = 2 * arch.num_layers * arch.kv_width * arch.torch_dtype.itemsize
    rows = []
    for count in SEQUENCES:
        step_s = median(stage.seconds(Work((), count, count * context)) for _ in range(REPEATS))
        bytes_per_s = (read + count * context * token_bytes) / step_s
        share = bytes_per_s / copy_bytes_per_s
        rows.append({"sequences": count, "context": context, "step_s": step_s, "bytes_per_s": bytes_per_s,
                     "share_of_copy": share})  # fmt: skip
    return {"model": name, "device": device, "kv_blocks": blocks, "copy_bytes_per_s": copy_bytes_per_s, "steps": rows}


def _copied(here: Target) -> float:
    source, sink = (torch.zeros(COPY_BYTES[here.cuda], dtype=torch.uint8, device=here.torch_device) for _ in range(2))
    return 2 * source.nbytes / median(timed(Runs(lambda _: sink.copy_(source)), here, 1.0))


def main(
    model: Annotated[str, typer.Option(help="catalogue name or config.json of a dense model")] = "llama-3.1-8b",
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu")] = "cuda",
    context: Annotated[int, typer.Option(min=1, help="tokens of each sequence")] = CONTEXT_TOKENS,
) -> None:
    """Print one JSON object: bytes/s of a copy and of decode steps of 1 and 64 sequences."""
    print(json.dumps(achieved(model, device, context), indent=2))


if __name__ == "__main__":
    typer.run(main)
