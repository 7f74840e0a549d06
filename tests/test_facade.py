"""``import phasewise``: the door of the house."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

import phasewise as pw
from experiments.planning.goodput import Settings

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "model": "llama-3.1-8b",
    "cluster": {"nodes": [{"gpu": "H100-SXM", "count": 2}]},
    "workload": {"rate": 4, "generate": {"requests": 40, "input": {"fixed": 200}, "output": {"fixed": 20}}},
    "system": {"name": "vllm", "tp": 1},
    "slo": {"ttft_s": 1.0, "tpot_s": 0.1},
}


def test_a_scenario_is_run() -> None:
    run = pw.run(SMALL)
    assert len(run.requests) == run.summary["completed"] == 40
    assert run.summary["slo"]["attainment"] == 1.0


def test_load_takes_a_path_plain_data_or_a_scenario(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(pw.load(SMALL).to_yaml())
    assert pw.load(file, ["workload.rate=5"]).workload.rate == 5
    assert pw.load(SMALL, ["seed=3"]).seed == 3
    scenario = pw.load(file)
    assert pw.load(scenario) is scenario
    changed = pw.load(scenario, ["workload.generate.requests=7"])
    assert changed.where == str(file)
    assert len(pw.run(changed).requests) == 7
    with pytest.raises(pw.ConfigError, match=r"workload\.rat"):
        pw.load(SMALL, ["workload.rat=5"])
    assert "rat" not in SMALL["workload"]  # what was given is not changed


def test_systems_are_compared_and_saved(tmp_path: Path) -> None:
    found = pw.compare(SMALL, ["vllm", "sarathi-serve"])
    assert list(found.table.columns) == ["vllm", "sarathi-serve"]
    assert found.table.loc["completed (requests)"].tolist() == [40.0, 40.0]
    found.save(tmp_path / "both")
    pd.testing.assert_frame_equal(pw.read_run(tmp_path / "both" / "vllm").requests, found.runs["vllm"].requests)


def test_rates_are_swept_and_the_goodput_found() -> None:
    rows = pw.sweep(SMALL, [2, 4], seeds=2)
    assert rows[["rate_per_s", "seed"]].to_numpy().tolist() == [[2, 0], [2, 1], [4, 0], [4, 1]]
    longer = pw.load(SMALL, ["workload.generate.requests=1000", "slo.tpot_s=0.01"])
    row = pw.goodput(longer, settings=Settings(seeds=1, tolerance=0.2)).iloc[0]
    assert row["system"] == "vllm"
    assert row["rate_per_s"] > 4


def test_a_layout_is_planned() -> None:
    best = pw.plan(pw.load(SMALL, ["latency=roofline"]), "thunderserve", top=2, requests=40)
    assert best[0].simulated == 1.0
    assert {replica.role for replica in best[0].plan.replicas} <= {"prefill", "decode", "mixed"}


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pw.__version__ == project["version"]


def test_every_name_is_there_and_typed_alike() -> None:
    tree = ast.parse((ROOT / "phasewise" / "__init__.py").read_text())
    typed = {
        alias.asname: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module not in ("importlib", "typing")
        for alias in node.names
    }
    assert typed == pw._PLACES
    assert set(pw.__all__) < set(dir(pw))
    for name in pw.__all__:
        assert getattr(pw, name) is not None


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'simulat'; it has .*simulate"):
        _ = pw.simulat


def test_the_door_loads_nothing() -> None:
    rooms = ("sim", "calibrate", "traces", "experiments", "numpy", "pandas", "pydantic", "torch", "matplotlib")
    code = f"import sys, phasewise; print(sorted(set({rooms}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_running_loads_no_torch_and_no_plots() -> None:
    code = f"import sys, phasewise; phasewise.run({SMALL!r}); print({{'torch', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_it_is_typed() -> None:
    for package in ("phasewise", "sim", "calibrate", "traces", "experiments"):
        assert (ROOT / package / "py.typed").is_file()
