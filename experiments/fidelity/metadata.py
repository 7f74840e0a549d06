"""What a run's metadata says of its engine and machine, and what vLLM's defaults say where it is silent.

``read_facts(meta)`` takes the ``meta.json`` of an LLMServingSim run (vLLM's resolved configuration) or any mapping with
vLLM's names at its top level. Every default that is used is listed in ``Facts.assumed``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sim import Limits
from sim.cluster import Gpu, gpu, gpu_called
from sim.cluster.names import called, match, words
from sim.memory import UNSEEN_BYTES
from sim.model import model
from sim.systems.schedulers.releases import Release, release
from sim.types import ConfigError

PLACES = (
    "resolved_config.scheduler_config", "resolved_config.cache_config", "resolved_config.parallel_config",
    "resolved_config.model_config", "kv_cache", "engine_kwargs", "hardware", "",
)  # fmt: skip
"""Where a setting may stand, the most reliable first."""
UNLISTED = (
    (
        called("H100-NVL", "h100 nvl", "94gb hbm3"),
        "H100-PCIe",
        95830,
        3938,
        {"float32": 60, "float16": 835.5, "float8": 1671},
    ),
    (
        called("RTX-5090", "5090", "rtx 32gb"),
        "RTX-PRO-6000",
        32607,
        1792,
        {"float32": 104.8, "float16": 209.5, "float8": 419},
    ),
    (
        called("RTX-6000-Ada", "6000 ada", "rtx generation 48gb"),
        "L40S",
        49140,
        960,
        {"float32": 91.1, "float16": 364.2, "float8": 728.5},
    ),
    (called("A10", "a10", "24gb pcie"), "A10G", 23028, 600, {"float32": 31.2, "float16": 125}),
)
"""GPUs that the catalogue lacks: ours and the words of CUDA's name, the type whose links they have, MiB, GB/s, dense
TFLOP/s with float32 accumulation (data sheets: H100 NVL 2023 and A10 2021, with sparsity halved; architecture papers:
RTX Blackwell 2025, Ada 2022)."""
SUFFIXES = re.compile(r"(-(instruct|chat|hf|base|it|\d{4}|fp8|fp8-dynamic|fp8-kv|v0\.1))+$")
SAME_SHAPE = {
    "llama-3-8b": "llama-3.1-8b", "llama-3-70b": "llama-3.1-70b", "llama-3.3-70b": "llama-3.1-70b",
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b", "deepseek-r1-distill-llama-70b": "llama-3.1-70b",
    "deepseek-r1-distill-qwen-7b": "qwen2.5-7b", "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b", "mistral-7b-instruct-v0.3": "mistral-7b-v0.3",
    "mistral-small-24b-instruct": "mistral-small-24b", "mistral-small-24b-base": "mistral-small-24b",
    "qwen3-4b-instruct": "qwen3-4b", "qwen3-coder-30b-a3b": "qwen3-30b-a3b", "qwq-32b": "qwen2.5-32b",
}  # fmt: skip
LATEST = (0, 19)
"""Release whose defaults are taken where none is named: the one that the kernel tables are of."""
MEMORY_TOLERANCE = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """An engine as it ran. ``assumed``: what the metadata did not say, and what was taken for it."""

    model: str
    dtype: str | None
    kv_dtype: str | None
    gpu: Gpu
    tp: int
    pp: int
    replicas: int
    version: tuple[int, ...]
    limits: Limits
    chunked_prefill: bool
    long_prefill_token_threshold: int
    reserve_full_prompt: bool
    assumed: tuple[str, ...]
    unmodelled: tuple[str, ...] = ()
    """Settings that change times and that no prediction knows: each with what is taken in its place."""


class _Meta:
    """Looks settings up, and notes those that were not found."""

    def __init__(self, meta: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.parts = [_part(meta, place) for place in PLACES]
        self.assumed: list[str] = []

    def get(self, *names: str) -> Any:
        """The first value that is stated under any of these names, else None."""
        stated = (part.get(name) for part in self.parts for name in names)
        return next((value for value in stated if value is not None), None)

    def integer(self, name: str, default: int) -> int:
        value = self._stated(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{self.where}: {name} is {value!r}; it must be a whole number >= 0")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._stated(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name} is {value!r}; it must be true or false")
        return value

    def share(self, name: str, default: float) -> float:
        value = self._stated(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigError(f"{self.where}: {name} is {value!r}; it must be a share, above 0 and at most 1")
        return float(value)

    def _stated(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            self.assumed.append(f"{name} {default}")
            return default
        return value


def _part(meta: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    for name in place.split(".") if place else ():
        inner = meta.get(name)
        meta = inner if isinstance(inner, Mapping) else {}
    return meta


def read_facts(meta: Mapping[str, Any], where: str = "metadata") -> Facts:
    """``where`` is the file named in errors. ``ConfigError`` if model or GPU are missing or unknown.

    Defaults are those of the release (``sim.systems.schedulers.releases``). CUDA graphs take no setting here: the
    kernels' times are those in graphs, and their memory is part of ``sim.memory``.
    """
    look = _Meta(meta, where)
    version = _version(look)
    device = _device(look)
    name = _model(look)
    tp, pp = look.integer("tensor_parallel_size", 1), look.integer("pipeline_parallel_size", 1)
    blocks, longest = look.get("num_gpu_blocks"), look.get("max_model_len")
    if blocks is None:
        look.assumed.append("num_gpu_blocks: what follows from the memory")
    known_longest = longest or model(name).max_position_embeddings
    known = release(version)
    chunked = look.flag("enable_chunked_prefill", known.chunked_prefill(known_longest))
    offline = "llm" in str(look.get("usage_context") or "").lower()
    if look.get("enforce_eager") is True:
        look.assumed.append("steps in CUDA graphs, though enforce_eager is on: launches of small steps are missing")
    sequences, tokens = known.batch(device, offline=offline)
    if not chunked:
        tokens = max(tokens, known_longest)
    limits = Limits(
        max_num_seqs=look.integer("max_num_seqs", sequences),
        max_num_batched_tokens=look.integer("max_num_batched_tokens", tokens),
        max_model_len=longest,
        release=version,
        block_size=look.integer("block_size", 16),
        num_kv_blocks=blocks,
        gpu_memory_utilization=look.share("gpu_memory_utilization", known.gpu_memory_utilization),
        prefix_caching=look.flag("enable_prefix_caching", known.prefix_caching),
        async_scheduling=look.flag("async_scheduling", _asynchronous(look, known, pp)),
    )
    return Facts(
        model=name,
        dtype=_dtype(look),
        kv_dtype=_kv_dtype(look),
        gpu=device,
        tp=tp,
        pp=pp,
        replicas=look.integer("data_parallel_size", 1),
        version=version,
        limits=limits,
        chunked_prefill=chunked,
        long_prefill_token_threshold=look.integer("long_prefill_token_threshold", 0),
        reserve_full_prompt=look.flag("scheduler_reserve_full_isl", known.reserve_full_prompt),
        assumed=tuple(look.assumed),
        unmodelled=tuple(_unmodelled(look, name)),
    )


UNMODELLED: Mapping[str, tuple[Any, str]] = {
    "enable_expert_parallel": (False, "experts are taken as cut like any MLP, not divided among the GPUs"),
    "enable_eplb": (False, "experts get equal shares of the tokens, and none is replicated"),
    "speculative_config": (None, "every step gives one token a sequence"),
    "decode_context_parallel_size": (1, "a sequence's KV is not divided among the GPUs"),
    "prefill_context_parallel_size": (1, "a prompt is not divided among the GPUs"),
    "cpu_offload_gb": (0, "all weights are taken to be on the GPU"),
    "kv_offloading_size": (None, "KV that leaves the GPU is lost"),
    "enable_lora": (False, "adapters cost nothing"),
    "enable_dbo": (False, "collectives and kernels do not overlap"),
    "ubatch_size": (0, "collectives and kernels do not overlap"),
}
"""Of vLLM's settings those that change times and are not modelled: the value that leaves them out, and what is done."""


