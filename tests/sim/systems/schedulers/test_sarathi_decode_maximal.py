"""SARATHI: one chunk and the decodes that ride with it; what its paper printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, Cluster, ConfigError, Problem, Request, Workload, simulate
from sim.batchers import smallest_efficient_chunk
from sim.cost import Roofline, StageCost
from sim.cost import seconds as stage_seconds
from sim.model import ModelSpec, model
from sim.types import Line, Stage, Work
from tests.lab import ONE, PIPELINE, Fill, spied
from tests.sim.systems.schedulers.test_vllm import traffic
from tests.toys import MS, Requests, problem, request, run, with_limits


def sarathi(slots: int = 3, longest: int = 320, **options: Any) -> Any:
    """A KV cache of so many slots."""
    options = {"chunk_size": 32, "tile": 32, **options}
    system = SYSTEMS["sarathi"](replicas=1, tp=1, **options)
    return with_limits(system, max_model_len=longest, block_size=1, num_kv_blocks=slots * longest + longest // 2)


def watched(system: Any, requests: list[Request], plan: Any = ONE) -> list[Fill]:
    lab, fills = spied(system)
    run(lab, requests, plan=plan, step_by_step=True)
    return [fill for fill in fills if fill.chunks or fill.decodes]


def test_decodes_ride_with_the_chunks_of_the_next_prompt() -> None:
    """Three slots and tiles of 32: chunks of 30 beside up to two decodes."""
    fills = watched(sarathi(), [request(n, input_tokens=60, output_tokens=4) for n in range(3)])
    assert [(fill.chunks, fill.decodes) for fill in fills] == [
        ({0: 30}, []), ({0: 30}, []), ({1: 30}, [0]), ({1: 30}, [0]), ({2: 30}, [0, 1]), ({2: 30}, [1]),
        ({}, [1, 2]), ({}, [2]), ({}, [2]),
    ]  # fmt: skip


@settings(max_examples=40)
@given(traffic(), st.integers(1, 5), st.sampled_from([ONE, PIPELINE]))
def test_every_batch_keeps_to_the_rules(requests: list[Request], slots: int, plan: Any) -> None:
    """One chunk of C - (B - 1) tokens or what is left of the prompt; B slots; a full batch is one tile."""
    fills = watched(sarathi(slots), requests, plan)
    done: dict[int, int] = {}
    for fill in fills:
        assert len(fill.chunks) <= 1
        assert fill.num_running <= slots
        assert len(fill.decodes) + len(fill.chunks) <= slots
        assert fill.tokens <= 32
        assert not fill.preempted
        for number, tokens in fill.chunks.items():
            done[number] = done.get(number, 0) + tokens
            assert tokens == 32 - (slots - 1) or done[number] == requests[number].input_tokens
    assert done == {one.id: one.input_tokens for one in requests if one.input_tokens + one.output_tokens <= 320}


def test_the_slots_are_shared_by_the_micro_batches() -> None:
    """Four slots, two stages: B is two, so a batch is a chunk of 31 and one decode, or two decodes."""
    fills = watched(sarathi(4, pp=2), [request(n, input_tokens=31, output_tokens=9) for n in range(4)], PIPELINE)
    assert max(fill.num_running for fill in fills) == 4
    assert {len(fill.decodes) for fill in fills if fill.chunks} == {0, 1}
    assert max(len(fill.decodes) for fill in fills) == 2
    assert {tokens for fill in fills for tokens in fill.chunks.values()} == {31}


def test_the_baseline_never_mixes_and_the_best_case_of_orca_never_cuts() -> None:
    requests = [request(n, input_tokens=60, output_tokens=4) for n in range(3)]
    baseline = watched(sarathi(mode="baseline"), requests)
    assert [(fill.chunks, fill.decodes) for fill in baseline[:2]] == [({0: 60, 1: 60, 2: 60}, []), ({}, [0, 1, 2])]
    best = watched(sarathi(mode="orca-best"), requests)
    assert [(fill.chunks, fill.decodes) for fill in best[:3]] == [({0: 60}, []), ({1: 60}, [0]), ({2: 60}, [0, 1])]


@given(traffic())
def test_one_slot_is_the_baseline(requests: list[Request]) -> None:
    """Spec, section 7: B = 1, and a chunk for the longest prompt."""
    one, baseline = (run(sarathi(1, chunk_size=320, mode=mode), requests) for mode in ("decode-maximal", "baseline"))
    assert one.log() == baseline.log()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "mode is 'best'; sarathi has decode-maximal, orca-best, baseline"),
        ({"chunk_size": 200}, r"chunk_size is 200; it must be auto, or a multiple of tile \(128\)"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be auto"),
        ({"tile": 0}, "tile is 0; it must be >= 1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"system\." + message):
        SYSTEMS["sarathi"](**options)


def test_more_decodes_than_a_chunk_holds_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"chunk_size is 32, but 39 decodes ride .* lower system\.engine\.max_num_seqs"
    ):
        run(sarathi(40), [request(0)])


@pytest.mark.parametrize(
    ("what", "limits", "reason"),
    [
        ({"input_tokens": 311}, {}, "321 tokens exceed system.engine.max_model_len, 320"),
        ({}, {"num_kv_blocks": 319}, "a: a context of 320 tokens exceeds the 319 of the KV cache"),
        ({"samples": 2}, {}, "a: 2 samples: this scheduler has one a request"),
    ],
)
def test_what_never_fits_is_refused(what: dict[str, int], limits: dict[str, int], reason: str) -> None:
    row = run(with_limits(sarathi(), **limits), [request(0, **what)], plan=ONE).rows.requests[0]  # type: ignore[arg-type]
    assert row.reason.startswith(reason)


# ------------------------------------------------------------ the chunk size


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """Time is flat up to ``tokens``, then proportional: the linear layers of a GPU, and nothing else."""

    tokens: int
    name: str = "ridge"
    measured: bool = False

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        return self

    def line(self, work: Work) -> Line:
        return Line(max(self.tokens, work.tokens) * MS // 100, 0, 1 << 30)


@pytest.mark.parametrize(("max_loss", "chunk"), [(0.0, 256), (0.2, 256), (0.5, 128), (0.74, 128), (0.75, 64)])
def test_the_smallest_chunk_within_the_loss(max_loss: float, chunk: int) -> None:
    """A prompt of 1024 below a ridge of 256: chunks of 128 take twice the time, of 64 four times."""
    cost = Ridge(tokens=256)
    assert smallest_efficient_chunk(lambda work: stage_seconds(cost, work), 1024, max_loss, tile=64) == chunk


def test_a_chunk_size_is_found_on_the_replica() -> None:
    lab, fills = spied(sarathi(chunk_size="auto"))
    run(lab, [request(0, input_tokens=300)], problem(cost=Ridge(tokens=96)), plan=ONE, step_by_step=True)
    assert fills[0].chunks == {0: 96 - 2}


# ------------------------------------------------------------ what the paper printed


def makespan_s(where: Problem, mode: str, batch: int, prompt: int, output: int, chunk: int = 256) -> float:
    """Seconds for six batches of equal requests in slots of just their length."""
    system = SYSTEMS["sarathi"](mode=mode, chunk_size=chunk, replicas=1, tp=1)
    length = prompt + output
    system = with_limits(system, max_model_len=length, block_size=1, num_kv_blocks=batch * length)
    requests = [request(n, 0.0, prompt, output) for n in range(6 * batch)]
    return simulate(where, system, Requests(requests)).makespan_s


def gain(
    where: Problem, batch: int, length: int, ratio: float, chunk: int = 256, mode: str = "decode-maximal"
) -> float:
    """Throughput over the baseline's, of requests of ``length`` tokens, ``ratio`` of the prompt to one of output."""
    output = round(length / (ratio + 1))
    times_s = [makespan_s(where, name, batch, length - output, output, chunk) for name in ("baseline", mode)]
    return times_s[0] / times_s[1]


