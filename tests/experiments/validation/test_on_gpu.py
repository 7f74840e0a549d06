"""Everything that a GPU can tell, in one command: here with a tiny model on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from experiments.on_gpu import Part, page, parts, run_part


def said(code: str, **more: bool) -> Part:
    return Part(name="x", command=[sys.executable, "-c", code], weight=1.0, **more)


def test_a_part_gives_its_json_or_says_why_not() -> None:
    assert run_part(said("print('{\"a\": 1}')"), 1, 30)["result"] == {"a": 1}
    failed = run_part(said("import sys; sys.exit('no such thing')"), 1, 30)
    assert (failed["error"], failed["result"]) == ("no such thing", None)
    assert run_part(said("import time; time.sleep(60)"), 1, 0.5)["error"] == "not done after its 0 s"
    told = run_part(said("import json, sys; print(json.dumps({'argv': sys.argv[1:]}))", measures=True), 60, 30)
    assert told["result"] == {"argv": ["--minutes", "0.700"]}


def test_a_gpu_gets_every_model_load_and_system(tmp_path: Path) -> None:
    found = {part.name: part.command for part in parts(tmp_path, "cuda", "H200-SXM", 2, quick=False)}
    for model in ("llama-3.1-8b", "llama-2-70b", "qwen3-30b-a3b", "qwen3-32b"):
        assert f"calibrate-{model}" in found
    for model in ("llama-3.1-8b", "qwen3-32b"):
        for system in ("vllm", "sarathi-serve"):
            assert {f"validate-{model}-{system}-{load}" for load in (50, 90)} <= found.keys()
    assert "1,2,4,8" in found["calibrate-llama-2-70b"]
    assert "system.engine.num_kv_blocks=8192" in found["validate-qwen3-32b-vllm-90"]
    assert "workload.rate=22.5" in found["validate-llama-3.1-8b-vllm-90"]


def test_the_page_names_what_failed() -> None:
    rows = {"calibrate-x": {"seconds": 3.0, "error": "one\nout of memory", "result": None}}
    assert "| calibrate-x | 3.0 | out of memory |" in page({"gpu": "L4", "parts": rows, "ratios": {}})


@pytest.mark.slow
def test_the_command_runs_on_the_cpu_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.on_gpu", "--device", "cpu", "--quick", "--minutes", "1.5"]
    command += ["--out", str(tmp_path / "out")]
    first = subprocess.run([*command, "--parts", "decode,calibrate"], capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    kept = (tmp_path / "out" / "summary.json").read_text()
    second = subprocess.run(
        [*command, "--parts", "decode,calibrate,validate-split"], capture_output=True, text=True, timeout=300
    )
    assert second.returncode == 0, second.stderr
    assert "calibrate" not in second.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["page.md", "summary.json", "work.tar"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["parts"]["calibrate-tiny"] == json.loads(kept)["parts"]["calibrate-tiny"]
    assert [step["sequences"] for step in summary["parts"]["decode-bandwidth"]["result"]["steps"]] == [1, 64]
    assert summary["parts"]["validate-split-splitwise-4-bits"]["result"]["complete"]
