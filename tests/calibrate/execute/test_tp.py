"""Stages of several ranks: the weights, logits and tokens of one, whatever is cut, moved or swapped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

import numpy as np  # noqa: E402

from calibrate.execute.how import Execution  # noqa: E402
from calibrate.execute.model.architecture import Architecture  # noqa: E402
from calibrate.execute.model.cache import cache_bytes  # noqa: E402
from calibrate.execute.model.shard import Ranks, Shard  # noqa: E402
from calibrate.execute.model.stage import Item, Stage  # noqa: E402
from calibrate.execute.model.weights import drawn, num_bytes, tensors_of  # noqa: E402
from calibrate.execute.workers.crew import link_shares, parts_of, worker_configs, workers_of  # noqa: E402
from calibrate.execute.workers.fleet import Fleet, Word, WorkerLostError  # noqa: E402
from sim.transfers import Quantized  # noqa: E402
from sim.types import ConfigError, Replica  # noqa: E402
from sim.types import Stage as StageSpec  # noqa: E402
from tests.calibrate.execute.test_measured import SMALL  # noqa: E402
from tests.calibrate.execute.test_wall import SPLIT, WALL, alive, alone, requests, system, wall  # noqa: E402
from tests.toys import cluster, problem  # noqa: E402

torch.set_num_threads(1)

DENSE = Architecture(
    name="dense", num_layers=2, hidden_size=32, intermediate_size=48, num_heads=8, num_kv_heads=2, head_dim=8,
    vocab_size=97, dtype="float32", qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "tied": replace(DENSE, tied=True, num_kv_heads=8),
    "experts": replace(DENSE, mlp_bias=False, num_experts=4, experts_per_token=2),
}


class Meeting:
    """Where the threads of a stage add up what they bring."""

    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)


class Threads(Ranks):
    """Ranks in one process, each in a thread of its own."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(Shard(rank, len(meeting.brought)))
        self.meeting = meeting

    def sum(self, part: Any) -> Any:
        self.meeting.brought[self.shard.rank] = part
        self.meeting.barrier.wait()
        total = torch.stack(self.meeting.brought).sum(dim=0)
        self.meeting.barrier.wait()
        return total


