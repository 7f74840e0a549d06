"""SARATHI (arXiv 2308.16369): chunked prefills with piggybacked decodes, before paging."""

from __future__ import annotations

from typing import Literal

from sim.batchers import DecodeMaximal
from sim.batchers.decode_maximal import COMPOSITIONS, Composition
from sim.policy import Limits, System
from sim.reschedulers import RestorePlan
from sim.systems.layout import layout
from sim.transfers import Whole
from sim.types import ConfigError


def sarathi(
    mode: Composition = "decode-maximal",
    chunk_size: int | Literal["auto"] = 256,
    tile: int = 128,
    replicas: int | None = None,
    tp: int | None = None,
    pp: int = 1,
    gpu: str | None = None,
) -> System:
    """SARATHI: batches of one prompt chunk and up to B - 1 decodes, in B slots of a context each.

    A slot holds system.engine.max_model_len tokens (2048). ``chunk_size`` (a multiple of ``tile``) counts the decodes
    that ride with a chunk; auto takes the smallest one that costs at most a fifth of the prefill throughput. ``mode``:
    orca-best has whole prompts for chunks, baseline never mixes prompts with decodes.
    """
    if mode not in COMPOSITIONS:
        raise ConfigError(f"system.mode is {mode!r}; sarathi has {', '.join(COMPOSITIONS)}")
    if tile < 1:
        raise ConfigError(f"system.tile is {tile}; it must be >= 1")
    if chunk_size != "auto" and (chunk_size < 1 or chunk_size % tile):
        raise ConfigError(f"system.chunk_size is {chunk_size}; it must be auto, or a multiple of tile ({tile})")
    size = None if chunk_size == "auto" else chunk_size
    planner, router = layout(replicas, tp, pp, gpu, None, None)
    return System(
        name="sarathi",
        mirrors={"decode-maximal": "SARATHI (2023)"}.get(mode, f"SARATHI (2023), its baseline {mode!r}"),
        planner=planner,
        router=router,
        batcher=lambda role: DecodeMaximal(size, tile, mode, pp),
        transfer=Whole,
        rescheduler=RestorePlan,
        limits=Limits(max_model_len=2048),
    )
