"""Models: parameters, KV bytes and FLOPs against published figures."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.model import Gemm, ModelSpec, model, models
from sim.types import ConfigError

GIB = 2**30

TINY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}
"""Per layer: qkv (8 + 2 + 2) * 8 * 64 = 6144, o 4096, gate and up 12288, down 6144, norms 128: 28800."""


def tiny(**changes: Any) -> ModelSpec:
    return ModelSpec.from_config(TINY | changes, name="tiny")


def test_a_model_from_the_catalogue() -> None:
    spec = model("llama-2-70b")

    assert spec.params == 68_976_648_192
    assert spec.kv_bytes_per_token() == 327_680
    assert spec.weight_bytes(0, 80) == 2 * spec.params


# ---------------------------------------------------------------- parameters

PUBLISHED = {
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "bloom-176b": 176_247_271_424,
    "falcon-180b": 179_522_565_120,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "yi-34b": 34_388_917_248,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-small-24b": 23_572_403_200,
    "phi-4": 14_659_507_200,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
}
"""Totals on the model cards (Hugging Face, 2022-2025), tied embeddings counted once; BLOOM's also in its model card's
text."""

NOMINAL = {"opt-66b": 65.7e9, "opt-175b": 175e9, "gpt-3": 175e9}
"""OPT: arXiv 2205.01068, and 65.7B on the 66B card. GPT-3: arXiv 2005.14165."""


@pytest.mark.parametrize(("name", "params"), PUBLISHED.items())
def test_parameters_match_the_model_card_exactly(name: str, params: int) -> None:
    assert model(name).params == params


@pytest.mark.parametrize(("name", "params"), NOMINAL.items())
def test_parameters_match_the_nominal_size(name: str, params: float) -> None:
    assert model(name).params == pytest.approx(params, rel=0.015)


def test_every_catalogue_model_is_checked_against_a_published_size() -> None:
    assert {spec.name for spec in models()} == set(PUBLISHED) | set(NOMINAL)


def test_bloom_has_its_published_embedding() -> None:
    assert model("bloom-176b").embedding_params == 3_596_615_680


@pytest.mark.parametrize(("name", "active"), [("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9)])
def test_active_parameters_of_mixtures(name: str, active: float) -> None:
    assert model(name).active_params == pytest.approx(active, rel=0.02)
    assert model("llama-2-7b").active_params == model("llama-2-7b").params


def test_layer_parameters_by_hand() -> None:
    spec = tiny()
    assert spec.layer_params == spec.active_layer_params == 28_800
    assert spec.params == 4 * 28_800 + 2 * 6_400 + 64
    assert spec.gemms() == (
        Gemm("qkv", 96, 64),
        Gemm("o", 64, 64),
        Gemm("gate_up", 192, 64),
        Gemm("down", 64, 96),
    )
    assert spec.gemms(tp=4)[0] == Gemm("qkv", (2 + 2 * 1) * 8, 64)


def test_deepseek_v3() -> None:
    """arXiv 2412.19437: 671B in all, 37B active; the KV cache holds 512 + 64 values a token and layer."""
    spec = ModelSpec.from_config(DEEPSEEK_V3, name="deepseek-v3")
    assert spec.params == pytest.approx(671e9, rel=0.001)
    assert spec.active_params == pytest.approx(37e9, rel=0.02)
    assert spec.kv_bytes_per_token_layer == spec.kv_bytes_per_token_layer_gpu(8) == 2 * 576
    assert spec.dtype == "float8"
    assert spec.weight_bytes(1, 2) == 18432 * 7168 * 3 + sum(gemm.n * gemm.k for gemm in spec.gemms()[:4]) + 16_384
    assert {gemm.name for gemm in spec.gemms()} >= {"qkv_a", "q_b", "kv_b", "router", "moe_down", "shared_down"}


DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


# ---------------------------------------------------------------- bytes


def test_vllm_table_1_kv_slots() -> None:
    """PagedAttention, SOSP 2023, table 1: tokens that fit into what is left for KV."""
    assert model("opt-13b").kv_bytes_per_token() == 819_200
    assert 12 * GIB // model("opt-13b").kv_bytes_per_token() == 15_728
    assert round(264 * GIB / model("opt-175b").kv_bytes_per_token()) == 60_075


def test_kv_bytes() -> None:
    assert model("llama-30b").kv_bytes_per_token() == 1_597_440
    assert model("llama-30b", dtype="bfloat16").kv_bytes_per_token() == 1_597_440
    assert model("llama-2-70b").kv_bytes_per_token(num_layers=20) == 81_920
    assert model("llama-2-70b", dtype="float8").kv_bytes_per_token() == 327_680
    assert tiny().kv_bytes_per_token_layer == 2 * 2 * 8 * 2


def test_key_value_heads_are_copied_beyond_their_number() -> None:
    spec = model("llama-2-70b")
    shares = [spec.kv_bytes_per_token_layer_gpu(tp) for tp in (1, 2, 4, 8, 16)]
    assert shares == [4096, 2048, 1024, 512, 512]


def test_stages_of_a_split_model() -> None:
    spec = model("llama-2-70b")
    assert spec.weight_bytes(0, 40) + spec.weight_bytes(40, 80) == spec.weight_bytes(0, 80)
    assert spec.weight_bytes(40, 41) == 2 * spec.layer_params


def test_tied_embeddings_are_held_twice_when_the_model_is_split() -> None:
    spec = model("opt-13b")
    split = spec.weight_bytes(0, 20) + spec.weight_bytes(20, 40)
    assert split - spec.weight_bytes(0, 40) == 2 * spec.embedding_params


@pytest.mark.parametrize("layers", [(0, 0), (-1, 4), (3, 2), (0, 5)])
def test_layers_must_exist(layers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="are not within 0 to 4"):
        tiny().weight_bytes(*layers)


@pytest.mark.parametrize(
    ("quantization", "layer_bytes", "dtype"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 14_963, "bfloat16"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 28_800, "bfloat16"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 16_200, "bfloat16"),
        ({"quant_method": "fp8"}, 28_800, "float8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"a": 1}}
                },
            },
            28_800,
            "int8",
        ),
    ],
)
def test_quantized_weights(quantization: dict[str, Any], layer_bytes: int, dtype: str) -> None:
    """Layers shrink; embedding, head and KV stay at 16 bits. AWQ: 28800 * (4 + (16 + 4) / 128) / 8, rounded up; nf4: a
    float32 scale for 64."""
    spec = tiny(quantization_config=quantization)
    assert spec.weight_bytes(1, 2) == layer_bytes
    assert spec.weight_bytes(3, 4) - spec.weight_bytes(1, 2) == 2 * 6_400
    assert spec.dtype == dtype
    assert spec.kv_bytes_per_value == 2
    config = TINY | {"quantization_config": quantization}
    assert ModelSpec.from_config(config, dtype="float16").weight_bytes(1, 2) == layer_bytes


# ---------------------------------------------------------------- arithmetic


def test_flops_by_hand() -> None:
    spec = tiny()
    assert spec.linear_flops_per_token_layer == 2 * (28_800 - 128)
    assert spec.head_flops_per_token == 2 * 6_400
    assert spec.attention_flops(1, 0) == 4 * 8 * 8
    assert spec.attention_flops(3, 10) == (11 + 12 + 13) * 4 * 8 * 8


def test_a_sliding_window_caps_what_is_attended_and_kept() -> None:
    spec = tiny(sliding_window=5)
    pair = 4 * 8 * 8
    assert spec.attention_flops(4, 3) == (4 + 5 + 5 + 5) * pair
    assert spec.attention_flops(2, 100) == 10 * pair
    assert [spec.kv_tokens(tokens) for tokens in (4, 5, 6)] == [4, 5, 5]
    assert tiny().kv_tokens(6) == 6


def test_mixtures_compute_with_the_chosen_experts_only() -> None:
    spec = model("mixtral-8x7b")
    expert = 3 * 4096 * 14336
    assert spec.layer_params - spec.active_layer_params == 6 * expert
    moe = {gemm.name: gemm for gemm in spec.gemms(tp=2) if gemm.name.startswith("moe_")}
    assert moe["moe_gate_up"] == Gemm("moe_gate_up", 14336, 4096, count=8, active=2)


@given(new=st.integers(0, 40), context=st.integers(0, 40), window=st.none() | st.integers(1, 50))
def test_attention_adds_up_over_chunks(new: int, context: int, window: int | None) -> None:
    """A prompt computed at once costs what its tokens cost one after another."""
    spec = tiny(sliding_window=window)
    singly = sum(spec.attention_flops(1, context + index) for index in range(new))
    assert spec.attention_flops(new, context) == singly


@given(st.sampled_from(models()), st.integers(1, 16))
def test_shards_cover_the_layer(spec: ModelSpec, tp: int) -> None:
    """Shards together hold every weight, and each no more than the whole."""
    for shard, whole in zip(spec.gemms(tp), spec.gemms(), strict=True):
        assert shard.n * shard.k <= whole.n * whole.k <= tp * shard.n * shard.k
    assert spec.kv_bytes_per_token_layer <= tp * spec.kv_bytes_per_token_layer_gpu(tp)


# ---------------------------------------------------------------- configuration files


def test_a_config_file_or_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    for path in (folder, folder / "config.json"):
        assert ModelSpec.from_config(path) == ModelSpec.from_config(TINY, name="my-model")
    assert model(str(folder), dtype="fp16").dtype == "float16"


def test_a_nested_text_config() -> None:
    outer = {"model_type": "llava", "torch_dtype": "float16", "text_config": {**TINY, "torch_dtype": None}}
    assert ModelSpec.from_config(outer, name="tiny") == tiny(torch_dtype="float16")


def test_falcon_with_one_key_value_head() -> None:
    """Falcon-7B: 71 query heads share one; 6.92e9 parameters with the tied head counted once."""
    config = {
        "model_type": "falcon",
        "num_hidden_layers": 32,
        "hidden_size": 4544,
        "num_attention_heads": 71,
        "multi_query": True,
        "vocab_size": 65024,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
    spec = ModelSpec.from_config(config)
    assert spec.num_key_value_heads == 1
    assert spec.gemms()[0] == Gemm("qkv", 4672, 4544)
    assert spec.params == 6_921_720_704


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4}, None),
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 4}, None),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"] * 4}, 64),
        ({"sliding_window": None}, None),
    ],
)
def test_sliding_windows(changes: dict[str, Any], window: int | None) -> None:
    assert tiny(**changes).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"tiny: model_type: 'mamba' is not known; known: bloom, .*llama"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, r"tiny: hidden_size must be given \(or n_embd, n_embed\)"),
        ({"vocab_size": -1}, "tiny: vocab_size: -1 must be a whole number >= 1"),
        ({"num_attention_heads": True}, "num_attention_heads: True must be"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must divide num_attention_heads 8"),
        ({"torch_dtype": None}, "torch_dtype is missing"),
        ({"torch_dtype": "bfloat61"}, "dtype: 'bfloat61' is unknown; did you mean 'bfloat16'"),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, "max_window_layers: 2 must be 0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: .* must be the same"),
        ({"layer_types": 7}, "layer_types: 7 must be of type list"),
        ({"num_experts": 4, "num_experts_per_tok": 8}, "experts_per_token: 8 > 4 experts"),
        ({"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}, r"mlp_only_layers: \[0\] is not"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config: quant_method: 'hqq' is not known"),
        ({"quantization_config": "fp8"}, "quantization_config: 'fp8' must be of type dict"),
    ],
)
def test_what_cannot_be_read_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file"):
        model(str(tmp_path / "none.json"))
    for text, message in (("{", "is not JSON"), ("[]", "must hold one JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
            model(str(tmp_path))


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model: 'llama-2-70' is unknown; did you mean 'llama-2-70b'\?"):
        model("llama-2-70")
    assert model("LLAMA-2-70B") == model("llama-2-70b")


def test_fields_that_go_together() -> None:
    with pytest.raises(ConfigError, match="experts_per_token: missing; num_experts, experts_per_token"):
        ModelSpec(
            name="x",
            num_layers=1,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=8,
            max_position_embeddings=8,
            tie_word_embeddings=False,
            num_experts=2,
            moe_intermediate_size=8,
        )
