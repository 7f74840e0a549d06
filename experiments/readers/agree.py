"""Whether a result is of what the scenario describes: its model, GPU, tensor parallelism, request rate, clients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from sim.cluster import gpu_called
from sim.types import ConfigError

SUFFIXES = {
    "instruct", "it", "chat", "hf", "base", "fp8", "bf16", "fp16", "nvfp4", "fp4", "int8", "int4", "awq", "gptq",
    "w8a8", "w4a16", "dynamic", "quantized", "meta", "v0", "preview", "kv", "bnb", "4bit", "8bit", "gguf",
}  # fmt: skip
SIZE = re.compile(r"\d+(?:\.\d+)?[bm]|\d+x\d+b|a\d+b")
SAME_RATE = 0.05


def contradictions(
    facts: Mapping[str, Any], *, model: str, gpus: Sequence[str], tps: Sequence[int]
) -> Iterator[tuple[str, bool]]:
    """(what the file says otherwise, whether that makes the comparison void)."""
    said = facts.get("model")
    if isinstance(said, str) and (void := _other_model(said, model)) is not None:
        yield f"the result is of model {said!r}, the scenario of {model!r}", void
    gpu = facts.get("gpu")
    if isinstance(gpu, str) and gpus and (other := _other_gpu(gpu, gpus)):
        yield f"the result is of GPU {gpu!r}, the scenario of {', '.join(gpus)}", other == "known"
    tp = facts.get("tp")
    if isinstance(tp, int) and tps and tp not in tps:
        yield f"the result is of tensor parallelism {tp}, the scenario of {', '.join(map(str, tps))}", True


def load_remarks(facts: Mapping[str, Any], *, rate: float | None, clients: int | None) -> Iterator[str]:
    """What of the load differs where the scenario's own requests are simulated."""
    limit = facts.get("max_concurrency")
    if isinstance(limit, int) and clients != limit:
        ours = "the scenario's requests wait for nobody" if clients is None else f"the scenario has {clients} clients"
        yield f"the result's requests were limited to {limit} at a time; {ours} (workload.closed_loop)"
    try:
        asked = float(facts.get("request_rate", "nan"))
    except (TypeError, ValueError):
        return
    if rate is not None and asked > 0 and (not isfinite(asked) or abs(rate / asked - 1) > SAME_RATE):
        yield f"the result was asked at {asked:g} requests/s, the scenario at {rate:g} (workload.rate)"


def _other_model(said: str, ours: str) -> bool | None:
    """None if the names may be those of one model; else whether their sizes or families leave no doubt."""
    theirs, mine = (_words(name) for name in (said, ours))
    if theirs <= mine or mine <= theirs or not theirs or not mine:
        return None
    sizes = [{word for word in words if SIZE.fullmatch(word)} for words in (theirs, mine)]
    if all(sizes) and not sizes[0] & sizes[1]:
        return True
    return False if not (theirs & mine) or sizes[0] == sizes[1] or not all(sizes) else None


def _words(name: str) -> set[str]:
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return set(re.findall(r"\d+(?:\.\d+)?[a-z]*|[a-z]+\d*(?=\D|$)|[a-z]+", last)) - SUFFIXES


def _other_gpu(said: str, ours: Sequence[str]) -> str | None:
    """None if it is one of ours; else whether it is ``known`` to be another, or of a name that says nothing."""
    try:
        return None if gpu_called(said) in ours else "known"
    except ConfigError:
        return "unknown"
