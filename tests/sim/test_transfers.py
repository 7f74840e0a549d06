"""KV between replicas: when it is visible, who waits for whom, what a full decode replica does to its senders."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim import Cluster, PolicyError, Problem
from sim.policy import Transfer, View
from sim.transfers import ByLength, ChunkByChunk, LayerByLayer, Quantized, Whole, in_bits
from sim.types import Chunk, ClusterEvent, ConfigError, Move, Plan, to_ps
from tests.lab import SPLIT, Way, system
from tests.toys import MS, TINY, problem, replica, request, run

US = 10**6
TICK = 1
MOVE = Move(0, 100, 1000, 4, "p", "d")


def where(gbps: float = 262.144, latency_us: float = 0) -> Problem:
    """TINY has 32768 bytes of KV a token: one token a microsecond."""
    return problem(
        Cluster.of(
            [{"gpu": "H100-SXM", "count": 2, "nodes": 2}],
            links={"inter_node": {"gbps": gbps, "latency_us": latency_us}},
        )
    )


def pushed(**more: object) -> object:
    return system(router=lambda: Way("p", "d"), **more)  # type: ignore[arg-type]


def test_serial_transfer_is_visible_in_full() -> None:
    """X = 100 us from the first token on, then the synchronisation; the decode starts at once."""
    result = run(pushed(transfer=lambda: Whole(sync_s=0.005)), [request(0)], where(), plan=SPLIT)
    visible = 100 * US + 5 * MS
    first, second = result.token_times_ps(0)[:2]
    assert first == 11 * MS
    assert result.rows.requests[0].transfer_ps == visible + 2 * TICK  # one to ask for room, one to arrive
    assert second == first + visible + 2 * TICK + 10 * MS + 10 * US + 101 * 1000
    assert result.rows.requests[0].bytes_moved == 100 * TINY.kv_bytes_per_token() == result.rows.links[0].bytes


def test_a_latency_is_paid_once_by_a_push_and_twice_by_a_pull() -> None:
    times = []
    for pull in (False, True):
        result = run(pushed(transfer=lambda pull=pull: Whole(pull)), [request(0)], where(latency_us=7), plan=SPLIT)
        times.append(result.rows.requests[0].transfer_ps)
    assert times == [107 * US + TICK, 114 * US + TICK]


@pytest.mark.parametrize("gbps", [262.144, 26.2144, 2.62144])
def test_layer_by_layer_hides_what_flows_during_the_prefill(gbps: float) -> None:
    """Splitwise, section 4.3: visible = max(X / L, X - T (L - 1) / L) + sync."""
    model = replace(TINY, num_layers=4)
    plan = Plan(
        replicas=tuple(replace(r, stages=tuple(replace(s, end_layer=4) for s in r.stages)) for r in SPLIT.replicas)
    )
    base = where(gbps)
    world = replace(base, model=model)
    result = run(pushed(transfer=lambda: LayerByLayer(0.005)), [request(0)], world, plan=plan)
    whole, layers, prefill = round(200 * US * 262.144 / gbps), 4, 11 * MS
    visible = max(whole // layers, whole - prefill * (layers - 1) // layers) + 5 * MS
    assert result.token_times_ps(0)[0] == prefill
    assert abs(result.rows.requests[0].transfer_ps - visible) <= 4 * TICK


def test_layer_by_layer_is_never_later_than_serial() -> None:
    for gbps in (1.0, 10.0, 100.0):
        times = [
            run(pushed(transfer=transfer), [request(0)], where(gbps), plan=SPLIT).rows.requests[0].transfer_ps
            for transfer in (LayerByLayer, Whole)
        ]
        assert times[0] <= times[1] + 2 * TICK


def test_two_requests_share_the_port_of_their_machine() -> None:
    """Both prompts end at 11 ms; each KV has half of the port: 200 us instead of 100."""
    plan = Plan(
        replicas=(
            replica("p", ["n0.g0"], "prefill"), replica("q", ["n0.g1"], "prefill"), replica("d", ["n1.g0"], "decode"),
        )
    )  # fmt: skip
    shared = run(system(router=lambda: Way(["p", "q"], "d")), [request(0), request(1)], where(), plan=plan)
    assert [row.transfer_ps for row in shared.rows.requests] == [200 * US + 2 * TICK, 200 * US + 3 * TICK]
    apart = [request(0), request(1, 0.00005)]  # 50 us later: 50 alone, 100 shared, 50 alone
    later = run(system(router=lambda: Way(["p", "q"], "d")), apart, where(), plan=plan)
    assert [row.transfer_ps for row in later.rows.requests] == [150 * US + 2 * TICK] * 2


def test_equal_legs_move_nothing() -> None:
    result = run(system(router=lambda: Way("d", "d")), [request(0)], where(), plan=SPLIT)
    assert (result.rows.requests[0].bytes_moved, result.rows.requests[0].transfer_ps, result.rows.links) == (0, 0, [])


def test_a_single_token_moves_nothing() -> None:
    result = run(pushed(transfer=LayerByLayer), [request(0, output_tokens=1)], where(), plan=SPLIT)
    assert result.rows.links == []
    assert result.rows.requests[0].finish_ps == 11 * MS


def test_a_full_decode_replica_holds_its_senders_back() -> None:
    """Eight blocks each side, four a request: two decode, two hold the prefill side, the fifth waits for a block."""
    requests = [request(number, input_tokens=50) for number in range(5)]
    result = run(pushed(num_kv_blocks=8, max_num_batched_tokens=50), requests, where(), plan=SPLIT)
    rows = result.rows.requests
    moves = {link.request: link for link in result.rows.links}
    prompt = 10 * MS + 50 * 10 * US
    assert [rows[n].scheduled_ps for n in range(4)] == [n * prompt for n in range(4)]
    assert moves[2].start_ps == rows[0].finish_ps + TICK  # room comes free at the decode side's boundary
    assert moves[3].start_ps == rows[1].finish_ps + TICK
    assert rows[4].scheduled_ps == moves[2].end_ps  # and then here
    assert max(row.used_blocks for row in result.rows.memory) == 8


def test_parts_are_sent_when_they_are_ready() -> None:
    class Thirds:
        pull = False

        def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
            assert view.seconds_to_move(move.source, move.target, move.kv_bytes) == pytest.approx(100e-6)
            return Chunk(0.25, 0.0), Chunk(0.25, 0.5), Chunk(0.25, 1.0)  # a quarter is compressed away

        def overhead_s(self, move: Move) -> float:
            return 0.0

    result = run(pushed(transfer=Thirds), [request(0)], where(), plan=SPLIT)
    link = result.rows.links[0]
    assert link.start_ps == 0 + TICK
    assert link.end_ps == 11 * MS + 25 * US + 2 * TICK
    assert link.bytes == 100 * TINY.kv_bytes_per_token() * 3 // 4


@pytest.mark.parametrize("parts", [(Chunk(1.0, 0.5),), (Chunk(0.7, 0.5), Chunk(0.7, 1.0))])
def test_parts_that_come_early_or_are_too_many_are_a_policy_error(parts: tuple[Chunk, ...]) -> None:
    class Wrong(Whole):
        def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
            return parts

    with pytest.raises(PolicyError, match="Wrong sends request 0 in parts"):
        run(pushed(transfer=Wrong), [request(0)], where(), plan=SPLIT)


def test_a_link_cut_for_good_fails_those_who_wait_for_it() -> None:
    cut = ClusterEvent(at_s=0.0, kind="link_scaled", target="nic:n0:out", factor=0.0)
    result = run(pushed(), [request(0), request(1)], where(), plan=SPLIT, events=[cut])
    assert [row.outcome for row in result.rows.requests] == ["failed", "failed"]
    assert {row.reason for row in result.rows.requests} == {"the link from p to d is cut, and nothing restores it"}


def test_a_link_cut_and_restored_delays_by_the_outage() -> None:
    events = [
        ClusterEvent(at_s=0.011, kind="link_scaled", target="nic:n0:out", factor=0.0),
        ClusterEvent(at_s=0.5, kind="link_scaled", target="nic:n0:out", factor=1.0),
    ]
    result = run(pushed(), [request(0)], where(), plan=SPLIT, events=events)
    assert result.rows.links[0].end_ps == 500 * MS + 100 * US + TICK


def test_replicas_that_wait_for_each_others_room_are_set_free() -> None:
    """Each holds a prompt for the other and has no block left: the last to ask starts over at its target."""
    plan = Plan(replicas=(replica("a", ["n0.g0"]), replica("b", ["n1.g0"])))
    requests = [request(number, input_tokens=60, output_tokens=4) for number in range(6)]
    result = run(system(router=lambda: Way(["a", "b"], ["b", "a"]), num_kv_blocks=4), requests, where(), plan=plan)
    assert [row.outcome for row in result.rows.requests] == ["completed"] * 6
    assert sum(row.preemptions for row in result.rows.requests) >= 1


# ------------------------------------------------------------ the policies themselves


def test_shapes_of_the_parts() -> None:
    assert Whole().chunks(MOVE, None) == (Chunk(1.0, 1.0),)  # type: ignore[arg-type]
    assert LayerByLayer().chunks(MOVE, None) == (Chunk(0.75, 0.25), Chunk(0.25, 1.0))  # type: ignore[arg-type]
    assert LayerByLayer().chunks(MOVE._replace(num_layers=1), None) == (Chunk(1.0, 1.0),)  # type: ignore[arg-type]


def test_short_prompts_go_at_once() -> None:
    """Splitwise, section 4.3: serial under 512 tokens on H100."""
    policy = ByLength(512, sync_s=0.005)
    assert len(policy.chunks(MOVE._replace(tokens=511), None)) == 1  # type: ignore[arg-type]
    assert len(policy.chunks(MOVE._replace(tokens=512), None)) == 2  # type: ignore[arg-type]
    assert policy.overhead_s(MOVE) == 0.005


@pytest.mark.parametrize("inner", [Whole(pull=True, sync_s=0.25), LayerByLayer(0.5), ByLength(64), ChunkByChunk(64)])
def test_quantised_parts_leave_when_the_plain_ones_do(inner: Transfer) -> None:
    """4.5 bits of 16 in each part, and the codec (a read and a write at either end) after what followed before."""
    thin = Quantized(4, codec_bytes_per_s=1e9, inner=inner)
    plain, few = (each.chunks(MOVE, None) for each in (inner, thin))  # type: ignore[arg-type]
    assert few == tuple(Chunk(part.share * 4.5 / 16, part.ready) for part in plain)
    codec_s = 2 * MOVE.kv_bytes * (1 + 4.5 / 16) / 1e9
    assert thin.overhead_s(MOVE) == inner.overhead_s(MOVE) + codec_s
    assert thin.pull == inner.pull
    assert Quantized(16, inner=inner).chunks(MOVE, None) == plain  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kv_bits", "moves", "message"),
    [(0, True, "kv_bits is 0"), (4.5, True, "kv_bits is 4.5"), (4, False, "give prefill and decode pools")],
)
def test_wrong_bits_are_named(kv_bits: int, moves: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        in_bits(Whole(), kv_bits, moves)


def test_a_move_takes_longer_over_a_slower_link() -> None:
    times = [
        run(pushed(), [request(0)], where(gbps), plan=SPLIT).rows.requests[0].transfer_ps for gbps in (200, 100, 1)
    ]
    assert times == sorted(times)
    assert to_ps(100 * TINY.kv_bytes_per_token() / 125e6) == pytest.approx(times[2], abs=3)
