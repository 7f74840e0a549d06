"""The decoder against transformers' own models, with the same random weights read from the same files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from calibrate.execute.model.architecture import Architecture  # noqa: E402
from calibrate.execute.model.stage import Item, Stage, generate  # noqa: E402
from calibrate.execute.model.weights import SafeTensors, drawn, num_bytes, tensors_of  # noqa: E402
from sim.types import ConfigError  # noqa: E402

torch.set_num_threads(1)  # more would only spin, at these sizes

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied, rope of 3.1, biases": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 4}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3 moe, weights as they are": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": False}),
}


def save(folder: Path, family: str, **more: Any) -> Any:
    """A transformers model with lively random weights, saved as a download would be. Loaded late: it takes seconds."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = getattr(transformers, f"{family}Config")(**(SIZES | more))
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, more = MODELS[name]
    reference = save(tmp_path, family, **more)
    stage = Stage(Architecture.read(tmp_path), blocks=40, block_size=8, folder=str(tmp_path))
    prompt = torch.randint(0, 101, (90,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(prompt[None]).logits[0]
    found = []
    for start, end in ((0, 37), (37, 38), (38, 89), (89, 90)):
        item = Item(0, start, tuple(prompt[start:end].tolist()), True)
        stage.tables.resize(0, end)
        found.append(stage.forward(stage.batch([item]))[0])
    torch.testing.assert_close(torch.stack(found), expected[[36, 37, 88, 89]], atol=1e-4, rtol=0)


def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    reference = save(tmp_path, "Llama")
    stage = Stage(Architecture.read(tmp_path), blocks=20, folder=str(tmp_path))
    prompt = list(range(7, 40))
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat((tokens, reference(tokens).logits[:, -1:].argmax(-1)), dim=1)
    assert generate(stage, prompt, 12) == tokens[0, len(prompt) :].tolist()


def test_our_reader_of_safetensors_equals_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2).half()}
    library.save_file(tensors, tmp_path / "model.safetensors")
    ours = SafeTensors(tmp_path)
    assert set(ours.names) == set(tensors)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in tensors.items())


def test_a_truncated_file_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    save(tmp_path, "Llama")
    arch = Architecture.read(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors.*fetch the file again"):
        Stage(arch, blocks=4, folder=str(tmp_path))
    file.write_bytes(whole.replace(b"model.norm.weight", b"model.mean.weight"))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: is missing"):
        Stage(arch, blocks=4, folder=str(tmp_path))
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="header length"):
        Stage(arch, blocks=4, folder=str(tmp_path))


def test_drawn_weights_are_those_of_the_layer_however_the_model_is_split() -> None:
    arch = Architecture.read(SIZES | {"model_type": "qwen3"})
    whole = drawn(arch, 0, 3, seed=5, device="cpu")
    part = drawn(arch, 1, 3, seed=5, device="cpu")
    assert torch.equal(whole.layers[2].gate_up, part.layers[1].gate_up)
    assert part.head is not None
    assert whole.head is not None
    assert torch.equal(whole.head, part.head)
    assert not torch.equal(whole.layers[1].qkv, whole.layers[2].qkv)
    assert not torch.equal(whole.layers[1].qkv, drawn(arch, 1, 2, seed=6, device="cpu").layers[0].qkv)
    assert num_bytes(arch, 0, 3) == sum(tensor.nbytes for tensor in tensors_of(whole))


def test_missing_memory_is_reported_before_anything_is_allocated() -> None:
    arch = Architecture.read(SIZES | {"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"layers 0 to 3 and 1000000000 KV blocks: needs .* GB are missing"):
        Stage(arch, blocks=10**9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type: 'gpt_neox' is not executed"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "rope_type: 'yarn'"),
        ({"model_type": "llama", "dtype": "float8"}, "dtype: 'float8' is not executed"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window: 64 is not executed"),
    ],
)
def test_what_cannot_be_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.read(SIZES | change)
