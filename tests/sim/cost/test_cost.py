"""Step times: exact lines, monotone prices, and what is measured, guessed or extrapolated."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.profile.file import read_profile, shipped_profiles
from sim.cluster import Cluster, Link
from sim.cost import (
    Fitted,
    Grid,
    Profile,
    ProfileEntry,
    Provenance,
    Roofline,
    Table,
    advanced,
    codec_seconds,
    collective_seconds,
    seconds,
)
from sim.cost.pieces import steeper, surface
from sim.cost.step import Composed
from sim.model import ModelSpec, model
from sim.types import ConfigError, Line, Stage, Work
from tests.abacus import ABACUS, PERFECT, TINY

A100 = Cluster.of([{"gpu": "A100-80G-SXM", "count": 8}])


def whole(spec: ModelSpec, cluster: Cluster, tp: int) -> Stage:
    return Stage(name="s", gpus=cluster.gpu_ids[:tp], first_layer=0, end_layer=spec.num_layers)


def test_a_decode_step_reads_the_weights_once_and_the_cache_once_a_sequence() -> None:
    llama = model("llama-2-70b")
    cost = Roofline().bind(llama, whole(llama, A100, 8), A100)
    one, many = Work((), 1, 1000), Work((), 64, 64_000)
    assert 0.010 < seconds(cost, one) < seconds(cost, many) < 2 * seconds(cost, one)
    assert cost.line(many).slope_ps == 64 * cost.line(one).slope_ps
    assert not cost.measured


# ---------------------------------------------------------------- hand-computed


def test_the_roofline_by_hand() -> None:
    """1e9 FLOP/s and bytes/s: a FLOP or a byte is 1,000 ps.

    A token's layer: qkv 16 x 8, o 8 x 8, up 16 x 8, down 8 x 16 = 448 weights, 896 FLOPs; it reads 896 bytes of
    weights and moves 2 x (24 + 16 + 24 + 24) = 176 of activations. Head: 256 weights. Embedding: 8 values read and
    written. A pair: 4 x 2 x 4 = 32 FLOPs a layer; a cached token: 2 x 4 values = 16 bytes a layer.
    """
    cost = PERFECT.bind(TINY, whole(TINY, ABACUS, 1), ABACUS)
    overhead, embedding, head = 10**9, 32_000, 512_000
    decode = overhead + embedding + head + 2 * (896 + 176) * 1000 + 2 * 32 * 10 * 1000
    assert cost.line(Work((), 1, 10)) == Line(decode, 64_000, 1 << 30)
    prefill = overhead + 100 * embedding + head + 2 * 100 * 896_000 + 2 * 32 * 5050 * 1000
    assert cost.line(Work(((100, 0),), 0, 0)) == Line(prefill, 100 * 100 * 64_000, 1 << 30)
    assert cost.line(Work((), 0, 0)) == Line(0, 0, 1 << 30)


def test_a_slow_gpu_multiplies_every_duration() -> None:
    stage = whole(TINY, ABACUS, 2)
    work = Work(((100, 7),), 3, 60)
    healthy, slow = (PERFECT.bind(TINY, stage, ABACUS, slow=factor).line(work) for factor in (1.0, 2.0))
    assert slow == Line(2 * healthy.first_ps, 2 * healthy.slope_ps, healthy.iterations)
    with pytest.raises(ConfigError, match="slow is 0"):
        PERFECT.bind(TINY, stage, ABACUS, slow=0.0)


def test_tensor_parallel_gpus_divide_the_work_and_reduce_twice_a_layer() -> None:
    line = PERFECT.bind(TINY, whole(TINY, ABACUS, 2), ABACUS).line(Work(((100, 0),), 0, 0))
    qkv, others = 12 * 8, 4 * 8 + 8 * 8 + 8 * 8  # the one KV head is on both GPUs
    reduce = 4 * (10**6 + 1_600 * 1000)  # one hop, 100 tokens of 8 values
    gather = 10**6 + 32 * 1000
    compute = 2 * 100 * 2 * (qkv + others) * 1000 + 2 * 16 * 5050 * 1000
    assert line.first_ps == 10**9 + 100 * 32_000 + compute + reduce + 256_000 + gather


PROVENANCE = Provenance(source="a sum", licence="none", date="2026", tool="a pencil", engine="none", method="by hand")
ENTRY = ProfileEntry(
    gpus=("abacus",),
    model="tiny",
    num_layers=2,
    tp=1,
    dtypes=("float16",),
    linear=Table(counts=(1, 11, 111), seconds=(0.001, 0.002, 0.002), per="model"),
    head=Table(counts=(1, 5), seconds=(0.0, 0.004)),
    attention_prefill=Grid(counts=(1, 101), contexts=(0, 100), seconds=((0.0, 0.0), (0.001, 0.003)), per="layer"),
    attention_decode=Grid(counts=(1, 5), contexts=(0, 100), seconds=((0.0, 0.001), (0.0, 0.005)), per="layer"),
    included=frozenset({"collective", "embedding", "overhead"}),
)


def fitted(entry: ProfileEntry) -> Fitted:
    return Fitted(profiles=[Profile(name="hand", provenance=PROVENANCE, entries=(entry,))], fallback=PERFECT)


def test_a_profile_by_hand() -> None:
    cost = fitted(ENTRY).bind(TINY, whole(TINY, ABACUS, 1), ABACUS)
    assert cost.measured
    assert cost.line(Work((), 1, 50)) == Line(2 * 10**9, 2 * 10**7, 51)
    assert cost.line(Work((), 3, 150)) == Line(1_200_000_000 + 2 * 10**9 + 3 * 10**9, 6 * 10**7, 51)
    assert cost.line(Work(((51, 20),), 0, 0)) == Line(2 * 10**9 + 2 * (500_000_000 + 200_000_000), 51 * 2 * 10**7, 2)


def test_beyond_the_table_the_last_slope_or_the_rooflines_continues_and_says_so() -> None:
    cost = fitted(ENTRY).bind(TINY, whole(TINY, ABACUS, 1), ABACUS)
    assert not cost.line(Work((), 5, 500)).extrapolated
    assert cost.line(Work((), 5, 501)).extrapolated is False, "the mean is 100.2 still; 101 ends the table"
    assert cost.line(Work((), 5, 505)).extrapolated
    assert cost.line(Work((), 6, 6)).extrapolated
    assert cost.line(Work(((102, 0),), 0, 0)).extrapolated
    assert cost.line(Work(((50, 101),), 0, 0)).extrapolated
    flat_end, beyond = (cost.operators.linear(tokens) for tokens in (111, 121))
    assert beyond == (flat_end[0] + 2 * 10 * 896_000, True), "the table is flat there, the roofline is not"


def test_context_beyond_a_flat_table_costs_what_the_roofline_says() -> None:
    flat = ((0.001, 0.001), (0.001, 0.001))
    prefill, decode = (Grid(counts=(1, 5), contexts=(0, 100), seconds=flat, per="model") for _ in range(2))
    cost = fitted(replace(ENTRY, attention_prefill=prefill, attention_decode=decode))
    bound_cost = cost.bind(TINY, whole(TINY, ABACUS, 1), ABACUS)
    for count in (1, 3, 5):
        for work in (Work((), count, 200 * count), Work(((count, 200),), 0, 0)):
            line = bound_cost.line(work)
            pairs = count if not work.chunks else count * count
            assert (line.slope_ps, line.extrapolated) == (pairs * 64_000, True)


def test_only_an_exact_match_is_measured() -> None:
    llama = model("llama-2-70b")
    cost = Fitted(profiles=[read_profile(shipped_profiles()["splitwise-2023"])])
    assert cost.bind(llama, whole(llama, A100, 8), A100).measured
    assert cost.bind(replace(llama, dtype="bfloat16"), whole(llama, A100, 8), A100).measured
    pcie = Cluster.of([{"gpu": "A100-80G-PCIe", "count": 8}])
    both = Cluster.of(
        [{"gpu": "A100-80G-SXM", "count": 4}, {"gpu": "H100-SXM", "count": 4}], {"inter_node": {"gbps": 200}}
    )
    others = [
        (llama, pcie, 8),
        (llama, both, 8),
        (llama, A100, 1),
        (model("llama-3.1-70b"), A100, 8),
        (replace(llama, dtype="float8"), A100, 8),
        (replace(llama, weight_bytes_per_param=0.5), A100, 8),
        (replace(llama, kv_dtype="float8"), A100, 8),
    ]
    for spec, cluster, tp in others:
        stage = whole(spec, cluster, tp)
        bound = cost.bind(spec, stage, cluster)
        assert not bound.measured
        work = Work(((512, 0),), 4, 4000)
        assert bound.line(work) == Roofline().bind(spec, stage, cluster).line(work)


def test_a_profile_of_another_depth_is_refused() -> None:
    deeper = replace(TINY, num_layers=3)
    with pytest.raises(ConfigError, match="num_layers is 2, the model has 3"):
        fitted(ENTRY).bind(deeper, whole(deeper, ABACUS, 1), ABACUS)


# ---------------------------------------------------------------- laws


def bound(name: str, cluster: Cluster, tp: int, *, profiled: bool = False) -> Composed:
    spec = model(name)
    cost = Fitted(profiles=[read_profile(path) for path in shipped_profiles().values()]) if profiled else Roofline()
    return cost.bind(spec, whole(spec, cluster, tp), cluster)


MISTRAL = replace(model("mistral-7b"), sliding_window=4096)
FULL = replace(MISTRAL, sliding_window=None)
COSTS = {
    "roofline": bound("llama-2-70b", A100, 8),
    "experts": bound("mixtral-8x7b", A100, 4),
    "one T4": bound("llama-3.1-8b", Cluster.of([{"gpu": "T4", "count": 1}]), 1),
    "window": Roofline().bind(MISTRAL, whole(MISTRAL, A100, 1), A100),
    "splitwise": bound("bloom-176b", A100, 8, profiled=True),
    "hand": fitted(ENTRY).bind(TINY, whole(TINY, ABACUS, 1), ABACUS),
    "polynomial": Fitted(profiles=[read_profile(shipped_profiles()["distserve-a100"])]).bind(
        model("opt-13b"), whole(model("opt-13b"), A100, 1), A100
    ),
}
chunks = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 20_000)), max_size=3).map(tuple)


@st.composite
def works(draw: st.DrawFn) -> Work:
    seqs = draw(st.integers(0, 100))
    context = draw(st.integers(seqs, seqs * 12_000)) if seqs else 0
    return Work(draw(chunks), seqs, context)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Any table, rising or not."""
    counts = sorted(draw(st.sets(st.integers(1, 300), min_size=2, max_size=4)))
    contexts = sorted(draw(st.sets(st.integers(0, 9000), min_size=2, max_size=4)))
    cell = st.floats(0, 1e-2)
    rows = [tuple(draw(cell) for _ in contexts) for _ in counts]
    return Grid(counts=tuple(counts), contexts=tuple(contexts), seconds=tuple(rows), per="model")


