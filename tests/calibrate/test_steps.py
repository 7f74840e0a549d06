"""Whole steps: what they take beside their operators comes back, and their batches are what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate import measure_fit
from calibrate.bench.shapes import Shard
from calibrate.measure import Outcome
from calibrate.measure import calibrate as measure_model
from calibrate.profile.report import errors
from sim.cluster import Cluster
from sim.cost import Fitted, Table, seconds
from sim.model import ModelSpec, model
from sim.types import Stage, Work
from tests.calibrate.test_calibrate import OPT, chunk_s, decode_s, laws, settings, sum_s
from tests.calibrate.test_points import TINY


def rest_s(layers: int, tokens: int, sequences: int) -> float:
    """What a step takes beside its operators: of layers, tokens, sequences and the step."""
    in_layer_s = 3e-5 + 1e-7 * (tokens + sequences) + 5e-6 * sequences
    return layers * in_layer_s + 1e-4


def linear_chunk_s(tokens: int, context: int) -> float:
    return 1e-5 + 1e-7 * tokens + 1e-8 * tokens * context


def measured_rest(tiny: Path, out: Path, factor: float = 1.0) -> Outcome:
    """A calibration whose whole steps are their operators, times a factor, and ``rest_s``."""

    def step_s(layers: int, tokens: int, sequences: int, context: int) -> float:
        mixed_s = 0.5 * decode_s(sequences, context) * (tokens > 0 and sequences >= 8)
        chunk_more_s = linear_chunk_s(tokens, 0) - chunk_s(tokens, 0) if tokens else 0.0
        operators_s = sum_s(layers, tokens, sequences, context) + layers * (chunk_more_s - mixed_s)
        return factor * operators_s + rest_s(layers, tokens, sequences)

    law = laws(
        step=step_s,
        attention_prefill=linear_chunk_s,
        attention_mixed=lambda tokens, sequences, context: linear_chunk_s(tokens, 0) + decode_s(sequences, context),
    )
    return measure_model(settings(tiny), out, measure=law)


def test_what_runs_beside_the_operators_comes_back_from_whole_steps(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    profile, samples, _ = measured_rest(tiny, tmp_path / "out.json")
    (entry,) = profile.entries
    assert entry.held_out["step"].points == 4
    assert entry.held_out["step"].largest < 2e-3
    assert errors(profile, samples).set_index("operator").loc["step", ["points", "held_out"]].tolist() == [40, 4]
    base = measure_model(settings(tiny), tmp_path / "base.json", measure=laws()).profile.entries[0]
    at = entry.linear.counts.index(16)
    in_layers_s = entry.linear.seconds[at] - base.linear.seconds[base.linear.counts.index(16)]
    assert in_layers_s == pytest.approx(2 * (3e-5 + 16e-7), rel=0.02)
    assert entry.head is not None
    assert entry.head.seconds[0] == pytest.approx(1.3e-4 * 1.1 + 1e-4, rel=0.01)
    for grid in (entry.attention_decode, entry.attention_mixed):
        assert grid is not None
        for count, row in zip(grid.counts, grid.seconds, strict=True):
            assert row == pytest.approx([decode_s(count, x) + 5e-6 * count for x in grid.contexts], rel=0.01)
    assert entry.attention_prefill is not None
    assert entry.attention_prefill.seconds[0][0] == pytest.approx(linear_chunk_s(16, 0), rel=1e-3)
    cluster = Cluster.of([{"gpu": "CPU", "count": 1}])
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=2)
    cost = Fitted(profiles=[profile]).bind(model(str(tiny)), stage, cluster)
    step_io_s = 2e-5 * (1 + 8 / 10)
    assert seconds(cost, Work((), 8, 8 * 32)) == pytest.approx(
        sum_s(2, 0, 8, 32) + rest_s(2, 0, 8) + step_io_s, rel=5e-3
    )
    noted = re.search(r"the tables have (\S+) us of each layer", profile.provenance.method)
    assert noted is not None
    assert float(noted[1]) == pytest.approx(30, rel=0.02)


def test_nothing_is_taken_from_operators_that_take_longer_than_their_step(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    profile = measured_rest(tiny, tmp_path / "out.json", factor=0.5).profile
    base = measure_model(settings(tiny), tmp_path / "base.json", measure=laws()).profile.entries[0]
    (entry,) = profile.entries
    assert all(entry.linear.seconds[entry.linear.counts.index(n)] >= s for n, s in _shared(base.linear, entry.linear))
    assert entry.held_out["step"].mape > 0.05


def _shared(table: Table, other: Table) -> list[tuple[int, float]]:
    pairs = zip(table.counts, table.seconds, strict=True)
    return [(count, value) for count, value in pairs if count in other.counts]


def test_a_model_that_the_engine_cannot_run_keeps_its_operators_alone(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from calibrate.bench.step import refused

    path = tmp_path / "opt.json"
    path.write_text(json.dumps(OPT))
    law = laws(activation=lambda tokens: 1e-6 * tokens, **{"gemm.up": lambda tokens: 1e-6 * tokens})
    profile = measure_model(settings(path), tmp_path / "out.json", measure=law).profile
    assert "step" not in profile.entries[0].held_out
    assert "operators alone (opt: gated_mlp: False is not executed" in profile.provenance.method
    padded = ModelSpec.from_config({**TINY, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 16})
    assert refused(Shard(spec=padded, tp=1)) is None
    assert "3 heads are padded to 4" in str(refused(Shard(spec=padded, tp=4)))


@given(st.integers(1, 400), st.integers(2, 10_000))
def test_contexts_of_a_step_spread_evenly_around_their_mean(sequences: int, mean: int) -> None:
    step = pytest.importorskip("calibrate.bench.step", reason="needs torch")
    contexts = step.even_contexts(sequences, mean)
    assert contexts.sum() == sequences * mean
    assert sorted(contexts) == list(contexts)
    ends = (mean / 2, mean * 1.5) if sequences > 1 else (mean, mean)
    assert (contexts[0], contexts[-1]) == pytest.approx(ends, abs=1)


def test_the_sequences_of_a_step_share_no_blocks() -> None:
    pytest.importorskip("torch")
    from calibrate.bench import step

    arch = step._architecture(Shard(spec=ModelSpec.from_config(TINY, name="tiny"), tp=1))
    point = {"layers": 1, "tokens": 40, "sequences": 5, "context": 50}
    batch = step._batch(arch, point, "cpu")
    tables = [
        table[: -(-int(length) // 16)]
        for rows in batch.decodes
        for table, length in zip(rows.tables, rows.contexts, strict=True)
    ]
    used = [int(block) for table in [batch.chunks[0].table, *tables] for block in table]
    assert len(set(used)) == len(used) == step._kv_blocks(point)
    assert min(used) == 1
    assert len(batch.tokens) == 45
    assert batch.wanted.tolist() == [39, 40, 41, 42, 43, 44]
    assert batch.positions.tolist()[:40] == list(range(40))


def test_an_entry_says_how_the_engine_launches_its_steps(tiny: Path, tmp_path: Path) -> None:
    """Chunks one by one; on CUDA, on one GPU a stage, decodes in graphs of up to as many as the engine captures."""
    pytest.importorskip("torch")
    from calibrate.execute.model.graphs import MAX_SEQUENCES, bucket

    profile, samples, _ = measured_rest(tiny, tmp_path / "out.json")
    assert (profile.entries[0].shared_launch, profile.entries[0].graphs) == (0.0, None)
    shard = Shard(spec=model(str(tiny), samples[0].dtype), tp=1)
    found, _ = measure_fit.entry(shard, "CPU", samples, cuda=True)
    assert found.graphs is not None
    assert found.graphs.sizes[-1] == MAX_SEQUENCES
    assert [found.graphs.padded(count) for count in range(1, 257)] == [bucket(count) for count in range(1, 257)]
