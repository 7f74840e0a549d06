"""Measured steps: the simulator's engine whose every step is run for real, on a virtual clock."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import calibrate.execute  # noqa: E402
from calibrate.execute.step_cost import MeasuredSteps  # noqa: E402
from sim import SYSTEMS  # noqa: E402
from sim.model import ModelSpec  # noqa: E402
from sim.types import ConfigError, Stage, Work  # noqa: E402
from tests.toys import cluster, problem, request, run, with_limits  # noqa: E402

torch.set_num_threads(1)

SMALL = ModelSpec.from_config(
    {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 4096,
        "dtype": "float32",
    },
    name="small",
)  # fmt: skip
WHOLE = Stage(name="s", gpus=("n0.g0",), first_layer=0, end_layer=2)


def steps(**options: object) -> MeasuredSteps:
    return MeasuredSteps(kv_blocks=200, **options)  # type: ignore[arg-type]


def test_a_step_is_executed_and_takes_its_time() -> None:
    cost = steps().bind(SMALL, WHOLE, cluster())
    line = cost.line(Work(((64, 32), (7, 0)), 3, 200))
    assert (line.iterations, line.slope_ps, line.extrapolated) == (1, 0, False)
    assert 10**7 < line.first_ps < 10**12  # between ten microseconds and a second
    assert cost.line(Work((), 0, 0)).first_ps == 0


def test_ten_times_the_tokens_take_longer() -> None:
    cost = steps().bind(SMALL, WHOLE, cluster())
    few, many = (min(cost.line(Work(((count, 0),), 0, 0)).first_ps for _ in range(5)) for count in (100, 1500))
    assert many > 2 * few


def test_a_slow_gpu_multiplies_what_was_measured_and_memoised_shapes_run_once() -> None:
    measured = steps(memoise=True)
    plain, slow = (measured.bind(SMALL, WHOLE, cluster(), factor) for factor in (1.0, 2.0))
    work = Work((), 4, 100)
    assert slow.line(work).first_ps == pytest.approx(2 * plain.line(work).first_ps, abs=2)
    executed = plain._stage.executed
    assert plain.line(Work((), 4, 100)) == plain.line(work)
    assert plain._stage.executed == executed == 2  # unmeasured, then measured


def test_two_shards_run_half_the_heads_and_pay_for_their_collectives() -> None:
    stage = replace(WHOLE, gpus=("n0.g0", "n0.g1"))
    measured = steps()
    cost = measured.bind(SMALL, stage, cluster())
    assert cost._stage.stage.decoder.arch.num_heads == 2
    assert cost.line(Work((), 1, 10)).first_ps > 0
    assert measured.bind(SMALL, WHOLE, cluster())._stage is not cost._stage


def test_every_iteration_of_a_run_is_executed() -> None:
    measured = steps()
    system = with_limits(SYSTEMS["vllm"](prefill={"replicas": 1, "tp": 1}, decode={"replicas": 1, "tp": 1}))
    where = replace(problem(cost=measured), model=SMALL)
    result = run(system, [request(n, 0.01 * n, 40 + n, 6) for n in range(4)], where)
    assert list(result.requests["outcome"]) == ["completed"] * 4
    assert len(measured._built) == 1  # both replicas share one model on the device
    (built,) = measured._built.values()
    assert built.executed >= int(result.steps["iterations"].sum())
    assert (result.requests["tpot_s"] > 0).all()


def test_a_pipeline_runs_each_stage_apart() -> None:
    measured = steps()
    where = replace(problem(cost=measured), model=SMALL)
    result = run(SYSTEMS["vllm"](replicas=1, tp=1, pp=2), [request(0, 0.0, 30, 5)], where)
    assert list(result.requests["outcome"]) == ["completed"]
    assert [built.stage.samples for built in measured._built.values()] == [False, True]


def test_a_model_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="gated_mlp: False is not executed"):
        steps().bind(replace(SMALL, gated_mlp=False), WHOLE, cluster())


def test_without_torch_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"needs torch; pip install 'phasewise\[calibrate\]'"):
        importlib.reload(calibrate.execute)
