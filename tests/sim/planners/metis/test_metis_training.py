"""Metis's planner of training steps: two published costs, and what holds of every search."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from sim.planners.metis.training import Machine, Profile, Training
from sim.types import ConfigError

A100S = [Machine("A100", 4, 81920, inside=46, outside=10)] * 2


def of_one_layer(tp: int, layers_ms: float, whole_ms: float) -> Profile:
    """The A100's measured times of a GPT of 1.5 billion parameters as one layer; 2.3491e9 is what its logs were made
    with (SamsungLabs/Metis, ``results/homo_cost_model``)."""
    return Profile(
        layer_ms={("A100", tp, 1): (layers_ms,)},
        sync_ms={("A100", tp, 1): whole_ms - layers_ms},
        layer_mib={("A100", tp, 1): (1.0,)},
        parameter_bytes=(round(2.3491e9),),
        optimizer_ms=39.309,
        batch_ms=0.9145,
        hidden=4096,
        sequence=1024,
    )


@pytest.mark.parametrize(
    ("dp", "tp", "layers_ms", "whole_ms", "step_ms"),
    [(8, 1, 236.763, 292.796, 5170.046), (4, 2, 136.218, 167.600, 5599.803)],
)
def test_published_steps(dp: int, tp: int, layers_ms: float, whole_ms: float, step_ms: float) -> None:
    training = Training(profile=of_one_layer(tp, layers_ms, whole_ms), machines=A100S)
    found = training.priced(("A100",), (8,), 128 // dp, ((dp, tp),), (0, 1))
    assert found.step_ms == pytest.approx(step_ms, abs=0.03)


def profile(**speeds: float) -> Profile:
    """Seven layers and one of half the work; 0.5 ms a sample on a GPU of speed 1, doublings of TP 0.9 efficient."""
    times, syncs, needs = {}, {}, {}
    for kind, speed in speeds.items():
        for k in range(3):
            for samples in (1, 2, 4, 8, 16):
                each = (0.2 + 0.5 * samples) / speed / 1.8**k
                times[kind, 1 << k, samples] = [each] * 7 + [each / 2]
                syncs[kind, 1 << k, samples] = 0.1
                needs[kind, 1 << k, samples] = [100.0 + 20 * samples] * 8
    return Profile(
        layer_ms=times,
        sync_ms=syncs,
        layer_mib=needs,
        parameter_bytes=[4 * 2**20] * 8,
        optimizer_ms=2.0,
        batch_ms=0.05,
        hidden=64,
        sequence=128,
    )


def training(a_speed: float = 1.0, **settings: object) -> Training:
    machines = [Machine("b", 4, 8000.0, inside=40, outside=10), Machine("a", 4, 3000.0, inside=40, outside=10)]
    return Training(profile=profile(a=a_speed, b=3.0), machines=machines, batch=32, **settings)  # type: ignore[arg-type]


def test_every_plan_is_whole_and_fits() -> None:
    search = training()
    found = search.search()
    assert found == sorted(found)
    assert len({one[1:] for one in found}) == len(found) > 100
    assert {one.order for one in found} == {("a", "b"), ("b", "a")}
    for one in found:
        assert sum(one.groups) == 8
        assert [dp * tp for dp, tp in one.degrees] == list(one.groups)
        assert (one.bounds[0], one.bounds[-1]) == (0, 8)
        assert all(a < b for a, b in pairwise(one.bounds))
        assert 32 % one.micro_batches == 0
        memory = [3000.0] * 4 + [8000.0] * 4
        if one.order == ("b", "a"):
            memory.reverse()
        for stage, (dp, _) in enumerate(one.degrees):
            first = sum(one.groups[:stage])
            need = 5 * (100 + 20 * (32 // dp // one.micro_batches)) * (one.bounds[stage + 1] - one.bounds[stage])
            assert need <= sum(memory[first : first + one.groups[stage]])


def test_a_wider_search_is_never_worse() -> None:
    best = training().search()[0]
    assert training(variance=0.5).search()[0] <= best
    assert training(max_permute_len=6).search()[0] <= best
    assert training(exhaustive=True).search()[0] <= best


def test_data_parallelism_comes_first() -> None:
    """Where memory is no matter, tensor parallelism is only for micro-batches with too few samples."""
    machines = [Machine("a", 4, 1e6, inside=40, outside=10)] * 2
    search = Training(profile=profile(a=1.0), machines=machines, batch=32)
    plain = [one for one in search.search() if 32 // max(one.groups) // one.micro_batches >= 1]
    assert plain
    assert {tp for one in plain for _, tp in one.degrees} == {1}
    assert {tp for one in replace(search, exhaustive=True).search() for _, tp in one.degrees} == {1, 2, 4}


def test_a_faster_type_never_slows_the_best() -> None:
    steps = [training(speed, exhaustive=True).search()[0].step_ms for speed in (0.5, 1.0, 2.0, 4.0)]
    assert steps == sorted(steps, reverse=True)


def test_no_uniform_plan_beats_the_search() -> None:
    machines = [Machine("a", 4, 1e6, inside=40, outside=10)] * 2
    search = Training(profile=profile(a=1.0), machines=machines, batch=32, exhaustive=True)
    best = search.search()[0].step_ms
    uniform = []
    for stages in (1, 2, 4, 8):
        bounds = tuple(8 * k // stages for k in range(stages + 1))
        for k in range(3):
            dp, tp = 8 // stages >> k, 1 << k
            for m in (1, 2, 4, 8, 16, 32):
                if dp and 1 <= 32 // dp // m <= 16 and 32 % (dp * m) == 0:
                    one = search.priced(("a",), (8 // stages,) * stages, m, ((dp, tp),) * stages, bounds)
                    uniform.append(one.step_ms)
    assert len(uniform) > 20
    assert best <= min(uniform)


def test_a_step_of_one_stage_and_one_micro_batch() -> None:
    """Eight GPUs of one machine at TP 4: 7.5 layers, sync, update, gradients, batch."""
    one = Training(profile=profile(a=1.0), machines=[Machine("a", 8, 1e6, inside=40, outside=10)], batch=8)
    found = one.priced(("a",), (8,), 1, ((2, 4),), (0, 8))
    layers = 7.5 * (0.2 + 0.5 * 4) / 1.8**2
    assert found.step_ms == pytest.approx(layers + 0.1 + 2 * 2.0 / 4 + 2 * (1 / 2) * 8 * 4 / 4 / 40 + 0.05)


def test_a_mixed_stage_waits_for_its_slowest_replica() -> None:
    """Of 8 samples the type of three times the speed takes 6."""
    machines = [Machine("a", 1, 1e6, 40, 10), Machine("b", 1, 1e6, 40, 10)]
    one = Training(profile=profile(a=1.0, b=3.0), machines=machines, batch=8)
    found = one.priced(("a", "b"), (2,), 1, ((2, 1),), (0, 8))
    slowest = max(7.5 * (0.2 + 0.5 * 2), 7.5 * (2 * 0.2 + 0.5 * 6) / 3)  # 6 = 4 + 2, priced apart
    assert found.step_ms == pytest.approx(slowest + 0.1 + 4.0 + 2 / 2 * 8 * 4 / 10 + 0.05)


def test_the_plan_does_not_depend_on_the_hash_seed() -> None:
    code = "from tests.sim.planners.metis.test_metis_training import training; print(training().search()[:50])"
    plans = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(plans) == 1


def test_what_the_profile_lacks_is_said() -> None:
    search = training()
    with pytest.raises(ConfigError, match="a has no times for one GPU"):
        replace(search, profile=profile(b=3.0)).search()
    with pytest.raises(ConfigError, match="nothing for"):
        search.priced(("a", "b"), (4, 4), 32, ((1, 4), (1, 8)), (0, 4, 8))
    with pytest.raises(ConfigError, match="as many layers"):
        replace(search.profile, parameter_bytes=[1])
