"""Scenario files: what they mean, and what a mistake in one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.runs.tables import notes
from experiments.scenario.file import Scenario
from experiments.scenario.resolve import build_cost, resolve, run
from experiments.scenario.system import OverheadSpec
from sim import Cluster, ConfigError
from sim.cost import Fitted, Roofline, seconds
from sim.model import model
from sim.types import Stage, Work

SMALL = """\
model: llama-2-7b
cluster:
  nodes: [{gpu: A100-80G-SXM, count: 2}]
workload:
  generate: {requests: 20, input: {fixed: 100}, output: {fixed: 10}}
  rate: 10
  arrivals: constant
system: {name: vllm, tp: 1}
slo: {ttft_s: 1, tpot_s: 0.1}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def fault(path: Path, *overrides: str) -> str:
    """What loading and resolving complains about: one line."""
    with pytest.raises(ConfigError) as caught:
        resolve(Scenario.load(path, overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_a_scenario_runs(path: Path) -> None:
    scenario = Scenario.load(path)
    setup = resolve(scenario)
    result = setup.run()
    summary = setup.summary(result)
    assert summary["completed"] == 20
    assert summary["gpus"] == {"A100-80G-SXM": 2}
    assert summary["workload"]["rate_per_s"] == pytest.approx(10)
    assert run(scenario).log() == result.log()


def test_the_same_scenario_in_python() -> None:
    data = yaml.safe_load(SMALL)
    assert Scenario(**data) == Scenario.of(data)
    assert Scenario.of(data).system.options == {"tp": 1}


def test_resolved_yaml_means_the_same(path: Path) -> None:
    scenario = Scenario.load(
        path, ["system.engine.max_num_seqs=7", "events=[{at_s: 1, kind: gpu_lost, target: n0.g0}]"]
    )
    again = Scenario.of(yaml.safe_load(scenario.to_yaml()))
    assert again.model_dump() == scenario.model_dump()
    assert resolve(again).system.limits.max_num_seqs == 7


def test_overrides(path: Path) -> None:
    scenario = Scenario.load(
        path,
        ["cluster.nodes[0].count=4", "cluster.nodes.0.nodes=3", "workload.limit=5", "slo.attainment=0.5", "seed=9"],
    )
    assert (scenario.cluster.nodes[0].count, scenario.cluster.nodes[0].nodes) == (4, 3)
    assert (scenario.workload.limit, scenario.slo.attainment, scenario.seed) == (5, 0.5, 9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.nodes[0].gpu=H10O", "FILE: cluster.nodes[0].gpu: 'H10O' is unknown; did you mean 'H100-SXM'?"),
        ("cluster.nodes[0].count=0", "FILE: cluster.nodes[0].count: 0 must be >= 1"),
        ("cluster.nodes[0].cuont=2", "FILE: cluster.nodes[0].cuont: the key 'cuont' is unknown; did you mean 'count'?"),
        ("cluster.nodes=[]", "FILE: cluster.nodes: [] must have at least 1 entry"),
        ("workload.rate=-1", "FILE: workload.rate: -1 must be > 0"),
        ("workload.rate=.nan", "FILE: workload.rate: nan must be a finite number"),
        ("workload.rate=fast", "FILE: workload.rate: 'fast' must be a number"),
        ("workload.limit=1.5", "FILE: workload.limit: 1.5 must be a whole number"),
        ("workload.rate=null", "FILE: workload: generate needs a rate; set workload.rate (requests/s)"),
        ("workload.trace=a.csv", "FILE: workload: both trace and generate are given; drop one"),
        ("workload.cv=2", "FILE: workload: cv belongs to arrivals: gamma, and gamma needs it; set both or neither"),
        (
            "workload.generate.input={mean: 3}",
            "FILE: workload.generate.input: ['mean'] given; set one of fixed, uniform, quantiles, or mean and median",
        ),
        ("workload.arrivals=poison", "FILE: workload.arrivals: 'poison' is unknown; did you mean 'poisson'?"),
        ("sytem.tp=2", "FILE: sytem: the key 'sytem' is unknown; did you mean 'system'?"),
        ("rate=2", "FILE: rate: the key 'rate' is unknown here; did you mean workload.rate?"),
        (
            "cluster.count=2",
            "FILE: cluster.count: the key 'count' is unknown here; did you mean cluster.nodes[].count?",
        ),
        (
            "max_num_seqs=8",
            "FILE: max_num_seqs: the key 'max_num_seqs' is unknown here; did you mean system.engine.max_num_seqs?",
        ),
        (
            "system.max_num_seqs=8",
            "FILE: system.max_num_seqs: is a setting of the engine; state it as system.engine.max_num_seqs",
        ),
        ("system.name=vlm", "FILE: system.name: 'vlm' is unknown; did you mean 'vllm'?"),
        ("system.modes=v0", "FILE: system.modes: the key 'modes' is unknown; did you mean 'mode'?"),
        ("system.mode=v2", "FILE: system.mode: 'v2' is unknown; did you mean 'v1'?"),
        ("system.tp=two", "FILE: system.tp: 'two' must be a whole number"),
        (
            "system.engine.max_num_seq=2",
            "FILE: system.engine.max_num_seq: the key 'max_num_seq' is unknown; did you mean 'max_num_seqs'?",
        ),
        ("system=vllm", "FILE: system: 'vllm' must be a mapping"),
        ("model=llama-2-7bb", "FILE: model: 'llama-2-7bb' is unknown; did you mean 'llama-2-7b'?"),
        ("dtype=bf16", "FILE: dtype: 'bf16' is unknown; did you mean 'bfloat16'?"),
        ("latency=splitwise", "FILE: latency: the profile 'splitwise' is unknown; did you mean 'splitwise-2023'?"),
        ("latency={H200: roofline}", "FILE: latency.H200: the GPU 'H200' is unknown; did you mean 'H200-SXM'?"),
        ("latency={L4: splitwise-2023}", "FILE: latency.L4: the profile splitwise-2023 has no entry for it"),
        ("latency=3", "FILE: latency: 3 must be a profile's name or path, or a mapping of these by GPU type"),
        ("slo.attainment=2", "FILE: slo.attainment: 2 must be <= 1"),
        ("events=[{at_s: 0, kind: gpu_slow, target: n0.g0}]", "FILE: events[0]: gpu_slow needs factor; add it"),
        (
            "events=[{at_s: 0, kind: gpu_last, target: n0.g0}]",
            "FILE: events[0].kind: 'gpu_last' is unknown; did you mean 'gpu_lost'?",
        ),
        ("events=5", "FILE: events: 5 must be the path of a file, or a list of events"),
        ("seed=-1", "FILE: seed: -1 must be >= 0"),
    ],
)
def test_mistakes_name_file_field_value_and_mend(path: Path, override: str, message: str) -> None:
    assert fault(path, override).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rate", "--set rate: it must read key=value"),
        ("cluster.nodes[3].count=1", "--set cluster.nodes[3].count=1: '3' is not a place in a list of 1"),
        ("model.name=x", "--set model.name=x: 'name' is inside a plain value"),
        ("seed=[", "--set seed=[:1: not valid YAML"),
    ],
)
def test_mistakes_in_overrides(path: Path, override: str, message: str) -> None:
    assert fault(path, override).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE: it must be a mapping with the keys model"),
        ("- a", "FILE: it must be a mapping"),
        ("model: [", "FILE:1: not valid YAML"),
        ("a: b: c", "FILE:1: not valid YAML"),
        ("model: llama-2-7b", "FILE: cluster: missing; it is required (and 1 more)"),
        (SMALL.replace("count: 2", "count: !!python/name:os.system"), "FILE:3: not valid YAML"),
    ],
)
def test_broken_files(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    assert fault(path).startswith(message)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert fault(tmp_path / "no.yaml").endswith(
        "cannot be read: No such file or directory; give the path of a scenario file"
    )
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in fault(binary)


# ---------------------------------------------------------------- the workload


def with_trace(path: Path, text: str, **workload: Any) -> Path:
    """A scenario beside a trace that it names without a folder."""
    path.with_name("trace.csv").write_text(text)
    data = yaml.safe_load(SMALL) | {"workload": {"trace": "trace.csv", **workload}}
    path.write_text(yaml.safe_dump(data))
    return path


HEADER = "arrival_s,input_tokens,output_tokens\n"


def test_a_trace_beside_the_scenario_is_found_from_anywhere(
    path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_trace(path, HEADER + "0,5,2\n1,6,3\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert [request.input_tokens for request in resolve(Scenario.load(path)).requests] == [5, 6]


def test_a_trace_in_the_current_folder_comes_second(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_trace(path, HEADER + "0,5,2\n", format="phasewise")
    here = tmp_path / "here"
    here.mkdir()
    path.with_name("trace.csv").rename(here / "trace.csv")
    monkeypatch.chdir(here)
    assert len(list(resolve(Scenario.load(path)).requests)) == 1
    monkeypatch.chdir(tmp_path)
    assert fault(path).startswith("FILE: workload.trace: 'trace.csv' is not a file")


def test_a_malformed_line_is_named(path: Path) -> None:
    with_trace(path, HEADER + "0,5,2\n1,many,3\n")
    message = fault(path)
    assert message.startswith(str(path.with_name("trace.csv").resolve()) + ":3: field input_tokens is 'many'")


def test_an_empty_trace(path: Path) -> None:
    with_trace(path, HEADER)
    assert "no request in the file" in fault(path)


def test_nothing_left_of_a_trace(path: Path) -> None:
    with_trace(path, HEADER + "0,5,2\n", start_s=10)
    assert "workload: it has no requests" in fault(path)


def test_slices_limits_and_scales_come_in_order(path: Path) -> None:
    with_trace(path, HEADER + "".join(f"{n},{n + 1},1\n" for n in range(10)), start_s=2, end_s=8, limit=3, time_scale=2)
    requests = list(resolve(Scenario.load(path)).requests)
    assert [(request.arrival_s, request.input_tokens) for request in requests] == [(0, 3), (2, 4), (4, 5)]


def test_rate_draws_arrivals_anew_by_the_seed(path: Path) -> None:
    with_trace(path, HEADER + "".join(f"{n},5,1\n" for n in range(500)), rate=20)
    first, same, other = (
        [request.arrival_s for request in resolve(Scenario.load(path, [f"seed={seed}"])).requests] for seed in (1, 1, 2)
    )
    assert first == same != other
    assert first[-1] == pytest.approx(499 / 20, rel=0.2)


def test_no_trace_means_the_shipped_sample(path: Path) -> None:
    scenario = Scenario.load(path, ["workload={limit: 3}"])
    assert len(list(resolve(scenario).requests)) == 3
    assert resolve(scenario).requests.rule == "reject"


def test_too_long_rules(path: Path) -> None:
    with_trace(path, HEADER + "0,5000,10\n1,5,2\n")
    setup = resolve(Scenario.load(path))
    summary = setup.summary(setup.run())
    assert (summary["completed"], summary["rejected"]) == (1, 1)
    assert summary["reasons"] == {"tokens exceed the model's context of 4096": 1}
    assert summary["workload"]["too_long"] == {"rule": "reject", "requests": 1, "max_model_len": 4096}

    setup = resolve(Scenario.load(path, ["workload.too_long=truncate", "system.engine.max_model_len=100"]))
    result = setup.run()
    assert result.columns["input_tokens"].tolist() == [90, 5]
    assert setup.summary(result)["workload"]["too_long"] == {"rule": "truncate", "requests": 1, "max_model_len": 100}

    assert "5000 input and 10 output tokens exceed max_model_len 4096" in fault(path, "workload.too_long=error")


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [("{fixed: 7}", {7}), ("{uniform: [3, 4]}", {3, 4}), ("{quantiles: [[0, 5], [1, 6]]}", {5, 6})],
)
def test_generated_lengths(path: Path, lengths: str, tokens: set[int]) -> None:
    requests = resolve(Scenario.load(path, [f"workload.generate.input={lengths}"])).requests
    assert {request.input_tokens for request in requests} == tokens


def test_lognormal_lengths_have_their_median(path: Path) -> None:
    overrides = ["workload.generate.requests=2001", "workload.generate.input={mean: 300, median: 200, max: 1000}"]
    lengths = sorted(request.input_tokens for request in resolve(Scenario.load(path, overrides)).requests)
    assert lengths[1000] == pytest.approx(200, rel=0.1)
    assert lengths[-1] <= 1000


# ---------------------------------------------------------------- costs, predictors, variants


def test_latency_choices() -> None:
    assert isinstance(build_cost("roofline"), Roofline)
    shipped = build_cost(None)
    assert isinstance(shipped, Fitted)
    assert {profile.name for profile in shipped.profiles} >= {"splitwise-2023"}
    unhurried = build_cost("roofline", OverheadSpec(step_s=0.25))
    stage = Stage(name="s", gpus=("n0.g0",), first_layer=0, end_layer=32)
    where = Cluster.of([{"gpu": "H100-SXM", "count": 1}])
    bound = unhurried.bind(model("llama-2-7b"), stage, where)
    assert not bound.measured
    assert 0.25 < seconds(bound, Work((), 1, 1)) < 0.26
    mixed = build_cost({"H100-SXM": "splitwise-2023", "A100-80G-SXM": "roofline"})
    assert isinstance(mixed, Fitted)
    assert {gpu for profile in mixed.profiles for entry in profile.entries for gpu in entry.gpus} == {"H100-SXM"}


def test_kernel_tables_can_be_chosen_by_gpu_type() -> None:
    cost = build_cost({"L40S": "vllm-0.14-l40s"})
    assert isinstance(cost, Fitted)
    assert [tables.gpus for profile in cost.profiles for tables in profile.kernels] == [("L40S",)]


def test_kernels_of_a_relative_are_told_apart_from_the_roofline(path: Path) -> None:
    told = {}
    for latency in ("null", "roofline"):
        loaded = Scenario.load(path, ["cluster.nodes[0].gpu=A40", f"latency={latency}", "until_s=20"])
        setup = resolve(loaded)
        summary = setup.summary(setup.run())
        assert summary["unmeasured_gpus"] == ["A40"]
        told[latency] = summary["predicted_gpus"], " ".join(notes(summary))
    assert told["null"][0] == ["A40"]
    assert "A40 are predicted" in told["null"][1]
    assert "roofline" not in told["null"][1]
    assert told["roofline"][0] == []
    assert "A40 are a roofline estimate" in told["roofline"][1]


@pytest.mark.parametrize(("name", "tokens"), [("mean", 10), ("max", 10), ("oracle", 10)])
def test_predictors(path: Path, name: str, tokens: int) -> None:
    setup = resolve(Scenario.load(path, [f"predictor={name}"]))
    assert setup.predictor.name == name
    assert setup.predictor.predict(next(iter(setup.requests))) == tokens


def test_a_system_may_have_a_predictor_of_its_own(path: Path) -> None:
    """Orca's oracle knows the lengths, unless the scenario says otherwise; vllm has the mean."""
    orca = ["system.name=orca", "system.reserve=oracle"]
    names = [resolve(Scenario.load(path, more)).predictor.name for more in ([], orca, [*orca, "predictor=mean"])]
    assert names == ["mean", "oracle", "mean"]


def test_a_variant_keeps_the_engine_settings_it_does_not_state(path: Path) -> None:
    scenario = Scenario.load(
        path,
        [
            "system.engine={max_num_seqs: 8, block_size: 32}",
            "compare.wide={name: sarathi-serve, tp: 2, engine: {max_num_seqs: 4}}",
            "compare.bad={name: vllm, tq: 1}",
        ],
    )
    wide = resolve(scenario.variant("wide", scenario.compare["wide"]))
    assert (wide.system.name, wide.system.limits.max_num_seqs, wide.system.limits.block_size) == (
        "sarathi-serve",
        4,
        32,
    )
    with pytest.raises(ConfigError, match=r"compare\.bad\.tq: the key 'tq' is unknown; did you mean 'tp'\?"):
        resolve(scenario.variant("bad", scenario.compare["bad"]))


def test_until_s_leaves_requests_running(path: Path) -> None:
    setup = resolve(Scenario.load(path, ["until_s=1.0"]))
    summary = setup.summary(setup.run())
    assert 0 < summary["completed"] < 20
    assert summary["completed"] + summary["running"] < 20  # the rest never arrived


def test_prices_can_be_given(path: Path) -> None:
    assert resolve(Scenario.load(path, ["cluster.nodes[0].usd_per_hour=3"])).usd_per_hour == 6.0
    overrides = ["cluster.nodes[0].usd_per_hour_spot=1", "cluster.pricing=spot"]
    assert resolve(Scenario.load(path, overrides)).usd_per_hour == 2.0


def test_schema_knows_every_key() -> None:
    schema = Scenario.model_json_schema()
    assert set(schema["required"]) == {"model", "cluster", "system"}
    assert schema["additionalProperties"] is False
    assert {"workload", "slo", "latency", "events", "seed", "compare"} <= set(schema["properties"])
    json.dumps(schema, allow_nan=False)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "experiments").glob("**/*.yaml")), ids=lambda p: p.stem
)
def test_every_scenario_file_that_comes_along_runs(path: Path) -> None:
    setup = resolve(Scenario.load(path, overrides=["workload.limit=20"]))
    result = setup.run()
    assert set(result.requests.outcome) == {"completed"}


def test_the_kv_cache_has_a_dtype_of_its_own() -> None:
    """In 8 bits twice as many blocks fit."""
    plain = {
        "model": "llama-3.1-8b",
        "cluster": {"nodes": [{"gpu": "H100-SXM", "count": 1}]},
        "workload": {"rate": 1, "generate": {"requests": 5, "input": {"fixed": 100}, "output": {"fixed": 5}}},
        "system": {"name": "vllm", "tp": 1},
    }
    kinds: list[dict[str, str]] = [{}, {"kv_dtype": "float8"}]
    blocks = [resolve(Scenario.of({**plain, **more})).run().rows.replicas[0].total_blocks for more in kinds]
    assert blocks[1] in (2 * blocks[0], 2 * blocks[0] + 1)
