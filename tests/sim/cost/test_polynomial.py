"""Whole steps in a closed form: by hand, and DistServe's published one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.profile.file import read_profile, shipped_profiles
from sim.cluster import Cluster
from sim.cost import DecodeTerms, Fitted, Overhead, Polynomial, Profile, PromptTerms, Provenance, StageCost, seconds
from sim.model import model
from sim.types import ConfigError, Stage, Work

A100 = Cluster.of([{"gpu": "A100-80G-SXM", "count": 8}])
OPT = model("opt-13b")
PROVENANCE = Provenance(source="a", licence="b", date="c", tool="d", engine="e", method="f")


def bind(
    profile: Profile, name: str = "opt-13b", tp: int = 1, layers: tuple[int, int] | None = None, **more: Any
) -> StageCost:
    spec = model(name)
    first, end = layers or (0, spec.num_layers)
    stage = Stage(name="s", gpus=A100.gpu_ids[:tp], first_layer=first, end_layer=end)
    return Fitted(profiles=[profile], **more).bind(spec, stage, A100)


def shipped(name: str) -> Profile:
    return read_profile(shipped_profiles()[name])


FORM = Polynomial(
    gpus=("A100-80G-SXM",),
    model="opt-13b",
    num_layers=40,
    tp=1,
    dtypes=("float16",),
    prompts=PromptTerms(step_s=0.010, token_s=1e-4, square_s=1e-8),
    decodes=DecodeTerms(step_s=0.020, context_s=1e-6, sequence_s=1e-4),
    large=DecodeTerms(step_s=0.010, context_s=1e-6, sequence_s=2e-4),
    large_from=10,
    hop_s=0.001,
    first_s=0.002,
    first_token_s=1e-7,
)
HAND = Profile(name="hand", provenance=PROVENANCE, polynomials=(FORM,))


def test_a_step_in_closed_form_by_hand() -> None:
    cost = bind(HAND)
    assert cost.measured
    assert seconds(cost, Work(((100, 0), (200, 0)), 0, 0)) == pytest.approx(
        0.010 + 300e-4 + (100**2 + 200**2) * 1e-8 + 0.001 + 0.002 + 300e-7, abs=1e-8
    )
    assert seconds(cost, Work((), 9, 5000)) == pytest.approx(0.020 + 9e-4 + 5e-3 + 0.002 + 5e-4, abs=1e-11)


def test_a_stage_takes_its_share_and_every_stage_of_prompts_a_hop_per_stage() -> None:
    first, second = bind(HAND, layers=(0, 20)), bind(HAND, layers=(20, 40))
    prompt, decode = Work(((1000, 0),), 0, 0), Work((), 4, 4000)
    whole = 0.010 + 0.1 + 0.01
    assert seconds(second, prompt) == pytest.approx(whole / 2 + 0.002)
    assert seconds(first, prompt) == pytest.approx(whole / 2 + 0.002 + 0.002 + 1e-4)
    assert seconds(first, decode) + seconds(second, decode) == pytest.approx(seconds(bind(HAND), decode))


def test_large_batches_have_their_own_terms_levelled_where_they_fall() -> None:
    cost = bind(HAND)
    none = {seqs: seconds(cost, Work((), seqs, 0)) - 0.002 for seqs in (9, 10, 54, 55, 100)}
    assert none == pytest.approx({9: 0.0209, 10: 0.0209, 54: 0.0209, 55: 0.0210, 100: 0.030})


def test_decodes_beside_prompts_cost_no_less_than_alone() -> None:
    cost = bind(HAND)
    chunk, decodes = ((10, 0),), (9, 900)
    both, alone = Work(chunk, *decodes), Work((), *decodes)
    assert seconds(cost, both) == pytest.approx(seconds(cost, alone) + 10e-4 + 100e-8 + 0.001 + 10e-7)
    assert seconds(cost, Work(((5000, 0),), *decodes)) > seconds(cost, Work(((5000, 0),), 0, 0))


def test_a_chunk_with_context_takes_what_the_longer_prompt_takes_more() -> None:
    cost = bind(replace(HAND, polynomials=(replace(FORM, hop_s=0.0, first_s=0.0, first_token_s=0.0),)))
    parts = [seconds(cost, Work((chunk,), 0, 0)) for chunk in ((300, 0), (700, 300))]
    assert sum(parts) - 0.010 == pytest.approx(seconds(cost, Work(((1000, 0),), 0, 0)))


def test_a_stated_overhead_takes_the_place_of_the_fits() -> None:
    work = Work((), 4, 4000)
    cost = bind(HAND, overhead=Overhead(step_s=0.5, sequence_s=0.01))
    steps_s = 0.020 + 4e-4 + 4e-3
    assert seconds(cost, work) == pytest.approx(steps_s + 0.5 + 0.04)
    slow = bind(HAND, overhead=Overhead(step_s=0.5, slowdown=1.5))
    assert seconds(slow, work) == pytest.approx(1.5 * steps_s + 0.5)


def test_measured_operators_and_kernels_come_before_closed_forms() -> None:
    both = Fitted(profiles=[shipped("distserve-a100"), shipped("vllm-0.14-a100-80g-sxm")])
    stage = Stage(name="s", gpus=A100.gpu_ids[:1], first_layer=0, end_layer=40)
    kernels = Fitted(profiles=[shipped("vllm-0.14-a100-80g-sxm")]).bind(OPT, stage, A100)
    assert both.bind(OPT, stage, A100).line(Work((), 4, 400)) == kernels.line(Work((), 4, 400))


PUBLISHED = {
    ("distserve-a100", "opt-13b", 1): (
        (18.10, 0.10191, 7.122e-6),
        (19.93, 6.269e-4, 0.03851),
        (7.166, 5.798e-4, 0.15831),
    ),
    ("distserve-a100", "opt-13b", 2): (
        (14.74, 0.06858, 2.450e-6),
        (13.29, 3.411e-4, 0.06296),
        (10.64, 3.118e-4, 0.08563),
    ),
    ("distserve-a100", "opt-66b", 2): (
        (43.06, 0.27423, 2.248e-5),
        (48.29, 9.424e-4, 0.12755),
        (28.73, 4.745e-4, 0.29618),
    ),
    ("distserve-a100", "opt-66b", 4): (
        (29.44, 0.15135, 8.317e-6),
        (30.76, 4.519e-4, 0.06328),
        (27.47, 4.047e-4, 0.12481),
    ),
    ("distserve-a100-vllm", "opt-13b", 1): (
        (22.05, 0.14051, 8.077e-6),
        (23.48, 5.929e-4, 0.06073),
        (20.21, 4.908e-4, 0.12),
    ),
    ("distserve-a100-vllm", "opt-66b", 4): (
        (42.97, 0.21287, 4.601e-5),
        (39.58, 6.946e-4, 0.13581),
        (40.86, 4.265e-4, 0.19508),
    ),
}
"""(a, b, c) in ms of prefill, decodes, and decodes from 95 sequences on (LLMServe/DistServe, simdistserve)."""
degrees = st.sampled_from([1, 2, 4])


@given(
    st.sampled_from(list(PUBLISHED)),
    degrees,
    st.lists(st.integers(1, 2048), min_size=1, max_size=8),
    st.integers(1, 256),
    st.integers(1, 1024),
)
def test_the_published_form_is_met_to_half_a_percent(
    key: tuple[str, str, int], pp: int, lengths: list[int], seqs: int, context: int
) -> None:
    """Where the published form does not fall: from 95 sequences on, the smaller batch's price is its floor."""
    name, spec, tp = key
    (a, b, c), small, large = PUBLISHED[key]
    profile, layers = shipped(name), model(spec).num_layers
    last = bind(profile, spec, tp, (layers - layers // pp, layers)) if pp > 1 else bind(profile, spec, tp)
    ray = 0.0 if pp > 1 else 1.0
    prefill = (a + b * sum(lengths) + c * sum(n * n for n in lengths)) / pp + pp + ray * (2 + 1e-4 * sum(lengths))
    found = seconds(last, Work(tuple((n, 0) for n in lengths), 0, 0)) * 1e3
    assert found == pytest.approx(prefill, rel=0.005)

    def decode(terms: tuple[float, float, float], count: int) -> float:
        return (terms[0] + terms[1] * seqs * context + terms[2] * count) / pp + ray * (2 + 1e-4 * seqs * (context - 1))

    expected = decode(small, seqs) if seqs < 95 else max(decode(large, seqs), decode(small, 94))
    assert seconds(last, Work((), seqs, seqs * context)) * 1e3 == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("change", [{"hop_s": -1.0}, {"large_from": 1}, {"tp": 0}, {"gpus": ()}])
def test_a_form_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="opt-13b"):
        replace(FORM, **change)
