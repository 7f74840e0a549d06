"""ExeGPT's runtimes in the engine: phases by hand, what they keep to, and how near its planner comes to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import cli
from sim import SYSTEMS, ConfigError, Problem, Request, Result, Workload
from sim.batchers import HandedOver, PromptPhases
from sim.planners.exegpt import Rule
from sim.planners.pools import Pool, Split
from tests.lab import Fill, retell, spied
from tests.sim.systems.schedulers.test_vllm import traffic
from tests.toys import ToyCost, cluster, problem, request, run, with_limits

PLAIN = ToyCost(per_context_ps=0, per_pair_ps=0)
"""10 ms, and 10 us for a token."""
ROUND = {"schedule": "rra", "encode_batch": 2, "decode_iterations": 2, "gpus": 1, "band": 0.99}
"""Phases of two prompts and two iterations; so wide a band that no batch is mended."""


def place(gpus: int = 1, lengths: Sequence[tuple[int, int]] = ((100, 10),), cost: ToyCost = PLAIN) -> Problem:
    return replace(problem(cluster(gpus), cost), workload=Workload(rate_per_s=1.0, lengths=tuple(lengths)))


def times_ms(result: Result, number: int) -> list[float]:
    return [at / 1e9 for at in result.token_times_ps(number)]


def test_round_robin_by_hand() -> None:
    """Prompts of two, two iterations, the third prompt, two iterations, and two more without prompts."""
    requests = [request(0, output_tokens=4), request(1, output_tokens=2), request(2, output_tokens=6)]
    result = run(SYSTEMS["exegpt"](**ROUND), requests, place())
    assert times_ms(result, 1) == pytest.approx([12, 22.02])
    assert times_ms(result, 0) == pytest.approx([12, 22.02, 32.03, 53.05])
    assert times_ms(result, 2) == pytest.approx([43.03, 53.05, 63.06, 73.07, 83.08, 93.09])


def watched(
    requests: Sequence[Request], where: Problem | None = None, limits: dict[str, Any] | None = None, **options: Any
) -> tuple[Result, list[Fill]]:
    spy, fills = spied(with_limits(SYSTEMS["exegpt"](**{**ROUND, **options}), **(limits or {})))
    return run(spy, requests, where or place(), step_by_step=True), [f for f in fills if f.chunks or f.decodes]


@settings(max_examples=60)
@given(
    requests=traffic(), batch=st.integers(1, 6), n=st.integers(1, 9), blocks=st.sampled_from([20, 40, 1000]),
    band=st.sampled_from([0.0, 0.1, 0.5]),
)  # fmt: skip
def test_nobody_enters_a_phase_and_nobody_misses_an_iteration(
    requests: list[Request], batch: int, n: int, blocks: int, band: float
) -> None:
    """Between prompts there are whole phases of iterations of everybody, unless nobody is left."""
    _, fills = watched(
        requests, None, {"num_kv_blocks": blocks}, encode_batch=batch, decode_iterations=n, band=band
    )  # fmt: skip
    iterations = 0
    for fill, state in retell(fills, requests, steady=not any(fill.chunks for fill in fills)):
        assert not (fill.chunks and fill.decodes)
        if fill.decodes:
            iterations += 1
            continue
        before = [number for number, one in state.items() if one.running and number not in fill.chunks]
        assert not before or iterations % n == 0
        iterations = 0


def test_nobody_is_recomputed_as_a_phase_has_room_before_it_begins() -> None:
    """40 blocks: prompts of 100 tokens take seven and may take two more in 20 iterations."""
    requests = [request(number, output_tokens=60) for number in range(12)]
    result, fills = watched(requests, None, {"num_kv_blocks": 40}, encode_batch=8, decode_iterations=20)
    assert result.columns["preemptions"].sum() == 0
    assert len(fills[0].chunks) == 4


def test_prompt_tokens_stay_in_the_band() -> None:
    """Three of 100 tokens are wanted, within 10 %: two long ones are enough, short ones are four."""
    lengths = [150, 170, 90, 80, 80, 70, 300, 280]
    requests = [request(number, input_tokens=tokens, output_tokens=1) for number, tokens in enumerate(lengths)]
    _, fills = watched(requests, place(lengths=((100, 1),)), encode_batch=3, band=0.1)
    assert [list(fill.chunks.values()) for fill in fills] == [[150, 170], [90, 80, 80, 70], [300], [280]]


@pytest.mark.parametrize(
    ("running", "wanted"), [(0, 22), (40, 14), (42, 12), (48, 12), (54, 12), (63, 9), (80, 6), (500, 1)]
)
def test_batches_are_mended_over_the_phases_of_a_request(running: int, wanted: int) -> None:
    """Five phases, 60 sequences: 12 come and 48 stay; more than 6 off counts, and a fifth of it comes or stays away."""
    assert PromptPhases(12, 5, 60.0, 100.0).wanted(running) == wanted


def sampled(count: int, seed: int, mean: float = 32, std: float = 13) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    answers = np.clip(np.rint(rng.normal(mean, std, count)), 1, 80).astype(int).tolist()
    return [(100, answer) for answer in answers]


def phases(rule: Rule, band: float, count: int = 125) -> tuple[list[int], list[int], list[int], float]:
    """Batches when phases begin, admissions and completions of each, from the 20th phase on; and the planned batch."""
    lengths = sampled(21 * count, 1)
    requests = [
        request(number, input_tokens=tokens, output_tokens=answer) for number, (tokens, answer) in enumerate(lengths)
    ]
    where = place(lengths=sampled(5000, 0))
    options = {"encode_batch": 20, "decode_iterations": 7, "band": band, "rule": rule}
    system = SYSTEMS["exegpt"](**{**ROUND, **options})
    planned = system.planner.schedule(replace(where, limits=system.limits)).decode_batch  # type: ignore[attr-defined]
    _, fills = watched(requests, where, **options)
    begins = [at for at, fill in enumerate(fills) if fill.chunks][20 : count + 1]
    batches = [len(fills[at + 1].decodes) for at in begins]
    admitted = [len(fills[at].chunks) for at in begins]
    ended = [a + b - c for a, b, c in zip(batches[:-1], admitted[1:], batches[1:], strict=True)]
    return batches, admitted[1:], ended, planned


def test_c_d_batches_stay_as_planned_over_100_phases() -> None:
    """By Little's law, with nothing mended: the mean batch within 5 %, as many admitted as end."""
    batches, admitted, ended, planned = phases("littles_law", 0.99)
    assert len(batches) > 100
    assert np.mean(batches) == pytest.approx(planned, rel=0.05)
    assert np.mean(batches[:50]) == pytest.approx(np.mean(batches[-50:]), rel=0.05)
    assert np.mean(admitted) == pytest.approx(np.mean(ended), rel=0.02)