def _unmodelled(look: _Meta, name: str) -> Iterator[str]:
    for setting, (off, instead) in UNMODELLED.items():
        value = look.get(setting)
        if value not in (None, off, False, 0):
            yield f"{setting} {value if isinstance(value, int | float | str) else 'is on'}: {instead}"
    ranks = look.get("data_parallel_size")
    if isinstance(ranks, int) and ranks > 1 and model(name).num_experts is not None:
        yield (
            f"data_parallel_size {ranks}: taken as independent replicas, each with all experts; the engine runs the "
            "ranks in lockstep, with dummy batches"
        )


def _asynchronous(look: _Meta, known: Release, pp: int) -> bool:
    """The release's default, but not with speculation by other than EAGLE and MTP (release notes of 0.14.0)."""
    speculation = look.get("speculative_config")
    method = speculation.get("method") if isinstance(speculation, Mapping) else speculation
    plain = method is None or "eagle" in str(method).lower() or "mtp" in str(method).lower()
    return plain and known.async_scheduling(pp)


def _version(look: _Meta) -> tuple[int, ...]:
    text = look.get("vllm_version")
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", str(text))
    if found is None:
        look.assumed.append(f"vllm_version {LATEST[0]}.{LATEST[1]}")
        return LATEST
    return tuple(int(part or 0) for part in found.groups())


