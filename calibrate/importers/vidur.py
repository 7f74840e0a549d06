"""Vidur's public profiling tables (MLSys 2024) as a profile of one GPU type: CUDA times of one layer's kernels.

``phasewise calibrate import vidur data/profiling/compute/a100 --out vidur-a100.json``

PATH is a device's folder with ``VENDOR/MODEL/mlp.csv`` and ``attention.csv`` below it, as in microsoft/vidur; its
collectives are taken from ``../../network/DEVICE_dgx/all_reduce.csv`` (or another folder, ``--network``), if they are
there. All times are ms. A step is ``linear(tokens) + attention + collectives``, put together as Vidur's
``ExecutionTime`` does: every kernel of a layer once, and one residual add. Vidur leaves head and embedding out of a
step: the roofline prices the head, ``emb`` is charged once. Decodes: by batch and context each; chunks: one at a time,
by length and context. Its CPU overheads (``cpu_overheads.csv``) are left out: state ``overhead`` in the scenario.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from calibrate import fit
from calibrate.fit import Floats, Rows
from sim.cost import Grid, HeldOut, Profile, ProfileEntry, Provenance, Table
from sim.model import ModelSpec
from sim.model import model as find_model
from sim.types import ConfigError

GPUS = {"a100": "A100-80G-SXM", "a40": "A40", "h100": "H100-SXM"}
MODELS = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-70b-hf": "llama-2-70b",
    "meta-llama/Meta-Llama-3-8B": "llama-3.1-8b",
    "meta-llama/Meta-Llama-3-70B": "llama-3.1-70b",
}
"""Llama 3 and 3.1 differ in rope's frequencies only: their kernels have the same shapes."""
DTYPES = ("float16", "bfloat16")
PER_LAYER = ("input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm",
             "mlp_up_proj", "mlp_act", "mlp_down_proj", "add")  # fmt: skip
ONCE = "emb"
ATTENTION = ("attn_input_reshape", "attn_kv_cache_save", "attn_output_reshape")
"""What surrounds the attention kernel; absent in some of the files."""
SHAPE = {"n_embd": "hidden_size", "n_kv_head": "num_key_value_heads"}
TP, MS = "num_tensor_parallel_workers", 1e-3
TOLERANCE = 0.01
"""Knots of the linear table are dropped where lines miss no point by more."""
SPARSE = 1.3
"""Counts and contexts of a grid are kept where they are this many times the last one kept."""
SEED = 2024


def import_vidur(path: str | Path, network: str | Path | None = None) -> Profile:
    """The profile of one device's folder. ``ConfigError`` names the file, the column or the value that is amiss."""
    folder = Path(path)
    if folder.name not in GPUS:
        raise ConfigError(f"{folder}: the device {folder.name!r} is unknown; give a folder named {', '.join(GPUS)}")
    found = [(folder / name, model) for name, model in MODELS.items() if (folder / name / "mlp.csv").is_file()]
    if not found:
        raise ConfigError(f"{folder}: no VENDOR/MODEL/mlp.csv of {', '.join(MODELS)} below it; copy the folder anew")
    links = _network(folder, network)
    reduces = None if links is None else all_reduces(links)
    entries = tuple(
        _entry(place, find_model(model), GPUS[folder.name], int(tp), reduces)
        for place, model in found
        for tp in sorted(set(_read(place / "mlp.csv", (TP,))[TP]))
    )
    method = "collectives from " + links.parent.name if links is not None else "no collectives"
    return Profile(name=f"vidur-{folder.name}", provenance=_provenance(method), entries=entries)


def _provenance(method: str) -> Provenance:
    return Provenance(
        source="microsoft/vidur, data/profiling; Agrawal et al., Vidur, MLSys 2024",
        licence="MIT",
        date="2024",
        tool="calibrate.importers.vidur",
        engine="CUDA kernel times of one layer in Sarathi-Serve's kernels, 2024; no overhead between steps",
        method=(
            f"medians, monotone tables thinned to {TOLERANCE:.0%}; {method}; held_out: linear with a random fifth of "
            "the token counts left out (five times), attention with each inner row left out"
        ),
    )


def _network(folder: Path, given: str | Path | None) -> Path | None:
    if given is None:
        beside = folder.parent.parent / "network" / f"{folder.name}_dgx" / "all_reduce.csv"
        return beside if beside.is_file() else None
    path = Path(given)
    path = path / "all_reduce.csv" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--network {given}: no all_reduce.csv there; leave it out or give Vidur's network folder")
    return path


