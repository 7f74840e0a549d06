"""NVIDIA aiconfigurator's public kernel tables (vLLM backends) as kernel tables of one GPU type, for any model.

``python -m calibrate.importers.aiconfigurator data/h100_sxm --out vllm-0.19-h100-sxm.json``

PATH is a system's folder with ``gemm/vllm/VERSION``, ``attention/vllm/VERSION`` and ``comm/vllm/VERSION`` below it.
Kept: 16-bit GEMMs by (tokens, n, k) on a thinner grid (and those of 8-bit floats, thinner still, from vLLM 0.19 on:
0.14 quantises their input in some ten kernels that a server's compiled graph fuses), attention of 128-wide heads with a
16-bit cache and no window (prompts one at a time, without context; decodes by sequences and context), and the
all-reduce of 16-bit values that vLLM captures in graphs, or NCCL's (``comm/nccl``) where that is faster or vLLM's was
not measured: between PCIe cards the two hosts differ by up to a factor of two and a half. ``message_size`` counts
values, not bytes (the collectors write ``size // bytes_per_element``; int8 takes as long as half of half as many).
Repeated rows count as their median. All take no longer than larger ones that were measured (they can be padded): some
rows are outliers by a factor of three. Decodes too large to measure continue their row's last slope, or
take in proportion what fewer sequences take (reading the cache), whichever is more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from calibrate import fit
from calibrate.fit import Floats
from calibrate.profile.file import write_profile
from calibrate.profile.scaling import BESIDE_CHUNKS, FLASH3
from sim.cost import VLLM_GRAPHS, AttentionTable, GemmTable, Grid, HeldOut, Kernels, Profile, Provenance, Table
from sim.types import ConfigError

GPUS = {
    "a100_sxm": ("A100-80G-SXM",),
    "h100_sxm": ("H100-SXM",),
    "h200_sxm": ("H200-SXM",),
    "l40s": ("L40S",),
    "rtx_pro_6000_server": ("RTX-PRO-6000",),
}
DTYPES = ("bfloat16", "float16")
TOKENS: tuple[int, ...] = (
    1, 8, 16, 32, 48, 64, 80, 96, 112, 128, 129, 160, 192, 224, 256, 257, 384, 512, 513, 768, 769, 1024, 1025, 1280,
    1281, 1536, 1537, 2048, 2049, 2560, 3072, 4096, 8192, 16384,
)  # fmt: skip
"""Where the file has them; one more than a multiple of 128 shows what a further tile of rows costs."""
WIDTHS = (
    128,
    256,
    512,
    1024,
    1536,
    2048,
    2560,
    3072,
    3584,
    4096,
    5120,
    6144,
    7168,
    8192,
    10240,
    12288,
    16384,
    51200,
    65536,
)
TOKENS8 = (1, 16, 32, 64, 96, 128, 192, 256, 512, 513, 1024, 1025, 2048, 2049, 4096, 4097, 8192, 16384)
"""For 8-bit floats, thinner; an odd count takes up to 80 % longer than the even one before it."""
WIDTHS8 = (256, 512, 1024, 2048, 4096, 6144, 8192, 12288, 16384, 65536)
FUSED_QUANTISATION = (0, 19)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTEXTS = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
HEAD_DIM = 128
MS = 1e-3
VALUE_BYTES = 2
"""Of a half or bfloat16."""
PROMPTS_FROM = {"h200_sxm": "h100_sxm"}
"""Whose table of prompts to take, from the folder beside: an H200 computes as fast as an H100, while its own table has
2.6 PFLOP/s in prompts of 16,384 tokens, more than twice what the chip can do."""


def import_aiconfigurator(path: str | Path) -> Profile:
    """The profile of one system's folder. ``ConfigError`` names the file or column that is amiss."""
    folder = Path(path)
    if folder.name not in GPUS:
        raise ConfigError(f"{folder}: {folder.name!r} is not a system that is known; known: {', '.join(GPUS)}")
    gemms, version = _read(folder, "gemm", "gemm_perf", ("gemm_dtype", "m", "n", "k"))
    attention = ("num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype", "batch_size", "isl", "step")
    prompted = folder.with_name(PROMPTS_FROM.get(folder.name, folder.name))
    prompts, _ = _read(prompted, "attention", "context_attention_perf", attention)
    decodes, _ = _read(folder, "attention", "generation_attention_perf", attention)
    reduces, _ = _read(folder, "comm", "custom_allreduce_perf", ("num_gpus", "message_size", "kernel_source"))
    gemm = gemm_table(gemms)
    kernels = Kernels(
        gpus=GPUS[folder.name],
        dtypes=DTYPES,
        gemm=gemm,
        gemm8=gemm_table(gemms, "fp8", TOKENS8, WIDTHS8) if _fused(gemms, version) else None,
        attention=attention_tables(_plain(prompts), _plain(decodes)),
        all_reduce=faster(all_reduce_tables(reduces), _nccl_tables(folder)),
        graphs=VLLM_GRAPHS,
        beside_chunks=0.0 if GPUS[folder.name][0].startswith(FLASH3) else BESIDE_CHUNKS,
        held_out={"gemm_tokens": _held_tokens(gemm), "gemm_shapes": _held_shapes(gemm)},
    )
    name = f"vllm-{version.rpartition('.')[0]}-{GPUS[folder.name][0].lower()}"
    return Profile(name=name, provenance=_provenance(version), kernels=(kernels,))


