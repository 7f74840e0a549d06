"""All that a machine with a GPU can tell, in one command: ``python -m experiments.on_gpu --out DIR``.

Profiles of models, their ratio to the shipped ones, what share of the bandwidth decode steps reach, and predictions
beside executions. Each part is a process with its share of the time; one that fails does not end the others. The same
command goes on where it stopped: parts that succeeded are not run again, calibrations keep their points.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from calibrate.profile.file import read_profile, shipped_profiles
from experiments.runs.rundir import write_json
from sim.types import ConfigError

SCENARIOS = Path(__file__).parent / "validation" / "scenarios"
PHASEWISE = [sys.executable, "-m", "experiments.cli"]
LEAST_S = 20.0
"""A part is not begun with less."""
ENOUGH_MINUTES = 45
"""For two executions of each scenario."""
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 4096,
    "dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A command that may print a JSON object. ``weight``: of the time; ``measures``: it is told how long it may."""

    name: str
    command: list[str]
    weight: float
    measures: bool = False


def parts(work: Path, device: str, gpu: str, repeats: int, *, quick: bool) -> list[Part]:
    """In the order they run; ``repeats`` of each execution. On the CPU a model of two layers stands for all."""
    cpu = device == "cpu"
    tiny = work / "tiny.json"
    if cpu:
        tiny.write_text(json.dumps(TINY), encoding="utf-8")
    first = str(tiny) if cpu else "llama-3.1-8b"
    others = [] if cpu else [("llama-2-70b", "1,2,4,8", 3.0), ("qwen3-30b-a3b", "1", 1.5)]
    served = [(first, 100.0, 20, 200)] if cpu else [(first, 25.0, 200, 16384), ("qwen3-32b", 6.1, 60, 8192)]
    bandwidth = [sys.executable, "-m", "calibrate.bandwidth", "--model", first, "--device", device]
    found = [Part(name="decode-bandwidth", command=bandwidth + ["--context", "64"] * cpu, weight=1.0)]
    for model, saturated, requests, blocks in served:
        found.append(_calibration(work, model, "1", 2.0, device, gpu))
        found += [_split(work, model, device, gpu, repeats)] * (model == first)
        for system in ("vllm", "sarathi-serve"):
            for load in (0.5,) if quick else (0.5, 0.9):
                sets = {"workload.rate": load * saturated, "workload.generate.requests": requests,
                        "system.name": system, "system.engine.num_kv_blocks": blocks}  # fmt: skip
                found.append(_colocated(work, model, f"{system}-{load:.0%}".rstrip("%"), sets, device, gpu, repeats))
    return found + [_calibration(work, *shape, device, gpu) for shape in others]


def _stem(model: str) -> str:
    return Path(model).name.removesuffix(".json")


def _profile(work: Path, model: str) -> Path:
    return work / f"{_stem(model)}.profile.json"


def _calibration(work: Path, model: str, tp: str, weight: float, device: str, gpu: str) -> Part:
    out, cpu = _profile(work, model), device == "cpu"
    small = ["--max-tokens", "64", "--max-seqs", "64", "--max-context", "128", "--threads", "1"] * cpu
    command = [*PHASEWISE, "calibrate", "--model", model, "--tp", tp, "--device", device, "--gpu", gpu, "--force",
               "--quiet", "--out", str(out), *small]  # fmt: skip
    return Part(name=f"calibrate-{_stem(model)}", command=command, weight=weight, measures=True)


def _validation(
    work: Path,
    name: str,
    model: str,
    scenario: str,
    sets: Mapping[str, Any],
    more: list[str],
    device: str,
    repeats: int,
) -> Part:
    """With the profile that was measured before, whatever its errors: they are in the report."""
    short = {"workload.generate.input": {"uniform": [16, 48]}, "workload.generate.output": {"uniform": [4, 8]}}
    sets = {"model": model, "accept_error": 10, **sets, **(short if device == "cpu" else {})}
    changes = [text for key, value in sets.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    command = [*PHASEWISE, "validate", str(SCENARIOS / scenario), "--device", device, "--overhead", "--json", "--quiet",
               "--profile", str(_profile(work, model)), "--repeats", str(repeats), "--out", str(work / name), *more,
               *changes]  # fmt: skip
    return Part(name=name, command=command, weight=2.5)


def _colocated(
    work: Path, model: str, name: str, sets: dict[str, Any], device: str, gpu: str, repeats: int
) -> Part:  # fmt: skip
    name = f"validate-{_stem(model)}-{name}"
    return _validation(work, name, model, "validate_h200.yaml", _nodes(gpu, 1) | sets, [], device, repeats)


def _split(work: Path, model: str, device: str, gpu: str, repeats: int) -> Part:
    sets = _nodes(gpu, 4) | {"workload.generate.requests": 20 if device == "cpu" else 100}
    sets |= {"system.engine.num_kv_blocks": 200} if device == "cpu" else {}
    more, scenario = ["--mode", "measured-step"], "validate_h200_split.yaml"
    return _validation(work, "validate-split-splitwise-4-bits", model, scenario, sets, more, device, repeats)


def _nodes(gpu: str, count: int) -> dict[str, Any]:
    one = {"gpu": gpu, "count": 1, "nodes": count} if gpu == "CPU" else {"gpu": gpu, "count": count}
    links = {"cluster.links": {"inter_node": {"gbps": 10, "latency_us": 50}}} if gpu == "CPU" else {}
    return {"cluster.nodes": [one], **links}


# ---------------------------------------------------------------- running


def run_part(part: Part, share_s: float, limit_s: float) -> dict[str, Any]:
    """What became of it: ``error`` is None, or the last lines that it said. ``share_s``: the time it should take."""
    command = [*part.command, "--minutes", f"{0.7 * share_s / 60:.3f}"] if part.measures else part.command
    started_s = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL)
        code, said, out = done.returncode, done.stderr, done.stdout
    except subprocess.TimeoutExpired:
        code, said, out = 124, f"not done after its {limit_s:.0f} s", ""
    row: dict[str, Any] = {"seconds": round(time.monotonic() - started_s, 1), "error": None, "result": None}
    if code:
        row["error"] = "\n".join(said.strip().splitlines()[-8:]) or f"exit status {code}"
    elif out.lstrip().startswith("{"):
        row["result"] = json.loads(out)
    return row