def test_the_papers_rule_expects_fewer_than_there_are() -> None:
    """Those in flight are longer than those that arrive, so its batch is never kept; mending admits fewer than B_E."""
    batches, _, _, planned = phases("paper", 0.99, count=70)
    assert np.mean(batches) > 1.05 * planned
    _, admitted, _, _ = phases("paper", 0.0, count=70)
    assert np.mean(admitted) < 20


def test_two_stages_take_turns() -> None:
    """Four prompts in two passes; each half then has its two iterations, and nobody more."""
    requests = [request(number, output_tokens=3) for number in range(8)]
    _, fills = watched(requests, place(2), gpus=2, tp=1, encode_batch=4)
    assert [sorted(fill.chunks) or fill.decodes for fill in fills] == [
        [0, 1], [2, 3], [0, 1], [2, 3], [0, 1], [2, 3], [4, 5], [6, 7], [4, 5], [6, 7], [4, 5], [6, 7],
    ]  # fmt: skip


def test_long_prompts_go_in_several_passes() -> None:
    requests = [request(number, output_tokens=2) for number in range(5)]
    _, fills = watched(requests, None, {"max_num_batched_tokens": 256}, encode_batch=5)
    assert [len(fill.chunks) for fill in fills] == [2, 2, 1, 0]


# ------------------------------------------------------------ WAA

APART: dict[str, Any] = {"schedule": "waa-c", "encode_batch": 2, "micro_batches": 1, "gpus": 2, "tp": 1}