def _provenance(version: str) -> Provenance:
    return Provenance(
        source="ai-dynamo/aiconfigurator 095f58a, systems/data",
        licence="Apache-2.0",
        date="2026",
        tool="calibrate.importers.aiconfigurator",
        engine=f"kernels of vLLM {version}",
        method=(
            "tables as measured, thinned; held_out: each inner token count (gemm_tokens) and each inner shape "
            "(gemm_shapes) predicted from its neighbours"
        ),
    )


def _read(folder: Path, kind: str, name: str, columns: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """The newest version's table, in seconds, and that version."""
    files = sorted(folder.glob(f"{kind}/vllm/*/{name}.parquet"))
    if not files:
        others = sorted({path.parts[-3] for path in folder.glob(f"{kind}/*/*/{name}.parquet")})
        mend = f"its tables of {', '.join(others)} are not read" if others else "copy the folder anew"
        raise ConfigError(f"{folder}: no {kind}/vllm/VERSION/{name}.parquet below it; {mend}")
    return _checked(files[-1], columns), files[-1].parent.name


def _checked(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table with its times in seconds as column ``s``."""
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet ({error}); copy it anew") from None
    missing = sorted({*columns, "latency"} - set(rows.columns))
    if missing:
        raise ConfigError(f"{path}: column {missing[0]!r} is missing; copy it anew")
    if not (rows.latency > 0).all():
        raise ConfigError(f"{path}: latency must be > 0 in every row; copy it anew")
    return rows.assign(s=rows.latency * MS)


def gemm_table(
    rows: pd.DataFrame, dtype: str = "bfloat16", counts: Sequence[int] = TOKENS, widths: Sequence[int] = WIDTHS
) -> GemmTable:
    """GEMMs on the grid that ``counts`` and ``widths`` share with the file; holes are filled geometrically."""
    gemms = rows[rows.gemm_dtype == dtype]
    tokens = [count for count in counts if (gemms.m == count).any()]
    n, k = ([width for width in widths if (gemms[side] == width).any()] for side in ("n", "k"))
    table = gemms.groupby(["n", "k", "m"]).s.median()
    cube = (
        table.reindex(pd.MultiIndex.from_product([n, k, tokens]))
        .to_numpy(copy=True)
        .reshape(len(n), len(k), len(tokens))
    )
    for i, j in np.argwhere(np.isnan(cube).any(axis=2)):  # the largest square is not measured
        cube[i, j] = cube[i - 1, j] * cube[i, j - 1] / cube[i - 1, j - 1]
    return GemmTable(tokens=tuple(tokens), n=tuple(n), k=tuple(k), seconds=_nested(_levelled(cube)))


def _fused(rows: pd.DataFrame, version: str) -> bool:
    """Whether there are 8-bit GEMMs whose input takes one kernel to quantise."""
    return bool((rows.gemm_dtype == "fp8").any()) and tuple(map(int, version.split(".")[:2])) >= FUSED_QUANTISATION


def _levelled(table: Floats) -> Floats:
    """Lowered to the least of what larger shapes take, along every axis."""
    for axis in range(table.ndim):
        table = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
    return table


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    keep = (rows.head_dim == HEAD_DIM) & (rows.kv_cache_dtype == "bfloat16")
    return rows[keep & (rows.window_size == 0)] if "window_size" in rows else rows[keep]


def attention_tables(prompts: pd.DataFrame, decodes: pd.DataFrame) -> tuple[AttentionTable, ...]:
    """One per pair of (heads, KV heads) that both files have."""
    shape = ["num_heads", "num_key_value_heads"]
    alone = prompts[prompts.batch_size == 1].groupby([*shape, "isl"]).s.median()
    steps = decodes.assign(context=decodes.isl + decodes.step).groupby([*shape, "batch_size", "context"]).s.median()
    pairs = sorted({tuple(key[:2]) for key in alone.index} & {tuple(key[:2]) for key in steps.index})
    tables = []
    for heads, kv_heads in pairs:
        lengths, grid = alone[heads, kv_heads], steps[heads, kv_heads].unstack()
        seconds = tuple(round(float(value), 9) for value in fit.rising(lengths.to_numpy(float)))
        prefill = Table(counts=tuple(int(x) for x in lengths.index), seconds=seconds, per="layer")
        decode = _decode_grid(grid)
        tables.append(
            AttentionTable(heads=int(heads), kv_heads=int(kv_heads), head_dim=HEAD_DIM, prefill=prefill, decode=decode)
        )
    return tuple(tables)


def _decode_grid(grid: pd.DataFrame) -> Grid:
    counts = [count for count in BATCHES if count in grid.index]
    at = np.array(CONTEXTS, float)
    rows: list[Floats] = []
    for number, count in enumerate(counts):
        known = grid.loc[count].dropna()
        x, y = known.index.to_numpy(float), fit.rising(known.to_numpy(float))
        beyond = y[-1] + (y[-1] - y[-2]) / (x[-1] - x[-2]) * (at - x[-1])
        if number:
            beyond = np.maximum(beyond, rows[-1] * count / counts[number - 1])
        rows.append(np.where(at <= x[-1], np.interp(at, x, y), beyond))
    seconds = tuple(tuple(round(float(value), 9) for value in row) for row in _levelled(np.array(rows)))
    return Grid(counts=tuple(counts), contexts=CONTEXTS, seconds=seconds, per="layer")


def all_reduce_tables(rows: pd.DataFrame) -> dict[int, Table]:
    """vLLM's all-reduce inside graphs (its own kernels up to 8 MiB, NCCL beyond), by bytes of the vector."""
    return _by_bytes(rows[rows.kernel_source == "vLLM_custom_graph"])


def _nccl_tables(folder: Path) -> dict[int, Table]:
    """NCCL's all-reduce of 16-bit values; none where there is no file of it."""
    files = sorted(folder.glob("comm/nccl/*/nccl_perf.parquet"))
    if not files:
        return {}
    rows = _checked(files[-1], ("op_name", "nccl_dtype", "num_gpus", "message_size"))
    return _by_bytes(rows[(rows.op_name == "all_reduce") & (rows.nccl_dtype == "half")])


def faster(ours: dict[int, Table], nccl: dict[int, Table]) -> dict[int, Table]:
    """By numbers of GPUs: the lesser of the two at the sizes of the first; one alone where the other is absent."""
    tables = {**nccl, **ours}
    for count in ours.keys() & nccl.keys():
        sizes, other = np.array(ours[count].counts), nccl[count]
        inside = (sizes >= other.counts[0]) & (sizes <= other.counts[-1])
        theirs = np.interp(sizes, other.counts, other.seconds)
        least = np.where(inside, np.minimum(ours[count].seconds, theirs), ours[count].seconds)
        seconds = tuple(round(float(value), 9) for value in _levelled(least))
        tables[count] = Table(counts=ours[count].counts, seconds=seconds)
    return dict(sorted(tables.items()))


def _by_bytes(rows: pd.DataFrame) -> dict[int, Table]:
    """Of 16-bit values, which the file counts."""
    tables = {}
    for count in sorted(set(rows.num_gpus.tolist())):
        group = rows[rows.num_gpus == count]
        medians = group.groupby("message_size").s.median()
        seconds = tuple(round(float(value), 9) for value in _levelled(medians.to_numpy(float)))
        tables[int(count)] = Table(counts=tuple(VALUE_BYTES * int(x) for x in medians.index), seconds=seconds)
    return tables


def _nested(cube: np.ndarray) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(float(f"{value:.4g}") for value in row) for row in plane) for plane in cube)