@st.composite
def any_cost(draw: st.DrawFn) -> Composed:
    name = draw(st.sampled_from([*COSTS, "any table"]))
    if name in COSTS:
        return COSTS[name]
    entry = replace(ENTRY, attention_prefill=draw(grids()), attention_decode=draw(grids()))
    return fitted(entry).bind(TINY, whole(TINY, ABACUS, 1), ABACUS)


@settings(max_examples=300)
@given(any_cost(), works(), st.integers(0, 5000))
def test_law_a_line_is_exact_at_every_iteration(cost: Composed, work: Work, later: int) -> None:
    line = cost.line(work)
    assert line.iterations >= 1
    for i in {0, 1, later, line.iterations - 1}:
        if i < line.iterations:
            then = cost.line(advanced(work, i))
            assert then.first_ps == line.first_ps + i * line.slope_ps
            assert then.extrapolated == line.extrapolated


@settings(max_examples=300)
@given(any_cost(), works(), st.integers(0, 2), st.integers(1, 2000), st.integers(1, 4000))
def test_law_more_tokens_or_context_never_cost_less(
    cost: Composed, work: Work, which: int, tokens: int, context: int
) -> None:
    price = cost.line(work).first_ps
    if work.decode_seqs:
        assert cost.line(work._replace(decode_context=work.decode_context + context)).first_ps >= price
    if which < len(work.chunks):
        n, p = work.chunks[which]
        rest = work.chunks[:which] + work.chunks[which + 1 :]
        assert cost.line(work._replace(chunks=((n + tokens, p), *rest))).first_ps >= price
        assert cost.line(work._replace(chunks=((n, p + context), *rest))).first_ps >= price
        assert cost.line(work._replace(chunks=rest)).first_ps <= price


