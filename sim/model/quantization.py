"""How a checkpoint's weights are stored: the formats that quantization tools write, as bytes per parameter.

Every scale and zero that is stored is counted. Formats that are not known are refused by name, never taken for 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from sim.types import ConfigError

FILE = "hf_quant_config.json"
"""Beside config.json, where NVIDIA's ModelOpt says what config.json does not."""
Fields = dict[str, Any]
NF4_BLOCK, NF4_SUPERBLOCK = 64, 256
"""bitsandbytes: weights that share a scale, and scales that share a second one when they are quantized too."""
MXFP4_BLOCK = 32
METHODS = (
    "fp8", "fbgemm_fp8", "modelopt", "bitsandbytes", "awq", "gptq", "gptq_marlin", "awq_marlin", "compressed-tensors",
    "mxfp4", "torchao (refused)",
)  # fmt: skip


def of_config(config: Mapping[str, Any], place: str) -> Fields:
    """The fields of a ``ModelSpec`` that a ``quantization_config`` decides. ``ConfigError`` names what is not known."""
    method = str(config.get("quant_method") or "")
    ignored = _patterns(config, place)
    if method in ("fp8", "fbgemm_fp8"):
        return {"dtype": "float8", **ignored}
    if method == "modelopt" or (not method and config.get("quant_algo")):
        return _modelopt(config, place) | _kv_scheme(config, place) | ignored
    if method == "bitsandbytes":
        return {"weight_bytes_per_param": _bitsandbytes(config), **ignored}
    if method in ("awq", "awq_marlin"):
        return {"weight_bytes_per_param": _grouped(_bits(config, place), _group(config), zeros=True), **ignored}
    if method in ("gptq", "gptq_marlin"):  # it packs zeros, symmetric or not
        return {"weight_bytes_per_param": _grouped(_bits(config, place), _group(config), zeros=True), **ignored}
    if method == "mxfp4":
        return {"weight_bytes_per_param": (4 + 8 / MXFP4_BLOCK) / 8, **ignored}
    if method == "compressed-tensors":
        return _compressed(config, place) | _kv_scheme(config, place) | ignored
    raise ConfigError(f"{place}: quant_method: {method or '(none)'!r} is not known; known: {', '.join(METHODS[:-1])}")


def of_modelopt(config: Mapping[str, Any], place: str) -> Fields:
    """What ``hf_quant_config.json`` says."""
    inner = config.get("quantization")
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{place}: quantization is missing; ModelOpt writes quant_algo there")
    return _modelopt(inner, place) | _kv_algorithm(inner, place) | _patterns(inner, place)


# ---------------------------------------------------------------- formats


def _modelopt(config: Mapping[str, Any], place: str) -> Fields:
    algorithm = str(config.get("quant_algo") or "").upper()
    group = config.get("group_size")
    if algorithm in ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"):
        return {"dtype": "float8"}
    if algorithm == "NVFP4":
        return {"weight_bytes_per_param": (4 + 8 / _whole(group or 16, "group_size", place)) / 8}
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
        return {"weight_bytes_per_param": _grouped(4, _whole(group or 128, "group_size", place), zeros=False)}
    if algorithm in ("W8A8_SQ_PER_CHANNEL", "INT8_SQ", "W8A16"):
        return {"dtype": "int8"} if algorithm != "W8A16" else {"weight_bytes_per_param": 1.0}
    known = "FP8, FP8_PB_WO, NVFP4, W4A16_AWQ, W4A8_AWQ, W8A8_SQ_PER_CHANNEL, W8A16"
    raise ConfigError(f"{place}: quant_algo: {algorithm or '(none)'!r} is not known; known: {known}")


def _bitsandbytes(config: Mapping[str, Any]) -> float:
    """nf4 and fp4: a float32 scale a block; with double quantization 8 bits, and a float32 for 256 of those."""
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        return 1.0
    if config.get("bnb_4bit_use_double_quant"):
        return (4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * NF4_SUPERBLOCK)) / 8
    return (4 + 32 / NF4_BLOCK) / 8


