"""``phasewise plan``: candidates, plan files, what cannot be done, and which machines a budget buys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from experiments import cli
from experiments.planning.budget import Machine, Market, offered, purchases
from experiments.planning.plan import Option, found, minimum, ranked, reloaded
from experiments.plots.plan import cluster_drawing, short_names
from experiments.scenario.file import Scenario
from experiments.scenario.planfile import plan_yaml, read_plan
from experiments.scenario.resolve import resolve
from sim import ConfigError
from sim.cluster import gpu
from sim.types import InfeasibleError, Plan

WORLD: dict[str, Any] = {
    "model": "llama-13b",
    "cluster": {
        "nodes": [{"gpu": "A40", "count": 4}, {"gpu": "RTX-3090-Ti", "count": 4}],
        "links": {"inter_node": {"gbps": 40, "latency_us": 50}},
    },
    "workload": {"generate": {"requests": 120, "input": {"uniform": [64, 900]}, "output": {"fixed": 20}}, "rate": 3.0},
    "system": {"name": "thunderserve", "n_steps": 3},
    "latency": "roofline",
    "slo": {"ttft_s": 2.0, "tpot_s": 0.15},
}
ONE_GPU = [{"gpu": "A40", "count": 1}]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump(WORLD))
    return path


def plan(*arguments: object) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *map(str, arguments)])
    return int(ended.value.code or 0)


def the_plan(where: Scenario | None = None) -> Plan:
    return found(resolve(where or Scenario.of(WORLD))).options[0].plan


def with_slo(**slo: float) -> Scenario:
    return Scenario.of({**WORLD, "slo": slo})


def test_it_prints_candidates_and_writes_a_plan_that_run_takes(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert plan(scenario, "--top", 2, "--requests", 60, "--out", out, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["plans"]
    assert len(rows) == 2
    assert rows[0]["simulated_attainment"] == 1.0
    assert rows[0]["goodput_per_s"] >= rows[1]["goodput_per_s"] > 3.0
    assert all(row["predicted_attainment"] > 0.95 for row in rows if row["predicted_attainment"] is not None)
    assert rows[0]["usd_per_hour"] == pytest.approx(0.44 * 4 + 0.307 * 4)
    log = pd.read_csv(out / "search.csv")
    assert (log["best"].diff().dropna() >= 0).all()
    assert {path.name for path in out.iterdir()} >= {"plan.yaml", "plan2.yaml", "candidates.csv", "cluster.png"}

    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(out / "scenario.yaml"), "--plan", str(out / "plan.yaml"), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 120


def test_the_plan_of_a_file_is_the_one_that_runs(tmp_path: Path) -> None:
    """One replica on two GPUs, in place of the twelve that vLLM would have."""
    text = "replicas: [{name: only, stages: [{gpus: [n1.g2, n1.g3], layers: [0, 40]}]}]"
    tmp_path.joinpath("own.yaml").write_text(text)
    file = tmp_path / "world.yaml"
    file.write_text(yaml.safe_dump({**WORLD, "system": {"name": "vllm"}, "plan": "own.yaml"}))
    result = resolve(Scenario.load(file)).run()
    assert set(result.columns["prefill_stage"]) == {"only"}


def test_a_plan_file_says_the_same_when_it_is_read(tmp_path: Path) -> None:
    setup = resolve(Scenario.of(WORLD))
    written = the_plan()
    file = tmp_path / "plan.yaml"
    file.write_text(plan_yaml(written))
    again = read_plan(file, setup.problem)
    assert again.replicas == written.replicas
    assert dict(again.shares) == pytest.approx(dict(written.shares), abs=1e-6)


def test_a_plan_of_nodes_keeps_its_flows(tmp_path: Path) -> None:
    setup = resolve(Scenario.of({**WORLD, "system": {"name": "helix", "tp": 4, "moves": 5}}))
    written = setup.system.planner.plan(setup.problem)
    file = tmp_path / "plan.yaml"
    file.write_text(plan_yaml(written))
    again = read_plan(file, setup.problem)
    assert [replica.name for replica in again.replicas] == [replica.name for replica in written.replicas]
    assert dict(again.flows) == dict(written.flows) != {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "replicas: [{name: a, stages: [{gpus: [n7.g0], layers: [0, 40]}]}]",
            "GPU 'n7.g0', which the cluster does not",
        ),
        ("replicas: [{name: a, stages: [{gpus: [n0.g0], layers: [0, 39]}]}]", "no replica holds layer 39"),
        ("replicas: [{name: a, stage: []}]", "did you mean 'stages'"),
        ("replicas: []", "must have at least 1 entry"),
        ("[1, 2]", "must be a mapping"),
        ("a: {", "not valid YAML"),
        (
            "{replicas: [{name: a, stages: [{gpus: [n0.g0], layers: [0, 40]}]}],"
            " shares: [{prefill: a, decode: b, share: 1}]}",
            "'b' is not one of its replicas",
        ),
        (
            "{replicas: [{name: a, stages: [{gpus: [n0.g0], layers: [0, 40]}]}],"
            " shares: [{prefill: a, decode: a, share: 0.5}]}",
            "they add up to 0.5",
        ),
        (
            "{replicas: [{name: a, stages: [{gpus: [n0.g0], layers: [0, 40]}]}],"
            " flows: [{source: b, tokens_per_s: 1}]}",
            "'b' is not one of its replicas",
        ),
    ],
)
def test_a_plan_file_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_plan(file, resolve(Scenario.of(WORLD)).problem)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_plan_stands_beside_the_bound_and_colocated_vllm(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence says what to rent and what it carries; no simple layout that was tried is better than the plan."""
    out = tmp_path / "out"
    assert plan(scenario, "--top", 2, "--requests", 60, "--out", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    best = told["plans"][0]
    assert told["sentence"].startswith("Rent 4 ")
    assert f"{best['goodput_per_s']:.4g} requests/s" in told["sentence"]
    assert 0 < told["bound"]["gap"] < 1
    assert set(told["bound"]["adds_per_s"]) >= {"A40", "RTX-3090-Ti"}
    assert len(told["baselines"]) == 3, "on all GPUs, and on either type"
    assert all((row["goodput_per_s"] or 0.0) <= best["goodput_per_s"] for row in told["baselines"])
    assert told["cheapest"]["usd_per_hour"] < best["usd_per_hour"]
    read_plan(out / "cheapest.yaml", resolve(Scenario.of(WORLD)).problem)
    assert (out / "baselines.csv").is_file()


def test_equal_seeds_give_equal_plans(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for _ in range(2):
        assert plan(scenario, "--top", 1, "--requests", 40, "--json") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_without_a_rate_the_most_that_is_carried_is_what_counts(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        plan(
            scenario,
            "--top",
            1,
            "--requests",
            40,
            "--set",
            "model=llama-3.1-8b",
            "--set",
            "workload={trace: sample}",
            "--json",
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["cheapest"] is None
    assert told["plans"][0]["goodput_per_s"] > 0


# ---------------------------------------------------------------- going on from a plan


def test_after_a_loss_the_others_stay_where_they_are(scenario: Path, tmp_path: Path) -> None:
    start, again, anew = tmp_path / "start.yaml", tmp_path / "again", tmp_path / "anew"
    before = the_plan()
    start.write_text(plan_yaml(before))
    lost = before.replicas[0].gpus[0]
    problem = resolve(Scenario.of(WORLD)).problem
    assert plan(scenario, "--from", start, "--lost", lost, "--requests", 40, "--top", 1, "--out", again) == 0
    light = read_plan(again / "plan.yaml", problem)
    assert {one.gpus for one in light.replicas} == {one.gpus for one in before.replicas if lost not in one.gpus}
    assert reloaded(before, light) == []
    assert plan(scenario, "--from", start, "--lost", "n0", "--full", "--requests", 40, "--top", 1, "--out", anew) == 0
    full = read_plan(anew / "plan.yaml", problem)
    assert not {gpu for one in full.replicas for gpu in one.gpus} & {"n0.g0", "n0.g1", "n0.g2", "n0.g3"}
    assert reloaded(light, full)


# ---------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", f"cluster.nodes={ONE_GPU}"], 3, "need 2 x"),
        (["--set", f"cluster.nodes={ONE_GPU * 2}", "--set", "cluster.links.inter_node.gbps=0"], 3, "none has a link"),
        (["--set", "slo.ttft_s=0.01"], 3, "slo.ttft_s is 0.01: to have 90% of the requests within it takes 0."),
        (
            ["--requests", "120", "--set", "workload.rate=60", "--set", "slo.ttft_s=0.5", "--top", "1"],
            3,
            "held back by",
        ),
        (["--budget", "0.1"], 3, "the cheapest machine, 1xRTX-3090, costs 0.22"),
        (["--budget", "-1"], 2, "--budget -1: must be a number > 0"),
        (["--budget", "5", "--machines", "8A40"], 2, "--machines '8A40': write GPUs and type"),
        (["--budget", "5", "--machines", "1xCPU"], 2, "no price is known of CPU"),
        (["--machines", "4xA40"], 2, "give --budget"),
        (["--lost", "n0"], 2, "--from PLAN.yaml"),
        (["--seconds", "5", "--system", "vllm"], 2, "vllm's planner has no time limit"),
        (["--system", "vllm,orca"], 2, "name one system"),
        (["--system", "thunder"], 2, "did you mean 'thunderserve'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    scenario: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert plan(scenario, "--requests", 60, *arguments) == code
    text = capsys.readouterr().err.strip()
    assert message in text
    assert len(text.splitlines()) == 1


def test_a_recording_too_short_to_tell_is_pointed_out(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 60 have come before the first must have been answered."""
    lines = [f"{0.002 * number:g},200,20" for number in range(60)]
    Path("short.csv").write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]))
    plan(scenario, "--requests", 60, "--set", "workload={trace: short.csv}", "--top", 1)
    text = capsys.readouterr().err
    assert "too few to see queues grow" in text


def test_drawn_arrivals_go_on_until_overload_is_seen(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 500 requests/s 60 would come before the first must have been answered."""
    assert plan(scenario, "--requests", 60, "--set", "workload.rate=500", "--top", 1) == 3
    assert "in the simulation" in capsys.readouterr().err


def test_a_plan_for_another_cluster_names_the_gpu_that_is_missing(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(plan_yaml(the_plan()))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(scenario), "--plan", str(file), "--set", "cluster.nodes=[{gpu: A40, count: 4}]"])
    assert ended.value.code == 2
    assert "'n1.g0', which the cluster does not have" in capsys.readouterr().err


def test_prices_that_are_unknown_are_named(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(scenario, "--requests", 40, "--top", 1, "--set", "cluster.pricing=spot", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["plans"][0]["usd_per_hour"] is None
    assert "no price is known of A40, RTX-3090-Ti" in printed.err


def test_the_minimum_is_what_a_lone_request_takes() -> None:
    """No plan, however light the load, has a request below it; the best one is near."""
    slow = {**WORLD, "workload": {**WORLD["workload"], "rate": 0.01}, "system": {"name": "vllm", "tp": 4}}
    setup = resolve(Scenario.of(slow))
    columns = setup.run().columns
    for name, least_s in minimum(setup).items():
        seen = float(pd.Series(columns[name]).quantile(0.9, interpolation="higher"))
        assert least_s <= seen * (1 + 1e-9)
        assert seen < 2 * least_s


def test_an_slo_just_above_the_minimum_is_searched_for() -> None:
    least_s = minimum(resolve(Scenario.of(WORLD)))["tpot_s"]
    with pytest.raises(InfeasibleError, match=r"slo.tpot_s"):
        found(resolve(with_slo(tpot_s=least_s * 0.99)))
    assert found(resolve(with_slo(tpot_s=least_s * 1.01))).options


# ---------------------------------------------------------------- ranking, and what a budget buys


def test_the_best_in_the_simulation_goes_first_and_of_equals_the_cheapest() -> None:
    setup = resolve(Scenario.of(WORLD))
    whole = the_plan()
    part = replace(whole, replicas=whole.replicas[:1])
    a, b, c = (
        Option(setup=setup, plan=whole, simulated=0.95),
        Option(setup=setup, plan=part, simulated=0.92),
        Option(setup=setup, plan=part, simulated=0.5),
    )
    assert ranked([c, b, a]) == [a, b, c]
    assert ranked([c, a, b], by_price=True) == [b, a, c], "both reach 0.9, b on fewer GPUs"
    assert ranked([a, replace(c, goodput_per_s=1.0)])[0].goodput_per_s == 1.0


def test_purchases_stay_within_the_budget_and_mix_types() -> None:
    market = Market(
        machines=(Machine(gpu=gpu("A40"), count=4), Machine(gpu=gpu("A5000"), count=4)), spot=False, unpriced=()
    )
    bought = purchases(market, 6.0, "bfloat16")
    assert all(0 < market.cost(purchase) <= 6.0 for purchase in bought)
    assert {len(purchase) for purchase in bought} == {1, 2}
    most = {purchase[0][0].gpu.name: max(n for (m, n), *more in bought if m == purchase[0][0] and not more)
            for purchase in bought}  # fmt: skip
    assert most == {"A40": 3, "A5000": 6}, "1.76 and 0.892 dollars an hour each"


def test_offers_are_as_large_as_the_budget_allows_at_the_scenarios_prices() -> None:
    given = {**WORLD["cluster"], "nodes": [{"gpu": "A40", "count": 4, "usd_per_hour": 3.0}]}
    market = offered(Scenario.of({**WORLD, "cluster": given}), 7.0, None)
    by_name = {machine.gpu.name: machine for machine in market.machines}
    assert by_name["A40"].count == 2, "2 x 3 dollars"
    assert by_name["A5000"].count == 4
    assert by_name["A100-80G-SXM"].count == 4
    assert "CPU" not in by_name


def test_a_budget_ends_in_plans_on_machines_it_can_pay(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert plan(scenario, "--budget", 2, "--machines", "2xA40,2xA5000", "--top", 2, "--requests", 60, "--out", out) == 0
    table = pd.read_csv(out / "candidates.csv")
    assert (table["usd_per_hour"] <= 2).all()
    assert table["usd_per_hour"].is_monotonic_increasing
    rented = Scenario.load(out / "scenario.yaml")
    read_plan(out / "plan.yaml", resolve(rented).problem)


# ---------------------------------------------------------------- the drawing


def test_the_drawing_shows_every_gpu_and_every_flow() -> None:
    setup = resolve(Scenario.of(WORLD))
    whole = the_plan()
    drawing = cluster_drawing(setup.problem.cluster, whole)
    machines, flows = drawing.figure.axes
    texts = [text.get_text().split("\n")[0] for text in machines.texts]
    names = short_names(whole)
    for replica in whole.replicas:
        assert texts.count(names[replica.name]) == len(replica.gpus)
    widths = [patch for patch in flows.patches if patch.get_label() != "_nolegend_"]
    assert len(widths) == len(whole.shares)
    assert len(drawing.table) == sum(len(replica.gpus) for replica in whole.replicas)
