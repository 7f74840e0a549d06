"""Checkpoints as quantization tools write them: bytes by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sim import ConfigError
from sim.model import ModelSpec

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
"""Parameters: q and o, k and v, the MLP, two norms."""
ATTENTION = 2 * 4096 * 4096 + 2 * 4096 * 1024
OUTER = 2 * 128256 * 4096 + 4096
"""Embedding, head and the last norm, at 16 bits."""
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128}
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16}


def of(quantization: dict[str, Any]) -> ModelSpec:
    return ModelSpec.from_config({**LLAMA, "quantization_config": quantization})


def bytes_of(layer_bytes: float, kept: int = 0) -> int:
    return round(32 * ((LAYER - kept) * layer_bytes + 2 * kept)) + 2 * OUTER


CASES: list[tuple[dict[str, Any], float]] = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, (4 + 20 / 128) / 8),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, (4 + 20 / 128) / 8),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": INT4}}}, (4 + 16 / 128) / 8),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {**INT4, "symmetric": False}}}},
     (4 + 20 / 128) / 8),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": NVFP4}}}, 0.5625),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, 0.5625),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
     (4 + 8 / 64 + 32 / 16384) / 8),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5625),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1.0),
    ({"quant_method": "mxfp4"}, 0.53125),
]  # fmt: skip


@pytest.mark.parametrize(("quantization", "layer_bytes"), CASES)
def test_bytes_per_parameter_by_hand(quantization: dict[str, Any], layer_bytes: float) -> None:
    model = of(quantization)
    assert model.weight_bytes_per_param == pytest.approx(layer_bytes, rel=1e-12)
    assert model.weight_bytes(0, 32) == pytest.approx(bytes_of(layer_bytes), abs=1)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "compressed-tensors",
         "config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8}}}},
    ],
)  # fmt: skip
def test_eight_bit_floats_run_the_gemms(quantization: dict[str, Any]) -> None:
    model = of(quantization)
    assert (model.dtype, model.weight_bytes(0, 32)) == ("float8", bytes_of(1.0))


@pytest.mark.parametrize(
    "ignore",
    [
        ["lm_head", *[f"model.layers.{n}.self_attn.{m}_proj" for n in range(32) for m in "qkvo"]],
        ["model.layers.*.self_attn*", "lm_head"],
        [r"re:.*self_attn\..*"],
        ["self_attn"],
    ],
)
def test_modules_that_are_left_alone_keep_16_bits(ignore: list[str]) -> None:
    model = of({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignore})
    assert model.weight_bytes(0, 32) == pytest.approx(bytes_of(0.5625, ATTENTION), abs=1)
    assert model.weight_bytes(0, 16) + model.weight_bytes(16, 32) == pytest.approx(bytes_of(0.5625, ATTENTION), abs=2)


def test_model_opt_writes_a_file_beside(tmp_path: Path) -> None:
    """FP8 with an FP8 cache: 1 byte a weight, half the KV of 16 bits."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    plain = ModelSpec.from_config(tmp_path)
    beside = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    model = ModelSpec.from_config(tmp_path)
    assert model.weight_bytes(0, 32) == bytes_of(1.0)
    assert model.kv_bytes_per_token() * 2 == plain.kv_bytes_per_token()


@pytest.mark.parametrize(
    ("quantization", "complaint"),
    [
        ({"quant_method": "torchao"}, "quant_method: 'torchao' is not known"),
        ({"quant_method": "modelopt", "quant_algo": "FP3"}, "quant_algo: 'FP3' is not known"),
        ({"quant_method": "gptq"}, "bits is missing"),
        ({"quant_method": "gptq", "bits": "four"}, "bits: 'four' must be a whole number"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 groups"),
        ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "must be a list of module names"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP4"}, "kv_cache_quant_algo"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(quantization: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        of(quantization)
