"""Helix's public per-layer times (ASPLOS 2025) as a profile: LLaMA-30B and LLaMA-2-70B on A100-40G, V100, L4 and T4.

``python -m calibrate.importers.helix simulator/model_manager --out helix-2025.json``

PATH holds ``MODEL/MACHINE/prompt_bs2time.csv`` (tokens, ms of one layer) and ``decode_bs2time.csv`` (requests, ms). A
machine of several GPUs is one entry with that tensor-parallel degree, its collectives included. The layer is
``linear(tokens) + attention``: prompts fix ``linear`` from their first count on and decodes its first point; what
decodes of many requests take beyond it is attention, at whatever context was measured (not published), so it does not
grow with the context. Prompts hold their own attention; a chunk's context adds FLOPs at half of peak, derived. Times
are in whole ms from 120 requests on and for all prompts, which bounds what any fit can reach.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import typer

from calibrate import fit
from calibrate.fit import Floats, Rows
from calibrate.profile.file import write_profile
from sim.cluster import gpu
from sim.cost import Grid, HeldOut, Profile, ProfileEntry, Provenance, Table
from sim.model import ModelSpec
from sim.model import model as find_model
from sim.types import ConfigError

MACHINES = {
    "a100": ("A100-40G-SXM", 1),
    "v100": ("V100-16G", 1),
    "l4": ("L4", 1),
    "l4x2": ("L4", 2),
    "t4": ("T4", 1),
    "t4x2": ("T4", 2),
    "t4x4": ("T4", 4),
}
"""Catalogue name and GPUs of a machine (cluster files of the source: A100 with 40 GB, V100 with 16 GB)."""
MODELS = {"llama1_30b": "llama-30b", "llama2_70b": "llama-2-70b"}
DTYPES = ("float16", "bfloat16")
ATTENTION_FLOPS_SHARE = 0.5
CONTEXTS = (0, 8192)
SEED = 2025
SPLITS = 10
PROVENANCE = Provenance(
    source="Thesys-lab/Helix-ASPLOS25 148b733, simulator/model_manager; Mei et al., Helix, ASPLOS 2025",
    licence="Apache-2.0",
    date="2024",
    tool="calibrate.importers.helix",
    engine="one layer in Helix's runtime on vLLM; no overhead between steps",
    method=(
        "monotone tables fitted to all rows; held_out: ten random 80:20 splits of the rows; a chunk's attention to "
        "context derived from FLOPs at 0.5 of peak"
    ),
)


class Layer(NamedTuple):
    """Measured seconds of one layer: prompts by tokens, decodes by requests."""

    tokens: Floats
    prompt_s: Floats
    seqs: Floats
    decode_s: Floats


def import_helix(path: str | Path) -> Profile:
    """The profile of Helix's ``model_manager`` folder. ``ConfigError`` names the file or value that is amiss."""
    folder = Path(path)
    found = [(folder / name, model) for name, model in MODELS.items() if (folder / name).is_dir()]
    if not found:
        raise ConfigError(f"{folder}: none of {', '.join(MODELS)} is below it; give Helix's simulator/model_manager")
    entries = tuple(
        _entry(machine, find_model(model), *MACHINES[machine.name])
        for variant, model in found
        for machine in sorted(variant.iterdir())
        if machine.name in MACHINES
    )
    return Profile(name="helix-2025", provenance=PROVENANCE, entries=entries)


def read_layer(machine: Path) -> Layer:
    """Both tables of one machine, without their row of zeros."""
    tokens, prompt_s = _read(machine / "prompt_bs2time.csv")
    seqs, decode_s = _read(machine / "decode_bs2time.csv")
    return Layer(tokens, prompt_s, seqs, decode_s)


def _read(path: Path) -> tuple[Floats, Floats]:
    try:
        rows = pd.read_csv(path, header=None, names=["count", "ms"], dtype=float)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as count,ms ({error}); copy Helix's file anew") from None
    rows = rows[rows["count"] > 0]
    if len(rows) < 2 or not (rows.ms > 0).all():
        raise ConfigError(f"{path}: needs at least 2 counts, each with ms > 0; copy Helix's file anew")
    return rows["count"].to_numpy(float), rows.ms.to_numpy(float) / 1e3


def _entry(machine: Path, spec: ModelSpec, name: str, tp: int) -> ProfileEntry:
    layer = read_layer(machine)
    tokens, linear_s, seqs, extra_s = fit_layer(layer)
    flops = gpu(name).flops_for("float16") * ATTENTION_FLOPS_SHARE
    pair_s = spec.attention_flops_per_pair / tp / flops
    return ProfileEntry(
        gpus=(name,),
        model=spec.name,
        num_layers=spec.num_layers,
        tp=tp,
        dtypes=DTYPES,
        linear=Table(counts=_whole(tokens), seconds=_rounded(linear_s), per="layer"),
        attention_prefill=_context_grid((1, int(tokens[-1])), pair_s),
        attention_decode=Grid(
            counts=_whole(seqs),
            contexts=CONTEXTS,
            seconds=tuple((value, value) for value in _rounded(extra_s)),
            per="layer",
        ),
        included=frozenset({"collective"}),
        held_out={
            "prefill": _held(layer.tokens, layer.prompt_s),
            "decode": _held(layer.seqs, layer.decode_s),
        },
    )


def fit_layer(layer: Layer) -> tuple[Floats, Floats, Floats, Floats]:
    """(token counts, linear seconds, sequence counts, what decodes take beyond linear)."""
    prompt_s, decode_s = fit.rising(layer.prompt_s), fit.rising(layer.decode_s)
    first = layer.tokens[0]
    early = layer.seqs < first
    early_s = np.minimum(decode_s, np.interp(layer.seqs, [layer.seqs[0], first], [decode_s[0], prompt_s[0]]))[early]
    tokens = np.concatenate([layer.seqs[early], layer.tokens])
    linear_s = fit.rising(np.concatenate([early_s, prompt_s]))
    extra_s = fit.rising(np.maximum(0.0, decode_s - np.interp(layer.seqs, tokens, linear_s)))
    return tokens, linear_s, layer.seqs, extra_s


def _held(counts: Floats, seconds: Floats) -> HeldOut:
    def predict(train: Rows, test: Rows) -> Floats:
        fitted = fit.rising(seconds[train])
        return fit.errors(np.interp(counts[test], counts[train], fitted), seconds[test])

    return fit.validated(predict, fit.splits(len(counts), share=0.2, repeats=SPLITS, seed=SEED))


def _context_grid(counts: tuple[int, ...], pair_s: float) -> Grid:
    rows = tuple(tuple(round(pair_s * count * context, 9) for context in CONTEXTS) for count in counts)
    return Grid(counts=counts, contexts=CONTEXTS, seconds=rows, per="layer")


def _whole(values: Floats) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _rounded(values: Floats) -> tuple[float, ...]:
    return tuple(round(float(value), 9) for value in values)


def main(
    path: Annotated[Path, typer.Argument(help="Helix's simulator/model_manager")],
    out: Annotated[Path, typer.Option(help="the profile to write")],
) -> None:
    """Fit Helix's per-layer times and write a profile."""
    try:
        write_profile(import_helix(path), out)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