@pytest.mark.parametrize(("chunk", "peak"), [(256, 14), (512, 29)])
def test_figure_9_the_gain_peaks_where_chunks_and_decodes_end_together(chunk: int, peak: int) -> None:
    """B = 18: the peak is at P:D = chunk/(B - 1), 14.1 and 29.1 with aligned chunks; the paper's grid has 14 and 28."""
    where = problem(cost=Ridge(tokens=chunk))
    assert peak == (chunk - 17) // 17
    gains = {ratio: gain(where, 18, 4096, ratio, chunk) for ratio in (5, 10, peak - 1, peak, peak + 1, 40, 60)}
    assert max(gains, key=lambda ratio: gains[ratio]) == peak


@cache
def hardware(gpu: str, name: str) -> Problem:
    """One GPU, roofline; positions are extended, as in the paper, to fit its longest sequences."""
    return Problem(
        cluster=Cluster.of(nodes=[{"gpu": gpu, "count": 1}]),
        model=replace(model(name), max_position_embeddings=4096),
        cost=Roofline(),
        workload=Workload(rate_per_s=1.0, lengths=((100, 10),)),
    )


def test_figure_9_and_11_heights_of_the_peaks() -> None:
    """LLaMA-13B on A6000, sequences of 1K, B = 18: 1.27x with C = 256, 1.23x with 512, Orca's best case 1.11x."""
    where = hardware("A6000", "llama-13b")
    assert gain(where, 18, 1024, 14) == pytest.approx(1.27, rel=0.1)
    assert gain(where, 18, 1024, 28, chunk=512) == pytest.approx(1.23, rel=0.1)
    assert max(gain(where, 18, 1024, ratio, mode="orca-best") for ratio in (14, 28, 40)) == pytest.approx(1.11, rel=0.1)