def test_kv_goes_through_the_host_and_joins_at_the_next_iteration() -> None:
    """Out of one GPU and into the other, 100 tokens over PCIe each way; NVLink is not what carries it."""
    where = place(2)
    result = run(SYSTEMS["exegpt"](**APART), [request(0, output_tokens=3)], where)
    capacity = where.cluster.capacity_bytes_per_s
    path = where.cluster.load_path(("n0.g0",))
    hop_s = path.latency_s + 100 * where.model.kv_bytes_per_token() / path.bytes_per_s(capacity)
    (one,) = result.rows.requests
    assert times_ms(result, 0)[0] == pytest.approx(11)
    assert times_ms(result, 0)[1] == pytest.approx(11 + 2 * hop_s * 1e3 + 10.01, abs=1e-3)
    assert one.prefill_stage == "encode"
    assert one.decode_stage == "decode"


def test_a_full_decode_pool_holds_the_prefill_pool_back() -> None:
    """Three at once decode; two prompts are computed beside two whose KV waits, and no more. All are served."""
    requests = [request(number, output_tokens=40) for number in range(30)]
    spy, fills = spied(with_limits(SYSTEMS["exegpt"](**APART), max_num_seqs=3))
    result = run(spy, requests, place(2), step_by_step=True)
    assert max(len(fill.decodes) for fill in fills) == 3
    held = max(fill.total_blocks - fill.free_blocks for fill in fills if fill.role == "prefill")
    assert held <= ceil(2 * 2 * 1.1 * 7)
    assert (result.columns["outcome"] == "completed").all()


def test_the_decode_pool_lets_in_no_more_than_planned() -> None:
    """40 blocks: five prompts of seven would fit, but not what they grow to and the band."""
    requests = [request(number, output_tokens=10) for number in range(30)]
    spy, fills = spied(with_limits(SYSTEMS["exegpt"](**APART), num_kv_blocks=40))
    result = run(spy, requests, place(2), step_by_step=True)
    planned = spy.planner.last(("waa-c",)).most_decodes  # type: ignore[attr-defined]
    assert planned == 4
    assert max(len(fill.decodes) for fill in fills) == planned
    assert (result.columns["outcome"] == "completed").all()


def test_micro_batches_share_the_decodes() -> None:
    """Two stages, two micro-batches: never more than half of the decodes in one, and everybody has a turn."""
    requests = [request(number, output_tokens=30) for number in range(9)]
    where = place(3, lengths=((100, 60),))
    spy, fills = spied(SYSTEMS["exegpt"](**{**APART, "gpus": 3, "micro_batches": 2}))
    result = run(spy, requests, where, step_by_step=True)
    pools = spy.planner.last(("waa-c",)).plan.replicas  # type: ignore[attr-defined]
    assert [len(one.stages) for one in pools] == [1, 2]
    decodes = [fill for fill in fills if fill.decodes]
    assert all(len(fill.decodes) <= ceil(fill.num_running / 2) for fill in decodes)
    assert (result.columns["outcome"] == "completed").all()


def test_prompts_of_a_pass_are_as_many_as_planned() -> None:
    spy, fills = spied(SYSTEMS["exegpt"](**APART))
    run(spy, [request(number, output_tokens=2) for number in range(6)], place(2), step_by_step=True)
    assert [sorted(fill.chunks) for fill in fills if fill.chunks] == [[0, 1], [2, 3], [4, 5]]


# ------------------------------------------------------------ planner and engine


@pytest.mark.parametrize("options", [{"gpus": 1}, {"gpus": 2, "tp": 1}, {**APART, "encode_batch": 4}])
def test_the_engine_serves_what_the_planner_says(options: dict[str, Any]) -> None:
    """Throughput under a full queue within 12 %, service time of the bounded length within 15 %."""
    lengths = sampled(1500, 0)
    where = place(2, lengths, ToyCost())
    system = SYSTEMS["exegpt"](**{"schedule": "rra", "encode_batch": 12, "decode_iterations": 8, **options} if
                               "micro_batches" not in options else options)  # fmt: skip
    planned = system.planner.schedule(replace(where, limits=system.limits))  # type: ignore[attr-defined]
    requests = [request(number, 0.0, prompt, answer) for number, (prompt, answer) in enumerate(lengths)]
    columns = run(system, requests, where).columns
    ends = np.sort(columns["arrival_s"] + columns["e2e_s"])
    rate = 750 / (ends[1050] - ends[300])
    service_s = np.quantile((columns["e2e_s"] - columns["queue_s"])[300:1050], 0.99)
    assert rate == pytest.approx(planned.perf.throughput_per_s, rel=0.12)
    assert service_s == pytest.approx(planned.perf.latency_s, rel=0.15)


