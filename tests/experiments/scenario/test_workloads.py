"""Workloads of a scenario file: closed loops, sessions, classes with their own SLOs; and the page of its keys."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from experiments.pages.schema_page import _models, page, unit
from experiments.plots.run.gallery import slo_of
from experiments.runs.rundir import Run
from experiments.scenario.file import Scenario
from experiments.scenario.requests import RequestStream
from experiments.scenario.resolve import resolve
from experiments.scenario.workload import WorkloadSpec
from sim import ConfigError, Slo
from sim.metrics import attainment, met, scaled, slo_figures
from sim.types import Request
from tests.command import call
from traces import ClosedLoop, Sessions, TraceSource, read, statistics, unroll, write

FIXED = {"requests": 12, "input": {"fixed": 100}, "output": {"fixed": 10}}
TALKS = {"requests": 6, "input": {"fixed": 64}, "output": {"fixed": 16}, "turns": {"fixed": 3}}


def scenario(workload: dict[str, Any], **more: Any) -> Scenario:
    data = {
        "model": "llama-2-7b",
        "cluster": {"nodes": [{"gpu": "A100-80G-SXM", "count": 1}]},
        "system": {"name": "vllm", "tp": 1},
        "workload": workload,
    }
    return Scenario.of({**data, **more})


def stream(workload: dict[str, Any], seed: int = 0) -> RequestStream:
    return RequestStream(WorkloadSpec(**workload), seed=seed, max_model_len=None)


def fault(workload: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(scenario(workload, **more))
    return str(caught.value)


# ---------------------------------------------------------------- who waits for whom


def test_clients_of_a_closed_loop_wait_for_their_answers() -> None:
    setup = resolve(scenario({"generate": FIXED, "closed_loop": {"clients": 3, "think_s": 2, "think_cv": 0}}))
    columns = setup.run().columns
    ends = columns["arrival_s"] + columns["e2e_s"]
    assert columns["arrival_s"][:3].tolist() == [2, 2, 2]
    assert columns["arrival_s"][3:] == pytest.approx(ends[:-3] + 2, abs=1e-9)
    figures = setup.summary(setup.run())
    assert figures["workload"]["rate_per_s"] == pytest.approx(11 / np.ptp(columns["arrival_s"]))
    assert setup.problem.workload.rate_per_s == 3 / (2 + 10)


def test_turns_of_a_session_wait_grow_and_hit_the_prefix_cache() -> None:
    workload = {"generate": TALKS, "rate": 1, "sessions": {"think_s": 1, "think_cv": 0}}
    setup = resolve(scenario(workload, system={"name": "vllm", "tp": 1, "engine": {"prefix_caching": True}}))
    table = setup.run().requests
    for _, talk in table.groupby("session"):
        assert talk["input_tokens"].tolist() == [64, 64 + 16 + 64, 64 + 16 + 64 + 16 + 64]
        assert talk["arrival_s"].to_numpy()[1:] == pytest.approx(
            (talk["arrival_s"] + talk["e2e_s"] + 1).to_numpy()[:-1]
        )
        assert (talk["cached_tokens"].to_numpy()[1:] >= [64, 144]).all()
    assert len(table) == 18


def test_each_kind_of_waiting_has_its_source() -> None:
    assert isinstance(stream({"generate": FIXED, "rate": 1}).source(), TraceSource)
    assert isinstance(stream({"generate": FIXED, "closed_loop": {"clients": 2}}).source(), ClosedLoop)
    assert isinstance(stream({"generate": TALKS, "rate": 1, "sessions": {}}).source(), Sessions)


def test_thinking_follows_the_seed_and_the_lengths_do_not() -> None:
    loop = {"generate": {**FIXED, "input": {"uniform": [1, 90]}}, "closed_loop": {"clients": 4, "think_s": 1}}
    first, same, other = (list(stream(loop, seed).source().next(0, None)) for seed in (1, 1, 2))
    assert first == same != other
    thoughtless = list(stream({**loop, "closed_loop": {"clients": 4}}, 1).source().next(0, None))
    assert sorted(r.input_tokens for r in thoughtless) == sorted(r.input_tokens for r in first)


# ---------------------------------------------------------------- classes


MIX = {
    "mix": {
        "chat": {"generate": {**FIXED, "requests": 3000}, "share": 3},
        "batch": {"generate": {**FIXED, "requests": 1000}, "priority": 2, "samples": 4, "beam_search": True},
    },
    "rate": 8,
}


def test_a_mix_shares_the_rate_out_and_marks_its_classes() -> None:
    requests = list(stream(MIX))
    assert Counter(request.klass for request in requests) == {"chat": 3000, "batch": 1000}
    spans = {name: [r.arrival_s for r in requests if r.klass == name] for name in MIX["mix"]}
    assert [len(times) / times[-1] for times in spans.values()] == pytest.approx([6, 2], rel=0.08)
    assert {(r.klass, r.priority, r.samples, r.beam_search) for r in requests} == {
        ("chat", 0, 1, False),
        ("batch", 2, 4, True),
    }
    assert [request.id for request in requests] == list(range(4000))


def test_a_mix_is_cut_as_a_whole_and_changing_a_class_leaves_the_others() -> None:
    chat = [request.arrival_s for request in stream(MIX) if request.klass == "chat"]
    altered = {**MIX, "mix": {**MIX["mix"], "batch": {**MIX["mix"]["batch"], "arrivals": "constant"}}}
    assert [request.arrival_s for request in stream(altered) if request.klass == "chat"] == chat
    assert list(stream({**MIX, "limit": 50})) == list(stream(MIX))[:50]


def test_clients_of_a_closed_loop_meet_classes_by_their_shares() -> None:
    loop = {"mix": MIX["mix"], "closed_loop": {"clients": 400}}
    first = Counter(request.klass for request in stream(loop).source().next(0, None))
    assert first["chat"] / 400 == pytest.approx(0.75, abs=0.08)


def test_recorded_traces_mix_at_their_own_times(tmp_path: Path) -> None:
    for name, times in (("a", (0.0, 2.0)), ("b", (1.0, 3.0))):
        write(tmp_path / f"{name}.csv", [Request(id=0, arrival_s=t, input_tokens=5, output_tokens=5) for t in times])
    (tmp_path / "it.yaml").write_text(
        yaml.safe_dump(scenario({}).model_dump(mode="json", exclude_none=True, exclude={"workload"}))
        + "workload: {mix: {a: {trace: a.csv}, b: {trace: b.csv, time_scale: 2}}, start_s: 1}\n"
    )
    spec = Scenario.load(tmp_path / "it.yaml")
    found = list(RequestStream(spec.workload, seed=0, max_model_len=None))
    assert [(request.klass, request.arrival_s) for request in found] == [("a", 1.0), ("b", 1.0), ("b", 5.0)]
    assert Scenario.of(yaml.safe_load(spec.to_yaml())).workload == spec.workload


def test_marks_are_for_traces_without_classes_too() -> None:
    (request, *_) = stream({"limit": 3, "samples": 2, "priority": -1})
    assert (request.samples, request.priority, request.klass) == (2, -1, None)


# ---------------------------------------------------------------- SLOs of classes


COLUMNS = {
    "outcome": np.array(["completed", "completed", "completed", "rejected"], dtype=object),
    "klass": np.array(["chat", "batch", None, "batch"], dtype=object),
    "output_tokens": np.array([5, 5, 5, 5]),
    "ttft_s": np.array([0.5, 4.0, 1.5, np.nan]),
    "tpot_s": np.array([0.01, 0.9, 0.01, np.nan]),
    "e2e_s": np.array([1.0, 9.0, 2.0, np.nan]),
}
CLASSES = Slo(ttft_s=1, classes={"batch": Slo(e2e_s=10, attainment=0.5)})


def test_a_class_is_held_to_its_own_bounds() -> None:
    marks = met(COLUMNS, CLASSES)
    assert {name: mark.tolist() for name, mark in marks.items()} == {
        "ttft": [True, True, False, False],
        "e2e": [True, True, True, False],
        "all": [True, True, False, False],
    }
    assert attainment(COLUMNS, CLASSES)["attainment"] == 0.5
    assert attainment(COLUMNS, CLASSES, scale=0.8)["attainment"] == 0.25  # 8 s for the batch
    assert scaled(CLASSES, 2).classes["batch"].e2e_s == 20


@pytest.mark.parametrize(
    ("general", "own", "reached"), [(0.5, 0.5, True), (0.5, 0.6, False), (0.6, 0.5, False), (0.5, 0.4, True)]
)
def test_every_class_must_reach_its_share(general: float, own: float, reached: bool) -> None:
    slo = Slo(ttft_s=1, attainment=general, classes={"batch": Slo(e2e_s=10, attainment=own), "nobody": Slo(ttft_s=1)})
    assert slo_figures(COLUMNS, slo, 10.0)["reached"] is reached


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.floats(0, 10), st.booleans()), min_size=1),
    st.none() | st.floats(0.1, 9),
    st.none() | st.floats(0.1, 9),
)
def test_overall_attainment_is_the_mean_over_the_classes(
    rows: list[tuple[str | None, float, bool]], general: float | None, own: float | None
) -> None:
    labels = np.array([label for label, _, _ in rows], dtype=object)
    columns = {
        "klass": labels,
        "outcome": np.array(["completed" if done else "failed" for *_, done in rows], dtype=object),
        "output_tokens": np.full(len(rows), 3),
        **{name: np.array([value for _, value, _ in rows]) for name in ("ttft_s", "tpot_s", "e2e_s")},
    }
    good = 0.0
    for label in ("a", "b", None):
        part = {name: values[labels == label] for name, values in columns.items()}
        slo = Slo(ttft_s=own) if label == "a" else Slo(ttft_s=general)
        good += met(part, slo)["all"].sum()
    share = attainment(columns, Slo(ttft_s=general, classes={"a": Slo(ttft_s=own)}))["attainment"]
    assert share == pytest.approx(good / len(rows))


def test_a_class_without_requests_shows() -> None:
    slo = {"ttft_s": 1, "classes": {"chta": {"ttft_s": 2}}}
    setup = resolve(scenario({"generate": FIXED, "rate": 8}, slo=slo))
    summary = setup.summary(setup.run())
    assert (summary["classes"]["chta"]["requests"], summary["classes"]["chta"]["slo"]["attainment"]) == (0, None)
    assert summary["slo"]["reached"] is True


def test_a_summary_tells_classes_apart(capsys: pytest.CaptureFixture[str]) -> None:
    mix = {name: {**klass, "limit": 20} for name, klass in MIX["mix"].items()}
    slo = {"ttft_s": 1, "classes": {"batch": {"e2e_s": 1e-6, "attainment": 0.5}}}
    setup = resolve(scenario({"mix": mix, "rate": 8}, slo=slo))
    result = setup.run()
    summary = setup.summary(result)
    assert {name: part["requests"] for name, part in summary["classes"].items()} == {"chat": 20, "batch": 20}
    assert [part["slo"]["attainment"] for part in summary["classes"].values()] == [1, 0]
    assert (summary["slo"]["attainment"], summary["slo"]["reached"]) == (0.5, False)
    again = slo_of(Run.of("it", result, summary))
    assert attainment(result.columns, again) == attainment(result.columns, setup.problem.slo)
    from experiments.runs.tables import print_run

    print_run({"name": "it", **summary})
    assert "class" in capsys.readouterr().out


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({"generate": TALKS, "rate": 1}, "generate.turns: turns must wait for each other; set workload.sessions"),
        ({"closed_loop": {"clients": 2}, "rate": 1}, "rate 1: under closed_loop the clients set the pace; drop rate"),
        ({"closed_loop": {"clients": 2}, "arrivals": "ramp"}, "arrivals: under closed_loop the clients set the pace"),
        ({"closed_loop": {"clients": 2}, "sessions": {}}, "both closed_loop and sessions are given; drop one"),
        ({"closed_loop": {"client": 2}}, "workload.closed_loop.client: the key 'client' is unknown; did you mean"),
        ({"closed_loop": {"clients": 0}}, "workload.closed_loop.clients: 0 must be >= 1"),
        ({"sessions": {}, "too_long": "truncate"}, "too_long: truncate is not for a context that grows"),
        ({"mix": {"a": {}}, "trace": "sample"}, "both trace and mix are given; trace belongs to each class of the mix"),
        ({"mix": {"a": {}}, "priority": 1}, "both priority and mix are given; priority belongs to each class"),
        ({"mix": {"a": {"generate": FIXED}}}, "mix.a: generate needs a rate; set workload.rate"),
        ({"mix": {"a": {"arrivals": "constant"}}}, "mix.a: arrivals: constant needs a rate; set workload.rate"),
        ({"mix": {"a": {"trace": "no.csv"}}}, "workload.mix.a.trace: 'no.csv' is not a file"),
        ({"mix": {"a": {"share": 0}}}, "workload.mix.a.share: 0 must be > 0"),
        ({"mix": {"a": {"rate": 3}}}, "workload.mix.a.rate: the key 'rate' is unknown"),
    ],
)  # fmt: skip
def test_mistakes_name_field_and_mend(workload: dict[str, Any], message: str) -> None:
    assert message in fault(workload)


def test_an_slo_for_a_class_that_is_not_there() -> None:
    text = fault(MIX, slo={"classes": {"bach": {"ttft_s": 1}}})
    assert text == "scenario: slo.classes.bach: the class 'bach' is unknown; did you mean 'batch'?"


def test_a_closed_loop_has_no_rate_to_sweep() -> None:
    with pytest.raises(ConfigError, match=r"workload.closed_loop: the clients set the pace, so it has no rate to vary"):
        scenario({"closed_loop": {"clients": 2}}).at(rate_per_s=1, seed=0)


@pytest.mark.parametrize(("gbps", "served"), [(0, False), (100, True)])
def test_machines_with_ports_but_no_link_cannot_send_kv(gbps: float, served: bool) -> None:
    split = {"name": "vllm", "prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 1}}
    nodes = [{"gpu": "A100-80G-SXM", "count": 1, "nodes": 2, "nic_gbps": 100}]
    cluster = {"nodes": nodes, "links": {"inter_node": {"gbps": gbps}}}
    it = scenario({"limit": 1}, system=split, cluster=cluster)
    if served:
        assert resolve(it).run().rows.requests[0].bytes_moved > 0
    else:
        with pytest.raises(ConfigError, match=r"cluster.links.inter_node: 0 gbps, so n\d and n\d have no link"):
            resolve(it).run()


# ---------------------------------------------------------------- files of workloads


def test_unrolled_sessions_arrive_as_if_every_token_took_so_long() -> None:
    turns = [Request(id=0, arrival_s=1.0, input_tokens=20, output_tokens=10, session=s) for s in ("a", "b", "a")]
    found = list(unroll(Sessions(turns, think_s=3, think_cv=0), token_s=0.5))
    assert [(r.id, r.session, r.arrival_s, r.input_tokens) for r in found] == [
        (0, "a", 1, 20), (1, "b", 1, 20), (2, "a", 1 + 10 * 0.5 + 3, 50),
    ]  # fmt: skip
    assert found[2].prefix[0] == found[0].prefix[0] != found[1].prefix[0]


def test_generated_sessions_reuse_prefixes(tmp_path: Path) -> None:
    turns = ("--turns", "{fixed: 4}", "--input", "{fixed: 64}", "--output", "{fixed: 32}", "--think-s", "5")
    assert call("trace", "generate", tmp_path / "talk.csv", "--requests", "10", *turns, "--quiet") == 0
    figures = statistics(read(tmp_path / "talk.csv"))
    assert figures["requests"] == 40
    inputs = [64, 160, 256, 352]
    assert figures["mean_input_tokens"] == sum(inputs) / 4
    assert figures["prefix_reuse"] == (sum(inputs[:-1]) + 3 * 32) / sum(inputs)  # answers are repeated too
    (tmp_path / "it.yaml").write_text(scenario({"trace": "talk.csv"}).to_yaml())
    assert len(resolve(Scenario.load(tmp_path / "it.yaml")).run().rows.requests) == 40


def test_an_answer_is_no_input_that_could_be_reused() -> None:
    asked = Request(id=0, arrival_s=0, input_tokens=20, output_tokens=44, prefix=(1, 2, 3, 4), prefix_block_tokens=16)
    again = Request(id=1, arrival_s=1, input_tokens=40, output_tokens=1, prefix=(1, 2), prefix_block_tokens=16)
    assert statistics([asked, asked])["prefix_reuse"] == 16 / 40
    assert statistics([asked, again])["prefix_reuse"] == 32 / 60


def test_a_workload_becomes_a_trace(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(scenario({**MIX, "limit": 30}).to_yaml())
    assert call("trace", "workload", tmp_path / "it.yaml", tmp_path / "mix.parquet", "--quiet") == 0
    assert list(read(tmp_path / "mix.parquet")) == list(stream({**MIX, "limit": 30}))


# ---------------------------------------------------------------- the page of keys


def test_the_page_of_keys_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[3] / "docs" / "reference" / "scenario.md"
    assert file.read_text(encoding="utf-8") == page(), (
        "write it anew: phasewise schema --markdown > docs/reference/scenario.md"
    )
    assert call("schema", "--markdown") == 0
    assert capsys.readouterr().out == page()


MODELS: dict[str, type[BaseModel]] = dict(_models("", Scenario))


@pytest.mark.parametrize("place", MODELS)
def test_every_key_has_a_meaning_a_unit_and_an_example_that_holds(place: str) -> None:
    for name, field in MODELS[place].model_fields.items():
        assert field.description, name
        assert field.examples, name
        if name in ("rate", "count") or name.endswith(("_s", "_us", "gbps", "_tokens", "_per_hour")):
            assert unit(name), name
        TypeAdapter(Annotated[field.annotation, field]).validate_python(field.examples[0])


def test_the_workloads_of_the_page_run() -> None:
    blocks = [yaml.safe_load(text.split("```")[0]) for text in page().split("```yaml\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        data = {**scenario({}).model_dump(exclude_none=True), **block}
        data["workload"] = {**block["workload"], "limit": 5}
        assert resolve(Scenario.of(data)).run().rows.requests


def test_the_schema_needs_no_plots() -> None:
    code = "import sys, experiments.pages.schema_page; sys.exit('matplotlib' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recording_that_begins_anew_shares_nothing_with_its_first_time(tmp_path: Path) -> None:
    """Other sessions, other prefixes, the same lengths; ids go on."""
    file = tmp_path / "trace.csv"
    rows = ["arrival_s,input_tokens,output_tokens,session", "0,10,1,a", "1,20,2,b"]
    file.write_text("\n".join(rows))
    spec = WorkloadSpec(trace=str(file), rate=5.0)
    stream = list(RequestStream(spec, seed=0, max_model_len=None, at_least=5))
    assert [(one.id, one.input_tokens, one.session) for one in stream] == [
        (0, 10, "a"), (1, 20, "b"), (2, 10, "a/1"), (3, 20, "b/1"), (4, 10, "a/2"),
    ]  # fmt: skip
    assert [one.arrival_s for one in stream] == sorted(one.arrival_s for one in stream)


@pytest.mark.parametrize("at_least", [3, 40, 500])
def test_what_is_drawn_goes_on_and_begins_as_it_did(at_least: int) -> None:
    generated = {"requests": 40, "input": {"fixed": 9}, "output": {"uniform": [1, 9]}}
    spec = WorkloadSpec(generate=generated, rate=5.0)  # type: ignore[arg-type]
    plain, longer = (list(RequestStream(spec, seed=0, max_model_len=None, at_least=n)) for n in (None, at_least))
    assert len(longer) == max(40, at_least)
    if at_least <= 40:
        assert longer == plain


def test_classes_go_on_together() -> None:
    part = {"requests": 10, "input": {"fixed": 9}, "output": {"fixed": 2}}
    spec = WorkloadSpec(rate=4.0, mix={"a": {"generate": part, "share": 3}, "b": {"generate": part}})  # type: ignore[arg-type]
    stream = list(RequestStream(spec, seed=0, max_model_len=None, at_least=400))
    assert len(stream) == 400
    assert sum(one.klass == "a" for one in stream) / 400 == pytest.approx(0.75, abs=0.06)
