"""The weights of a range of layers: drawn from a seed, or read from local safetensors files.

Drawn weights depend on the seed and the layer alone, so that every process that holds a layer holds the same one, and
every rank of several its part of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate.execute.model.architecture import Architecture
from calibrate.execute.model.shard import Shard
from sim.types import ConfigError

_SAFE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer; projections that read the same input are one matrix. ``[out, in]``, experts ``[expert, out, in]``."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    router: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Layers ``first <= layer < end``; the embedding with the first, the final norm and the head with the last."""

    layers: tuple[Layer, ...]
    embedding: Tensor | None
    final_norm: Tensor | None
    head: Tensor | None


WHOLE = Shard()
Shape = tuple[int, ...]
Make = Callable[[str, Shape], Tensor]
"""Makes (or reads) the tensor of that name; several Hugging Face names stand for their concatenation, with ``+``."""


def build(arch: Architecture, first: int, end: int, make: Make, shard: Shard = WHOLE) -> Weights:
    """A shard of all tensors of the layers, each whole from ``make``. ``arch``: of the whole model."""
    first_stage, last_stage = first == 0, end == arch.num_layers
    table = (arch.vocab_size, arch.hidden_size)
    embedding = make("model.embed_tokens.weight", table) if first_stage or (last_stage and arch.tied) else None
    embedding = shard.cut("embedding", embedding, arch)
    own_head = make("lm_head.weight", table) if last_stage and not arch.tied else None
    head = (embedding if arch.tied else shard.cut("head", own_head, arch)) if last_stage else None
    return Weights(
        layers=tuple(_layer(arch, number, make, shard) for number in range(first, end)),
        embedding=embedding if first_stage else None,
        final_norm=make("model.norm.weight", (arch.hidden_size,)) if last_stage else None,
        head=head,
    )


def _layer(arch: Architecture, number: int, make: Make, shard: Shard) -> Layer:
    at = f"model.layers.{number}"
    hidden, inner, width = arch.hidden_size, arch.intermediate_size, arch.num_heads * arch.head_dim
    qkv = width + 2 * arch.kv_width
    attn = f"{at}.self_attn"
    three = f"{attn}.q_proj.{{0}}+{attn}.k_proj.{{0}}+{attn}.v_proj.{{0}}"
    two = f"{at}.mlp.gate_proj.{{0}}+{at}.mlp.up_proj.{{0}}"
    tensors: dict[str, tuple[str, Shape]] = {
        "input_norm": (f"{at}.input_layernorm.weight", (hidden,)),
        "qkv": (three.format("weight"), (qkv, hidden)),
        "o": (f"{attn}.o_proj.weight", (hidden, width)),
        "mlp_norm": (f"{at}.post_attention_layernorm.weight", (hidden,)),
    }
    if arch.qkv_bias:
        tensors["qkv_bias"] = (three.format("bias"), (qkv,))
    if arch.o_bias:
        tensors["o_bias"] = (f"{attn}.o_proj.bias", (hidden,))
    if arch.qk_norm:
        tensors["q_norm"] = (f"{attn}.q_norm.weight", (arch.head_dim,))
        tensors["k_norm"] = (f"{attn}.k_norm.weight", (arch.head_dim,))
    if arch.num_experts is not None and number >= arch.first_dense_layers:
        tensors["router"] = (f"{at}.mlp.gate.weight", (arch.num_experts, hidden))
        tensors["gate_up"] = (f"{at}.mlp.experts.*.gate_proj+up_proj", (arch.num_experts, 2 * inner, hidden))
        tensors["down"] = (f"{at}.mlp.experts.*.down_proj", (arch.num_experts, hidden, inner))
    else:
        tensors["gate_up"] = (two.format("weight"), (2 * inner, hidden))
        tensors["down"] = (f"{at}.mlp.down_proj.weight", (hidden, inner))
        if arch.mlp_bias:
            tensors["gate_up_bias"] = (two.format("bias"), (2 * inner,))
            tensors["down_bias"] = (f"{at}.mlp.down_proj.bias", (hidden,))
    return Layer(**{field: shard.cut(field, make(*what), arch) for field, what in tensors.items()})  # type: ignore[arg-type]


def num_bytes(arch: Architecture, first: int, end: int, shard: Shard = WHOLE) -> int:
    """Of the weights that ``build`` would make."""

    def make(_: str, shape: Shape) -> Tensor:
        return torch.empty(shape, dtype=arch.torch_dtype, device="meta")

    found = {id(tensor): tensor.nbytes for tensor in tensors_of(build(arch, first, end, make, shard))}
    return sum(found.values())


