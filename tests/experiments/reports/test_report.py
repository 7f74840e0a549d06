"""Reports: one file that says what a folder holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import phasewise as pw
from experiments.cli import main
from experiments.reports.tables import table

SCENARIO = """
model: llama-3.1-8b
cluster: {nodes: [{gpu: H100-SXM, count: 2}]}
workload: {rate: 4, generate: {requests: 60, input: {fixed: 300}, output: {fixed: 20}}}
system: {name: vllm, tp: 1}
compare: {vllm: {tp: 1}, split: {name: splitwise, prefill: {tp: 1, replicas: 1}, decode: {tp: 1, replicas: 1}}}
slo: {ttft_s: 1.0, tpot_s: 0.1}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("results")
    file = folder / "small.yaml"
    file.write_text(SCENARIO)
    long = ["--set", "workload.generate.requests=1000", "--set", "slo.tpot_s=0.01"]
    calls: list[list[str]] = [
        ["run", str(file), "--out", str(folder / "run")],
        ["compare", str(file), "--out", str(folder / "comparison")],
        ["sweep", str(file), "--rates", "2,4", "--seeds", "2", "--workers", "1", "--out", str(folder / "sweep")],
        ["goodput", str(file), "--seeds", "1", "--tolerance", "0.3", *long, "--out", str(folder / "goodput")],
        ["plan", str(file), "--system", "thunderserve", "--seconds", "2", "--set", "latency=roofline",
         "--out", str(folder / "plan")],
    ]  # fmt: skip
    for call in calls:
        run(*call, "--quiet")
    return folder


def run(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == code


def text_of(folder: Path) -> str:
    run("report", str(folder))
    return (folder / "report.html").read_text(encoding="utf-8")


HEADLINES = {
    "run": "100.0% of 60 requests are within TTFT 1 s, TPOT 0.1 s, at $",
    "comparison": "vllm, split keep 100.0% of the requests within the SLO, on 2 H100-SXM with llama-3.1-8b",
    "sweep": "carries 4 requests/s with 90% within the SLO",
    "goodput": "with 90% within the SLO",
    "plan": "Rent 2 H100-SXM",
}
SECTIONS = {
    "run": ["Latency", "Totals", "Latency distributions", "SLO attainment, memory and queues", "What the GPUs do",
            "Replicas", "The slowest requests", "Where the figures come from"],
    "comparison": ["Side by side", "Latency distributions", "SLO attainment, memory and queues", "What the GPUs do",
                   "Replicas", "Where the figures come from"],
    "sweep": ["Highest rates", "By arrival rate", "What can be had at once", "All means",
              "Where the figures come from"],
    "goodput": ["Goodput", "Around it", "Where the figures come from"],
    "plan": ["Plans", "Colocated vLLM beside it", "The best one on its cluster", "How it was found",
             "Where the figures come from"],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(HEADLINES))
def test_a_report_says_it_in_a_sentence_then_shows_it(results: Path, kind: str) -> None:
    text = text_of(results / kind)
    headline = re.search(r'class="headline"[^>]*>(.*?)</p>', text, re.DOTALL)
    assert headline is not None
    assert HEADLINES[kind] in headline[1]
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS[kind]


@pytest.mark.parametrize("kind", list(HEADLINES))
def test_a_report_needs_no_network_and_is_small(results: Path, kind: str) -> None:
    text = text_of(results / kind)
    assert len(text.encode()) < 6e6
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:", text)


def test_a_report_names_profiles_errors_and_versions(results: Path) -> None:
    times = pw.read_run(results / "run").summary["step_times"]
    assert [(row["gpu"], row["tp"], row["basis"]) for row in times] == [("H100-SXM", 1, "measured")]
    text = text_of(results / "run")
    held = times[0]["held_out"]["gemm_tokens"]
    for part in (times[0]["profile"], times[0]["source"], f"gemm_tokens {held['mape']:.1%}", pw.__version__):
        assert part in text


def test_what_is_no_result_is_refused(tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("report", str(tmp_path), code=2)
    assert "not a run directory" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "summary.json").write_text("[1")
    run("report", str(broken), code=2)
    assert "summary.json: damaged" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    run("report", str(results / "run"), "--out", str(tmp_path / "file" / "report.html"), code=2)
    assert "cannot be written" in capsys.readouterr().err


def test_names_are_escaped(tmp_path: Path) -> None:
    found = pw.compare(pw.load({**_plain(), "compare": {"<b>x</b>": {"name": "vllm", "tp": 1}}}))
    found.save(tmp_path / "odd")
    text = text_of(tmp_path / "odd")
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "<b>x</b>" not in text.replace("\\u003cb", "")


def _plain() -> dict[str, Any]:
    return pw.load(
        {
            "model": "llama-3.1-8b",
            "cluster": {"nodes": [{"gpu": "H100-SXM", "count": 1}]},
            "workload": {"rate": 4, "generate": {"requests": 10, "input": {"fixed": 300}, "output": {"fixed": 20}}},
            "system": {"name": "vllm", "tp": 1},
        }
    ).model_dump(mode="json", exclude_unset=True)


def test_small_numbers_keep_their_digits() -> None:
    """TPOT beside E2E: 0.0376 s must not become 0.04."""
    forms = {
        "mixed": [0.0376, 9.62],
        "large": [120.5, 4000.0],
        "middle": [1.5, 90.0],
        "whole": [3, 4],
        "none": [0.0, 0.0],
    }
    shown = table(pd.DataFrame(forms), name="t")
    assert [column.formatter.format for column in shown.columns] == ["0,0.0000", "0,0.0", "0,0.00", "0,0", "0,0"]