def all_reduces(path: Path) -> dict[int, Table]:
    """Seconds by bytes, by GPUs, of a network folder's ``all_reduce.csv`` (all GPUs in one machine)."""
    column = "time_stats.all_reduce.median"
    rows = _read(path, (column, "num_workers", "size", "devices_per_node"))
    rows = rows[rows.num_workers == rows.devices_per_node]
    return {int(count): _by_bytes(rows[rows.num_workers == count], column) for count in sorted(set(rows.num_workers))}


def send_receives(path: Path) -> Table:
    """Seconds by bytes of a network folder's ``send_recv.csv``: one pair inside one machine."""
    column = "time_stats.send_recv.median"
    rows = _read(path, (column, "num_workers", "size", "devices_per_node"))
    inside = rows[(rows.num_workers == 2) & (rows.devices_per_node == 2)]
    return _by_bytes(inside if len(inside) else rows[rows.num_workers == 2], column)


def _by_bytes(rows: pd.DataFrame, column: str) -> Table:
    medians = rows[rows["size"] > 0].groupby("size")[column].median()
    seconds = fit.rising(medians.to_numpy(float) * MS)
    return _table(*fit.thinned(medians.index.to_numpy(float), seconds, TOLERANCE))


def _entry(place: Path, spec: ModelSpec, gpu: str, tp: int, reduces: dict[int, Table] | None) -> ProfileEntry:
    tokens, linear_s = linear(place / "mlp.csv", spec, tp)
    prefill, decode = attention(place / "attention.csv", spec, tp)
    reduce = (reduces or {}).get(tp)
    return ProfileEntry(
        gpus=(gpu,),
        model=spec.name,
        num_layers=spec.num_layers,
        tp=tp,
        dtypes=DTYPES,
        linear=_table(*fit.thinned(tokens, linear_s, TOLERANCE)),
        collective=None if reduce is None else _collective(reduce, spec),
        attention_prefill=_grid(prefill),
        attention_decode=_grid(decode),
        included=frozenset({"embedding"}),
        held_out={
            "linear": _held_table(tokens, linear_s),
            "attention_prefill": _held_grid(prefill),
            "attention_decode": _held_grid(decode),
        },
    )


def linear(path: Path, spec: ModelSpec, tp: int) -> tuple[Floats, Floats]:
    """Seconds of all layers' kernels but attention, and of the embedding, by tokens."""
    columns = {name: f"time_stats.{name}.median" for name in (*PER_LAYER, ONCE)}
    rows = _read(path, (*columns.values(), "num_tokens", TP, "n_embd", "n_head", "n_kv_head"))
    rows = _of(path, rows, {**SHAPE, "n_head": "num_attention_heads"}, spec, tp)
    seconds = rows[[columns[name] for name in PER_LAYER]].sum(axis=1) * spec.num_layers + rows[columns[ONCE]]
    counts, medians, weights = fit.medians(rows.num_tokens, seconds * MS)
    return counts, fit.rising(medians, weights)