def _held_tokens(table: GemmTable) -> HeldOut:
    cube, counts = np.array(table.seconds), np.array(table.tokens, float)
    part = (counts[1:-1] - counts[:-2]) / (counts[2:] - counts[:-2])
    between = cube[..., :-2] + part * (cube[..., 2:] - cube[..., :-2])
    return fit.held_out(fit.errors(between, cube[..., 1:-1]).ravel())


def _held_shapes(table: GemmTable) -> HeldOut:
    """Each inner n, and each inner k, of shapes that a model has (1,024 and more)."""
    logs = np.log(np.array(table.seconds))
    shares = []
    for axis, widths in enumerate((table.n, table.k)):
        moved, x = np.moveaxis(logs, axis, 0), np.log(np.array(widths, float))
        large = np.array(table.k if axis == 0 else table.n) >= 1024
        for at in range(1, len(x) - 1):
            if widths[at] > 1024:
                part = (x[at] - x[at - 1]) / (x[at + 1] - x[at - 1])
                guess = moved[at - 1] + part * (moved[at + 1] - moved[at - 1])
                shares.append(fit.errors(np.exp(guess[large]), np.exp(moved[at][large])).ravel())
    return fit.held_out(np.concatenate(shares))


def main(
    path: Annotated[Path, typer.Argument(help="a system's folder of aiconfigurator's data")],
    out: Annotated[Path, typer.Option(help="the profile to write")],
) -> None:
    """Turn aiconfigurator's kernel tables into a profile."""
    try:
        write_profile(import_aiconfigurator(path), out)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
