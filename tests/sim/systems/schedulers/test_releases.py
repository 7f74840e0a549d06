"""vLLM's defaults by release, GPU and usage."""

from __future__ import annotations

from typing import Any

import pytest

import phasewise as pw
from sim import ConfigError
from sim.cluster import gpu
from sim.policy import Limits
from sim.systems.schedulers.releases import TODAY, release

# What ``vllm serve`` resolves, from the pull requests that releases.py names: seqs and tokens of a server.
TABLE = [
    ("0.6.0", "H100-SXM", 256, 512),
    ("0.6.5", "H100-SXM", 256, 2048),
    ("0.8.3", "A100-80G-SXM", 1024, 2048),
    ("0.8.4", "A100-80G-SXM", 256, 2048),
    ("0.8.4", "H100-SXM", 1024, 8192),
    ("0.8.5", "A100-80G-SXM", 1024, 8192),
    ("0.9", "A100-80G-SXM", 256, 2048),
    ("0.9", "H100-SXM", 1024, 8192),
    ("0.11.1", "H200-SXM", 1024, 8192),
    ("0.15.1", "L40S", 256, 2048),
    ("0.19", "RTX-PRO-6000", 1024, 8192),
    ("0.20", "L4", 256, 2048),
    ("0.20", "B200", 1024, 8192),
]


@pytest.mark.parametrize(("version", "kind", "seqs", "tokens"), TABLE)
def test_batches_by_release_and_gpu(version: str, kind: str, seqs: int, tokens: int) -> None:
    assert release(version).batch(gpu(kind)) == (seqs, tokens)


def test_offline_batches_are_larger() -> None:
    assert release("0.20").batch(gpu("H100-SXM"), offline=True) == (1024, 16384)
    assert release("0.20").batch(gpu("L4"), offline=True) == (256, 8192)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.7.3", (False, False, False, False, 0.9)),
        ("0.8", (True, True, False, False, 0.9)),
        ("0.14.0", (True, True, True, False, 0.9)),
        ("0.19", (True, True, True, True, 0.9)),
        ("0.20.1", (True, True, True, True, 0.92)),
    ],
)
def test_switches_by_release(version: str, expected: tuple[Any, ...]) -> None:
    known = release(version)
    found = (known.v1, known.prefix_caching, known.async_scheduling(1), known.reserve_full_prompt,
             known.gpu_memory_utilization)  # fmt: skip
    assert found == expected


def test_a_pipeline_is_scheduled_ahead_from_0_15_on() -> None:
    assert [release(name).async_scheduling(2) for name in ("0.14.1", "0.15")] == [False, True]


def test_v0_without_chunks_takes_the_longest_prompt() -> None:
    known = release("0.7")
    assert known.limits(Limits(max_model_len=4096), frozenset(), [gpu("L4")], 1).max_num_batched_tokens == 4096
    assert known.limits(Limits(max_model_len=65536), frozenset(), [gpu("L4")], 1).max_num_batched_tokens == 2048


def test_the_smallest_gpu_decides_and_what_is_stated_stays() -> None:
    mixed = [gpu("H100-SXM"), gpu("L4")]
    assert release().limits(Limits(), frozenset(), mixed, 1).max_num_batched_tokens == 2048
    stated = Limits(max_num_seqs=7, prefix_caching=False)
    kept = release().limits(stated, frozenset({"max_num_seqs", "prefix_caching"}), [gpu("H100-SXM")], 1)
    assert (kept.max_num_seqs, kept.prefix_caching, kept.max_num_batched_tokens) == (7, False, 8192)


@pytest.mark.parametrize("text", ["latest", "1", "0.x", "", "0.20/1"])
def test_what_is_no_release_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"system\.engine\.version"):
        release(text)


# ---------------------------------------------------------------- in a scenario

SCENARIO: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": {"nodes": [{"gpu": "H100-SXM", "count": 2}]},
    "workload": {"rate": 4, "generate": {"requests": 20, "input": {"fixed": 300}, "output": {"fixed": 20}}},
    "system": {"name": "vllm", "tp": 1},
}


def test_a_bare_vllm_is_todays() -> None:
    run = pw.run(SCENARIO)
    engine = run.summary["engine"]
    assert run.summary["mirrors"] == f"vLLM {'.'.join(map(str, TODAY))} (V1 scheduler)"
    names = ("max_num_seqs", "max_num_batched_tokens", "prefix_caching", "async_scheduling", "gpu_memory_utilization")
    assert [engine[name] for name in names] == [1024, 8192, True, True, 0.92]
    assert engine["max_model_len"] == 131072
    assert (engine["chunked_prefill"], engine["reserve_full_prompt"], engine["release"]) == (True, True, TODAY)


def test_another_release_is_named() -> None:
    run = pw.run(pw.load(SCENARIO, ["system.engine.version=0.11.0"]))
    assert run.summary["mirrors"] == "vLLM 0.11.0 (V1 scheduler)"
    assert run.summary["engine"]["async_scheduling"] is False
    old = pw.run(pw.load(SCENARIO, ['system.engine.version="0.7"']))
    assert old.summary["mirrors"] == "vLLM 0.7 (V0 scheduler)"
    assert old.summary["engine"]["prefix_caching"] is False


def test_a_release_and_a_mode_must_agree_and_other_systems_have_none() -> None:
    with pytest.raises(ConfigError, match=r"vLLM 0\.7 has the V0 engine"):
        pw.run(pw.load(SCENARIO, ['system.engine.version="0.7"', "system.mode=v1"]))
    with pytest.raises(ConfigError, match=r"system\.engine\.version: sarathi-serve follows no release"):
        pw.run(pw.load(SCENARIO, ["system={name: sarathi-serve, tp: 1, engine: {version: '0.20'}}"]))
