"""ExeGPT's planner: how many requests end when, and who has which layers."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.model import model
from sim.planners.exegpt import Tensor, Traffic
from sim.planners.exegpt.layout import groups, pipeline, shared, spread
from sim.planners.exegpt.lengths import latency_s
from tests.toys import TINY

# ------------------------------------------------------------ lengths


def test_table_6_a_request_stays_for_whole_phases() -> None:
    """Four A40s, OPT-13B, 63 tokens: the printed latencies follow from batch, rate and phase (within 1 %)."""
    assert latency_s(63, 7, 49 / 26.15) == pytest.approx(16.87, rel=0.01)
    assert latency_s(63, 13, 52 / 25.23) == pytest.approx(10.23, rel=0.01)


def test_ends_and_batches_by_hand() -> None:
    """Answers of 3 and 4 tokens: 2 and 3 iterations. In phases of two: one phase, and two."""
    traffic = Traffic((10, 20), (2, 3))
    assert traffic.phases(2) == 1.5
    assert traffic.ending(2).tolist() == [0.25, 0.5]  # the longer one's second phase ends with its first iteration
    assert traffic.batch(4, 2, "littles_law") == (6.0, 4 * 2.5 / 2)
    begin, mean = traffic.batch(4, 2, "paper")
    assert begin == 4 / 0.75
    assert mean == pytest.approx(begin * (1 + 0.75) / 2)
    assert traffic.context_tokens == (2 * 10 + 3 + 3 * 20 + 6) / 5


@given(iterations=st.lists(st.integers(1, 60), min_size=1, max_size=40), n=st.integers(1, 70), batch=st.integers(1, 30))
def test_littles_law_is_what_phase_after_phase_gives(iterations: list[int], n: int, batch: int) -> None:
    """The mean number there, phase by phase and iteration by iteration; the paper's rule never says less."""
    traffic = Traffic((1,) * len(iterations), tuple(iterations))
    begin, mean = traffic.batch(batch, n, "littles_law")
    held = [sum(one > n * phase + at for one in iterations for phase in range(60)) for at in range(n)]
    assert begin == pytest.approx(batch * held[0] / len(iterations))
    assert mean == pytest.approx(batch * sum(held) / n / len(iterations))
    assert traffic.ending(n).sum() == pytest.approx(np.mean([1 / ceil(one / n) for one in iterations]))
    assert traffic.batch(batch, n, "paper")[0] <= begin * (1 + 1e-9)


# ------------------------------------------------------------ layout


@pytest.mark.parametrize(("joined", "stages"), [(0, 6), (2, 5), (4, 4), (6, 3)])
def test_partial_tp_has_a_stage_for_each_group_and_each_other_gpu(joined: int, stages: int) -> None:
    found = groups([f"g{number}" for number in range(6)], Tensor(2, joined))
    assert len(found) == stages == joined // 2 + 6 - joined
    assert [gpu for group in found for gpu in group] == [f"g{number}" for number in range(6)]
    one = pipeline(model("opt-13b"), "x", "mixed", found, lambda tp: 1.5 if tp == 2 else 1.0)
    counts = [stage.num_layers for stage in one.stages]
    assert sum(counts) == 40
    wide, single = counts[: joined // 2], counts[joined // 2 :]
    assert all(a / 1.5 == pytest.approx(b, abs=1.1) for a in wide for b in single)


@given(layers=st.integers(1, 96), speeds=st.lists(st.floats(0.1, 10), min_size=1, max_size=12))
def test_every_layer_is_somewhere_and_no_stage_is_empty(layers: int, speeds: list[float]) -> None:
    used = speeds[:layers]
    found = spread(layers, used)
    assert sum(found) == layers
    assert min(found) >= 1


def test_equal_stages_have_equal_layers_and_idle_gpus_none() -> None:
    assert spread(40, [1.0] * 4) == [10] * 4
    assert spread(10, [1.0] * 4) == [3, 3, 2, 2]
    assert len(pipeline(TINY, "x", "mixed", (("a",), ("b",), ("c",)), lambda tp: 1.0).stages) == 2


def test_groups_are_in_the_decode_pool_first() -> None:
    assert shared(Tensor(2, 2), 2, 2) == (Tensor(2, 0), Tensor(2, 2))
    assert shared(Tensor(2, 4), 1, 3) == (Tensor(2, 0), Tensor(2, 2))
    assert shared(Tensor(4, 8), 4, 4) == (Tensor(4, 4), Tensor(4, 4))