def _device(look: _Meta) -> Gpu:
    name = look.get("device_name", "gpu")
    if name is None:
        raise ConfigError(f"{look.where}: device_name (or gpu) is missing; state the GPU, such as RTX-4090")
    device = _unlisted(str(name))
    if device is None:
        device = gpu(gpu_called(str(name)))
        if device.name.endswith("-SXM") and not {"sxm", "hbm3", "hbm3e", "hbm2e", "hbm2"} & set(words(str(name))):
            look.assumed.append(f"gpu: {name!r} is the {device.name}")
    seen_bytes = look.get("device_total_memory_bytes")
    if seen_bytes is None:
        return device
    if abs(seen_bytes / device.memory_bytes - 1) > MEMORY_TOLERANCE:
        look.assumed.append(f"rates of the {device.name}, which has other memory than the {seen_bytes / 2**30:.0f} GiB")
    return replace(device, memory_bytes=seen_bytes + round(UNSEEN_BYTES))


def _unlisted(text: str) -> Gpu | None:
    listed = next((entry for entry in UNLISTED if entry[0].must <= set(words(text))), None)
    if listed is None or match(text, [listed[0]]) is None:
        return None
    known, like, memory_mib, gb_per_s, tflops = listed
    flops = {dtype: rate * 1e12 for dtype, rate in {**tflops, "bfloat16": tflops["float16"]}.items()}
    return replace(
        gpu(like),
        name=known.name,
        memory_bytes=memory_mib * 2**20,
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        flops=flops,
    )


def _model(look: _Meta) -> str:
    name = look.get("model", "model_id", "model_name")
    if name is None:
        raise ConfigError(f"{look.where}: model is missing; state it, such as meta-llama/Llama-3.1-8B")
    text = str(name)
    if text.endswith(".json"):
        return text
    short = SUFFIXES.sub("", text.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-"))
    return SAME_SHAPE.get(short, short)


def _dtype(look: _Meta) -> str | None:
    """Of the weights: what a checkpoint's name or the configuration says; None: the model's own."""
    quantization = look.get("quantization")
    name = str(look.get("model", "model_id", "model_name")).lower()
    if "fp8" in str(quantization) or re.search(r"-fp8\b", name):
        return "float8"
    if quantization is not None:
        raise ConfigError(f"{look.where}: quantization is {quantization!r}; known: fp8, or none")
    text = str(look.get("dtype") or "auto").removeprefix("torch.")
    return None if text == "auto" else {"half": "float16", "float": "float32"}.get(text, text)


def _kv_dtype(look: _Meta) -> str | None:
    """None: as wide as the activations."""
    text = str(look.get("cache_dtype", "kv_cache_dtype") or "auto")
    if text in ("auto", "float16", "bfloat16"):
        return None
    if text not in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        raise ConfigError(f"{look.where}: kv_cache_dtype is {text!r}; known: auto, fp8, fp8_e4m3, fp8_e5m2")
    return "float8"