def _compressed(config: Mapping[str, Any], place: str) -> Fields:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        count = len(groups) if isinstance(groups, Mapping) else 0
        raise ConfigError(f"{place}: config_groups: {count} groups are not supported; it must be one, for all modules")
    ((name, group),) = groups.items()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{place}: config_groups.{name}.weights is missing")
    inside = f"{place}: config_groups.{name}.weights"
    bits, kind = _bits(weights, inside), str(weights.get("type", "int"))
    if bits == 8 and group.get("input_activations"):
        return {"dtype": "float8" if kind == "float" else "int8"}
    size = _group(weights)
    if kind == "float" and bits == 4:
        scale_bits = 8  # an FP8 scale (NVFP4), or a power of two (MXFP4)
        return {"weight_bytes_per_param": (bits + scale_bits / (size if size > 0 else 16)) / 8}
    return {"weight_bytes_per_param": _grouped(bits, size, zeros=weights.get("symmetric") is False)}


def _grouped(bits: int, group_size: int, *, zeros: bool) -> float:
    """A 16-bit scale for every group, and a zero of ``bits``."""
    per_group = (16 + bits * zeros) / group_size if group_size > 0 else 0.0
    return (bits + per_group) / 8


def _kv_scheme(config: Mapping[str, Any], place: str) -> Fields:
    scheme = config.get("kv_cache_scheme")
    if scheme is None:
        return _kv_algorithm(config, place)
    if not isinstance(scheme, Mapping) or scheme.get("num_bits") != 8:
        raise ConfigError(f"{place}: kv_cache_scheme: {scheme!r} is not supported; it must have num_bits 8")
    return {"kv_dtype": "float8" if scheme.get("type", "float") == "float" else "int8"}


def _kv_algorithm(config: Mapping[str, Any], place: str) -> Fields:
    algorithm = config.get("kv_cache_quant_algo")
    if algorithm in (None, "", "NONE"):
        return {}
    if str(algorithm).upper() not in ("FP8", "INT8"):
        raise ConfigError(f"{place}: kv_cache_quant_algo: {algorithm!r} is not supported; known: FP8, INT8")
    return {"kv_dtype": {"FP8": "float8", "INT8": "int8"}[str(algorithm).upper()]}


def _bits(config: Mapping[str, Any], place: str) -> int:
    for name in ("bits", "w_bit", "num_bits"):
        if config.get(name) is not None:
            return _whole(config[name], name, place)
    raise ConfigError(f"{place}: bits is missing")


def _group(config: Mapping[str, Any]) -> int:
    found = next((config[name] for name in ("group_size", "q_group_size") if config.get(name) is not None), -1)
    return found if isinstance(found, int) and not isinstance(found, bool) else -1


def _whole(value: Any, name: str, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise ConfigError(f"{place}: {name}: {value!r} must be a whole number >= 1")
    return value


# ---------------------------------------------------------------- what stays as it is


def _patterns(config: Mapping[str, Any], place: str) -> Fields:
    """Modules that are left alone, under the names that the tools give the list."""
    found: list[str] = []
    names = ("ignore", "exclude_modules", "modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers")
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if (
            isinstance(value, str)
            or not isinstance(value, Sequence)
            or not all(isinstance(item, str) for item in value)
        ):
            raise ConfigError(f"{place}: {name}: {value!r} must be a list of module names")
        found += value
    kept = tuple(dict.fromkeys(pattern for pattern in found if pattern not in ("lm_head", "embed_tokens")))
    return {"unquantized": kept} if kept else {}


def matcher(pattern: str) -> Callable[[str], object]:
    """Whether a module (``model.layers.3.mlp.gate``) is meant: ``re:`` and ``*`` patterns, or a part of its name."""
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:]).match
        except re.error:
            raise ConfigError(f"quantization: the pattern {pattern!r} is no regular expression") from None
    if "*" in pattern:
        return lambda path: fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")
    return lambda path: f".{pattern}." in f".{path}."