@pytest.mark.parametrize("kind", ["rra", "waa"])
def test_a_plan_from_elsewhere_is_followed(kind: str) -> None:
    """The schedule is searched for what the plan's roles are for."""
    where = place(2)
    if kind == "rra":
        plan = SYSTEMS["vllm"](tp=2, replicas=1).planner.plan(where)
    else:
        plan = Split(prefill=Pool(tp=1, replicas=1), decode=Pool(tp=1, replicas=1)).plan(where)
    result = run(SYSTEMS["exegpt"](), [request(0), request(1)], where, plan=plan)
    assert (result.columns["outcome"] == "completed").all()
    with pytest.raises(ConfigError, match="is not among the kinds searched; set it to auto"):
        run(SYSTEMS["exegpt"](schedule="waa-c" if kind == "rra" else "rra"), [request(0)], where, plan=plan)


def test_g_equal_seeds_give_equal_bytes() -> None:
    requests = [request(number, 0.01 * number, 50 + number, 5 + number % 7) for number in range(40)]
    logs = [run(SYSTEMS["exegpt"](), requests, place(2)).log() for _ in range(2)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "x"}, "system.schedule is 'x'; exegpt has auto, rra, waa-c, waa-m"),
        ({"rule": "x"}, "system.rule is 'x'; exegpt has littles_law, paper"),
        ({"latency_bound_s": 0.0}, "system.latency_bound_s is 0.0; it must be a number > 0"),
        ({"band": 1.0}, r"system.band is 1.0; it must be in \[0, 1\)"),
        ({"tolerance": -0.1}, r"system.tolerance is -0.1; it must be in \[0, 1\)"),
        (
            {"schedule": "waa-c", "decode_iterations": 4},
            "system.decode_iterations is for rra; with schedule waa-c leave",
        ),
        ({"schedule": "rra", "micro_batches": 4}, "system.micro_batches is for waa-c, waa-m; with schedule rra leave"),
        ({"encode_batch": 0}, "system.encode_batch is 0; it must be a whole number >= 1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SYSTEMS["exegpt"](**options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PromptPhases(0, 1, 1.0, 1.0),
        lambda: PromptPhases(1, 0, 1.0, 1.0),
        lambda: HandedOver(1, 0, 1.0, 1.0),
        lambda: HandedOver(1, 1, 1.0, 1.0, band=1.0),
    ],
)
def test_batchers_check_what_they_are_given(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"system\."):
        make()


# ------------------------------------------------------------ the command

WORLD: dict[str, Any] = {
    "model": "opt-13b",
    "cluster": {"nodes": [{"gpu": "A40", "count": 4}]},
    "workload": {
        "generate": {"requests": 80, "input": {"uniform": [64, 400]}, "output": {"uniform": [8, 60]}},
        "rate": 2.0,
    },
    "system": {"name": "exegpt"},
    "latency": "roofline",
    "slo": {"e2e_s": 12.0},
}


def test_the_plan_command_shows_the_schedule_and_the_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump(WORLD))
    for json_ in (["--json"], []):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", str(path), "--out", str(tmp_path / f"out{len(json_)}"), "--quiet", *json_])
        assert not ended.value.code
        printed = capsys.readouterr().out
        lines = json.loads(printed)["notes"] if json_ else printed.splitlines()
        assert any(line.startswith("schedule within 12 s: ") for line in lines)
        assert any("an exhaustive search has" in line for line in lines)
    with pytest.raises(SystemExit) as ended:  # the schedule is searched again, for the plan as it stands
        cli.main(["run", str(path), "--plan", str(tmp_path / "out0" / "plan.yaml"), "--quiet", "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["completed"] == 80
