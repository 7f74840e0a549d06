"""``phasewise systems | gpus | models | profiles``: what the package knows by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="print a JSON list")]
GIB = 2**30


def register(app: typer.Typer) -> None:
    for command in (systems, gpus, models, profiles):
        app.command()(command)


def systems(json_: Json = False) -> None:
    """List the serving systems and the options a scenario may set for each."""
    import inspect

    from sim.systems import SYSTEMS

    rows: list[dict[str, Any]] = []
    for name, factory in SYSTEMS.items():
        text = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
        options = {
            option: None if parameter.default is inspect.Parameter.empty else parameter.default
            for option, parameter in inspect.signature(factory).parameters.items()
            if option != "simulate"
        }
        rows.append({"name": name, "description": text, "mirrors": factory().mirrors, "options": options})
    if json_:
        _print_json(rows)
        return
    for row in rows:
        shown = ", ".join(f"{option}={json.dumps(value)}" for option, value in row["options"].items())
        print(f"{row['name']}\n  {row['description']}\n  mirrors: {row['mirrors']}\n  options: {shown}")


def gpus(json_: Json = False) -> None:
    """List the GPU types of the catalogue (dense peak rates; prices are defaults to override)."""
    from sim.cluster import gpus as catalogue

    if json_:
        _print_json([_gpu_fields(gpu) for gpu in catalogue()])
        return
    rows = [
        (
            gpu.name,
            f"{gpu.memory_bytes / GIB:.0f}",
            f"{gpu.bandwidth_bytes_per_s / 1e9:,.0f}",
            f"{gpu.flops_for('bfloat16') / 1e12:,.0f}",
            "-" if gpu.nvlink_bytes_per_s is None else f"{gpu.nvlink_bytes_per_s / 1e9:,.0f}",
            f"{gpu.pcie_bytes_per_s / 1e9:,.1f}",
            _or_dash(gpu.tdp_w, "{:.0f}"),
            _or_dash(gpu.usd_per_hour, "{:.2f}"),
            _or_dash(gpu.usd_per_hour_spot, "{:.2f}"),
        )
        for gpu in catalogue()
    ]
    _print_table(
        ("GPU", "memory (GiB)", "bandwidth (GB/s)", "16-bit TFLOP/s", "NVLink (GB/s)", "PCIe (GB/s)", "TDP (W)", "$/h",
         "$/h spot"), rows)  # fmt: skip


def models(
    config: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="a catalogue name or a Hugging Face config.json: its card")
    ] = None,
    json_: Json = False,
) -> None:
    """List the models of the catalogue, or show one: parameters, bytes, KV, and the fewest GPUs that hold it."""
    from sim.model import models as catalogue

    if config is not None:
        from experiments.pages.model_card import card, lines
        from sim.model import model

        found = card(model(config))
        print(json.dumps(found, indent=2, allow_nan=False) if json_ else "\n".join(lines(found)))
        return

    rows: list[dict[str, Any]] = [
        {
            "name": model.name,
            "params": model.params,
            "active_params": model.active_params,
            "num_layers": model.num_layers,
            "dtype": model.dtype,
            "weight_bytes": model.weight_bytes(0, model.num_layers),
            "kv_bytes_per_token": model.kv_bytes_per_token(),
            "max_position_embeddings": model.max_position_embeddings,
        }
        for model in catalogue()
    ]
    if json_:
        _print_json(rows)
        return
    _print_table(
        ("model", "parameters (1e9)", "active (1e9)", "layers", "weights (GB)", "KV (KiB/token)", "context (tokens)"),
        [
            (row["name"], f"{row['params'] / 1e9:.1f}", f"{row['active_params'] / 1e9:.1f}", str(row["num_layers"]),
             f"{row['weight_bytes'] / 1e9:.1f}", f"{row['kv_bytes_per_token'] / 1024:.1f}",
             _or_dash(row["max_position_embeddings"], "{}"))
            for row in rows
        ],
    )  # fmt: skip


def profiles(
    json_: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="a page about every profile, instead")] = False,
) -> None:
    """List the shipped latency profiles by GPU type, with source and held-out error; the others take the roofline."""
    if markdown:
        from experiments.pages.profiles_page import page

        print(page(), end="")
        return
    rows = list(_profile_rows())
    if json_:
        _print_json(rows)
        return
    _print_table(
        ("profile", "GPU", "model", "TP", "held-out error (mean)", "source"),
        [
            (row["profile"], ", ".join(row["gpus"]), row["model"] or "any", str(row["tp"] or "any"),
             ", ".join(f"{kind} {error['mape']:.1%}" for kind, error in row["held_out"].items()) or "-", row["source"])
            for row in rows
        ],
    )  # fmt: skip


def _profile_rows() -> Iterator[dict[str, Any]]:
    from calibrate.profile.file import read_profile, shipped_profiles
    from calibrate.profile.relatives import RELATIVES
    from sim.cluster import gpus as catalogue

    known: set[str] = set()
    for name, path in shipped_profiles().items():
        profile = read_profile(path)
        for part in profile.parts:
            known.update(part.gpus)
            yield {
                "profile": name, "gpus": list(part.gpus), "model": getattr(part, "model", None),
                "tp": getattr(part, "tp", None), "dtypes": list(part.dtypes),
                "held_out": {kind: {"mape": error.mape, "largest": error.largest, "points": error.points}
                             for kind, error in part.held_out.items()},
                "source": profile.provenance.source, "engine": profile.provenance.engine,
            }  # fmt: skip
    for gpu in catalogue():
        relative = RELATIVES.get(gpu.name)
        if relative is not None:
            yield {
                "profile": relative.profile, "gpus": [gpu.name], "model": None, "tp": None,
                "dtypes": ["bfloat16", "float16"], "held_out": {}, "engine": None,
                "source": "scaled from that profile's GPU by specification; not measured",
            }  # fmt: skip
        elif gpu.name not in known:
            yield {
                "profile": "roofline", "gpus": [gpu.name], "model": None, "tp": None, "dtypes": sorted(gpu.flops),
                "held_out": {}, "source": "data sheet and typical efficiencies; not measured", "engine": None,
            }  # fmt: skip


def _gpu_fields(gpu: Any) -> dict[str, Any]:
    from dataclasses import fields

    values = {field.name: getattr(gpu, field.name) for field in fields(gpu)}
    return {**values, "flops": dict(values["flops"])}


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain columns, easy to cut: the first is left-aligned, as is text; numbers go right."""
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    numeric = [all(_is_number(row[place]) for row in rows) for place in range(len(header))]
    for row in (header, *rows):
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        print("  ".join(cells).rstrip())


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "", 1).isdecimal()
