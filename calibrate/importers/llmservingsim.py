"""LLMServingSim's public layer times (vLLM 0.19, CUDA kernels of one layer, eager) as a profile of one GPU family.

``python -m calibrate.importers.llmservingsim profiles/RTX4090 --out vllm-0.19-rtx-4090.json``

PATH is a folder with ``VENDOR/MODEL/VARIANT/meta.yaml`` below it, and ``tpN/*.csv`` beside each of those. One entry
per model and TP degree. A step is ``linear(tokens) + head(sequences) + attention``:

- ``linear``: every layer's GEMMs, norms, rope and activation by tokens, times the model's layers, plus embedding and
  final norm. Mixtures of experts add their expert kernels for the experts that so many tokens reach when each
  chooses at random.
- ``head``: the logits and the sampler by sequences.
- ``attention_prefill``, ``attention_decode``: the kernel by (chunk, context) and by (sequences, context each).
- ``attention_mixed``: what decodes add to the kernel that serves chunks as well: the median over chunks. It is
  1.5 to 2.5 times what they take alone, as that kernel is one for prompts.

There is no overhead between steps: vLLM 0.19 prepares a step while the GPU works on the last one (async_scheduling, its
default). TP files hold a shard's compute without its all-reduces. Left out: TP degrees of a mixture of experts without
expert times, and skewed contexts (a step is told by the sum of its contexts).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import typer

from calibrate import fit
from calibrate.fit import Floats, Rows
from calibrate.profile.file import write_profile
from sim.cost import VLLM_GRAPHS, Grid, HeldOut, Profile, ProfileEntry, Provenance, Table
from sim.model import ModelSpec
from sim.model import model as find_model
from sim.outside import read_yaml
from sim.types import ConfigError

GPUS = {"RTX4090": "RTX-4090", "RTXPRO6000": "RTX-PRO-6000"}
MODELS = {
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
}
DTYPES = {"bf16": "bfloat16"}
PER_LAYER = {
    "qkv_proj": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
    "layernorm": 2,
    "qk_norm": 1,
    "rotary_emb": 1,
}
"""Kernels of one layer, and how often each runs (norms before attention and before the MLP)."""
ONCE = ("embedding", "final_layernorm")
HEAD = ("lm_head", "sampler")
COLUMNS = {
    "dense.csv": ("layer", "tokens", "time_us"),
    "per_sequence.csv": ("layer", "sequences", "time_us"),
    "attention.csv": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
    "moe.csv": ("tokens", "activated_experts", "time_us"),
}
SEED = 19
US = 1e-6


class Attention(NamedTuple):
    """Kernel seconds by (count, context), NaN where not measured: chunks, decodes, and decodes beside chunks."""

    prefill: pd.DataFrame
    decode: pd.DataFrame
    mixed: pd.DataFrame


def import_llmservingsim(path: str | Path) -> Profile:
    """The profile of one GPU folder. ``ConfigError`` names the file, the column or the value that is amiss."""
    folder = Path(path)
    metas = sorted(folder.rglob("meta.yaml"))
    if not metas:
        raise ConfigError(f"{folder}: no meta.yaml below it; give a GPU's folder of LLMServingSim profiles")
    loaded = [(meta.parent, _meta(meta)) for meta in metas]
    hardware = {meta["hardware"] for _, meta in loaded}
    if len(hardware) > 1:
        raise ConfigError(f"{folder}: holds {', '.join(sorted(hardware))}; give the folder of one GPU")
    entries = tuple(entry for variant, meta in loaded for entry in _entries(variant, meta))
    gpu = GPUS[hardware.pop()]
    version, dates = loaded[0][1]["vllm_version"], [str(meta["profiled_at"])[:10] for _, meta in loaded]
    return Profile(name=f"vllm-{version}-{gpu.lower()}", provenance=_provenance(version, max(dates)), entries=entries)


def _provenance(version: str, date: str) -> Provenance:
    return Provenance(
        source="casys-kaist/LLMServingSim 5daddb2, profiles",
        licence="MIT",
        date=date,
        tool="calibrate.importers.llmservingsim",
        engine=f"vLLM {version}, CUDA kernel times of one layer, eager, dummy weights",
        method=(
            "monotone tables through all points; held_out: linear and head with a random fifth of the token counts "
            "left out (five times), attention with each inner row left out, mixed with a random fifth left out"
        ),
    )


def _meta(path: Path) -> dict[str, Any]:
    meta = read_yaml(path, "meta.yaml")
    for field, known in (("hardware", GPUS), ("model", MODELS), ("variant", DTYPES)):
        if not isinstance(meta, dict) or meta.get(field) not in known:
            found = meta.get(field) if isinstance(meta, dict) else meta
            raise ConfigError(f"{path}: {field} is {found!r}; known: {', '.join(known)}")
    for field in ("vllm_version", "profiled_at"):
        if field not in meta:
            raise ConfigError(f"{path}: {field} is missing; copy the file anew")
    return dict(meta)


def _entries(variant: Path, meta: dict[str, Any]) -> Iterator[ProfileEntry]:
    spec = find_model(MODELS[meta["model"]])
    for folder in sorted(variant.glob("tp*")):
        if spec.num_experts is None or (folder / "moe.csv").exists():
            yield _entry(folder, spec, GPUS[meta["hardware"]], DTYPES[meta["variant"]])


def _entry(folder: Path, spec: ModelSpec, gpu: str, dtype: str) -> ProfileEntry:
    tokens, linear_s = linear(folder, spec)
    seqs, head_s = _summed(_read(folder / "per_sequence.csv"), "sequences", dict.fromkeys(HEAD, 1))
    attention = read_attention(folder / "attention.csv")
    return ProfileEntry(
        gpus=(gpu,),
        model=spec.name,
        num_layers=spec.num_layers,
        tp=int(folder.name.removeprefix("tp")),
        dtypes=(dtype,),
        linear=_table(tokens, linear_s),
        head=_table(seqs, head_s),
        attention_prefill=_grid(attention.prefill),
        attention_decode=_grid(attention.decode),
        attention_mixed=_grid(attention.mixed),
        overhead_s=0.0,
        included=frozenset({"embedding"}),
        graphs=VLLM_GRAPHS,
        held_out={
            "linear": _held_table(tokens, linear_s),
            "head": _held_table(seqs, head_s),
            "attention_prefill": _held_grid(attention.prefill),
            "attention_decode": _held_grid(attention.decode),
            "attention_mixed": _held_mixed(folder / "attention.csv"),
        },
    )


def linear(folder: Path, spec: ModelSpec) -> tuple[Floats, Floats]:
    """(token counts, seconds of the whole model but head and attention)."""
    rows = _read(folder / "dense.csv")
    kernels = set(rows.layer.unique())
    if unknown := sorted(kernels - set(PER_LAYER) - set(ONCE)):
        raise ConfigError(f"{folder / 'dense.csv'}: layer {unknown[0]!r} is unknown; known: {', '.join(PER_LAYER)}")
    times = {name: spec.num_layers * count for name, count in PER_LAYER.items() if name in kernels}
    tokens, seconds = _summed(rows, "tokens", times | dict.fromkeys(ONCE, 1))
    if spec.num_experts is not None:
        seconds = seconds + spec.num_layers * _experts(folder / "moe.csv", spec, tokens)
    return tokens, seconds


def _experts(path: Path, spec: ModelSpec, tokens: Floats) -> Floats:
    """Expert kernels of a layer, for as many experts as ``tokens`` reach on average: E(1 - (1 - k/E)^tokens)."""
    assert spec.num_experts is not None
    assert spec.experts_per_token is not None
    table = _read(path).pivot_table(index="tokens", columns="activated_experts", values="time_us")
    reached = spec.num_experts * (1 - (1 - spec.experts_per_token / spec.num_experts) ** tokens)
    knots = [(count, row.dropna()) for count, row in table.iterrows()]
    counts = np.array([count for count, _ in knots], float)
    by_experts = [np.interp(reached, row.index.to_numpy(float), row.to_numpy(float)) for _, row in knots]
    columns = np.transpose(by_experts)
    return np.array([np.interp(n, counts, column) for n, column in zip(tokens, columns, strict=True)]) * US


def read_attention(path: Path) -> Attention:
    """The three parts of the attention kernel's table, in seconds by (count, context)."""
    rows = _read(path)
    alone, decodes, both = _parts(rows)
    mixed = _added(both, alone).groupby(["n_decode", "kv_decode"]).us.median().unstack()
    floor = _filled(decodes).reindex(index=mixed.index, columns=mixed.columns)
    return Attention(alone * US, decodes * US, mixed.clip(lower=floor) * US)


