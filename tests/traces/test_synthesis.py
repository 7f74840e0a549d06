"""Generated requests: the lengths and arrivals that were asked for, from one seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sim.types import ConfigError, Request
from traces import (
    LENGTHS,
    Empirical,
    Fixed,
    Lognormal,
    Quantiles,
    Uniform,
    generate,
    make_sample,
    read,
    resample,
    sample_path,
    statistics,
)

MANY = 20_000


def inputs_of(lengths, number: int = MANY) -> np.ndarray:
    return np.array([r.input_tokens for r in generate(number, 1.0, input=lengths, output=Fixed(tokens=1))])


def test_requests_out_of_distributions():
    requests = generate(2, rate_per_s=2.0, arrivals="constant", input=Fixed(tokens=100), output=Fixed(tokens=7))
    assert list(requests) == [
        Request(id=0, arrival_s=0.0, input_tokens=100, output_tokens=7),
        Request(id=1, arrival_s=0.5, input_tokens=100, output_tokens=7),
    ]


def test_uniform_lengths_take_every_value_equally_often():
    values, numbers = np.unique(inputs_of(Uniform(low_tokens=3, high_tokens=6)), return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    assert numbers / MANY == pytest.approx(0.25, abs=0.02)


def test_lognormal_lengths_have_their_mean_and_median():
    drawn = inputs_of(Lognormal(mean_tokens=211, median_tokens=129))
    assert np.median(drawn) == pytest.approx(129, rel=0.05)
    assert drawn.mean() == pytest.approx(211, rel=0.05)
    assert inputs_of(Lognormal(mean_tokens=211, median_tokens=129, max_tokens=500)).max() == 500


def test_a_lognormal_without_spread_is_fixed():
    assert set(inputs_of(Lognormal(mean_tokens=9, median_tokens=9), 50)) == {9}


def test_a_quantile_table_is_met_at_its_points():
    drawn = inputs_of(Quantiles(points=((0, 10), (0.5, 20), (1, 100))))
    assert (drawn <= 20).mean() == pytest.approx(0.5, abs=0.02)
    assert drawn.mean() == pytest.approx((15 + 60) / 2, rel=0.02)


def test_empirical_lengths_are_as_frequent_as_in_the_sample():
    values, numbers = np.unique(inputs_of(Empirical(tokens=(5, 100, 5, 5))), return_counts=True)
    assert values.tolist() == [5, 100]
    assert numbers[0] / MANY == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("rank_correlation", [-1.0, -0.4, 0.0, 0.6, 1.0])
def test_inputs_and_outputs_are_correlated_as_asked(rank_correlation):
    lengths = Lognormal(mean_tokens=2e4, median_tokens=1e4)
    requests = list(generate(MANY, 1.0, input=lengths, output=lengths, rank_correlation=rank_correlation))
    found = spearmanr([r.input_tokens for r in requests], [r.output_tokens for r in requests]).statistic
    assert found == pytest.approx(rank_correlation, abs=0.02)


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 30))
def test_more_requests_begin_as_fewer_do(seed, few, more):
    settings = {"input": Lognormal(mean_tokens=30, median_tokens=20), "output": Uniform(low_tokens=1, high_tokens=9)}
    longer = list(generate(few + more, 3.0, seed=seed, **settings))
    assert longer[:few] == list(generate(few, 3.0, seed=seed, **settings))


def test_streams_do_not_depend_on_how_many_numbers_are_drawn_at_once(monkeypatch):
    settings = {"input": Lognormal(mean_tokens=30, median_tokens=20), "output": Fixed(tokens=1), "seed": 3}
    expected = list(generate(50, 3.0, **settings))
    monkeypatch.setattr("traces.synthesis.DRAWS", 7)
    monkeypatch.setattr("traces.arrivals.DRAWS", 3)
    assert list(generate(50, 3.0, **settings)) == expected


def test_arrivals_and_lengths_have_their_own_random_numbers():
    settings = {"input": Uniform(low_tokens=1, high_tokens=10**6), "output": Fixed(tokens=1), "seed": 4}
    poisson, constant = (list(generate(9, 1.0, arrivals=kind, **settings)) for kind in ("poisson", "constant"))
    other = list(generate(9, 1.0, **settings | {"input": Fixed(tokens=5)}))
    assert [r.input_tokens for r in poisson] == [r.input_tokens for r in constant]
    assert [r.arrival_s for r in poisson] == [r.arrival_s for r in other]


def test_resampling_keeps_lengths_together():
    recorded = [
        Request(id=i, arrival_s=i, input_tokens=10 * i + 1, output_tokens=i + 1, klass=str(i)) for i in range(5)
    ]
    drawn = list(resample(recorded, 200, 2.0, arrivals="constant", seed=1))
    assert {(r.input_tokens, r.output_tokens, r.klass) for r in drawn} == {
        (r.input_tokens, r.output_tokens, r.klass) for r in recorded
    }
    assert [r.id for r in drawn] == list(range(200))
    assert drawn[-1].arrival_s == 99.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Fixed(tokens=0), "fixed lengths: 0; expected ascending token counts >= 1"),
        (lambda: Uniform(low_tokens=5, high_tokens=4), "uniform lengths: 5, 4"),
        (lambda: Lognormal(mean_tokens=10, median_tokens=20), "lognormal lengths .median, mean.: 20, 10"),
        (lambda: Lognormal(mean_tokens=30, median_tokens=20, max_tokens=10), "20, 10"),
        (lambda: Quantiles(points=((0, 1), (0.5, 2))), "expected ascending numbers from 0 to 1"),
        (lambda: Quantiles(points=((0, 5), (1, 2))), "quantile table: 5, 2"),
        (lambda: Empirical(tokens=()), "sampled lengths: none"),
        (lambda: generate(0, 1.0, input=Fixed(tokens=1), output=Fixed(tokens=1)), "count is 0"),
        (lambda: generate(1, 0, input=Fixed(tokens=1), output=Fixed(tokens=1)), "rate_per_s is 0"),
        (
            lambda: generate(1, 1, input=Fixed(tokens=1), output=Fixed(tokens=1), rank_correlation=1.5),
            "rank_correlation is 1.5",
        ),
        (lambda: resample([], 1, 1.0), "without requests"),
    ],
)
def test_bad_settings_are_refused_at_once(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_every_distribution_is_listed():
    assert set(LENGTHS.values()) == {Fixed, Uniform, Lognormal, Quantiles, Empirical}


def test_the_shipped_sample_is_what_its_script_makes():
    assert list(read(sample_path())) == list(make_sample())


def test_the_shipped_sample_resembles_the_published_statistics():
    """Splitwise (ISCA 2024), conversation trace: mean and median tokens in 1155 and 1020, out 211 and 129."""
    found = statistics(read(sample_path()))
    assert found["requests"] == 2500
    for name, published in {
        "mean_input_tokens": 1155,
        "p50_input_tokens": 1020,
        "mean_output_tokens": 211,
        "p50_output_tokens": 129,
    }.items():
        assert found[name] == pytest.approx(published, rel=0.05)


def test_the_shipped_sample_resembles_the_original(shared_data):
    original = list(read(shared_data / "traces" / "azure" / "AzureLLMInferenceTrace_conv.csv"))
    ours, theirs = statistics(read(sample_path())), statistics(original)
    for name in ("rate_per_s", "burstiness", "mean_input_tokens", "mean_output_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.05)
    for name in ("p50", "p90", "p99"):
        for side in ("input", "output"):
            assert ours[f"{name}_{side}_tokens"] == pytest.approx(theirs[f"{name}_{side}_tokens"], rel=0.1)
    pairs = [[(r.input_tokens, r.output_tokens) for r in requests] for requests in (read(sample_path()), original)]
    ours_rank, theirs_rank = (spearmanr(*zip(*found, strict=True)).statistic for found in pairs)
    assert ours_rank == pytest.approx(theirs_rank, abs=0.05)
