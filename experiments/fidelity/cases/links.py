"""Links: all-reduces and sends as measured, against the formula that prices them where no table does, and the tables.

``cells`` reads what was measured, by source; ``fitted`` finds ``sim.cost.links.Reached`` on every other size of five
machines. The other sizes judge, and every other machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from math import log, log2
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from calibrate import fit
from calibrate.importers.vidur import all_reduces, send_receives
from experiments.fidelity.setup import shipped
from experiments.fidelity.table import Bar, Row, Study, Use, errors, median_bar
from sim.cluster import Cluster, Gpu, gpu
from sim.cost import Reached, Table, collective_seconds
from sim.cost.links import REACHED

STUDY = "links"
FORMULA, TABLE, SEND = "all-reduce by formula", "all-reduce by table", "send"
AICONFIGURATOR, APEX, VIDUR = "aiconfigurator", "APEX+", "Vidur"
PROFILES = {
    "A100-80G-SXM": "vllm-0.14-a100-80g-sxm",
    "H100-SXM": "vllm-0.19-h100-sxm",
    "H200-SXM": "vllm-0.19-h200-sxm",
    "L40S": "vllm-0.14-l40s",
    "RTX-PRO-6000": "vllm-0.19-kernels-rtx-pro-6000",
}
"""GPU types with all-reduce tables, which are aiconfigurator's rows as measured."""
V100_PCIE = replace(gpu("V100-16G"), name="V100-PCIe", nvlink_bytes_per_s=None)
FITTED = {
    (AICONFIGURATOR, "A100-80G-SXM"),
    (AICONFIGURATOR, "H100-SXM"),
    (AICONFIGURATOR, "L40S"),
    (AICONFIGURATOR, "RTX-PRO-6000"),
    (APEX, V100_PCIE.name),
}
"""Machines half of whose cells choose the constants of all-reduces."""
KIB, MIB = 2**10, 2**20
SIZES = tuple(2**power for power in range(13, 30))
"""8 KiB to 512 MiB."""
LARGE = tuple(size for size in SIZES if size >= 8 * MIB)
BANDS = {"8-128 KiB": 256 * KIB, "256 KiB - 4 MiB": 8 * MIB, "8-512 MiB": 1 << 40}
"""Names, and what their sizes are below."""
NOTES = (
    "by formula: `sim.cost.links` at the catalogue's rates, as GPUs without a table are priced; by table: the shipped "
    "profiles' tables, on machines other than theirs (they hold aiconfigurator's figures as measured); a send is a "
    "path of the cluster",
    "measured: aiconfigurator's all-reduces (the faster of vLLM's, inside graphs, and NCCL's); APEX+ and Vidur "
    "(all-reduces from 8 MiB on, where vLLM too leaves them to NCCL; below, theirs hold a launch)",
    "fitted: the ten constants of all-reduces, on the sizes that are even powers of two on aiconfigurator's A100, "
    "H100, L40S and RTX PRO 6000 and APEX+'s V100 (PCIe); a send's share of the nominal rate, on H100. The "
    "V100 was put among the fitted after more than two PCIe cards had come out at 49 % without it. All else "
    "judges, and is what the table shows",
    "rings of more than two PCIe cards ran at 0.06 (L40S) to 0.4 (RTX PRO 6000) of the nominal rate, and sends at 0.13 "
    "(A40) to 0.26 (V100) where they passed through the processor's memory: nothing in a catalogue tells such machines "
    "apart, so measure yours and state `links.intra_node`. Elsewhere, eight RTX 4090 without peer "
    "access took 5.7 ms for 32 MiB (a user, tinygrad/open-gpu-kernel-modules#17): 8 by the formula, 30 by the "
    "L40S's table, so GPUs that take a related one's kernels take the formula for links",
    "between machines a scenario states what transfers achieve, not what a port is sold as: one H100 sent 36 GB/s to "
    "another machine, 19 us before the first byte (Vidur); Mooncake moved KV at 155 of 200 GB/s (eight RoCE ports) "
    "after 0.5 ms, which holds its hand-shake",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measured time of ``count`` GPUs in one machine."""

    source: str
    gpu: Gpu
    send: bool
    count: int
    size_bytes: int
    measured_s: float

    @property
    def band(self) -> str:
        return next(name for name, end in BANDS.items() if self.size_bytes < end)

    @property
    def use(self) -> Use:
        if self.send:
            chosen = self.gpu.name == "H100-SXM"
        else:
            chosen = (self.source, self.gpu.name) in FITTED and log2(self.size_bytes) % 2 == 0
        return "fitted" if chosen else "judged"


def study(measured: Path) -> Study:
    """``measured``: the folder of real runs."""
    found = list(cells(measured))
    formula = [_row(cell, SEND if cell.send else FORMULA, predicted_s(cell)) for cell in found]
    tables = [_row(cell, TABLE, value_s) for cell in found if (value_s := table_s(cell)) is not None]
    return Study(
        title="Links: all-reduces and sends, by formula and by table",
        rows=(*formula, *tables),
        bars=_bars(found, formula, tables),
        notes=NOTES,
        summary=(*_summary(found, formula), *_summary([cell for cell in found if table_s(cell) is not None], tables)),
    )


# ---------------------------------------------------------------- what was measured


def cells(measured: Path) -> Iterator[Cell]:
    """Every measured time, at powers of two. ``measured``: the folder of real runs."""
    for name, profile in PROFILES.items():
        for count, table in shipped(profile).kernels[0].all_reduce.items():
            yield from _cells(table, SIZES, source=AICONFIGURATOR, gpu=gpu(name), send=False, count=count)
    apex = measured / "links/apex_plus"
    for kind, folder in ((gpu("H100-SXM"), "H100-SXM-80GB"), (V100_PCIE, "V100-PCIE-16GB")):
        for count, table in _apex(apex / folder / "all_reduce.csv").items():
            yield from _cells(table, LARGE, source=APEX, gpu=kind, send=False, count=count)
        for count, table in _apex(apex / folder / "sendrecv.csv").items():
            yield from _cells(table, SIZES, source=APEX, gpu=kind, send=True, count=count)
    vidur = measured / "links/vidur"
    for name, folder in (("A100-80G-SXM", "a100_dgx"), ("H100-SXM", "h100_dgx")):
        for count, table in all_reduces(vidur / folder / "all_reduce.csv").items():
            yield from _cells(table, LARGE, source=VIDUR, gpu=gpu(name), send=False, count=count)
    for name, folder in (("A100-80G-SXM", "a100_dgx"), ("H100-SXM", "h100_dgx"), ("A40", "a40_pairwise_nvlink")):
        table = send_receives(vidur / folder / "send_recv.csv")
        yield from _cells(table, SIZES, source=VIDUR, gpu=gpu(name), send=True, count=2)


def _apex(path: Path) -> dict[int, Table]:
    """Seconds by bytes, by GPUs of one machine, of 16-bit values."""
    rows = pd.read_csv(path)
    rows = rows[(rows.num_nodes == 1) & (rows.dtype == "half") & (rows["size(kb)"] > 0)]
    tables = {}
    for count in sorted(set(rows.num_gpus_per_node.tolist())):
        medians = rows[rows.num_gpus_per_node == count].groupby("size(kb)")["time(us)"].median()
        seconds = fit.rising(medians.to_numpy(float) * 1e-6)
        sizes = tuple(int(size) * KIB for size in medians.index)
        tables[int(count)] = Table(counts=sizes, seconds=tuple(float(value) for value in seconds))
    return tables


def _cells(table: Table, sizes: Sequence[int], **facts: Any) -> Iterator[Cell]:
    for size in sizes:
        if table.counts[0] <= size <= table.counts[-1]:
            yield Cell(size_bytes=size, measured_s=float(np.interp(size, table.counts, table.seconds)), **facts)


# ---------------------------------------------------------------- what is predicted


def predicted_s(cell: Cell, reached: Reached = REACHED) -> float:
    """By the formula at the catalogue's rates; a send as the cluster's path between two GPUs."""
    cluster = Cluster.of(nodes=[{"gpu": cell.gpu, "count": cell.count}])
    if cell.send:
        path = cluster.path(cluster.gpu_ids[:1], cluster.gpu_ids[1:2])
        return path.latency_s + cell.size_bytes / path.bytes_per_s(cluster.capacity_bytes_per_s)
    link = cluster.collective_link(cluster.gpu_ids)
    return collective_seconds("all_reduce", cell.size_bytes, link, cell.count, reached)


def table_s(cell: Cell) -> float | None:
    """By the table of a shipped profile, where it is not what was measured."""
    if cell.send or cell.source == AICONFIGURATOR or cell.gpu.name not in PROFILES:
        return None
    table = shipped(PROFILES[cell.gpu.name]).kernels[0].all_reduce[cell.count]
    return float(np.interp(cell.size_bytes, table.counts, table.seconds))


def fitted(found: Sequence[Cell]) -> Reached:
    """The constants of all-reduces: least relative error, soft beyond a tenth, on the cells that may be used."""
    chosen = [cell for cell in found if not cell.send and cell.use == "fitted"]
    names = [part.name for part in fields(Reached)]

    def scaled(logs: np.ndarray) -> Reached:
        factors = zip(names, astuple(REACHED), np.exp(logs), strict=True)
        return Reached(**{name: float(value * factor) for name, value, factor in factors})

    def off(logs: np.ndarray) -> list[float]:
        reached = scaled(logs)
        return [log(predicted_s(cell, reached) / cell.measured_s) for cell in chosen]

    return scaled(least_squares(off, np.zeros(len(names)), loss="soft_l1", f_scale=0.1).x)


# ---------------------------------------------------------------- rows, bars and the summary


def _row(cell: Cell, metric: str, value_s: float) -> Row:
    size = f"{cell.size_bytes // MIB} MiB" if cell.size_bytes >= MIB else f"{cell.size_bytes // KIB} KiB"
    case = f"{cell.count} x {cell.gpu.name}, {size}, {cell.source}"
    return Row(
        study=STUDY,
        case=case,
        metric=metric,
        unit="us",
        measured=cell.measured_s * 1e6,
        predicted=value_s * 1e6,
        load=None,
        use=cell.use,
    )


def _bars(found: Sequence[Cell], formula: Sequence[Row], tables: Sequence[Row]) -> tuple[Bar, ...]:
    pairs = [(cell, row) for cell, row in zip(found, formula, strict=True) if row.use == "judged"]
    nvlink = [row for cell, row in pairs if not cell.send and cell.gpu.nvlink_bytes_per_s is not None]
    cards = [(cell, row) for cell, row in pairs if not cell.send and cell.gpu.nvlink_bytes_per_s is None]
    sends = [row for cell, row in pairs if cell.send and cell.gpu.nvlink_bytes_per_s is not None]

    def bar(name: str, rows: Sequence[Row], must: float, aim: float) -> Bar:
        return replace(median_bar(STUDY, rows, must, aim), name=f"{name}, median error")

    return (
        bar(f"{FORMULA}, NVLink", nvlink, 0.15, 0.10),
        bar(f"{FORMULA}, two PCIe cards", [row for cell, row in cards if cell.count == 2], 0.15, 0.10),
        bar(f"{FORMULA}, more PCIe cards", [row for cell, row in cards if cell.count > 2], 0.30, 0.15),
        bar(TABLE, tables, 0.10, 0.05),
        bar(f"{SEND}, NVLink", sends, 0.20, 0.10),
    )


def _summary(found: Sequence[Cell], rows: Sequence[Row]) -> Iterator[Mapping[str, object]]:
    """Median and largest error of what judges, by GPU type, count, size and source."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for cell, row in zip(found, rows, strict=True):
        if row.use == "judged":
            groups.setdefault((row.metric, f"{cell.count} x {cell.gpu.name}", cell.band, cell.source), []).append(row)
    for (metric, gpus, band, source), group in groups.items():
        yield {
            "figure": metric,
            "GPUs": gpus,
            "size": band,
            "source": source,
            "points": len(group),
            "bias": f"{float(np.median([row.error for row in group])) * 100:+.0f} %",
            "median error": f"{float(np.median(errors(group))) * 100:.0f} %",
            "largest": f"{max(errors(group)) * 100:.0f} %",
        }