def _parts(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    chunks, seqs = rows.prefill_chunk > 0, rows.n_decode > 0
    alone = rows[chunks & ~seqs].pivot_table(index="prefill_chunk", columns="kv_prefill", values="time_us")
    decodes = rows[~chunks & seqs].pivot_table(index="n_decode", columns="kv_decode", values="time_us")
    return alone, decodes, rows[chunks & seqs]


def _added(both: pd.DataFrame, alone: pd.DataFrame) -> pd.DataFrame:
    base = alone.stack().reindex(pd.MultiIndex.from_frame(both[["prefill_chunk", "kv_prefill"]])).to_numpy(float)
    return both.assign(us=both.time_us - base, base=base)


def _filled(table: pd.DataFrame) -> pd.DataFrame:
    """Contexts that some counts were not measured at, by interpolation (two grids overlap in the file)."""
    return table.interpolate(axis=1, method="index")


def _read(path: Path) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as CSV ({error}); copy LLMServingSim's file anew") from None
    missing = sorted(set(COLUMNS[path.name]) - set(rows.columns))
    if missing:
        raise ConfigError(f"{path}: column {missing[0]!r} is missing; it needs {', '.join(COLUMNS[path.name])}")
    if rows.empty or not np.isfinite(rows.time_us).all() or (rows.time_us <= 0).any():
        raise ConfigError(f"{path}: time_us must be finite and > 0 in every row, and there must be rows")
    return rows


def _summed(rows: pd.DataFrame, count: str, times: dict[str, int]) -> tuple[Floats, Floats]:
    table = rows.pivot_table(index=count, columns="layer", values="time_us").dropna()
    missing = sorted(set(times) - set(table.columns))
    if missing:
        raise ConfigError(f"layer {missing[0]!r} has no times; it needs {', '.join(times)}")
    seconds = sum(table[name].to_numpy(float) * n for name, n in times.items()) * US
    return table.index.to_numpy(float), fit.rising(np.asarray(seconds, float))


def _table(counts: Floats, seconds: Floats) -> Table:
    return Table(counts=tuple(int(x) for x in counts), seconds=tuple(round(float(y), 9) for y in seconds))


def _grid(table: pd.DataFrame) -> Grid:
    return Grid(
        counts=tuple(int(x) for x in table.index),
        contexts=tuple(int(x) for x in table.columns),
        seconds=tuple(tuple(round(float(value), 10) for value in row) for row in _filled(table).to_numpy()),
        per="layer",
    )


def _held_table(counts: Floats, seconds: Floats) -> HeldOut:
    def predict(train: Rows, test: Rows) -> Floats:
        return fit.errors(np.interp(counts[test], counts[train], seconds[train]), seconds[test])

    return fit.validated(predict, fit.splits(len(counts), share=0.2, repeats=5, seed=SEED))


def _held_grid(table: pd.DataFrame) -> HeldOut:
    """Each inner row predicted from its neighbours."""
    values, counts = _filled(table).to_numpy(float), table.index.to_numpy(float)
    shares = []
    for row in range(1, len(counts) - 1):
        low, high, seen = row - 1, row + 1, table.notna().to_numpy()[row]
        part = (counts[row] - counts[low]) / (counts[high] - counts[low])
        between = values[low] + part * (values[high] - values[low])
        shares.append(fit.errors(between[seen], values[row][seen]))
    return fit.held_out(np.concatenate(shares))


def _held_mixed(path: Path) -> HeldOut:
    """Whole mixed kernels, predicted as the chunk alone plus what decodes add elsewhere."""
    alone, _, both = _parts(_read(path))
    added = _added(both, alone).reset_index(drop=True)

    def predict(train: Rows, test: Rows) -> Floats:
        extra = added.loc[train].groupby(["n_decode", "kv_decode"]).us.median()
        seen = added.loc[test]
        more = extra.reindex(pd.MultiIndex.from_frame(seen[["n_decode", "kv_decode"]])).to_numpy(float)
        return fit.errors(seen.base.to_numpy(float) + more, seen.time_us.to_numpy(float))

    return fit.validated(predict, fit.splits(len(added), share=0.2, repeats=1, seed=SEED))


def main(
    path: Annotated[Path, typer.Argument(help="a GPU's folder of LLMServingSim profiles")],
    out: Annotated[Path, typer.Option(help="the profile to write")],
) -> None:
    """Fit LLMServingSim's layer times and write a profile."""
    try:
        write_profile(import_llmservingsim(path), out)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