class Crew:
    """A stage of several ranks, as one."""

    def __init__(self, arch: Architecture, tp: int) -> None:
        meeting = Meeting(tp)
        self.ranks = [Stage(arch, blocks=40, block_size=4, seed=3, ranks=Threads(rank, meeting)) for rank in range(tp)]

    def all(self, work: Any) -> list[Any]:
        out: list[Any] = [None] * len(self.ranks)

        def run(rank: int, stage: Stage) -> None:
            out[rank] = work(stage)

        threads = [threading.Thread(target=run, args=one) for one in enumerate(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out

    def run(self, items: Sequence[Item]) -> dict[int, int]:
        first, *others = [tokens for tokens, _ in self.all(lambda stage: stage.run(items))]
        assert all(tokens == first for tokens in others)
        return dict(first)


def generated(crew: Crew, prompt: list[int], count: int) -> list[int]:
    tokens = [crew.run([Item(0, 0, tuple(prompt), True)])[0]]
    while len(tokens) < count:
        tokens.append(crew.run([Item(0, len(prompt) + len(tokens) - 1, (tokens[-1],), True)])[0])
    return tokens


PROMPT = [5, 96, 0, 48, 49, 3, 77, 12, 64]


# ---------------------------------------------------------------- without processes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_together_give_the_tokens_and_logits_of_one(name: str, tp: int) -> None:
    """Four ranks of two key-value heads: each of those is there twice."""
    one, several = Crew(MODELS[name], 1), Crew(MODELS[name], tp)
    assert generated(several, PROMPT, 8) == generated(one, PROMPT, 8)

    def logits(stage: Stage) -> Any:
        stage.tables.resize(7, len(PROMPT))
        return stage.forward(stage.batch([Item(7, 0, tuple(PROMPT), True)]))

    torch.testing.assert_close(torch.cat(several.all(logits), dim=1), one.all(logits)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_ranks_hold_the_weights_of_one_cut_in_parts(name: str) -> None:
    arch = MODELS[name]
    whole = drawn(arch, 0, 2, seed=1, device="cpu")
    parts = [drawn(arch, 0, 2, seed=1, device="cpu", shard=Shard(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([part.layers[1].o for part in parts], dim=1), whole.layers[1].o)
    assert torch.equal(torch.cat([part.layers[1].down for part in parts], dim=-1), whole.layers[1].down)
    assert whole.head is not None
    assert torch.equal(torch.cat([part.head for part in parts if part.head is not None]), whole.head)
    queries = torch.cat([part.layers[0].qkv[:16] for part in parts])
    assert torch.equal(queries, whole.layers[0].qkv[:64])
    assert [part.layers[0].o_bias is None for part in parts] == [False, True, True, True]
    for rank, part in enumerate(parts):
        unique = {id(tensor): tensor.nbytes for tensor in tensors_of(part)}
        assert num_bytes(arch, 0, 2, Shard(rank, 4)) == sum(unique.values())


def test_a_rank_holds_its_share_of_the_kv() -> None:
    own = Shard(1, 4).architecture(DENSE)
    assert (own.num_heads, own.num_kv_heads, own.intermediate_size) == (2, 1, 12)
    assert cache_bytes(own, 2, 9, 4) * 2 == cache_bytes(DENSE, 2, 9, 4)  # two heads on four ranks: each is there twice


@pytest.mark.parametrize(("size", "what"), [(3, "8 query heads"), (16, "8 query heads"), (8, "columns")])
def test_what_ranks_cannot_share_is_refused(size: int, what: str) -> None:
    arch = replace(DENSE, intermediate_size=36)
    with pytest.raises(ConfigError, match=f"tp: {size}: dense has .*{what}, which {size} GPUs cannot share"):
        Shard(0, size).architecture(arch)
    with pytest.raises(ConfigError, match="tp: 4: dense has 6 key-value heads"):
        Shard(0, 4).architecture(replace(DENSE, num_heads=24, num_kv_heads=6))


def of(name: str, *cuts: tuple[int, int, int]) -> Replica:
    """A replica of stages (tp, first layer, end layer)."""
    return Replica(
        name=name,
        stages=tuple(
            StageSpec(name=f"{name}.{k}", gpus=tuple(f"g{n}" for n in range(tp)), first_layer=first, end_layer=end)
            for k, (tp, first, end) in enumerate(cuts)
        ),
    )


DEGREES = st.sampled_from([1, 2, 4, 8])


@given(DEGREES, DEGREES, DEGREES, DEGREES, st.sampled_from([1, 2, 4, 8]))
def test_every_rank_gets_the_heads_and_layers_it_computes_once(a: int, b: int, c: int, d: int, kv_heads: int) -> None:
    source, target = of("a", (a, 0, 3), (b, 3, 4)), of("b", (c, 0, 1), (d, 1, 4))
    sent = []
    for part in parts_of(source, target, kv_heads):
        ends = []
        for replica, worker, own in ((source, part.source, part.source_head), (target, part.target, part.target_head)):
            name, _, rank = worker.partition("/")
            (stage,) = (stage for stage in replica.stages if stage.name == name)
            first_head = Shard(int(rank or 0), stage.tp).share(kv_heads).start
            ends.append(
                {
                    (x, h)
                    for x in range(part.first, part.end)
                    for h in range(first_head + own, first_head + own + part.heads)
                }
            )
            assert stage.first_layer <= part.first < part.end <= stage.end_layer
        assert ends[0] == ends[1]
        sent += [(part.target, x, head) for x, head in ends[1]]
    wanted = [
        (f"{stage.name}/{rank}" if stage.tp > 1 else stage.name, x, head)
        for stage in target.stages
        for rank in range(stage.tp)
        for x in range(stage.first_layer, stage.end_layer)
        for head in range(kv_heads)[Shard(rank, stage.tp).share(kv_heads)]
    ]
    assert sorted(sent) == sorted(wanted)


def test_the_parts_of_a_move_together_take_the_whole_link() -> None:
    """One sender sends one part after another at the full rate, two send at half of it each."""
    for source, target, expected in (
        (of("a", (1, 0, 4)), of("b", (2, 0, 4)), [1.0, 1.0]),
        (of("a", (2, 0, 4)), of("b", (1, 0, 4)), [0.5, 0.5]),
        (of("a", (1, 0, 3), (1, 3, 4)), of("b", (1, 0, 4)), [0.75, 0.25]),
        (of("a", (1, 0, 4)), of("b", (1, 0, 4)), [1.0]),
    ):
        assert link_shares(parts_of(source, target, 2)) == expected


@pytest.mark.parametrize(("source_tp", "target_tp"), [(1, 2), (2, 4), (4, 1), (4, 2)])
def test_kv_that_is_cut_anew_gives_the_same_tokens(source_tp: int, target_tp: int) -> None:
    expected = generated(Crew(DENSE, 1), PROMPT, 6)
    source, target = Crew(DENSE, source_tp), Crew(DENSE, target_tp)
    tokens = [source.run([Item(0, 0, tuple(PROMPT), True)])[0]]
    target.run([Item(9, 0, (1, 2, 3, 4, 5), False)])  # so that its blocks are others
    ranks = {
        f"{name}.0/{n}": stage for name, crew in (("s", source), ("t", target)) for n, stage in enumerate(crew.ranks)
    }
    ranks |= {name.removesuffix("/0"): stage for name, stage in ranks.items() if name.endswith("/0")}
    for part in parts_of(of("s", (source_tp, 0, 2)), of("t", (target_tp, 0, 2)), DENSE.num_kv_heads):
        heads = slice(part.source_head, part.source_head + part.heads)
        parts = ranks[part.source].take_out(0, part.first, part.end, heads=heads)
        room = ranks[part.target].room_for(len(PROMPT), part.first, part.end, heads=part.heads)
        assert [(each.shape, each.dtype) for each in room] == [(each.shape, each.dtype) for each in parts]
        ranks[part.target].put_in(0, len(PROMPT), part.first, part.end, parts, first_head=part.target_head)
    while len(tokens) < 6:
        tokens.append(target.run([Item(0, len(PROMPT) + len(tokens) - 1, (tokens[-1],), True)])[0])
    assert tokens == expected


@pytest.mark.parametrize("heads", [1, 2])
def test_room_for_kv_of_four_bits_has_its_shape(heads: int) -> None:
    (stage,) = Crew(DENSE, 1).ranks
    stage.run([Item(0, 0, tuple(PROMPT), False)])
    parts = stage.take_out(0, 0, 2, heads=slice(0, heads), bits=4)
    room = stage.room_for(len(PROMPT), 0, 2, heads=heads, bits=4)
    assert [(each.shape, each.dtype) for each in room] == [(each.shape, each.dtype) for each in parts]


def test_kv_that_was_swapped_out_comes_back_to_other_blocks() -> None:
    (stage,) = Crew(DENSE, 1).ranks
    (expected,) = [generated(Crew(DENSE, 1), PROMPT, 2)]
    token = stage.run([Item(0, 0, tuple(PROMPT), True)])[0][0]
    free = stage.tables.free
    stage.swap_out([0])
    assert stage.tables.free == 40
    stage.run([Item(1, 0, (9,) * 20, False)])
    stage.swap_in([0])
    assert stage.tables.free == free - 5
    assert [token, stage.run([Item(0, len(PROMPT), (token,), True)])[0][0]] == expected


def test_ranks_have_a_gpu_each_and_kv_between_gpus_goes_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    which = system(**SPLIT_TWO)
    where = replace(problem(), model=SMALL)
    plan = which.planner.plan(replace(where, limits=which.limits))
    arch = Architecture.of(SMALL)
    names = [worker for replica in plan.replicas for worker in workers_of(replica.stages[0])]

    def configs(**how: Any) -> Any:
        return worker_configs(where, which, plan, arch, Execution(mode="wall-clock", **how), "store")

    by_group = configs(device="cuda")
    assert [by_group[name]["device"] for name in names] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    a, b, c, d = names
    world = by_group[a]["world"]
    assert world["backend"] == "nccl"
    assert world["groups"] == [(a, b), (c, d), (a, c), (b, d), (c, a), (d, b)]
    assert configs(device="cuda", emulate_links=True)[a]["world"]["groups"] == [(a, b), (c, d)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # each of those that talk shares a GPU with the other
    assert configs(device="cuda")[a]["world"]["groups"] == [(a, b), (c, d)]
    with pytest.raises(ConfigError, match=r"plan: stage .*: tp 2 on cuda:1, which is 1 GPU\(s\) here; NCCL needs one"):
        configs(device="cuda:1")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="several GPUs want NCCL, which this torch was built without"):
        configs(device="cuda")


@pytest.mark.parametrize("killed", [True, False])
def test_a_rank_that_fails_because_another_was_killed_is_not_blamed(killed: bool) -> None:
    fleet = Fleet({"s/0": {}, "s/1": {}})
    fleet._processes = {name: subprocess.Popen(["sleep", "60"]) for name in ("s/0", "s/1")}
    try:
        if killed:
            fleet._processes["s/1"].kill()
        word = Word("s/0", 0.0, {"is": "failed", "kind": "RuntimeError", "text": "connection closed by peer"})
        error = fleet._failure(word)
        assert isinstance(error, WorkerLostError)
        expected = "worker s/1 is gone" if killed else "worker s/0 failed: connection closed"
        assert str(error).startswith(expected)
    finally:
        for process in fleet._processes.values():
            process.kill()
            process.wait()


def test_kv_by_group_is_chosen_by_device_and_links() -> None:
    assert not Execution(mode="wall-clock").kv_by_group
    assert Execution(mode="wall-clock", kv_carrier="group").kv_by_group
    with pytest.raises(ConfigError, match="kv_carrier: group: cannot be slowed down"):
        Execution(mode="wall-clock", kv_carrier="group", emulate_links=True)
    with pytest.raises(ConfigError, match="kv_carrier: 'groups' is unknown; did you mean 'group'"):
        Execution(kv_carrier="groups")  # type: ignore[arg-type]


# ---------------------------------------------------------------- with processes

SPLIT_TWO: dict[str, Any] = {"prefill": {"replicas": 1, "tp": 2}, "decode": {"replicas": 1, "tp": 2}}
UNEQUAL: dict[str, Any] = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 2}}
GROUP = replace(WALL, kv_carrier="group")


@pytest.mark.slow
def test_two_stages_of_two_ranks_give_the_tokens_of_each_request_alone() -> None:
    what = requests(4)
    _, outputs = wall(system(replicas=1, tp=2, pp=2), what)
    assert outputs == alone(what)


@pytest.mark.slow
def test_two_ranks_send_to_two_and_share_a_slow_link() -> None:
    what = requests(4)
    slow = cluster(gpus=2, nodes=2, gbps=0.002)
    result, outputs = wall(system(**SPLIT_TWO), what, replace(WALL, emulate_links=True), where=slow)
    assert outputs == alone(what)
    assert list(result.requests["bytes_moved"]) == [SMALL.kv_bytes_per_token() * item.input_tokens for item in what]
    for _, row in result.requests.iterrows():
        assert row["transfer_s"] >= row["bytes_moved"] * 8 / 2e6


@pytest.mark.slow
def test_kv_of_four_bits_by_group_is_what_was_quantised() -> None:
    what = requests(3)
    which = replace(system(**SPLIT), transfer=lambda: Quantized(bits=4))
    result, outputs = wall(which, what, GROUP)
    for item in what:
        source, target = (Stage(Architecture.of(SMALL), blocks=200) for _ in range(2))
        prompt = np.random.default_rng([0, item.id]).integers(0, 200, item.input_tokens).tolist()
        tokens = [source.run([Item(0, 0, tuple(prompt), True)])[0][0]]
        parts = source.take_out(0, 0, 2, bits=4)
        target.put_in(0, item.input_tokens, 0, 2, parts)
        while len(tokens) < item.output_tokens:
            tokens.append(target.run([Item(0, item.input_tokens + len(tokens) - 1, (tokens[-1],), True)])[0][0])
        assert outputs[item.id] == tokens
        assert result.requests["bytes_moved"][item.id] == sum(part.nbytes for part in parts)


SWAPPING = {
    "vllm": (system(14, mode="paper", preemption="swap", replicas=1, tp=1), WALL),
    "one to two ranks, KV by groups": (system(14, "distserve", **UNEQUAL), GROUP),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWAPPING)
def test_swapping_changes_no_token(name: str) -> None:
    """In a split system KV also arrives at a decoder that has swapped out to take it in."""
    what = requests(6, output_tokens=40, gap_s=0.0)
    which, how = SWAPPING[name]
    result, outputs = wall(which, what, how)
    assert result.requests["preemptions"].sum() > 0
    assert outputs == alone(what)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Fleet] = []
    enter = Fleet.__enter__

    def remember(fleet: Fleet) -> Fleet:
        started.append(enter(fleet))
        threading.Timer(0.5, os.kill, (list(fleet.pids.values())[1], signal.SIGKILL)).start()
        return fleet

    monkeypatch.setattr(Fleet, "__enter__", remember)
    with pytest.raises(WorkerLostError, match=r"worker .*/1 (is gone|hung up)"):
        wall(system(replicas=1, tp=2), requests(400, output_tokens=30))
    assert not [pid for pid in started[0].pids.values() if alive(pid)]
