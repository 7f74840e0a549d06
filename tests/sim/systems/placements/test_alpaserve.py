"""AlpaServe: classes are models, groups host some of them, who would be late is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from sim import SYSTEMS, ConfigError, Plan, Problem, Result, Slo, System, Workload
from sim.types import to_ps
from tests.toys import MS, ToyCost, cluster, problem, replica, request, run

COST = ToyCost(base_ps=100 * MS, per_token_ps=0, per_context_ps=0, per_pair_ps=0)


class Hosting:
    """Two groups of one GPU: one hosts model a, the other both."""

    def plan(self, problem: Problem) -> Plan:
        return Plan(
            replicas=(
                replace(replica("one", ["n0.g0"]), models=("a",)),
                replace(replica("two", ["n0.g1"]), models=("a", "b")),
            )
        )


def alpaserve(**options: object) -> System:
    return replace(SYSTEMS["alpaserve"](**options), planner=Hosting())


def simulate(
    system: System, classes: str, bound_s: float | None = None, output_tokens: int = 1, gap_s: float = 0.0
) -> Result:
    requests = [
        request(n, gap_s * n, output_tokens=output_tokens, klass=name) for n, name in enumerate(classes)
    ]  # fmt: skip
    known = Workload(rate_per_s=1.0, lengths=((100, output_tokens),))
    where = replace(problem(cluster(gpus=2), COST), slo=Slo(e2e_s=bound_s), workload=known)
    return run(system, requests, where)


def test_a_request_goes_where_its_model_is() -> None:
    table = simulate(alpaserve(), "bab").requests.sort_values("request")
    assert table["prefill_stage"].tolist() == ["two", "one", "two"]


def test_one_request_at_a_time_runs_to_its_end() -> None:
    result = simulate(alpaserve(), "bb", output_tokens=3)
    assert result.token_times_ps(0) == [100 * MS, 200 * MS, 300 * MS]
    assert result.token_times_ps(1) == [400 * MS, 500 * MS, 600 * MS]


def test_batches_are_of_one_model_and_models_take_turns() -> None:
    result = simulate(alpaserve(batch=None), "bab", output_tokens=4)
    shared = [row for row in result.rows.step_fields if row[0] == "two"]
    assert shared
    both = replace(alpaserve(batch=None), planner=_Everything())
    result = simulate(both, "abab", output_tokens=3)
    steps = [(tokens > 0, seqs) for _, _, _, count, tokens, seqs, _ in result.rows.step_fields for _ in range(count)]
    assert steps[:4] == [(True, 0)] * 4  # a, b, a, b: neighbours in line are of different models
    assert [seqs for prompt, seqs in steps if not prompt] == [2, 2, 2, 2]


class _Everything:
    def plan(self, problem: Problem) -> Plan:
        return Plan(replicas=(replace(replica("one", ["n0.g0"]), models=("a", "b")),))


def test_who_would_be_late_is_refused_at_once() -> None:
    result = simulate(alpaserve(), "bbbbb", bound_s=0.25)
    assert Counter(result.requests["outcome"]) == {"completed": 2, "rejected": 3}
    assert (result.requests["e2e_s"].dropna() <= 0.25).all()
    assert result.requests["reason"].str.contains("over 0.25 s").sum() == 3
    assert (simulate(alpaserve(admission=False), "bbbbb", bound_s=0.25).requests["outcome"] == "completed").all()


def test_a_model_without_a_host_is_refused() -> None:
    assert simulate(alpaserve(), "c").requests["reason"].tolist() == ["no group that is up hosts c"]


def test_weights_of_every_model_take_memory() -> None:
    def blocks(models: tuple[str, ...]) -> int:
        class One:
            def plan(self, problem: Problem) -> Plan:
                return Plan(replicas=(replace(replica("one", ["n0.g0"]), models=models),))

        system = replace(alpaserve(), planner=One())
        return run(system, [request(0, klass="a")], problem(cluster(gpus=2), COST)).rows.replicas[0].total_blocks

    where = problem(cluster(gpus=2))
    per_block = where.model.kv_bytes_per_token_layer_gpu(1) * where.model.num_layers * 16
    assert blocks(("a",)) - blocks(("a", "b")) == pytest.approx(where.model.weight_bytes(0, 2) / per_block, abs=1)


def test_the_planned_system_serves() -> None:
    requests = [request(n, 0.02 * n, output_tokens=2, klass="ab"[n % 2]) for n in range(60)]
    where = problem(cluster(gpus=2), COST)
    where = replace(where, workload=replace(where.workload, classes={"a": 0.5, "b": 0.5}))
    result = run(SYSTEMS["alpaserve"](arrivals=100), requests, where)
    assert (result.requests["outcome"] == "completed").all()
    assert to_ps(result.makespan_s) > 0


def test_bad_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"system\.batch is 0"):
        SYSTEMS["alpaserve"](batch=0)