def ratios_to_shipped(profile: Path, gpu: str) -> dict[str, Any]:
    """Median, least and largest ratio of each operator to the shipped profiles of this GPU, by profile."""
    from calibrate.profile.report import ratio_summary, ratios

    found: dict[str, Any] = {}
    for name, path in shipped_profiles().items():
        other = read_profile(path)
        if any(gpu in part.gpus for part in other.parts):
            try:
                table = ratio_summary(ratios(read_profile(profile), other))
            except ConfigError as error:
                found[name] = str(error)
            else:
                found[name] = json.loads(table.to_json(orient="records"))
    return found


def page(summary: Mapping[str, Any]) -> str:
    """The summary to read: a row per part, bandwidths, errors of the validations, ratios of operators."""
    lines = [f"# {summary['gpu']}", "", "| part | seconds | result |", "|---|---|---|"]
    for name, row in summary["parts"].items():
        said = (row["error"] or "done").splitlines()[-1].replace("|", "/")
        lines.append(f"| {name} | {row['seconds']} | {said} |")
    results = {name: row["result"] for name, row in summary["parts"].items() if row["result"]}
    for step in results.get("decode-bandwidth", {}).get("steps", ()):
        share = f"{step['share_of_copy']:.0%} of a copy's bandwidth"
        lines += [
            "",
            f"Decode, {step['sequences']} sequences of {step['context']}: {step['step_s'] * 1e3:.2f} ms, {share}",
        ]
    lines += ["", "| validation | metric | predicted | real | error | noise |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        for row in result.get("figures", ()):
            if row["statistic"] in ("mean", "") and row["error"] is not None:
                values = f"{row['predicted']:.4g} | {row['real']:.4g} | {row['error']:+.1%} | {_share(row['noise'])}"
                lines.append(f"| {name} | {row['metric']} | {values} |")
    lines += ["", "| profile | over | operator | tp | median | least | most |", "|---|---|---|---|---|---|---|"]
    for profile, others in summary["ratios"].items():
        for other, rows in others.items():
            for row in rows if isinstance(rows, list) else ():
                values = " | ".join(f"{row[key]:.3g}" for key in ("median", "min", "max"))
                lines.append(f"| {profile} | {other} | {row['operator']} | {row['tp']} | {values} |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def main(
    out: Annotated[Path, typer.Option(metavar="DIR", help="receives summary.json, page.md and work.tar")],
    minutes: Annotated[float, typer.Option(min=0.1, help="time for all parts together")] = 25.0,
    quick: Annotated[bool, typer.Option("--quick", help="fewer requests, one run of each, half load only")] = False,
    only: Annotated[str | None, typer.Option("--parts", help="beginnings of the parts' names, comma-separated")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command with a tiny model")] = "cuda",
) -> None:
    """Calibrate, report, measure decode bandwidth, validate. Exit code 1 if a part failed or had no time."""
    from calibrate.bench.device import gpu_name

    work, ends_s = out / "work", time.monotonic() + 60 * minutes
    gpu = gpu_name(device)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "work.tar").is_file() and not work.exists():
        with tarfile.open(out / "work.tar") as tar:
            tar.extractall(out, filter="data")
    work.mkdir(exist_ok=True)
    path = out / "summary.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
    known = parts(work, device, gpu, 2 if minutes >= ENOUGH_MINUTES and not quick else 1, quick=quick)
    chosen = [part for part in known if part.name.startswith(tuple((only or "").split(",")))]
    if not chosen:
        raise ConfigError(f"--parts: {only}: known: {', '.join(part.name for part in known)}")
    due = [part for part in chosen if rows.get(part.name, {"error": "new"})["error"] is not None]
    for number, part in enumerate(due):
        left_s = ends_s - time.monotonic()
        share_s = left_s * part.weight / sum(later.weight for later in due[number:])
        print(f"{part.name}: about {share_s:.0f} s", file=sys.stderr)
        rows[part.name] = {"seconds": 0, "error": "no time left", "result": None}
        if left_s >= LEAST_S:
            rows[part.name] = run_part(part, share_s, min(left_s, 2 * share_s))
        profiles = sorted(work.glob("*.profile.json"))
        ratios = {path.name.partition(".profile")[0]: ratios_to_shipped(path, gpu) for path in profiles}
        write_json(path, {"gpu": gpu, "device": device, "parts": rows, "ratios": ratios})
    (out / "page.md").write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    with tarfile.open(out / "work.tar", "w") as tar:
        tar.add(work, "work")
    shutil.rmtree(work)
    failed = [part.name for part in chosen if rows[part.name]["error"] is not None]
    print(f"{out / 'page.md'}: {len(chosen) - len(failed)} of {len(chosen)} parts done; missing: {failed or 'none'}")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
