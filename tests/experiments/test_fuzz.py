"""2,000 malformed files of every kind: one line and a documented exit code, never a traceback or half a result.

``pytest -m slow tests/experiments/test_fuzz.py -s`` prints how they ended.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from experiments.cli.app import main

INPUTS = 2000
NASTY: list[Any] = [
    None, True, False, 0, -1, 0.5, 1e300, -1e300, 1e-320, float("nan"), float("inf"), 10**12, 10**40, "", "x", "0",
    "1e300", "a\0b", "é" * 300, "x" * 5000, "../..", "/", "2020-13-45", [], {}, [[]], [None], {"a": 1}, [1, "x", {}],
    {"": None},
    "\x1b[31m",
    1, 2, 3, 7, 16, 100, 4096, 60_000, 1e-9, 1e6, 1e9, "n0", "n0.g0", "prefill", "bfloat16", [0, 1], ["n0.g0", "n0.g1"],
]  # fmt: skip
JUNK = [
    "0",
    "1",
    "-",
    ".5",
    "e9",
    "x",
    "\t",
    ";",
    "{",
    "]",
    "\0",
    "\n",
    ",",
    '"',
    ": ",
    "- ",
    "&a [*a]",
    "9" * 5000,
    "[" * 2000,
    "\x1b[0m",
    "\ufeff",
    "%",
    "!!python/none",
]

SCENARIO: dict[str, Any] = {
    "model": "llama-3.2-1b",
    "cluster": {"nodes": [{"gpu": "H100-SXM", "count": 2, "nodes": 1}], "links": {"inter_node": {"gbps": 100}}},
    "workload": {"trace": "sample", "limit": 4, "rate": 5, "sort": False},
    "system": {"name": "vllm", "replicas": 1, "tp": 1, "engine": {"max_num_seqs": 8}},
    "overhead": {"step_s": 0.001},
    "slo": {"ttft_s": 1, "classes": {}},
    "events": [{"at_s": 1, "kind": "gpu_slow", "target": "n0.g0", "factor": 2}],
    "until_s": 100,
}
PLAN: dict[str, Any] = {
    "replicas": [{"name": "a", "role": "mixed", "stages": [{"gpus": ["n0.g0"], "layers": [0, 16]}]}]
}
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}  # fmt: skip
PROFILE: dict[str, Any] = {
    "schema": "phasewise-profile", "version": 1, "name": "p",
    "provenance": {"source": "s", "licence": "l", "date": "d", "tool": "t", "engine": "e", "method": "m"},
    "entries": [{
        "gpus": ["H100-SXM"], "model": "llama-3.2-1b", "num_layers": 16, "tp": 1, "dtypes": ["bfloat16"],
        "operators": {"linear": {"counts": [1, 128, 8192], "seconds": [0.001, 0.002, 0.09], "per": "model"}},
    }],
}  # fmt: skip
RESULT: dict[str, Any] = {
    "model_id": "llama-3.2-1b", "duration": 4.0, "completed": 2, "failed": 0, "input_lens": [100, 60],
    "output_lens": [3, 1], "ttfts": [0.5, 0.2], "itls": [[0.1, 0.2], []], "start_times": [1.0, 2.0],
    "errors": ["", ""], "request_rate": 2,
}  # fmt: skip
GUIDELLM: dict[str, Any] = {"benchmarks": [{"requests": {"successful": [
    {"prompt_tokens": 5, "output_tokens": 3, "start_time": 1.0, "time_to_first_token_ms": 50.0,
     "inter_token_latency_ms": 10.0}
]}}]}  # fmt: skip
EVENTS: list[dict[str, Any]] = [
    {"at_s": 1, "kind": "node_lost", "target": "n0"},
    {"at_s": 2, "kind": "gpu_joined", "target": "n0.g0"},
]
ROWS = [{"timestamp": 3000 * n, "input_length": 600 + n, "output_length": 5, "hash_ids": [0, n + 1]} for n in range(12)]
TRACE = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{n},{100 + n},{5 + n}\n" for n in range(5))
STEPS = "batch,seq_len,phase,latency_ms\n1,512,prefill,30\n8,512,decode,9\n"
SMALL = "model: llama-3.2-1b\ncluster: {nodes: [{gpu: H100-SXM, count: 1}]}\nsystem: {name: vllm, tp: 1}\n"

IMPORT = "calibrate import csv m.csv --gpu H100-SXM --model llama-3.2-1b --out o.json"
KINDS: dict[str, tuple[Any, str, list[str]]] = {
    "scenario": (SCENARIO, "s.yaml", ["run", "s.yaml", "--out", "out"]),
    "plan": (PLAN, "plan.yaml", ["run", "base.yaml", "--plan", "plan.yaml", "--out", "out"]),
    "config": (CONFIG, "config.json", ["run", "base.yaml", "--set", "model=config.json", "--out", "out"]),
    "profile": (PROFILE, "p.json", ["run", "base.yaml", "--set", "latency=p.json", "--out", "out"]),
    "events": (EVENTS, "e.yaml", ["run", "base.yaml", "--set", "events=e.yaml", "--out", "out"]),
    "result": (RESULT, "r.json", ["compare-run", "base.yaml", "r.json", "--tolerance", "0.5"]),
    "guidellm": (GUIDELLM, "r.json", ["compare-run", "base.yaml", "r.json"]),
    "jsonl": (ROWS, "t.jsonl", ["trace", "stats", "t.jsonl"]),
    "csv": (TRACE, "t.csv", ["run", "base.yaml", "--set", "workload.trace=t.csv", "--out", "out"]),
    "steps": (STEPS, "m.csv", [*IMPORT.split()]),
}  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def changed(data: Any, place: tuple[Any, ...], value: Any, how: str) -> Any:
    """The data with one place set, dropped, or given a key that it does not know."""
    if not place:
        return value
    data = deepcopy(data)
    target = data
    for key in place[:-1]:
        target = target[key]
    if how == "drop":
        del target[place[-1]]
    elif how == "extra" and isinstance(target, dict):
        target[str(value)[:20]] = value
    else:
        target[place[-1]] = value
    return data


@st.composite
def inputs(draw: st.DrawFn) -> tuple[str, str]:
    """A kind, and the text of a file of it, changed in one or two places of its data, or in its text."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    data, name, _ = KINDS[kind]
    if not isinstance(data, str):
        for _ in range(draw(st.integers(0, 2))):
            value = draw(st.sampled_from(NASTY))
            data = changed(
                data, draw(st.sampled_from(places(data))), value, draw(st.sampled_from(["set", "drop", "extra"]))
            )
    text = data if isinstance(data, str) else written(data, name)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1] if not isinstance(data, str) else [1, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", *JUNK])) + text[at + draw(st.integers(0, 3)) :]
    return kind, text


def written(data: Any, name: str) -> str:
    if name.endswith(".yaml"):
        return yaml.safe_dump(data, allow_unicode=True)
    if name.endswith(".jsonl") and isinstance(data, list):
        return "\n".join(json.dumps(row) for row in data)
    return json.dumps(data)


@pytest.fixture(scope="module")
def ended() -> Any:
    counts: Counter[tuple[str, int]] = Counter()
    yield counts
    by_code = Counter(code for _, code in counts.elements())
    print(f"\n{sum(counts.values())} malformed inputs; exit codes: {dict(sorted(by_code.items()))}")
    for kind in KINDS:
        print(f"  {kind}: { {code: count for (name, code), count in sorted(counts.items()) if name == kind} }")


@pytest.mark.slow
@settings(max_examples=INPUTS, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(case=inputs())
def test_no_input_ends_in_a_traceback_or_half_a_result(
    case: tuple[str, str], ended: Any, tmp_path_factory, capsys, monkeypatch
) -> None:
    kind, text = case
    _, name, command = KINDS[kind]
    folder = tmp_path_factory.mktemp("fuzz")
    monkeypatch.chdir(folder)
    Path("base.yaml").write_text(SMALL + "workload: {trace: sample, limit: 4, rate: 5}\n")
    Path(name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SystemExit) as left:
        main(command)
    code, said = left.value.code or 0, capsys.readouterr()
    ended[kind, code] += 1
    assert code in (0, 1, 2, 3), said.err
    assert "defect of phasewise" not in said.err, (kind, text[:2000], said.err)
    assert "Traceback" not in said.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said.err), said.err
    if code == 2:
        assert len(said.err.strip().splitlines()) <= 8, said.err  # remarks, then the error; options have usage lines
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not Path("out").exists() or Path("out/summary.json").is_file()
    shutil.rmtree(folder)
