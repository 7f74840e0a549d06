"""Writing traces: what is written is what is read, and nothing half-written is left behind."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.types import ConfigError, Request
from traces import read, write

names = st.none() | st.text(max_size=8).filter(lambda text: text.splitlines() == [text])
blocks = st.tuples(st.lists(st.integers(), max_size=3).map(tuple), st.integers(1, 512)) | st.just(((), None))


@st.composite
def streams(draw) -> list[Request]:
    arrivals = sorted(draw(st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=6)))
    requests = []
    for number, arrival_s in enumerate(arrivals):
        prefix, block_tokens = draw(blocks)
        lengths = {field: draw(st.integers(1, 10**9)) for field in ("input_tokens", "output_tokens")}
        rest = {"session": draw(names), "klass": draw(names), "priority": draw(st.integers(-(2**40), 2**40))}
        requests.append(
            Request(id=number, arrival_s=arrival_s, prefix=prefix, prefix_block_tokens=block_tokens, **lengths, **rest)
        )
    return requests


ONE = Request(id=0, arrival_s=1.5, input_tokens=3, output_tokens=4, session="s, 1", priority=-1)


def test_a_written_trace_reads_back_equal(tmp_path):
    assert write(tmp_path / "trace.csv", [ONE]) == 1
    assert list(read(tmp_path / "trace.csv")) == [ONE]
    assert (tmp_path / "trace.csv").read_text().splitlines()[1] == '1.5,3,4,"s, 1",,-1,,,,,'


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@settings(max_examples=60)
@given(requests=streams())
def test_round_trip(tmp_path_factory, suffix, requests):
    path = tmp_path_factory.getbasetemp() / f"round{suffix}"
    assert write(path, iter(requests)) == len(requests)
    assert list(read(path)) == requests


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_long_prompt_has_long_hashes(tmp_path, suffix):
    prefix = tuple(range(2**63, 2**63 + 8192))  # 128k tokens by blocks of 16: beyond the csv module's own limit
    request = Request(id=0, arrival_s=0, input_tokens=131072, output_tokens=1, prefix=prefix, prefix_block_tokens=16)
    write(tmp_path / f"long{suffix}", [request])
    assert list(read(tmp_path / f"long{suffix}")) == [request]


def test_parquet_groups_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["traces.write"], "ROWS_PER_GROUP", 2)
    requests = [Request(id=i, arrival_s=i / 4, input_tokens=i + 1, output_tokens=1) for i in range(5)]
    assert write(tmp_path / "trace.parquet", requests) == 5
    assert list(read(tmp_path / "trace.parquet")) == requests


def failing():
    yield ONE
    raise ConfigError("the source broke")


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (failing(), "the source broke"),
        ([], "no request to write"),
        ([ONE, Request(id=1, arrival_s=1.0, input_tokens=1, output_tokens=1)], "request 1 arrives at 1.0 s, before"),
        (
            [Request(id=0, arrival_s=0, input_tokens=1, output_tokens=1, session="a\r")],
            "request 0: .* is no session or klass",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_failed_write_leaves_what_was_there(tmp_path, suffix, requests, message):
    path = tmp_path / f"trace{suffix}"
    path.write_text("as before")
    with pytest.raises(ConfigError, match=message):
        write(path, list(requests) if isinstance(requests, list) else failing())
    assert path.read_text() == "as before"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_where_it_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"suffix '.txt' is unknown; use .csv or .parquet"):
        write(tmp_path / "trace.txt", [ONE])
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        write(tmp_path / "absent" / "trace.csv", [ONE])