@settings(max_examples=300)
@given(any_cost(), works(), st.integers(0, 4000))
def test_law_more_sequences_never_cost_less(cost: Composed, work: Work, extra: int) -> None:
    """One more sequence, of at least the mean context: the tables know a batch by that mean."""
    mean = -(-work.decode_context // max(1, work.decode_seqs))
    more = work._replace(decode_seqs=work.decode_seqs + 1, decode_context=work.decode_context + max(1, mean) + extra)
    assert cost.line(more).first_ps >= cost.line(work).first_ps


@given(st.sampled_from(["roofline", "experts", "one T4", "window", "splitwise"]), works())
def test_law_a_sequence_of_one_token_costs_something_too(name: str, work: Work) -> None:
    """The roofline knows a batch by the sum of its contexts; so, in effect, does the shipped profile."""
    cost = COSTS[name]
    more = work._replace(decode_seqs=work.decode_seqs + 1, decode_context=work.decode_context + 1)
    assert cost.line(more).first_ps >= cost.line(work).first_ps


@given(st.sampled_from(["llama-2-70b", "mixtral-8x7b"]), works(), st.integers(1, 31), st.booleans())
def test_law_stages_add_up(name: str, work: Work, cut: int, profiled: bool) -> None:
    """To the rounding of slopes: half a picosecond per token of context, stage and chunk."""
    spec = model(name)
    cost = Fitted(profiles=[read_profile(path) for path in shipped_profiles().values()]) if profiled else Roofline()
    stage = whole(spec, A100, 8)
    halves = replace(stage, end_layer=cut), replace(stage, first_layer=cut)
    parts = [cost.bind(spec, half, A100).line(work) for half in halves]
    line = cost.bind(spec, stage, A100).line(work)
    slack = 3 * (20 + work.decode_context + sum(p + n for n, p in work.chunks))
    assert abs(sum(part.first_ps for part in parts) - line.first_ps) <= slack


# ---------------------------------------------------------------- parts


LINES = st.tuples(st.integers(0, 60), st.integers(0, 9))


@given(LINES, LINES)
def test_the_steeper_of_two_lines_is_their_maximum(first: tuple[int, int], second: tuple[int, int]) -> None:
    row = steeper(first, second)
    for x in range(62):
        assert row.segment(x, 1)[0] == max(value + slope * x for value, slope in (first, second))


def test_a_surface_goes_through_its_table_and_straight_between_the_counts() -> None:
    table = [[10.0, 20.0], [30.0, 50.0], [70.0, 130.0]]  # at contexts 0 and 10, by count
    through = surface((1, 3, 7), (0, 10), table, pair_ps=0.0, causal=False)
    for count, (start, end) in zip((1, 3, 7), table, strict=True):
        assert through.at(count) == (start, ((end - start) / 10, (end - start) / 10))
    assert through.at(2) == (20.0, (1.5, 1.5))
    assert through.at(5) == (50.0, (4.0, 4.0))
    assert through.at(9) == (90.0, (8.0, 8.0)), "beyond the table it grows as in its last part"


def test_a_chunk_of_one_token_attends_like_a_decode() -> None:
    operators = COSTS["roofline"].operators
    assert operators.chunk(1).segment(999, 1) == operators.decode(1).segment(1000, 1)


def test_the_first_dense_layers_of_a_mixture_are_priced_as_such() -> None:
    mixed = replace(model("mixtral-8x7b"), first_dense_layers=2)
    dense = replace(mixed, num_experts=None, experts_per_token=None, moe_intermediate_size=None, first_dense_layers=0)
    first = Stage(name="s", gpus=A100.gpu_ids[:1], first_layer=0, end_layer=2)
    rest = replace(first, first_layer=2, end_layer=4)
    linear = {
        (spec is mixed, stage is first): Roofline().operators(spec, stage, A100).linear(16)
        for spec in (mixed, dense)
        for stage in (first, rest)
    }
    assert linear[True, True] == linear[False, True] < linear[True, False]


def test_collectives_by_hand() -> None:
    link = Link(bytes_per_s=1e9, latency_s=1e-6)
    assert collective_seconds("all_reduce", 1e9, link, 1) == 0
    assert collective_seconds("all_reduce", 1e9, link, 4) == pytest.approx(1.5 + 6e-6)
    assert collective_seconds("all_reduce", 0, link, 8) == pytest.approx(3e-6)
    assert collective_seconds("all_gather", 1e9, link, 4) == pytest.approx(0.75 + 2e-6)
    assert collective_seconds("all_to_all", 1e9, link, 4) == pytest.approx(0.75 + 3e-6)
    assert collective_seconds("send", 1e9, link, 2) == pytest.approx(1 + 1e-6)
    with pytest.raises(ConfigError, match="did you mean 'all_reduce'"):
        collective_seconds("allreduce", 1e9, link, 2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give it bandwidth"):
        collective_seconds("send", 1e9, Link(bytes_per_s=0), 2)


def test_the_codec_reads_one_form_and_writes_the_other() -> None:
    assert codec_seconds(1e9, 0.25, 1e12, 0.5) == pytest.approx(1.25e9 / 0.5e12)
    assert codec_seconds(1e9, 1, 1e12, 0.5) == 0


def test_experts_are_read_as_far_as_they_are_touched() -> None:
    mixtral = model("mixtral-8x7b")
    operators = Roofline().operators(mixtral, whole(mixtral, A100, 1), A100)
    one, few, many = (operators.linear(tokens)[0] for tokens in (1, 4, 64))
    assert one < few < many < 4.2 * one, "two of eight experts for one token, all of them for many"


def test_a_sliding_window_caps_attention() -> None:
    cost = COSTS["window"]
    line = cost.line(Work((), 2, 2 * 4096))
    assert line.slope_ps == 0
    assert line.first_ps == cost.line(Work((), 2, 2 * 9000)).first_ps
    assert cost.line(Work(((101, 5000),), 0, 0)) == cost.line(Work(((101, 6000),), 0, 0))
    attention = cost.operators.chunk(101).segment(5000, 101)
    alone = Roofline().bind(FULL, whole(FULL, A100, 1), A100).operators.chunk(101)
    assert attention[0] == pytest.approx(alone.segment(4096 - 51, 101)[0], rel=1e-6)
    assert MISTRAL.attention_flops(101, 5000) == FULL.attention_flops(101, 4096 - 51), "the same pairs"


@pytest.mark.parametrize(
    ("field", "value"), [("compute_efficiency", 0.0), ("memory_efficiency", 1.1), ("overhead_s", float("nan"))]
)
def test_a_roofline_without_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        Roofline(**{field: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table(counts=(1, 1), seconds=(0.1, 0.1)), "each larger than the last"),
        (lambda: Table(counts=(1,), seconds=(0.1,)), "at least 2"),
        (lambda: Table(counts=(1, 2), seconds=(0.1,)), "1 values; it needs 2"),
        (lambda: Table(counts=(1, 2), seconds=(0.2, 0.1)), "monotone"),
        (lambda: Table(counts=(1, 2), seconds=(0.1, float("nan"))), "number >= 0"),
        (lambda: Grid(counts=(1, 2), contexts=(0, 1), seconds=((0.1, 0.1),)), "1 rows"),
        (lambda: replace(ENTRY, included=frozenset({"linear"})), "known: collective"),
        (lambda: replace(ENTRY, included=frozenset({"head"})), "drop one of the two"),
        (lambda: replace(ENTRY, tp=0), "tp"),
        (lambda: replace(ENTRY, included=frozenset(), overhead_s=-1.0), "overhead_s is -1"),
    ],
)
def test_tables_are_checked_where_they_are_made(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()