def drawn(arch: Architecture, first: int, end: int, *, seed: int, device: str, shard: Shard = WHOLE) -> Weights:
    """Random weights that keep activations near one: variance 1 / inputs; norms are ones and biases small."""
    generator = torch.Generator(device)

    def make(name: str, shape: Shape) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=arch.torch_dtype, device=device)
        words = np.random.SeedSequence([seed, *name.encode()]).generate_state(2)
        generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
        out = torch.empty(shape, dtype=arch.torch_dtype, device=device)
        return out.normal_(0.0, spread, generator=generator)

    return build(arch, first, end, make, shard)


def loaded(
    arch: Architecture, first: int, end: int, *, folder: str | Path, device: str, shard: Shard = WHOLE
) -> Weights:
    """Weights from the folder's ``*.safetensors``; ``ConfigError`` names a tensor that is missing or misshapen."""
    tensors = SafeTensors(folder)

    def make(name: str, shape: Shape) -> Tensor:
        found = _experts(tensors, name) if ".experts.*." in name else _joined(tensors, name)
        if tuple(found.shape) != shape:
            raise ConfigError(f"{folder}: {name}: has the shape {tuple(found.shape)}; the configuration wants {shape}")
        return found.to(device=device, dtype=arch.torch_dtype)

    return build(arch, first, end, make, shard)


def _joined(tensors: SafeTensors, name: str) -> Tensor:
    parts = [tensors.read(part) for part in name.split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _experts(tensors: SafeTensors, name: str) -> Tensor:
    """All experts of a layer: stored as one tensor, or one by one."""
    at, _, which = name.partition(".experts.*.")
    whole = f"{at}.experts.{'gate_up_proj' if '+' in which else which}"
    if whole in tensors.names:
        return tensors.read(whole)
    one_by_one: list[Tensor] = []
    while f"{at}.experts.{len(one_by_one)}.down_proj.weight" in tensors.names:
        each = [f"{at}.experts.{len(one_by_one)}.{part}.weight" for part in which.split("+")]
        one_by_one.append(torch.cat([tensors.read(part) for part in each]))
    if not one_by_one:
        raise ConfigError(f"{tensors.folder}: {whole}: is missing")
    return torch.stack(one_by_one)


class SafeTensors:
    """The tensors of every ``*.safetensors`` in a folder (format: huggingface/safetensors, README, "Format")."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.names: dict[str, tuple[Path, str, Shape, int, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)
        if not self.names:
            raise ConfigError(f"{folder}: holds no *.safetensors file; give the folder of a downloaded model")

    def _index(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER_BYTES):
                raise ConfigError(f"{path}: header length: {length} is not possible in {size} bytes; fetch it again")
            try:
                header = json.loads(file.read(length))
                entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
                for name, entry in entries.items():
                    start, end = (8 + length + offset for offset in entry["data_offsets"])
                    self.names[name] = (path, entry["dtype"], tuple(entry["shape"]), start, end)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{path}: header: {error!r}; it is not a safetensors file") from None
        for name, (where, dtype, shape, start, end) in self.names.items():
            if where == path:
                _check_entry(path, name, dtype, shape, end - start, end <= size)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in the dtype it is stored in."""
        if name not in self.names:
            raise ConfigError(f"{self.folder}: {name}: is missing")
        path, dtype, shape, start, end = self.names[name]
        raw = np.fromfile(path, dtype=np.uint8, offset=start, count=end - start)
        return torch.from_numpy(raw).view(_SAFE_DTYPES[dtype]).view(shape)


def _check_entry(path: Path, name: str, dtype: str, shape: Shape, size: int, inside: bool) -> None:
    if dtype not in _SAFE_DTYPES:
        raise ConfigError(f"{path}: {name}: dtype {dtype!r} is not executed; known: {', '.join(_SAFE_DTYPES)}")
    if not inside or size != prod(shape) * _SAFE_DTYPES[dtype].itemsize:
        raise ConfigError(f"{path}: {name}: {size} bytes do not hold {dtype} {list(shape)}; fetch the file again")


# ---------------------------------------------------------------- memory


def free_bytes(device: str) -> int:
    """Memory that can be allocated on the device now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines: Mapping[str, Any] = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def check_memory(what: str, needed_bytes: int, device: str) -> None:
    """Raise ``ConfigError`` that says how much is missing, before anything is allocated."""
    free = free_bytes(device)
    if needed_bytes > free:
        raise ConfigError(
            f"{what}: needs {needed_bytes / 1e9:.2f} GB on {device}; {(needed_bytes - free) / 1e9:.2f} GB are missing; "
            "use a smaller model, fewer KV blocks (num_kv_blocks) or a larger device"
        )


def tensors_of(weights: Weights) -> list[Tensor]:
    """Every tensor, for counting and comparing."""
    outer = [tensor for tensor in (weights.embedding, weights.final_norm, weights.head) if tensor is not None]
    inner = [getattr(layer, field.name) for layer in weights.layers for field in fields(Layer)]
    return outer + [tensor for tensor in inner if tensor is not None]
