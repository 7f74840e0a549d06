"""Steps in CUDA graphs: padded to the next size that was captured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.profile.file import read_profile, shipped_profiles, write_profile
from experiments.fidelity.cases import kv_bound
from sim.cluster import Cluster
from sim.cost import VLLM_GRAPHS, Fitted, Graphs, Overhead, Profile, StageCost, advanced
from sim.cost.graphs import Captured
from sim.cost.step import Composed
from sim.model import model
from sim.types import ConfigError, Stage, Work

LLAMA = model("llama-3.1-8b")
OWN = Graphs(sizes=(1, 2, 4, 8, 16), block_tokens=16)
RTX4090 = read_profile(shipped_profiles()["vllm-0.19-rtx-4090"])


def bound(graphs: Graphs | None) -> StageCost:
    profile = replace(RTX4090, entries=tuple(replace(entry, graphs=graphs) for entry in RTX4090.entries))
    cluster = Cluster.of(nodes=[{"gpu": "RTX-4090", "count": 1}])
    stage = Stage(name="all", gpus=cluster.gpu_ids, first_layer=0, end_layer=LLAMA.num_layers)
    return Fitted(profiles=(profile,), overhead=Overhead()).bind(LLAMA, stage, cluster)


def test_a_step_runs_as_the_next_size() -> None:
    counts = (1, 3, 5, 248, 249, 257, 512, 513, 9000)
    assert [VLLM_GRAPHS.padded(count) for count in counts] == [1, 4, 8, 248, 256, 272, 512, 513, 9000]


def test_the_sizes_are_those_of_a_real_server(shared_data: Path) -> None:
    meta = json.loads((shared_data / "measured" / kv_bound.FOLDER / "meta.json").read_text())
    assert tuple(meta["resolved_config"]["compilation_config"]["cudagraph_capture_sizes"]) == VLLM_GRAPHS.sizes


def test_vllm_pads_what_depends_on_tokens_alone() -> None:
    """257 decodes take the GEMMs of 272, their own attention and head; so do 200 and a chunk of 57."""
    plain, padded = bound(None), bound(VLLM_GRAPHS)
    assert isinstance(plain, Composed)
    more_ps = plain.operators.linear(272)[0] - plain.operators.linear(257)[0]
    assert more_ps > 0
    for work in (Work((), 257, 257 * 500), Work(((57, 0),), 200, 200 * 500)):
        assert padded.line(work) == plain.line(work)._replace(first_ps=plain.line(work).first_ps + more_ps)
    large = Work((), 600, 600 * 500)
    assert padded.line(large) == plain.line(large)


def test_our_engine_pads_whole_decode_steps() -> None:
    """Five of 17 to 32 tokens run as eight of 32 (two blocks of 16); steps with chunks, or more, as they are."""
    plain, padded = bound(None), bound(OWN)
    assert isinstance(padded, Captured)
    assert padded.measured
    whole = plain.line(Work((), 8, 8 * 32)).first_ps
    line = padded.line(Work((), 5, 5 * 17))
    assert (line.first_ps, line.slope_ps, line.iterations) == (whole, 0, 16)
    assert padded.line(Work((), 5, 5 * 33)).first_ps == plain.line(Work((), 8, 8 * 64)).first_ps > whole
    for work in (Work(((57, 0),), 5, 500), Work((), 17, 17 * 40), Work((), 0, 0)):
        assert padded.line(work) == plain.line(work)


@given(seqs=st.integers(1, 20), context=st.integers(1, 4000), step=st.integers(0, 70))
def test_the_law(seqs: int, context: int, step: int) -> None:
    """A line foretells every iteration that it holds for, and it holds as long as possible."""
    cost = Captured(COMPOSED, OWN, 16)
    work = Work((), seqs, max(seqs, context))
    line = cost.line(work)
    if step < line.iterations:
        later = cost.line(advanced(work, step))
        assert later.first_ps == line.first_ps + step * line.slope_ps
        assert later.extrapolated == line.extrapolated
    if seqs <= OWN.sizes[-1]:
        assert cost.line(advanced(work, line.iterations)).first_ps > line.first_ps


COMPOSED = bound(None)


def test_graphs_are_kept_in_files(tmp_path: Path) -> None:
    for graphs in (OWN, VLLM_GRAPHS, None):
        profile = replace(RTX4090, entries=tuple(replace(entry, graphs=graphs) for entry in RTX4090.entries))
        again = _again(profile, tmp_path / "profile.json")
        assert [entry.graphs for entry in again.entries] == [graphs]
    for name in shipped_profiles():
        if name.startswith("vllm-"):
            parts = read_profile(shipped_profiles()[name]).parts
            assert {getattr(part, "graphs", None) for part in parts} == {VLLM_GRAPHS}


def _again(profile: Profile, path: Path) -> Profile:
    write_profile(profile, path)
    return read_profile(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"sizes": ()}, "needs whole numbers"), ({"sizes": (2, 2)}, "each larger"), ({"sizes": (0, 1)}, ">= 1"),
     ({"sizes": (1,), "block_tokens": 0}, "block_tokens is 0")],
)  # fmt: skip
def test_graphs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Graphs(**fields)