def attention(path: Path, spec: ModelSpec, tp: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Seconds of one layer's attention by (chunk, context) and by (sequences, context); NaN where not measured."""
    kernels = {True: "time_stats.attn_prefill.median", False: "time_stats.attn_decode.median"}
    columns = (*kernels.values(), "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill", TP, "n_embd",
               "n_q_head", "n_kv_head")  # fmt: skip
    rows = _of(path, _read(path, columns), {**SHAPE, "n_q_head": "num_attention_heads"}, spec, tp)
    around = [name for part in ATTENTION if (name := f"time_stats.{part}.median") in rows]
    grids = []
    for prefill, count in ((True, "prefill_chunk_size"), (False, "batch_size")):
        part = rows[rows.is_prefill.astype(bool) == prefill]
        part = part[part.batch_size == 1] if prefill else part
        seconds = (part[kernels[prefill]] + part[around].fillna(0.0).sum(axis=1)) * MS
        if part.empty or not np.isfinite(seconds).all() or (seconds <= 0).any():
            raise ConfigError(
                f"{path}: {kernels[prefill]} must be > 0 in every row of its kind, at TP {tp}, and be there"
            )
        grids.append(
            part.assign(s=seconds).pivot_table(index=count, columns="kv_cache_size", values="s", aggfunc="median")
        )
    return _sparse(grids[0]), _sparse(grids[1])


def _of(path: Path, rows: pd.DataFrame, shape: dict[str, str], spec: ModelSpec, tp: int) -> pd.DataFrame:
    """The rows of this degree, known to be the model's."""
    rows = rows[rows[TP] == tp].drop_duplicates()
    for column, field in shape.items():
        other = rows[rows[column] != getattr(spec, field)]
        if len(other):
            value = other[column].iloc[0]
            raise ConfigError(f"{path}: {column} is {value}, {spec.name} has {getattr(spec, field)}; copy it anew")
    if rows.empty:
        raise ConfigError(f"{path}: no row with {TP} {tp}, which mlp.csv has; copy it anew")
    return rows


def _read(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as CSV ({error}); copy Vidur's file anew") from None
    missing = [name for name in columns if name not in rows]
    if missing:
        raise ConfigError(f"{path}: column {missing[0]!r} is missing; copy Vidur's file anew")
    if rows.empty:
        raise ConfigError(f"{path}: has no rows; copy Vidur's file anew")
    return rows


def _sparse(grid: pd.DataFrame) -> pd.DataFrame:
    """Fewer rows and columns, each larger by a share than the last; the ends stay."""
    return grid.loc[_kept(grid.index.to_numpy(float)), _kept(grid.columns.to_numpy(float))]


def _kept(axis: Floats) -> list[float]:
    kept = [axis[0]]
    for value in axis[1:-1]:
        if value >= SPARSE * kept[-1] and axis[-1] >= SPARSE * value:
            kept.append(value)
    return [*kept, axis[-1]]


def _filled(grid: pd.DataFrame) -> Floats:
    """Contexts that a row lacks: between those it has by lines; beyond them by its last slope, or the smaller row's
    in proportion to the count."""
    contexts, counts = grid.columns.to_numpy(float), grid.index.to_numpy(float)
    rows: list[Floats] = []
    for number, (_, row) in enumerate(grid.iterrows()):
        known = row.dropna()
        x, y = known.index.to_numpy(float), fit.rising(known.to_numpy(float))
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else 0.0
        beyond = y[-1] + slope * (contexts - x[-1])
        if number:
            above = rows[-1] - np.interp(x[-1], contexts, rows[-1])
            beyond = np.maximum(beyond, y[-1] + above * counts[number] / counts[number - 1])
        rows.append(np.where(contexts <= x[-1], np.interp(contexts, x, y), beyond))
    return np.array(rows)


def _grid(grid: pd.DataFrame) -> Grid:
    return Grid(
        counts=tuple(int(value) for value in grid.index),
        contexts=tuple(int(value) for value in grid.columns),
        seconds=tuple(tuple(round(float(value), 10) for value in row) for row in _filled(grid)),
        per="layer",
    )


def _table(counts: Floats, seconds: Floats) -> Table:
    return Table(counts=tuple(int(x) for x in counts), seconds=tuple(round(float(y), 9) for y in seconds))


def _collective(reduce: Table, spec: ModelSpec) -> Table:
    """Two all-reduces a layer, by tokens."""
    token_bytes = spec.hidden_size * spec.activation_bytes_per_value
    tokens = sorted({max(1, size // token_bytes) for size in reduce.counts})
    seconds = np.interp([count * token_bytes for count in tokens], reduce.counts, reduce.seconds)
    return Table(counts=tuple(tokens), seconds=tuple(round(2 * float(value), 9) for value in seconds), per="layer")


def _held_table(counts: Floats, seconds: Floats) -> HeldOut:
    """Of inner counts: the ends are never left out."""

    def predict(_train: Rows, test: Rows) -> Floats:
        inner = test[(test > 0) & (test < len(counts) - 1)]
        seen = np.delete(np.arange(len(counts)), inner)
        return fit.errors(np.interp(counts[inner], counts[seen], seconds[seen]), seconds[inner])

    return fit.validated(predict, fit.splits(len(counts), share=0.2, repeats=5, seed=SEED))


def _held_grid(grid: pd.DataFrame) -> HeldOut:
    """Each inner row predicted from its neighbours, where it was measured."""
    values, counts = _filled(grid), grid.index.to_numpy(float)
    shares = []
    for row in range(1, len(counts) - 1):
        part = (counts[row] - counts[row - 1]) / (counts[row + 1] - counts[row - 1])
        between = values[row - 1] + part * (values[row + 1] - values[row - 1])
        seen = grid.notna().to_numpy()[row]
        shares.append(fit.errors(between[seen], values[row][seen]))
    return fit.held_out(np.concatenate(shares) if shares else [])