@pytest.mark.parametrize(
    ("gpu", "name", "settings", "published"),
    [
        ("A6000", "llama-13b", ((1024, 6, 50), (2048, 6, 50), (3072, 6, 50)), (1.33, 1.26, 1.22)),
        ("A100-80G-SXM", "llama-30b", ((1024, 10, 28), (2048, 5, 63), (3072, 3, 127)), (1.25, 1.22, 1.14)),
    ],
)
def test_table_4_throughput(
    gpu: str, name: str, settings: tuple[tuple[int, int, float], ...], published: tuple[float, ...]
) -> None:
    """Peak throughput over the baseline's, C = 256, by (sequence length, batch, P:D)."""
    gains = [gain(hardware(gpu, name), batch, length, ratio) for length, batch, ratio in settings]
    assert gains == [pytest.approx(value, rel=0.12) for value in published]


def test_figure_13_what_chunking_costs_a_prompt() -> None:
    """LLaMA-13B on A6000: chunks of 64 several times slower, 256 lose at most 20 %, 512 at most 10 %."""
    where = hardware("A6000", "llama-13b")
    stage = Stage(name="s", gpus=("n0.g0",), first_layer=0, end_layer=where.model.num_layers)
    cost = where.cost.bind(where.model, stage, where.cluster)
    whole = prompt_s(cost, 1024)
    assert whole / prompt_s(cost, 64) < 0.6
    assert 0.8 <= whole / prompt_s(cost, 256) <= whole / prompt_s(cost, 512)
    assert whole / prompt_s(cost, 512) >= 0.9


def prompt_s(cost: StageCost, chunk: int) -> float:
    price: Callable[[Work], float] = lambda work: stage_seconds(cost, work)  # noqa: E731
    return sum(price(Work(((chunk, start),), 0, 0)) for start in range(0, 1024, chunk))
