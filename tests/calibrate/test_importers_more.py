"""Importers of DistServe's fit and Vidur's tables, and the command around all importers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from calibrate.commands_import import FORMATS, imported, register
from calibrate.importers.distserve import import_distserve
from calibrate.importers.vidur import all_reduces, import_vidur, send_receives
from calibrate.profile.file import read_profile, shipped_profiles, write_profile
from sim.cluster import Cluster
from sim.cost import Fitted, Overhead, Profile, PromptTerms, seconds
from sim.model import model
from sim.types import ConfigError, Stage, Work

A100 = Cluster.of([{"gpu": "A100-80G-SXM", "count": 8}])


def shipped(name: str) -> Profile:
    return read_profile(shipped_profiles()[name])


# ---------------------------------------------------------------- DistServe


def fit_file(folder: Path, engine: str = "distserve", **changes: Any) -> Path:
    terms = {
        "decoding_large_small_bs_threshold": 95,
        "prefill": [18.0, 0.1, 7e-6],
        "decoding_smallbs": [20.0, 6e-4, 0.04],
        "decoding_largebs": [7.0, 6e-4, 0.16],
    }
    path = folder / f"profiler-a100-80g.{engine}.json"
    path.write_text(json.dumps({"facebook/opt-13b": {"1": {**terms, **changes}, "2": terms}}))
    return path


def test_a_fit_file_becomes_a_profile(tmp_path: Path) -> None:
    profile = import_distserve(fit_file(tmp_path, "vllm"))
    assert (profile.name, [form.tp for form in profile.polynomials]) == ("distserve-a100-vllm", [1, 2])
    assert profile.polynomials[0].prompts == PromptTerms(step_s=0.018, token_s=1e-4, square_s=7e-9)
    write_profile(profile, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile


def test_a_negative_term_is_left_out_and_named(tmp_path: Path) -> None:
    profile = import_distserve(fit_file(tmp_path, prefill=[18.0, 0.1, -7e-6]))
    assert [form.tp for form in profile.polynomials] == [2]
    assert "facebook/opt-13b TP 1" in profile.provenance.method
    assert "facebook/opt-66b TP 2" in shipped("distserve-a100-vllm").provenance.method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill": [1.0, 2.0]}, r"TP 1: prefill is \[1.0, 2.0\]; it must be three numbers"),
        ({"decoding_large_small_bs_threshold": None}, "threshold is missing"),
        ({"decoding_smallbs": "20 ms"}, "decoding_smallbs is '20 ms'"),
        ({"decoding_smallbs": [20_000.0, 0.6, 40.0]}, r"a decode of 1 sequence of opt-13b takes 20\.1 s .* unit"),
        ({"prefill": [0.018, 1e-4, 7e-9], "decoding_smallbs": [0.02, 6e-7, 4e-5]}, r"takes 2\.\S+ s .*roofline"),
    ],
)  # fmt: skip
def test_a_damaged_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = fit_file(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        imported("distserve", path)
    assert str(caught.value).startswith(str(path))


def test_the_engine_is_in_the_files_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.distserve\.json or \.vllm\.json"):
        import_distserve(fit_file(tmp_path, "orca"))


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"facebook/opt-13b": 3}'])
def test_other_json_is_no_fit(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.distserve.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="copy DistServe's file anew"):
        import_distserve(path)


# ---------------------------------------------------------------- Vidur

KERNELS = ("emb", "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm",
           "mlp_up_proj", "mlp_act", "mlp_down_proj", "add")  # fmt: skip
LLAMA = model("llama-2-7b")


@pytest.fixture
def vidur(tmp_path: Path) -> Path:
    """Each of ten kernels takes 20 us and 1 us a token; a chunk 1 us a token and its context 1 us per 100 tokens and
    token; a decode 2 us and 1 us per 100 tokens; saving KV 1 us; an all-reduce 10 us and 1 us per 10 kB."""
    device = tmp_path / "profiling" / "compute" / "a100"
    place = device / "meta-llama" / "Llama-2-7b-hf"
    place.mkdir(parents=True)
    shape = {"n_embd": 4096, "n_kv_head": 32, "num_tensor_parallel_workers": 1}
    tokens = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    medians = [{f"time_stats.{name}.median": 0.020 + 0.001 * n for name in KERNELS} for n in tokens]
    rows = [{**row, **shape, "n_head": 32, "num_tokens": n} for n, row in zip(tokens, medians, strict=True)]
    pd.DataFrame(rows).to_csv(place / "mlp.csv", index=False)
    prefill = [
        (True, 1, n, kv, n * (1 + kv / 100)) for n in (64, 128, 256, 512) for kv in (0, 64, 128, 512) if n + kv <= 640
    ]
    decode = [(False, n, 0, kv, n * (2 + kv / 100)) for n in (1, 2, 4, 8) for kv in (32, 64, 1024)]
    attention = [
        {
            "is_prefill": kind,
            "batch_size": batch,
            "prefill_chunk_size": chunk,
            "kv_cache_size": kv,
            "time_stats.attn_prefill.median": us / 1e3 if kind else None,
            "time_stats.attn_decode.median": None if kind else us / 1e3,
            "time_stats.attn_kv_cache_save.median": 0.001,
            **shape,
            "n_q_head": 32,
        }
        for kind, batch, chunk, kv, us in prefill + decode
    ]
    pd.DataFrame(attention).to_csv(place / "attention.csv", index=False)
    network(tmp_path / "profiling" / "network" / "a100_dgx", "all_reduce")
    return device


def network(folder: Path, collective: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = (10_000, 20_000, 1_000_000)
    rows = [
        {f"time_stats.{collective}.median": 0.010 + size / 10_000 / 1e3 * (1 if near == count else 100),
         "num_workers": count, "devices_per_node": near, "size": size}
        for count in (2, 4) for near in (1, count) for size in sizes
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / f"{collective}.csv", index=False)
    return folder / f"{collective}.csv"


def test_vidurs_kernels_become_a_step(vidur: Path) -> None:
    entry = import_vidur(vidur).entries[0]
    assert (entry.gpus, entry.model, entry.tp) == (("A100-80G-SXM",), "llama-2-7b", 1)
    cost = Fitted(profiles=[import_vidur(vidur)], overhead=Overhead())
    stage = Stage(name="s", gpus=A100.gpu_ids[:1], first_layer=0, end_layer=LLAMA.num_layers)
    spec = replace(LLAMA, dtype="float16")
    bound = cost.bind(spec, stage, A100)
    head_s = Fitted(profiles=[]).bind(spec, stage, A100).operators.head(4)[0] / 1e12  # type: ignore[attr-defined]
    linear_us = (9 * 32 + 1) * (20 + 4)
    attention_us = 32 * (4 * (2 + 64 / 100) + 1)
    assert seconds(bound, Work((), 4, 4 * 64)) == pytest.approx((linear_us + attention_us) * 1e-6 + head_s, rel=1e-6)


def test_a_chunks_context_beyond_the_measured_grows_by_the_last_slope(vidur: Path) -> None:
    grid = import_vidur(vidur).entries[0].attention_prefill
    assert grid is not None
    assert dict(zip(grid.contexts, grid.seconds[grid.counts.index(512)], strict=True)) == pytest.approx(
        {kv: (512 * (1 + kv / 100) + 1) * 1e-6 for kv in grid.contexts}, rel=1e-6
    )


def test_held_out_errors_of_straight_tables_are_nearly_nothing(vidur: Path) -> None:
    held = import_vidur(vidur).entries[0].held_out
    assert set(held) == {"linear", "attention_prefill", "attention_decode"}
    assert max(part.mape for part in held.values()) < 0.002


def test_collectives_are_those_inside_a_machine(vidur: Path) -> None:
    tables = all_reduces(vidur.parents[1] / "network" / "a100_dgx" / "all_reduce.csv")
    assert tables[2].seconds == pytest.approx((11e-6, 110e-6))
    assert tables[2].counts == (10_000, 1_000_000), "the point between lies on their line"
    pair = send_receives(network(vidur.parent / "pair", "send_recv"))
    assert pair.seconds[0] == pytest.approx(11e-6)


def test_a_tensor_parallel_entry_takes_two_all_reduces_a_layer(vidur: Path) -> None:
    for name in ("mlp.csv", "attention.csv"):
        path = vidur / "meta-llama/Llama-2-7b-hf" / name
        rows = pd.read_csv(path)
        rows.assign(num_tensor_parallel_workers=2).to_csv(path, index=False)
    collective = import_vidur(vidur).entries[0].collective
    assert collective is not None
    assert collective.per == "layer"
    assert collective.seconds[-1] == pytest.approx(2 * (10 + 122 * 8192 / 10_000) * 1e-6, rel=1e-3)
    alone = import_vidur(vidur, network(vidur / "other", "all_reduce").parent)
    assert "collectives from other" in alone.provenance.method


def _edit(vidur: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = vidur / "meta-llama/Llama-2-7b-hf" / name
    change(pd.read_csv(path)).to_csv(path, index=False)


def _scaled(factor: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda rows: rows.assign(**{name: rows[name] * factor for name in rows if name.startswith("time_stats")})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mlp.csv", lambda rows: rows.drop(columns="time_stats.mlp_act.median"), r"column 'time_stats\.mlp_act"),
        ("attention.csv", lambda rows: rows.drop(columns="kv_cache_size"), "column 'kv_cache_size' is missing"),
        ("mlp.csv", lambda rows: rows.iloc[:0], "no rows"),
        ("mlp.csv", lambda rows: rows.assign(n_embd=5120), "n_embd is 5120, llama-2-7b has 4096"),
        ("attention.csv", lambda rows: rows.assign(num_tensor_parallel_workers=4), "no row with .* 1, which"),
        ("attention.csv", lambda rows: rows[rows.is_prefill], r"attn_decode\.median must be"),
        ("mlp.csv", _scaled(1000), "are the times in the unit"),
        ("mlp.csv", _scaled(1 / 1000), "are the times in the unit"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_named(vidur: Path, name: str, change: Callable[..., pd.DataFrame], message: str) -> None:
    _edit(vidur, name, change)
    if name == "mlp.csv" and "unit" in message:
        _edit(vidur, "attention.csv", change)
    with pytest.raises(ConfigError, match=message) as caught:
        imported("vidur", vidur)
    assert str(vidur) in str(caught.value)


def test_the_published_links_are_read(shared_data: Path) -> None:
    folder = shared_data / "measured" / "links" / "vidur"
    tables = all_reduces(folder / "a100_dgx" / "all_reduce.csv")
    assert set(tables) == {2, 4, 8}
    assert 80e9 < tables[8].counts[-1] / tables[8].seconds[-1] < 300e9
    pair = send_receives(folder / "a100_dgx" / "send_recv.csv")
    assert 200e9 < pair.counts[-1] / pair.seconds[-1] < 300e9, "NVLink 3 is 300 GB/s one way"


# ---------------------------------------------------------------- the command

APP = typer.Typer()
register(APP)
APP.callback()(lambda: None)


def test_the_command_writes_a_profile(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    found = CliRunner().invoke(APP, ["import", "distserve", str(fit_file(tmp_path)), "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "distserve-a100: opt-13b on A100-80G-SXM" in found.output
    assert len(read_profile(out).polynomials) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vidurr", "."], "vidur"),
        (["helix", "nowhere"], "nowhere: is not there; give Helix's folder"),
        (["helix", ".", "--network", "."], "--network: helix has no such files"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(APP, ["import", *arguments, "--out", str(tmp_path / "p.json")])
    assert isinstance(found.exception, ConfigError)
    assert message in str(found.exception)
    assert not (tmp_path / "p.json").exists()


SOURCES = {
    "aiconfigurator": ("aiconfigurator/data/l40s", "vllm-0.14-l40s"),
    "helix": ("helix/simulator/model_manager", "helix-2025"),
    "llmservingsim": ("llmservingsim/profiles/RTX4090", "vllm-0.19-rtx-4090"),
    "splitwise-sim": ("splitwise/perf_model.csv", "splitwise-2023"),
}


@pytest.mark.parametrize("format_", SOURCES)
def test_every_format_is_imported(format_: str, shared_data: Path) -> None:
    path, name = SOURCES[format_]
    assert imported(format_, shared_data / "measured" / path) == shipped(name)


def test_every_format_has_a_test() -> None:
    assert set(FORMATS) == {*SOURCES, "vidur", "distserve", "csv"}
