"""A model's card: figures by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.pages.model_card import card, lines
from sim.model import model
from tests.command import call


def test_the_card_of_llama_by_hand() -> None:
    """Llama-3.1-8B: 8.03e9 parameters in 16 bits; 2 x 8 heads x 128 x 2 bytes x 32 layers of KV."""
    found = card(model("llama-3.1-8b"))
    assert found["params"] == found["active_params"] == 8_030_261_248
    assert found["weight_bytes"]["total"] == 2 * 8_030_261_248
    assert found["weight_bytes"]["embedding_and_head"] == 2 * (2 * 128256 * 4096 + 4096)
    assert found["kv_bytes_per_token"] == 131_072
    assert found["kv_bytes"]["8192"] == 2**30
    assert found["gpus"]["H100-SXM"]["count"] == 1
    assert "T4" not in found["gpus"] or found["gpus"]["T4"]["count"] >= 2  # 16 GB do not hold 16 GB of weights


def test_a_window_bounds_the_kv() -> None:
    found = card(model("mistral-7b"))
    assert found["kv_bytes"]["131072"] == found["kv_bytes"]["8192"] == 2**29


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("models", "llama-3.1-8b") == 0
    assert capsys.readouterr().out.splitlines() == lines(card(model("llama-3.1-8b")))
    assert call("models", "qwen3-30b-a3b", "--json") == 0
    assert json.loads(capsys.readouterr().out)["active_params"] < 4e9
    assert call("models", "no-such-model") == 2
    assert capsys.readouterr().err.count("\n") == 1
